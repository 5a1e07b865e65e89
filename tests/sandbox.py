"""A call in a fork that is watched: what it writes, starts and connects to, how long it takes, how it ends."""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from selection.run.ending import run_stage

from forks import REPOSITORY

SECONDS = 60  # of one case at most
MEMORY = 6 * 2**30  # bytes that a case may ask for beyond what it starts with
WRITABLE = ("run", "out", "tmp")  # folders of a case in which a stage may write


def run_case(call: Callable, wrong: Callable[[object], str | None], case: Path, cache: Path) -> tuple[str, object]:
    """Call it in a fork, in folder `case`: ("succeeded", result), ("refused", line) or ("failed", why)."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(_run(call, wrong, case, cache)))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else ("failed", f"still at work after {SECONDS} s")
    except EOFError:
        process.join()
        return "failed", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _run(call: Callable, wrong: Callable, case: Path, cache: Path) -> tuple[str, object]:
    os.chdir(case)
    tempfile.tempdir, log = str(case / "tmp"), case / "tmp" / "log"
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", errors="backslashreplace")
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    before, seen, code, results = _snapshot(case), [], 0, []
    _watch(case, cache, seen)
    try:
        run_stage(lambda: results.append(call()))
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        ours = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(str(REPOSITORY))]
        return "failed", f"traceback: {type(error).__name__}: {str(error)[:300]} ({ours[-1]})"
    if happened := seen + [f"changed {path}" for path, _ in before ^ _snapshot(case)]:
        return "failed", happened[0]
    sys.stdout.flush()
    said = [line for line in log.read_text("utf-8", "replace").split("\n") if line.startswith("error:")]
    if code == 2 and len(said) == 1 and said[0].isprintable() and len(said[0]) <= 1000:
        return "refused", said[0]
    if code or said:
        return "failed", f"exit code {code}, {len(said)} error lines: {said[:1]!r:.300}"
    result = json.loads(json.dumps(results[0]))
    why = wrong(result)
    return ("failed", f"wrong result: {why}") if why else ("succeeded", result)


def _snapshot(case: Path) -> set[tuple]:
    """What lies beside the folders in which a stage may write, and what hostile code would make anywhere."""
    found = [path for path in case.rglob("*") if path.relative_to(case).parts[0] not in WRITABLE]
    status = {path: path.lstat() for path in [*found, *case.rglob("PWNED")]}
    return {(path, (s.st_mode, s.st_size, path.is_dir() or s.st_mtime_ns)) for path, s in status.items()}


def _watch(case: Path, cache: Path, seen: list[str]) -> None:
    """Note what this process does from now on that no input file may make it do."""
    allowed = [*(case / name for name in WRITABLE), cache, Path(os.devnull)]
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod"}
    starts = {"os.system", "os.exec", "os.posix_spawn", "socket.connect", "pty.spawn"}

    def hook(name: str, arguments: tuple) -> None:
        first, paths = arguments[0] if arguments else None, []
        if name == "open" and arguments[2] & writes:
            paths = [first]
        elif name in changes and arguments[-1] == -1:  # else relative to an open folder
            paths = arguments[:2] if name == "os.rename" else [arguments[1] if name == "os.symlink" else first]
        elif name in starts or (name == "subprocess.Popen" and arguments[1][:2] != ["git", "-C"]):
            seen.append(f"{name} {arguments}")
        elif name == "exec" and getattr(first, "co_filename", "").startswith(str(case)):
            seen.append(f"runs {first.co_filename}")
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):  # else an open file
                folder, file = os.path.split(os.fsdecode(path))
                where = Path(os.path.realpath(folder or "."), file)
                seen.extend([f"{name} {where}"] * (not any(where.is_relative_to(each) for each in allowed)))

    sys.addaudithook(hook)
