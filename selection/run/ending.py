"""How a script ends. It imports this first: a signal or a missing package ends its other imports with one line."""

import contextlib
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable

from selection.run.errors import INSTALL, UserError

INTERRUPTED = "interrupted: call the same command again to go on"
_ONE_SIGNAL, _LONGEST = 10.0, 600  # seconds within which signals count as one; characters of a message


def one_line(message: str) -> str:
    """The message in one line of limited length, without characters that a terminal would obey."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 200]} … {message[-200:]}"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, by its number: whatever is being written is dropped, what is finished stays."""


def end_on_signals() -> None:
    """From here until `run_stage`, Ctrl-C, SIGTERM and a missing package end the process with one line."""
    on_signals(lambda number, frame: _end(INTERRUPTED, 128 + number))
    sys.excepthook = _end_without_package


def _end_without_package(kind: type[BaseException], error: BaseException, traceback) -> None:
    text = not_installed(error)
    _end(text, 2) if text else sys.__excepthook__(kind, error, traceback)


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
    """Raise Interrupted, once for several signals as torchrun and terminals send them: the end must not be interrupted.
    A much later one counts again: a library may have swallowed the first."""
    global _interrupted_at
    if time.monotonic() - _interrupted_at > _ONE_SIGNAL:
        _interrupted_at = time.monotonic()
        raise Interrupted(number)


_OUR_FAULTS = (None, errno.ENOENT, errno.EEXIST, errno.EINVAL, errno.EBADF, errno.EPIPE)  # the user can mend others


def run_stage(main: Callable[[], None], one_gpu: bool = False) -> None:
    """Run a script's `main`: an error of the user's becomes one line on stderr and exit code 2, a signal 130 or 143.
    `one_gpu`: without torchrun, see only the first GPU where the user names none, as LLaMA-Factory tunes on no more."""
    from selection.run.processes import processes

    if one_gpu and "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    on_signals(interrupt)
    together = None
    try:
        together = processes()
        main()
    except BaseException as error:
        if (text := _as_text(error)) is None:
            raise
        if together is None or together.first_to_say(one_line(text)):
            print(one_line(text), file=sys.stderr, flush=True)
        sys.exit(128 + error.args[0] if isinstance(error, Interrupted) else 2)


def _as_text(error: BaseException) -> str | None:
    """The line for an error that the user can mend; None for a bug of the suite."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, Interrupted):
        return INTERRUPTED
    if isinstance(error, MemoryError):
        return "error: out of memory: give fewer rows or a smaller model"
    if isinstance(error, OSError) and error.errno not in _OUR_FAULTS:
        where = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror}{where}: see to it, then call the same command again to go on"
    return not_installed(error)


end_on_signals()
