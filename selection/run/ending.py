"""How a script ends on a signal or a missing package, also while it still imports."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable

from selection.run.errors import INSTALL

INTERRUPTED = "interrupted: call the same command again to go on"
_ONE_SIGNAL = 10.0  # seconds within which signals count as one
_LONGEST = 600  # characters of a message, which may quote a user's file


def one_line(message: str) -> str:
    """The message in one line of limited length, without characters that a terminal would obey."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 200]} … {message[-200:]}"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, by `number`: whatever is being written is dropped, what is finished stays."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def end_on_signals() -> None:
    """Until `run_stage`, while a script imports: Ctrl-C, SIGTERM and a missing package end it with one line."""
    on_signals(lambda number, frame: _end(INTERRUPTED, 128 + number))
    sys.excepthook = _end_without_package


def _end_without_package(kind: type[BaseException], error: BaseException, traceback) -> None:
    if text := not_installed(error):
        _end(text, 2)
    sys.__excepthook__(kind, error, traceback)


def _end(text: str, code: int) -> None:
    print(one_line(text), file=sys.stderr, flush=True)
    os._exit(code)


def not_installed(error: BaseException) -> str | None:
    """What to do about a missing package; None for another error, and for a module of our own."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "selection", "finetune", "scripts"):
        return None
    return f"error: the package {package} is not installed in {sys.prefix}: bash scripts/setup.sh, or {INSTALL}"


def on_signals(handler: Callable) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)


_interrupted_at = -math.inf


def interrupt(number: int, frame) -> None:
    """Raise Interrupted for the first of several signals, as torchrun and terminals send them: the end is not to be
    interrupted. One that comes much later counts again: a library may have swallowed the first."""
    global _interrupted_at
    if time.monotonic() - _interrupted_at > _ONE_SIGNAL:
        _interrupted_at = time.monotonic()
        raise Interrupted(number)
