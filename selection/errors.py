"""How a stage ends when something is wrong with what the user gave it: one line, exit code 2."""

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

# What the system refuses and the user can mend: no space, no permission, a read-only file system, and the like.
_OF_THE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ETIMEDOUT, errno.ENOTCONN,
}  # fmt: skip

_ONE_SIGNAL = 10.0  # seconds within which signals count as one
_INTERRUPTED = "interrupted: call the same command again to go on"


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong, where, and what to do."""


INSTALL = "pip install -r requirements.txt"  # in the repository

_LONGEST = 600  # characters of a message; a file of the user's may be quoted in it


def _one_line(message: str) -> str:
    """In one line of limited length, without characters that a terminal would obey."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 200]} … {message[-200:]}"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: whatever is being written is dropped, what is finished stays."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_stage(main: Callable[[], None], one_gpu: bool = False) -> None:
    """Run a stage script's `main`; a UserError becomes one line on stderr and exit code 2, a signal 130 or 143.

    `one_gpu`: see only the first GPU where the user names none, as LLaMA-Factory refuses to tune when it sees several
    and was not started by torchrun.
    """
    from selection.processes import processes

    if one_gpu and "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    _on_signals(_interrupt)
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
        if not (text := _not_installed(error)):
            raise
        code = 2
    except MemoryError:
        text, code = "error: out of memory: give fewer rows or a smaller model", 2
    except Interrupted as stop:
        text, code = _INTERRUPTED, 128 + stop.number
    text = _one_line(text)
    if together is None or together.first_to_say(text):
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def end_on_signals() -> None:
    """For the seconds before `run_stage`, while a stage script imports: Ctrl-C and SIGTERM end it with one line.

    So does a package that is not installed, with exit code 2.
    """
    _on_signals(_end)
    sys.excepthook = _end_without_package


def _not_installed(error: BaseException) -> str | None:
    """What to do about a package that is missing; None for another error, and for a module of our own."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "selection", "finetune", "scripts"):
        return None
    return f"error: the package {package} is not installed in {sys.prefix}: bash scripts/setup.sh, or {INSTALL}"


def _end_without_package(kind: type[BaseException], error: BaseException, traceback) -> None:
    if text := _not_installed(error):
        print(_one_line(text), file=sys.stderr, flush=True)
        os._exit(2)
    sys.__excepthook__(kind, error, traceback)


def _on_signals(handler: Callable) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)


def _end(number: int, frame) -> None:
    print(_INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(128 + number)


_interrupted_at = -math.inf


def _interrupt(number: int, frame) -> None:
    """The first signal counts: torchrun and terminals send several, and the end is not to be interrupted. One that
    comes much later is meant: a library may have swallowed the first."""
    global _interrupted_at
    if time.monotonic() - _interrupted_at > _ONE_SIGNAL:
        _interrupted_at = time.monotonic()
        raise Interrupted(number)
