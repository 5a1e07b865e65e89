"""What the stage scripts' command lines have in common."""

import argparse

from selection.config import Experiment, load_experiment


def add_experiment_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config_path", required=required, help="YAML of the experiment (configs/)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="override a key, e.g. selection.mode=released",
    )


def load_experiment_from_arguments(parser: argparse.ArgumentParser) -> Experiment:
    """For stages that take nothing but an experiment."""
    add_experiment_arguments(parser)
    arguments = parser.parse_args()
    return load_experiment(arguments.config_path, arguments.set)


def load_scoring_arguments(parser: argparse.ArgumentParser) -> tuple[Experiment, argparse.Namespace]:
    """For stages that score; the arguments for what a stage has added to the parser."""
    parser.add_argument("--self_test", metavar="N", help="the same as --set selection.self_test=N")
    add_experiment_arguments(parser)
    arguments = parser.parse_args()
    own = [] if arguments.self_test is None else [f"selection.self_test={arguments.self_test}"]
    return load_experiment(arguments.config_path, [*arguments.set, *own]), arguments
