"""Export coresets of a run as data sets: annotated rows, LLaMA-Factory, TRL, `datasets`, row numbers.

    python scripts/export.py runs/demo --coreset staff-0.2

Needs a run folder with a coreset, its data and the target's tokenizer. Writes RUN_DIR/export/<coreset>, or
FOLDER/<coreset>, anew: annotated.parquet and annotated.jsonl (every row of the run with score, stratum and the reason
why it was chosen or not), llamafactory/, dataset/, prompt_completion.jsonl, chat.jsonl and indices.txt (chosen rows).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.report.export import coreset_paths, export
from selection.run.cli import argument_parser, load_run_from_arguments


def main() -> None:
    parser = argument_parser(__doc__)
    names_help = "names, or files (.json, published .pt); default: all of the run"
    parser.add_argument("--coreset", nargs="+", default=[], help=names_help)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the exports go; default: RUN_DIR/export")
    experiment, arguments = load_run_from_arguments(parser)
    for path in coreset_paths(experiment, arguments.coreset):
        folder = (arguments.out or experiment.folder / "export").resolve() / path.stem
        print("\n  ".join([f"{path.stem} -> {folder}", *export(experiment, path, folder)]))


if __name__ == "__main__":
    run_stage(main)
