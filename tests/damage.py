"""Damage to files, as a hypothesis strategy: bytes changed anywhere, or one value changed and the file written anew."""

import copy
import csv
import io
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from hypothesis import reject
from hypothesis import strategies as st

from selection.run.products import _seal

_ODD = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**53 + 1, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, "", " ", "x", "0", "1e400", "nan", "null", "x" * 5000, "\0", "\ud800", "\x1b[31m", "é\u202e",
    "../../around/x", "/etc/passwd", "around/canary.txt", "~nobody/x", "https://localhost/x", [], {}, [[]], [None],
    {"": None}, [1e308] * 50, "RAW:" + "[" * 3000 + "]" * 3000, "${jndi:x}", "{{ ''.__class__ }}",
]  # fmt: skip
_YAML = (  # RAW: what follows stands in the file as it is, not as a JSON string
    "RAW:!!python/object/apply:os.system ['touch PWNED']", "RAW:!!python/name:os.system", "RAW:!!binary x", "RAW:0x",
    "RAW:!!set {a, b}", "RAW:!!timestamp 2001-99-99", "RAW:1:2:3", "RAW:!!float x", "RAW:<<: 1", "RAW:*unknown",
    "RAW:=", "RAW:&a [*a]", "RAW:\n---\n---", "RAW:{a: &a [x, x, x], b: &b [*a, *a, *a], c: [*b, *b, *b]}",
)  # fmt: skip
_ENDS = ["\0", "\xff\xfe", "\xc3", "\r", "\n\n", "[" * 5000, "9" * 5000, "NaN", "-"]


