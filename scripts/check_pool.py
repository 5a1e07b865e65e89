"""Look at a pool before paying for it: which rows are probably wrong, repeated or odd, and what selection could gain.

    python scripts/check_pool.py --config_path configs/demo.yaml
    python scripts/check_pool.py --target Qwen/Qwen2.5-7B --data my.jsonl

Needs the small model (the target where there is none, or none yet) and the data; nothing is tuned. One pass over all
rows, held-out ones too. Writes <run folder>/pool/suspects.jsonl, a line for each suspect row, worst first (row: its
number in the data, from 0), pool.json beside it, and <run folder>/coresets/clean.json, a coreset of all training rows
that are not suspect; with --out all three go there. A second call takes the list as it is: delete the lines of rows
that are right, call again, and clean.json has them. `selection.leave_out: suspects` keeps the listed rows out of every
choice.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import one_line, run_stage

from selection.coreset import unscored
from selection.report.look import look_at_rows
from selection.rows.split import training_split
from selection.run.cli import add_dry_run_argument, add_experiment_arguments, argument_parser
from selection.run.config import Experiment, load_experiment
from selection.run.errors import UserError
from selection.run.log import say
from selection.scores.coresets import write_coreset
from selection.scores.identity import check_run, write_experiment
from selection.scores.pool import suspects_in_training, without
from selection.scores.suspects import KINDS, possible_gain
from selection.start import start

_SHOWN, _LETTERS = 3, 100  # rows of each kind that are said, and letters of each


def main() -> None:
    experiment, out, dry_run = load()
    split, folder = training_split(experiment, dry_run), out or experiment.pool
    check_run(experiment, split)
    found = look_at_rows(experiment, split, folder, dry_run)
    if found is None:
        return
    write_experiment(experiment)
    pool, suspects = found
    left_out = suspects_in_training(experiment, folder)
    clean = without(unscored(experiment), left_out)
    ids = [split.ids[row] for row in clean.index]
    about = {"left_out": left_out}
    path = write_coreset(out or experiment.coresets, "clean", None, clean.index, ids, clean, about)
    print(f"clean: {len(clean.index)} of {len(split.rows)} training rows -> {path}")
    counts = Counter(suspect.get("kind", "listed") for suspect in suspects)
    for kind, count in counts.items():
        say(f"\n{kind}: {count} rows ({KINDS.get(kind, 'not of check_pool.py')})")
        for suspect in [each for each in suspects if each.get("kind", "listed") == kind][:_SHOWN]:
            prompt, answer = (shortened(suspect.get(name, "")) for name in ("prompt", "answer"))
            say(f"  row {suspect['row']}: {prompt} -> {answer}")
    if (by_length := pool["effort_by_length"]) is not None:
        say(f"\neffort score against response length: rank correlation {by_length:+.2f} (±1: the score is the length)")
    print(f"what selection can gain here: {possible_gain(counts, pool['rows'], pool.get('tried', {}))}")


def load() -> tuple[Experiment, Path | None, bool]:
    """The experiment, --out and --dry_run."""
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False)
    parser.add_argument("--target", metavar="MODEL", help="instead of --config_path; default: none")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="with --target: as start.py's; default: none")
    parser.add_argument("--small", metavar="MODEL", help="with --target: speculative model, which looks; default: none")
    parser.add_argument("--template", metavar="NAME", help="with --target: chat template; default: the family's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of the run folder; default: none")
    add_dry_run_argument(parser)
    given = parser.parse_args()
    if bool(given.config_path) == bool(given.target) or bool(given.target) != bool(given.data):
        raise UserError("give --config_path, or --target and --data")
    if given.config_path:
        return load_experiment(given.config_path, given.set), given.out, given.dry_run
    with tempfile.TemporaryDirectory() as nowhere:
        dry = Path(nowhere) if given.dry_run else None
        path, _ = start(given.target, given.data, given.small, given.template, overrides=given.set, dry=dry)
        return load_experiment(path), given.out, given.dry_run


def shortened(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 2]} …"


if __name__ == "__main__":
    run_stage(main)
