"""Files that no reader sees half of, checked and hashed content, and products that are made once and reused."""

import contextlib
import fcntl
import functools
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

_T = TypeVar("_T")


@contextlib.contextmanager
def _one_error(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {verb} {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it to `path` at the end, or remove it where anything is raised."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _one_error("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # by a killed process
                if not Path("/proc", left.suffixes[-2][1:]).exists():
                    left.unlink(missing_ok=True)
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())  # else a power failure may keep the name and lose the content
            os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _lock_file(path: Path) -> TextIO:
    with _one_error("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8", errors="replace")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, for files in `folder` that are read, changed and written again."""
    with _lock_file(folder / ".lock") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Work alone on `path`, a file or folder in the making. Raises: UserError saying who else does."""
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


def write_json(path: Path, value: object) -> None:
    """One JSON document, atomically. Raises: ValueError for NaN and infinity."""
    with atomic_path(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, kind: type[_T] = Any) -> _T:
    """A JSON document, as a `kind` that pydantic knows. Raises: UserError where it is missing, no JSON or another."""
    try:
        with _one_error("read", path):
            value = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {error}") from None
    return checked(kind, value, path)


def parse_json(text: str) -> Any:
    """The value in JSON text. Raises: ValueError, RecursionError; also for NaN, infinity and lone surrogates."""
    value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is no number")
    return float(number)


def checked(kind: type[_T], value: object, source: Path) -> _T:
    """`value`, out of the file `source`, as a `kind`. Raises: UserError naming the field."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{source} is damaged: {where}: {first['msg']}: remove it and make it again") from None


read_record = functools.partial(read_json, kind=dict[str, Any])  # a JSON object


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """A JSON object with a checksum of itself, for `read_sealed`."""
    write_json(path, {**record, "sha256": _seal(record)})


def read_sealed(path: Path, remove: Path | None = None) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises: UserError, which says to `remove` it, where it is missing or was changed."""
    record = read_record(path)
    if record.pop("sha256", None) != _seal(record):
        todo = f"remove {remove or 'it'} and make it again"
        raise UserError(f"{path} is damaged (its checksum does not fit), or of an earlier version: {todo}")
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


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits. Raises: UserError where it cannot be read."""
    with _one_error("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_version() -> str:
    """The suite's version, with the commit where this is a checkout."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if commit := subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip():
            return f"{__version__}+{commit}"
    return __version__


def first_difference(stored: dict, wanted: dict) -> str | None:
    """The first key in which two records differ, as "section.key: stored …, now …"; None if they agree."""
    for key in dict.fromkeys([*wanted, *stored]):
        before, now = stored.get(key), wanted.get(key)
        if before != now:
            if isinstance(before, dict) and isinstance(now, dict) and (inside := first_difference(before, now)):
                return f"{key}.{inside}"
            return f"{key}: stored {json.dumps(before)}, now {json.dumps(now)}"
    return None


def refuse_difference(path: Path, stored: dict, wanted: dict, todo: str) -> None:
    """Raises: UserError where the record of `path` is not the one wanted."""
    if difference := first_difference(stored, wanted):
        raise UserError(f"{path} was made otherwise ({difference}): {todo}")


def check_same_everywhere(identity: dict) -> None:
    """Raises: UserError naming the host whose processes would make something else than the leader."""
    if difference := first_difference(processes().from_leader(lambda: identity), identity):
        here = f"host {socket.gethostname()} would compute otherwise than the first one ({difference})"
        raise UserError(f"{here}: give all hosts the same models, devices and arguments")


def reuse(folder: Path, identity: dict, todo: str = "remove it or give another output_dir") -> bool:
    """Whether `folder` is there, a finished product of this `identity`. Raises: UserError where it was made from
    something else, or changed since: it is neither used nor overwritten."""
    if there := folder.exists():
        refuse_difference(folder, made_from(folder), identity, todo)
    return there


def made_from(folder: Path) -> dict:
    """The identity of a finished product. Raises: UserError where a file of it is damaged or missing."""
    record, checksums = read_record(folder / "made_from.json"), folder / "checksums.json"
    for name, checksum in (read_sealed(checksums) if checksums.exists() else {}).items():
        if not (folder / name).is_file() or file_digest(folder / name) != checksum:
            raise UserError(f"{folder / name} is damaged or missing: remove {folder} and call the same command again")
    return record


@contextlib.contextmanager
def building(folder: Path, identity: dict) -> Iterator[Path]:
    """Give an empty folder to fill; at the end it becomes `folder`, with its identity, or is removed on an error.
    Raises: UserError where another run is making it."""
    draft = folder.with_name(f".{folder.name}.partial")
    with held(folder):
        shutil.rmtree(draft, ignore_errors=True)
        try:
            with _one_error("write", folder):
                draft.mkdir(parents=True)
            yield draft
            write_json(draft / "made_from.json", identity)
            files = sorted(path for path in draft.rglob("*") if path.is_file())
            write_sealed(draft / "checksums.json", {str(path.relative_to(draft)): file_digest(path) for path in files})
            with _one_error("write", folder):
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def rebuilding(folder: Path, identity: dict) -> Iterator[Path]:
    """As `building`; an earlier `folder` is replaced once the new one is whole."""
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    with held(folder):
        shutil.rmtree(new, ignore_errors=True)
        with building(new, identity) as draft:
            yield draft
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)  # only now: half removed, the next call would refuse it
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def building_together(folder: Path, identity: dict) -> Iterator[Path]:
    """`building` by all processes: each is given the same folder, which the leader makes and names."""
    together, draft = processes(), folder.with_name(f".{folder.name}.partial")
    with building(folder, identity) if together.leads else contextlib.nullcontext():
        together.wait()
        yield draft
        together.wait()
    together.wait()
