"""Write the experiment of a target and a data file: small model, template, form of the rows and defaults are found.

    python start.py --target Qwen/Qwen2.5-7B --data my.jsonl

Needs the model (or the model hub) and the data. Every choice is said, with what overrides it. Writes
<run folder>/start.yaml, the --config_path of every stage; `selection.sh` with the same arguments calls this first, then
the stages. Paths count from the working directory.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

from selection.choices import start
from selection.run.cli import argument_parser, run_stage


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--target", required=True, metavar="MODEL", help="to tune: a folder or a hub name; required")
    parser.add_argument(
        "--data", required=True, nargs="+", type=Path, metavar="FILE", help="JSON, JSONL, CSV or Parquet; required"
    )
    parser.add_argument(
        "--small", metavar="MODEL", help="the speculative model; default: the family's smallest, or cut"
    )
    parser.add_argument("--template", metavar="NAME", help="LLaMA-Factory's chat template; default: the family's")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run folder; default: runs/<data>-<target>")
    parser.add_argument("--rate", type=float, nargs="+", help="fractions to keep; default: the published five")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value for any other key of selection/README.md; may be given again; default: none",
    )
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)  # where selection.sh reads how to go on
    given = parser.parse_args()
    path, cut = start(given.target, given.data, given.small, given.template, given.run, given.rate, given.set)
    print(f"experiment: {path}")
    if given.answer:
        given.answer.write_text("\n".join([str(path), *cut]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