class _Payload:
    """Pickled: a shell command for whoever unpickles it."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)

    def __deepcopy__(self, memo):  # which would else run the command
        return self


_OBJECTS = (
    _Payload(), {"indices": [0, 2]}, [0, 2**70], [0, True], torch.tensor([0, 2]).float(), torch.tensor([[0, 2]]),
    torch.tensor([0, 2]).to_sparse(), torch.tensor(3), torch.empty(2**40, device="meta"), torch.ones(1).expand(10**9),
    {0, 2}, range(3),
)  # fmt: skip


class Format(NamedTuple):
    """A file as a value of lists, dicts and plain values, and back; `odd` values that only this format has."""

    decode: Callable[[bytes], object] | None = None  # None: bytes alone
    encode: Callable[[object], bytes] | None = None
    odd: tuple = ()


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    write(out := io.BytesIO())
    return out.getvalue()


def _to_json(value: object) -> bytes:
    raw = re.compile(r'"RAW:((?:[^"\\]|\\.)*)"')
    return raw.sub(lambda match: json.loads(f'"{match[1]}"'), json.dumps(value)).encode()


def _to_sealed(value: dict) -> bytes:
    """With the checksum that fits, which anybody can compute."""
    record = {key: each for key, each in value.items() if key != "sha256"}
    return _to_json(record | {"sha256": _seal(record)})


def _to_csv(rows: list) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue().encode(errors="replace")


def _from_safetensors(data: bytes) -> dict:
    end = 8 + int.from_bytes(data[:8], "little")
    return {"surplus": 0, "header": json.loads(data[8:end]), "data": data[end:]}


def _to_safetensors(value: dict) -> bytes:
    header = _to_json(value["header"])
    return (len(header) + value["surplus"]).to_bytes(8, "little") + header + value["data"]


JSON = Format(json.loads, _to_json)
SEALED = Format(json.loads, _to_sealed)
YAML = Format(json.loads, _to_json, _YAML)  # the YAML are written as JSON
JSON_LINES = Format(lambda data: list(map(json.loads, data.splitlines())), lambda v: b"\n".join(map(_to_json, v)))
CSV = Format(lambda data: list(csv.reader(io.StringIO(data.decode(), newline=""))), _to_csv)
PARQUET = Format(
    lambda data: pd.read_parquet(io.BytesIO(data)).to_dict("list"), lambda value: pd.DataFrame(value).to_parquet()
)
NPY = Format(
    lambda data: np.load(io.BytesIO(data)).tolist(), lambda value: _written(lambda out: np.save(out, value)), _OBJECTS
)
PT = Format(
    lambda data: torch.load(io.BytesIO(data)), lambda value: _written(lambda out: torch.save(value, out)), _OBJECTS
)
SAFETENSORS = Format(_from_safetensors, _to_safetensors)
BYTES = Format()


def _nodes(value: object, parent=None, key=None):
    """(container, key) of every node; (None, None) for the whole, which comes first."""
    yield parent, key
    for k, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _nodes(child, value, k)


@st.composite
def _changed_value(draw, value: object, odd: tuple) -> tuple[object, str]:
    """The value with one node changed, and what was changed."""
    nodes = list(_nodes(value))
    (parent, key), (other_parent, other) = (nodes[draw(st.sampled_from(range(len(nodes))))] for _ in range(2))
    strange = copy.deepcopy(draw(st.sampled_from(odd if odd and draw(st.booleans()) else _ODD)))
    if parent is None or other_parent is None:
        return strange, "the whole"
    old, what = parent[key], draw(st.sampled_from(["delete", "rename", "repeat", "copy", "nudge", "odd", "odd"]))
    if what == "delete":
        del parent[key]
    elif what == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["x", "", f"{key} ", str(key).upper(), "__class__", "\0"]))] = parent.pop(key)
    elif what == "repeat" and isinstance(parent, list):
        parent.insert(draw(st.integers(0, len(parent))), old)
    elif what == "copy":
        parent[key] = copy.deepcopy(other_parent[other])
    elif what == "nudge" and isinstance(old, int | float):
        parent[key] = draw(st.sampled_from([old + 1, old - 1, -old, old * 1000, old * 1.0000001, float(old), str(old)]))
    elif what == "nudge" and isinstance(old, str):
        at = draw(st.integers(0, len(old)))
        parent[key] = old[:at] + draw(st.sampled_from(["", "0", "a", "/", "..", "é", "\\", *_ENDS])) + old[at + 1 :]
    else:
        what, parent[key] = f"{str(strange)[:40]!r} instead of", strange
    return value, f"{what} {key!r}"


@st.composite
def _changed_bytes(draw, data: bytes) -> tuple[bytes, str]:
    at, length = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 2, 8, 64, 1000]))
    before, chunk, after = data[:at], data[at : at + length], data[at + length :]
    changes = {
        "flip": lambda: bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in chunk[:1]) + chunk[1:] + after,
        "cut": lambda: b"",
        "delete": lambda: after,
        "repeat": lambda: chunk * draw(st.sampled_from([2, 50])) + after,
        "noise": lambda: draw(st.binary(min_size=length, max_size=length)) + after,
        "insert": lambda: draw(st.sampled_from(_ENDS)).encode("latin-1") + chunk + after,
    }
    what = draw(st.sampled_from(["flip", *changes, "the whole"]))
    if what == "the whole":
        whole = [b"", b"\0" * 100, b"null", b"[]", b"{}", b"PK\3\4", b"\x1f\x8b\x08", pickle.dumps(_Payload())]
        return draw(st.sampled_from(whole)), what
    return before + changes[what](), f"{what} at {at}"


class Damage:
    """The damaged content, or None: `what` says what is where the file was."""

    def __init__(self, what: str, content: bytes | None = None):
        self.what, self.content = what, content

    def __repr__(self) -> str:
        return f"Damage({self.what})"


PLACES = ("a link out of the run folder", "a link to nothing", "a link to itself", "a folder", "nothing")


@st.composite
def damage(draw, content: Callable[[], bytes], format: Format) -> Damage:
    """One to five changes of a file's bytes or values; in one case of twenty something else is in the file's place."""
    kind = draw(st.sampled_from(["value"] * 12 * (format.decode is not None) + ["bytes"] * 7 + ["place"]))
    if kind == "place":
        return Damage(draw(st.sampled_from(PLACES)))
    value, changes = format.decode(content()) if kind == "value" else content(), []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 5]))):
        value, what = draw(_changed_value(value, format.odd) if kind == "value" else _changed_bytes(value))
        changes.append(what)
    try:
        return Damage(f"{kind}: {', '.join(changes)}", format.encode(value) if kind == "value" else value)
    except Exception:  # no file of this format holds it
        reject()
