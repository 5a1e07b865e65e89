"""YAML files of checked keys: reading, `--set`, writing, and errors that name the key."""

import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar

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
        "extra_forbidden": f"unknown key {key}: selection/run/config.py lists the keys",
        "missing": f"key {key} is missing: add it" + ("" if "." in key else f", or give --set {key}=…"),
    }.get(first["type"], f"key {key}: {first['msg']}, not {reprlib.repr(first['input'])}")
    # No place: keys that do not go together.
    raise UserError(f"{source}: {say if first['loc'] else first['ctx']['error']}")
