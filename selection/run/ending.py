"""How a script ends on a signal or a missing package, also while it still imports."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from selection.run.errors import INSTALL

_ONE_SIGNAL = 10.0  # seconds within which signals count as one
INTERRUPTED = "interrupted: call the same command again to go on"
_LONGEST = 600  # characters of a message; a file of the user's may be quoted in it


def one_line(message: str) -> str:
    """In one line of limited length, without characters that a terminal would obey."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 200]} … {message[-200:]}"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: whatever is being written is dropped, what is finished stays."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def end_on_signals() -> None:
    """For the seconds before `run_stage`, while a stage script imports: Ctrl-C and SIGTERM end it with one line.

    So does a package that is not installed, with exit code 2.
    """
    on_signals(_end)
    sys.excepthook = _end_without_package


def not_installed(error: BaseException) -> str | None:
    """What to do about a package that is missing; None for another error, and for a module of our own."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "selection", "finetune", "scripts"):
        return None
    return f"error: the package {package} is not installed in {sys.prefix}: bash scripts/setup.sh, or {INSTALL}"


def _end_without_package(kind: type[BaseException], error: BaseException, traceback) -> None:
    if text := not_installed(error):
        print(one_line(text), file=sys.stderr, flush=True)
        os._exit(2)
    sys.__excepthook__(kind, error, traceback)


def on_signals(handler: Callable) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)


def _end(number: int, frame) -> None:
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(128 + number)


_interrupted_at = -math.inf


def interrupt(number: int, frame) -> None:
    """The first signal counts: torchrun and terminals send several, and the end is not to be interrupted. One that
    comes much later is meant: a library may have swallowed the first."""
    global _interrupted_at
    if time.monotonic() - _interrupted_at > _ONE_SIGNAL:
        _interrupted_at = time.monotonic()
        raise Interrupted(number)
