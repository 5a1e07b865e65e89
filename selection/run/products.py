"""Writing files so that a reader never sees half of one, and hashing what they hold."""

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from selection import __version__
from selection.run.config import REPOSITORY
from selection.run.errors import UserError
from selection.run.log import warn
from selection.run.processes import processes


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; renamed to `path` at the end, removed if anything is raised.

    What a killed process left behind goes with the next call for the same path.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            if not Path("/proc", left.suffixes[-2][1:]).exists():
                left.unlink(missing_ok=True)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())  # else a power failure may keep the name and lose the content
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: for files in `folder` that are read, changed and written again."""
    with _lock_file(folder / ".lock") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        yield


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Alone at work on `path`, a file or folder in the making. Raises: UserError saying who else is."""
    with _lock_file(path.with_name(f".{path.name}.lock")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{path} is held by {holder}: wait for it, or stop it") from None
        except OSError as error:  # a file system without locks
            warn(f"{path.parent} cannot be locked ({error.strerror}): see that no second run works in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _lock_file(path: Path) -> TextIO:
    with _user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: Path, value: object) -> None:
    """One JSON document, atomically. NaN and infinity are refused: they are not JSON."""
    with atomic_path(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises: UserError naming the file where it is missing or no JSON."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {error}") from None


def parse_json(text: str) -> Any:
    """What Python alone would take is refused: NaN, infinity, and half characters, which no file can be given.

    Raises: ValueError, RecursionError.
    """
    value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(number: str) -> float:
    """1e999 would become infinity."""
    return float(number) if math.isfinite(float(number)) else _refuse_constant(number)


_T = TypeVar("_T")


def checked(kind: type[_T], value: object, source: Path) -> _T:
    """`value`, out of the file `source`, as a `kind` that pydantic knows. Raises: UserError naming the field."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{source} is damaged: {where}: {first['msg']}: remove it and make it again") from None


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: UserError."""
    return checked(dict[str, Any], read_json(path), path)


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """A JSON record with a checksum of what it says, for `read_sealed`."""
    write_json(path, {**record, "sha256": _seal(record)})


def read_sealed(path: Path, remove: Path | None = None) -> dict[str, Any]:
    """Raises: UserError where it is missing, no JSON object, or does not say what was written.

    `remove`: what has to go then, where it is more than the file.
    """
    record = read_record(path)
    if record.pop("sha256", None) != _seal(record):
        raise UserError(
            f"{path} is damaged (its checksum does not fit), or of an earlier version: remove {remove or 'it'} and "
            "make it again"
        )
    return record


def _seal(record: dict[str, Any]) -> str:
    return digest(json.dumps(record, sort_keys=True).encode())


def digest(*chunks: bytes) -> str:
    """SHA-256 over the chunks and their lengths, as 64 hex digits."""
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(len(chunk).to_bytes(8, "little"))
        sha.update(chunk)
    return sha.hexdigest()


def code_version() -> str:
    """The suite's version, with the commit where this is a checkout."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{__version__}+{commit}" if commit else __version__


def first_difference(stored: dict, wanted: dict) -> str | None:
    """The first key in which two records differ, as "key: stored …, now …"; None if they agree. A key of a section has
    the section's name in front, with a dot."""
    for key in [*wanted, *(k for k in stored if k not in wanted)]:
        before, now = stored.get(key), wanted.get(key)
        if before != now:
            if isinstance(before, dict) and isinstance(now, dict) and (inside := first_difference(before, now)):
                return f"{key}.{inside}"
            return f"{key}: stored {json.dumps(before)}, now {json.dumps(now)}"
    return None


def check_same_everywhere(identity: dict) -> None:
    """Of several processes: see that all would make the same. Raises: UserError naming the host that would not."""
    if difference := first_difference(processes().from_leader(lambda: identity), identity):
        raise UserError(
            f"host {socket.gethostname()} would compute otherwise than the first one ({difference}): give all hosts "
            "the same models, devices and arguments"
        )


def reuse(folder: Path, identity: dict) -> bool:
    """Whether `folder` is a finished product of exactly this `identity`; False where there is none.

    Raises: UserError where it was made from something else, or changed since: it is neither used nor overwritten.
    """
    if not folder.exists():
        return False
    record = made_from(folder)
    if difference := first_difference(record, identity):
        raise UserError(f"{folder} was made otherwise ({difference}): remove it or give another output_dir")
    return True


def made_from(folder: Path) -> dict:
    """The identity of a finished product. Raises: UserError where a file of it is damaged or missing."""
    record, checksums = read_record(folder / "made_from.json"), folder / "checksums.json"
    for name, checksum in (read_sealed(checksums) if checksums.exists() else {}).items():
        if not (folder / name).is_file() or file_digest(folder / name) != checksum:
            raise UserError(f"{folder / name} is damaged or missing: remove {folder} and call the same command again")
    return record


@contextlib.contextmanager
def building(folder: Path, identity: dict) -> Iterator[Path]:
    """Gives an empty folder to fill; it becomes `folder`, with its identity, once all is done, or vanishes.

    Raises: UserError where another run is making it.
    """
    draft = _draft_of(folder)
    with held(folder):
        shutil.rmtree(draft, ignore_errors=True)
        try:
            with _user_errors(folder):
                draft.mkdir(parents=True)
            yield draft
            write_json(draft / "made_from.json", identity)
            files = sorted(path for path in draft.rglob("*") if path.is_file())
            checksums = {str(path.relative_to(draft)): file_digest(path) for path in files}
            write_sealed(draft / "checksums.json", checksums)
            with _user_errors(folder):
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def building_together(folder: Path, identity: dict) -> Iterator[Path]:
    """`building` for all processes of this call: each is given the same folder, the leader makes and names it."""
    together = processes()
    if together.leads:
        with building(folder, identity) as draft:
            together.wait()
            yield draft
            together.wait()
    else:
        together.wait()
        yield _draft_of(folder)
        together.wait()
    together.wait()


def _draft_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits. Raises: UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
