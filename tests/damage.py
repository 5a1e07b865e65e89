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
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from hypothesis import reject
from hypothesis import strategies as st

from selection.run.products import _seal

RAW = "RAW:"  # what follows goes into a JSON or YAML file as it stands
_COMMAND = "touch PWNED"
_ODD = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**53 + 1, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, "", " ", "x", "0", "1e400", "nan", "null", "x" * 5000, "\0", "\ud800", "\x1b[31m", "é\u202e",
    "../../around/x", "/etc/passwd", "around/canary.txt", "~nobody/x", "https://localhost/x", [], {}, [[]], [None],
    {"": None}, [1e308] * 50, RAW + "[" * 3000 + "]" * 3000, "${jndi:x}", "{{ ''.__class__ }}",
]  # fmt: skip


class _Payload:
    """Pickled: a shell command for whoever unpickles it."""

    def __reduce__(self):
        return os.system, (_COMMAND,)


@dataclass(frozen=True)
class Format:
    """A file as a value of lists, dicts and plain values, and back; `odd` values that only this format has."""

    decode: Callable[[bytes], object] | None = None  # None: bytes alone
    encode: Callable[[object], bytes] | None = None
    odd: tuple = ()


class Damage:
    """The damaged content, or None: something else is where the file was."""

    def __init__(self, what: str, content: bytes | None = None):
        self.what, self.content = what, content

    def __repr__(self) -> str:
        return f"Damage({self.what})"


def _to_json(value: object) -> bytes:
    texts = re.compile(rf'"{RAW}((?:[^"\\]|\\.)*)"')
    return texts.sub(lambda match: json.loads(f'"{match[1]}"'), json.dumps(value)).encode()


def _to_sealed(value: dict) -> bytes:
    """With the checksum that fits, which anybody can compute."""
    record = {key: each for key, each in value.items() if key != "sha256"}
    return _to_json(record | {"sha256": _seal(record)})


def _to_csv(rows: list) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(row if isinstance(row, list) else [row] for row in rows)
    return out.getvalue().encode(errors="replace")


def _from_parquet(data: bytes) -> list:
    table = pa.parquet.read_table(io.BytesIO(data))
    return [[name, "", table[name].to_pylist()] for name in table.column_names]


def _to_parquet(columns: list) -> bytes:
    arrays, out = [], io.BytesIO()
    for _, kind, values in columns:
        try:
            array = pa.array(values)
            arrays.append(array.cast(pa.type_for_alias(kind)) if kind else array)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            arrays.append(pa.array(list(map(str, values))))
    pa.parquet.write_table(pa.table(arrays, [name for name, *_ in columns]), out)
    return out.getvalue()


def _from_npy(data: bytes) -> dict:
    array = np.load(io.BytesIO(data))
    return {"descr": array.dtype.str, "fortran_order": False, "shape": list(array.shape), "data": data[-array.nbytes :]}


def _to_npy(value: dict) -> bytes:
    shape = value["shape"]
    if isinstance(shape, list):
        value = value | {"shape": tuple(shape)}
    data = value.pop("data")
    if not isinstance(data, bytes):
        out = io.BytesIO()
        np.save(out, np.array([_Payload()], dtype=object), allow_pickle=True)
        return out.getvalue()
    header = repr(value).ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + data


