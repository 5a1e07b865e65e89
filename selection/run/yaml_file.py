"""YAML files of checked keys: reading, `--set`, writing, and errors that name the key."""

import difflib
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from selection.run.errors import UserError

_Section = TypeVar("_Section", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# 1e-4 is a number; YAML 1.1 wants 1.0e-4 and would make it text.
_POWER_OF_TEN = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
yaml.add_implicit_resolver("tag:yaml.org,2002:float", _POWER_OF_TEN, list("-+0123456789"), _Loader, _Dumper)
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: a date or number that is none


def _parse(text: str) -> Any:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_Loader)):
        raise yaml.YAMLError("write values out instead of aliases: a few lines could fill all memory")
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Raises: UserError where the file cannot be read or holds no keys."""
    try:
        values = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config_path {path}: {error.strerror or error}") from None
    except _UNREADABLE as error:
        raise UserError(f"{path} is no readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: write `key: value` lines as in configs/")
    return values


def override(values: dict[str, Any], text: str) -> None:
    """Put a `--set key=value` into `values`; dots reach into sections. Raises: UserError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: write it as --set key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {text}: {section} is a value, not a section")
    try:
        values[last] = _parse(value)
    except _UNREADABLE:
        raise UserError(f"--set {text}: the value is no readable YAML") from None


def to_yaml(section: BaseModel) -> str:
    """Every key with its value; `read_yaml` reads it."""
    return yaml.dump(section.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def check_keys(kind: type[_Section], values: dict[str, Any], source: str) -> _Section:
    """`values` out of `source` as a `kind`. Raises: UserError naming the first wrong key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith("("))
    say = {
        "extra_forbidden": f"unknown key {key}: {_meant(kind, key)}selection/run/config.py lists the keys",
        "missing": f"key {key} is missing: add it" + ("" if "." in key else f", or give --set {key}=…"),
    }.get(first["type"], f"key {key}: {first['msg']}, not {reprlib.repr(first['input'])}")
    # No place: keys that do not go together.
    raise UserError(f"{source}: {say if first['loc'] else first['ctx']['error']}")


def _meant(kind: type[BaseModel], key: str) -> str:
    """The known key that is spelled nearly like `key`, of its section or else of another, as a question."""
    known = [known.rpartition(".") for known in _keys_of(kind, "")]
    section, _, name = re.sub(r"\.\d+(?=\.)", "", key).rpartition(".")  # without the number of a data set
    close = difflib.get_close_matches(name, [last for its, _, last in known if its == section], n=1)
    found = [f"{section}.{each}" if section else each for each in close]
    found += ["".join(parts) for parts in known if parts[2] == name]
    return f"did you mean {found[0]}? " if found else ""


def _keys_of(kind: Any, prefix: str) -> Iterator[str]:
    """Keys of a section, or of those that an annotation holds, with those of sections in them: selection.num_strata."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        for inner in get_args(kind):
            yield from _keys_of(inner, prefix)
        return
    for name, field in kind.model_fields.items():
        yield prefix + name
        yield from _keys_of(field.annotation, f"{prefix}{name}.")
