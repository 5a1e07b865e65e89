"""Export coresets of a run as data sets: annotated rows, LLaMA-Factory, TRL, `datasets`, row numbers.

    python scripts/export.py runs/demo --coreset staff-0.2

Needs a run folder with a coreset, its data and the target's tokenizer. Writes RUN_DIR/export/<coreset>, or
FOLDER/<coreset>, anew: annotated.parquet and annotated.jsonl (every row of the run with score, stratum and the reason
why it was chosen or not), llamafactory/, dataset/, prompt_completion.jsonl, chat.jsonl and indices.txt (chosen rows).
--card writes RUN_DIR/export/card or FOLDER/card instead: all rows and the coresets as a data set for the hub.
--lm_eval writes RUN_DIR/export/lm_eval or FOLDER/lm_eval instead: the held-out rows as lm-evaluation-harness's tasks.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.report.export import coreset_paths, export
from selection.run.cli import argument_parser, load_run_from_arguments
from selection.run.config import Experiment
from selection.run.errors import UserError


def main() -> None:
    parser = argument_parser(__doc__)
    names_help = "names, or files (.json, published .pt); default: all of the run"
    parser.add_argument("--coreset", nargs="+", default=[], help=names_help)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the exports go; default: RUN_DIR/export")
    card_help = "one folder ready for the hub: rows and coresets as Parquet, data set card, report"
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--card", action="store_true", help=card_help)
    instead.add_argument("--lm_eval", action="store_true", help="held-out rows as tasks of lm-evaluation-harness")
    licence_help = "with --card: the hub's id, e.g. cc-by-4.0; default: that of the data sets, where the hub says it"
    parser.add_argument("--licence", metavar="ID", help=licence_help)
    push_help = "with --card: upload it where you are logged in, as a private data set; default: no upload"
    parser.add_argument("--push", metavar="NAME", help=push_help)
    experiment, arguments = load_run_from_arguments(parser)
    if arguments.lm_eval:
        if arguments.coreset or arguments.licence or arguments.push:
            raise UserError("--lm_eval writes the held-out rows alone: leave out --coreset, --licence and --push")
        from finetune.lm_eval_tasks import write_tasks  # torch takes seconds

        folder = (arguments.out or experiment.folder / "export").resolve() / "lm_eval"
        print("\n  ".join([f"lm_eval -> {folder}", *write_tasks(experiment, folder)]))
        return
    if arguments.card or arguments.licence or arguments.push:
        card(experiment, arguments)
        return
    for path in coreset_paths(experiment, arguments.coreset):
        folder = (arguments.out or experiment.folder / "export").resolve() / path.stem
        print("\n  ".join([f"{path.stem} -> {folder}", *export(experiment, path, folder)]))


def card(experiment: Experiment, given: argparse.Namespace) -> None:
    from selection.report.card import check_login, licence_of, push, write_card  # the report's charts take seconds

    if not given.card:
        raise UserError("--licence and --push go with --card")
    licence, folder = licence_of(experiment, given.licence), (given.out or experiment.folder / "export") / "card"
    if given.push:
        check_login()
    coresets = coreset_paths(experiment, given.coreset)
    said = write_card(experiment, coresets, folder := folder.resolve(), licence)
    print("\n  ".join([f"card -> {folder}", *said]))
    if given.push:
        print(push(folder, given.push))


if __name__ == "__main__":
    run_stage(main)
