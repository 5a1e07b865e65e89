"""What the scripts' command lines have in common."""

import argparse

from selection.run import log
from selection.run.config import Experiment, load_experiment
from selection.run.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help says how to call this)")

    def parse_args(self, *arguments, **options) -> argparse.Namespace:
        parsed = super().parse_args(*arguments, **options)
        log.be_quiet(parsed.quiet)
        return parsed


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A script's parser, with --quiet; --help begins with `description`, the script's docstring. Parsing puts --quiet
    into effect, and raises UserError for a wrong command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=form, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--quiet", action="store_true", help="say nothing but results, warnings and errors")
    return parser


def add_experiment_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    about = f"the experiment, e.g. configs/demo.yaml; {'required' if required else 'default: none'}"
    parser.add_argument("--config_path", required=required, metavar="YAML", help=about)
    add_set_argument(parser, "another value for a key of the YAML, e.g. selection.mode=released")


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
