"""What the scripts' command lines have in common."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

from selection.run import log
from selection.run.config import Experiment, load_experiment
from selection.run.ending import INTERRUPTED, Interrupted, interrupt, not_installed, on_signals, one_line
from selection.run.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help says how to call this)")

    def parse_args(self, *arguments, **options) -> argparse.Namespace:
        parsed = super().parse_args(*arguments, **options)
        log.be_quiet(parsed.quiet)
        return parsed


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A script's parser: --help begins with `description`, the script's docstring, and its example calls.

    Options cannot be abbreviated. Every script takes --quiet, which parsing puts into effect. Raises, when it parses:
    UserError for a wrong command line.
    """
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but results, warnings and errors")
    return parser


def add_experiment_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    needed = "required" if required else "default: none"
    parser.add_argument(
        "--config_path", required=required, metavar="YAML", help=f"the experiment, e.g. configs/demo.yaml; {needed}"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a key of the YAML, e.g. selection.mode=released; may be given again; default: none",
    )


def add_dry_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry_run", action="store_true", help="say what would be done and what is there already")


def load_experiment_from_arguments(parser: argparse.ArgumentParser) -> Experiment:
    """For stages that take nothing but an experiment."""
    add_experiment_arguments(parser)
    arguments = parser.parse_args()
    return load_experiment(arguments.config_path, arguments.set)


def load_scoring_arguments(parser: argparse.ArgumentParser) -> tuple[Experiment, argparse.Namespace]:
    """For stages that score; the arguments for what a stage has added to the parser."""
    parser.add_argument(
        "--self_test",
        metavar="N",
        help="rows that are first scored one by one too, 0 for none; default: selection.self_test of the YAML (4)",
    )
    add_experiment_arguments(parser)
    add_dry_run_argument(parser)
    arguments = parser.parse_args()
    own = [] if arguments.self_test is None else [f"selection.self_test={arguments.self_test}"]
    return load_experiment(arguments.config_path, [*arguments.set, *own]), arguments


# What the system refuses and the user can mend: no space, no permission, a read-only file system, and the like.
_OF_THE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ETIMEDOUT, errno.ENOTCONN,
}  # fmt: skip


def run_stage(main: Callable[[], None], one_gpu: bool = False) -> None:
    """Run a stage script's `main`; a UserError becomes one line on stderr and exit code 2, a signal 130 or 143.

    `one_gpu`: see only the first GPU where the user names none, as LLaMA-Factory refuses to tune when it sees several
    and was not started by torchrun.
    """
    from selection.run.processes import processes

    if one_gpu and "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    on_signals(interrupt)
    together = None
    try:
        together = processes()
        main()
        return
    except UserError as error:
        text, code = f"error: {error}", 2
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        where = f": {error.filename}" if error.filename else ""
        text, code = f"error: {error.strerror}{where}: see to it, then call the same command again to go on", 2
    except ModuleNotFoundError as error:
        if not (text := not_installed(error)):
            raise
        code = 2
    except MemoryError:
        text, code = "error: out of memory: give fewer rows or a smaller model", 2
    except Interrupted as stop:
        text, code = INTERRUPTED, 128 + stop.number
    text = one_line(text)
    if together is None or together.first_to_say(text):
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)