def _to_pt(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _from_safetensors(data: bytes) -> dict:
    length = int.from_bytes(data[:8], "little")
    return {"surplus": 0, "header": json.loads(data[8 : 8 + length]), "data": data[8 + length :]}


def _to_safetensors(value: dict) -> bytes:
    header = _to_json(value["header"])
    return (len(header) + value["surplus"]).to_bytes(8, "little") + header + value["data"]


_YAML = (
    "!!python/object/apply:os.system ['touch PWNED']", "!!python/name:os.system", "!!binary x", "!!set {a, b}",
    "!!timestamp 2001-99-99", "0x", "1:2:3", "!!float x", "<<: 1", "*unknown", "&a [*a]", "=", "\n---\n---",
    "{a: &a [x, x, x], b: &b [*a, *a, *a], c: &c [*b, *b, *b], d: &d [*c, *c, *c], e: [*d, *d, *d]}",
)  # fmt: skip
_TYPES = ("string", "float", "int8", "int64", "bool", "large_string", "date32", "uint64", "halffloat", "double")
_ROWS = [0, 2, 5]
_TENSORS = (
    _Payload(), {"indices": _ROWS}, [*_ROWS, 2**70], [*_ROWS, True], torch.tensor(_ROWS).float(), torch.tensor([_ROWS]),
    torch.tensor(_ROWS).to_sparse(), torch.tensor(3), torch.empty(2**40, device="meta"), torch.ones(1).expand(10**9),
    set(_ROWS), range(3),
)  # fmt: skip
JSON = Format(json.loads, _to_json)
SEALED = Format(json.loads, _to_sealed)
JSON_LINES = Format(
    lambda data: [json.loads(line) for line in data.splitlines()],
    lambda lines: b"".join(_to_json(line) + b"\n" for line in lines),
)
YAML = Format(json.loads, _to_json, tuple(RAW + text for text in _YAML))  # the YAML are written as JSON
CSV = Format(lambda data: list(csv.reader(io.StringIO(data.decode(), newline=""))), _to_csv)
PARQUET = Format(_from_parquet, _to_parquet, _TYPES)
NPY = Format(_from_npy, _to_npy, ("<f4", "|O", "<U9", "<M8", "|V4", "<c8", 10**12, 14.0))
PT = Format(lambda data: torch.load(io.BytesIO(data), weights_only=True), _to_pt, _TENSORS)
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
    parent, key = nodes[draw(st.sampled_from(range(len(nodes))))]
    strange = draw(st.sampled_from(odd) if odd and draw(st.booleans()) else st.sampled_from(_ODD))
    if parent is None:
        return copy.deepcopy(strange), "the whole"
    old, what = parent[key], draw(st.sampled_from(["delete", "repeat", "swap", "copy", "nudge", "odd", "odd"]))
    other_parent, other = nodes[draw(st.sampled_from(range(1, len(nodes))))]
    if what == "delete":
        del parent[key]
    elif what == "repeat" and isinstance(parent, list):
        parent.insert(draw(st.integers(0, len(parent))), old)
    elif what == "repeat":  # a key of another name
        parent[draw(st.sampled_from(["x", "", f"{key} ", str(key).upper(), "__class__", "\0"]))] = parent.pop(key)
    elif what == "swap" and isinstance(parent, list):
        at = draw(st.integers(0, len(parent) - 1))
        parent[key], parent[at] = parent[at], old
    elif what in ("swap", "copy"):
        parent[key] = copy.deepcopy(other_parent[other])
    elif what == "nudge" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = draw(st.sampled_from([old + 1, old - 1, -old, old * 1000, old * 1.0000001, float(old), str(old)]))
    elif what == "nudge" and isinstance(old, str):
        at = draw(st.integers(0, len(old)))
        between = draw(st.sampled_from(["", "0", "a", "/", "\0", "\n", "..", "é", "\\"]))
        parent[key] = old[:at] + between + old[at + 1 :]
    else:
        what, parent[key] = f"{str(strange)[:40]!r} instead of", copy.deepcopy(strange)
    return value, f"{what} {key!r}"


@st.composite
def _changed_bytes(draw, data: bytes) -> tuple[bytes, str]:
    data, end = bytearray(data), len(data)
    at, other, length = draw(st.integers(0, end)), draw(st.integers(0, end)), draw(st.sampled_from([1, 2, 8, 64, 1000]))
    what, chunk = (
        draw(st.sampled_from(["flip", "flip", "cut", "delete", "repeat", "swap", "noise", "insert", "all"])),
        (),
    )
    chunk = data[at : at + length]
    if what == "flip" and at < end:
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif what == "cut":
        del data[at:]
    elif what == "delete":
        del data[at : at + length]
    elif what == "repeat":
        data[at:at] = chunk * draw(st.sampled_from([1, 50]))
    elif what == "swap":
        data[at : at + length], data[other : other + length] = data[other : other + length], chunk
    elif what == "noise":
        data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
    elif what == "insert":
        odd = [b"\0", b"\xff\xfe", b"\xc3", b"\r", b"\n\n", b"[" * 5000, b"9" * 5000, b"NaN", b"-"]
        data[at:at] = draw(st.sampled_from(odd))
    else:
        whole = [b"", b"\0" * 100, b"null", b"[]", b"{}", b"PK\3\4", b"\x1f\x8b\x08", pickle.dumps(_Payload())]
        data[:] = draw(st.sampled_from(whole))
    return bytes(data), f"{what} at {at}"


PLACES = ("a link out of the run folder", "a folder", "a link to nothing", "a link to itself", "nothing")


@st.composite
def damage(draw, content: Callable[[], bytes], format: Format) -> Damage:
    """One to five changes of a file's bytes or values; of twenty files one has something else in its place."""
    kinds = ["value"] * 12 * (format.decode is not None) + ["bytes"] * 7 + ["place"]
    kind, changes = draw(st.sampled_from(kinds)), []
    if kind == "place":
        return Damage(draw(st.sampled_from(PLACES)))
    value = format.decode(content()) if kind == "value" else content()
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 5]))):
        value, what = draw(_changed_value(value, format.odd) if kind == "value" else _changed_bytes(value))
        changes.append(what)
        if kind == "value" and not isinstance(value, dict | list):
            break
    if kind == "value":
        try:
            value = format.encode(value)
        except Exception:  # no file of this format holds it
            reject()
    return Damage(f"{kind}: {', '.join(changes)}", value)
