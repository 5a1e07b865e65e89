"""How a stage ends when something is wrong with what the user gave it: one line, exit code 2."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong, where, and what to do."""


_LONGEST = 600  # characters of a message; a file of the user's may be quoted in it


def _one_line(message: str) -> str:
    """In one line of limited length, without characters that a terminal would obey."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 200]} … {message[-200:]}"


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage script's `main`; a UserError becomes one line on stderr and exit code 2.

    A process uses one GPU: the first where the user names none (LLaMA-Factory refuses to start when it sees several).
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        main()
    except UserError as error:
        print("error: " + _one_line(str(error)), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: call the same command again to go on", file=sys.stderr)
        sys.exit(130)
