"""What the scripts' command lines have in common."""

import argparse
import sys
from pathlib import Path

from selection import __version__
from selection.run import log
from selection.run.config import Experiment, load_experiment, load_run
from selection.run.errors import UserError

_ANY_KEY = "another value for a key of the YAML, e.g. selection.mode=released"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help says how to call this)")

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        given = sys.argv[1:] if args is None else args
        parsed = super().parse_args([_with_underscores(argument) for argument in given], namespace)
        log.be_quiet(parsed.quiet)
        return parsed


def _with_underscores(argument: str) -> str:
    """--dry_run for --dry-run."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A script's parser, with --version and --quiet; --help begins with `description`, the script's docstring. Parsing
    puts --quiet into effect, and raises UserError for a wrong command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=form, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__, help="print the suite's version")
    parser.add_argument("--quiet", action="store_true", help="say nothing but results, warnings and errors")
    return parser


def add_config_argument(
    parser: argparse.ArgumentParser, about: str, required: bool, default: Path | None = None, *more_names: str
) -> None:
    """--config_path YAML, or YAML alone as the first argument."""
    either = parser.add_mutually_exclusive_group(required=required)
    about += "; required" if required else f"; default: {default.name if default else 'none'}"
    either.add_argument("--config_path", *more_names, default=default, metavar="YAML", help=about)
    same = "the same without --config_path; default: none"
    either.add_argument("config_path", nargs="?", default=argparse.SUPPRESS, metavar="YAML", help=same)


def add_experiment_arguments(
    parser: argparse.ArgumentParser, required: bool = True, default: Path | None = None
) -> None:
    add_config_argument(parser, "the experiment, e.g. configs/demo.yaml", required, default)
    add_set_argument(parser, _ANY_KEY)


def load_run_from_arguments(parser: argparse.ArgumentParser) -> tuple[Experiment, argparse.Namespace]:
    """The experiment of the run folder, or else of the YAML, that the command line names, and all its options."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR", help="run folder; default: --config_path's")
    either.add_argument("--config_path", metavar="YAML", help="the experiment; required without RUN_DIR")
    add_set_argument(parser, _ANY_KEY)
    arguments = parser.parse_args()
    load, path = (load_run, arguments.run) if arguments.run else (load_experiment, arguments.config_path)
    return load(path, arguments.set), arguments


def add_set_argument(parser: argparse.ArgumentParser, about: str) -> None:
    about += "; may be given again; default: none"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=about)


def add_dry_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry_run", action="store_true", help="say what would be done and what is there already")


def load_experiment_from_arguments(parser: argparse.ArgumentParser) -> tuple[Experiment, argparse.Namespace]:
    """The experiment that the command line names, and all its options."""
    add_experiment_arguments(parser)
    arguments = parser.parse_args()
    if (rows := getattr(arguments, "self_test", None)) is not None:
        arguments.set.append(f"selection.self_test={rows}")
    return load_experiment(arguments.config_path, arguments.set), arguments


def load_scoring_arguments(parser: argparse.ArgumentParser) -> tuple[Experiment, argparse.Namespace]:
    """`load_experiment_from_arguments` for stages that score."""
    about = "rows that are first scored one by one too, 0 for none; default: selection.self_test of the YAML (4)"
    parser.add_argument("--self_test", metavar="N", help=about)
    add_dry_run_argument(parser)
    return load_experiment_from_arguments(parser)
