"""Write the experiment of a target and a data file: small model, template, form of the rows and defaults are found.

    python start.py --target Qwen/Qwen2.5-7B --data my.jsonl

Every choice is printed, with what overrides it. The experiment is <run folder>/start.yaml, the --config_path of every
stage. `selection.sh` with the same arguments calls this first, then the stages. Paths count from the working directory.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

from selection.errors import end_on_signals, run_stage  # noqa: E402

end_on_signals()

from selection.choices import start  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the model to tune: a folder or a name on the model hub")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="JSON, JSONL, CSV or Parquet file")
    parser.add_argument("--small", help="the speculative model: a folder or a hub name (default: by the family)")
    parser.add_argument("--template", help="LLaMA-Factory's chat template (default: the family's)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/<data>-<target>)")
    parser.add_argument("--rate", type=float, nargs="+", help="fractions to keep (default: the published five)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="override any other key")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)  # where selection.sh reads how to go on
    given = parser.parse_args()
    path, cut = start(given.target, given.data, given.small, given.template, given.run, given.rate, given.set)
    if given.answer:
        given.answer.write_text("\n".join([str(path), *cut]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
