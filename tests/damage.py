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
import safetensors.torch
import torch
from hypothesis import reject
from hypothesis import strategies as st

from selection.run.products import _seal

_ODD = (  # RAW: what follows stands in the file as it is, not as a JSON string
    None, True, False, 0, 1, -1, 2, 2**31, 2**53 + 1, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, "", " ", "x", "0", "1e400", "nan", "null", "x" * 5000, "\0", "\ud800", "\x1b[31m", "é\u202e",
    "../../around/x", "/etc/passwd", "around/canary.txt", "~nobody/x", "https://localhost/x", [], {}, [[]], [None],
    {"": None}, [1e308] * 50, "RAW:" + "[" * 3000 + "]" * 3000, "${jndi:x}", "{{ ''.__class__ }}",
)  # fmt: skip
_YAML = (
    "RAW:!!python/object/apply:os.system ['touch PWNED']", "RAW:!!binary x", "RAW:!!set {a, b}", "RAW:1:2:3", "RAW:0x",
    "RAW:!!timestamp 2001-99-99", "RAW:!!float x", "RAW:<<: 1", "RAW:*unknown", "RAW:=", "RAW:&a [*a]",
)  # fmt: skip
_BYTES = (b"", b"\0", b"\xff\xfe", b"\xc3", b"\r", b"\n\n", b"[" * 5000, b"9" * 5000, b"NaN", b"-")


class _Payload:
    """Pickled: a shell command for whoever unpickles it."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)

    def __deepcopy__(self, memo):  # which would else run the command
        return self


PAYLOAD = _Payload()
_WHOLE = (b"", b"\0" * 100, b"null", b"[]", b"{}", b"PK\3\4", b"\x1f\x8b\x08", pickle.dumps(PAYLOAD))
_OBJECTS = (
    PAYLOAD, {"indices": [0, 2]}, [0, 2**70], [0, True], torch.tensor([0, 2]).float(), torch.tensor([[0, 2]]),
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


JSON = Format(json.loads, _to_json)
SEALED = Format(json.loads, _to_sealed)
YAML = Format(json.loads, _to_json, _YAML)  # the YAML are written as JSON
JSON_LINES = Format(lambda data: list(map(json.loads, data.splitlines())), lambda v: b"\n".join(map(_to_json, v)))
CSV = Format(
    lambda data: list(csv.reader(io.StringIO(data.decode(), newline=""))),
    lambda v: pd.DataFrame(v).to_csv(header=False, index=False).encode(errors="replace"),
)
PARQUET = Format(lambda data: pd.read_parquet(io.BytesIO(data)).to_dict("list"), lambda v: pd.DataFrame(v).to_parquet())
NPY = Format(lambda data: np.load(io.BytesIO(data)).tolist(), lambda v: _written(lambda f: np.save(f, v)), _OBJECTS)
PT = Format(lambda data: torch.load(io.BytesIO(data)), lambda v: _written(lambda f: torch.save(v, f)), _OBJECTS)
SAFETENSORS = Format(safetensors.torch.load, lambda v: safetensors.torch.save(v, {"format": "pt"}), _OBJECTS)
BYTES = Format()


def _places(container: object):
    """(container, key) of every value in it, at any depth."""
    keys = container if isinstance(container, dict) else range(len(container)) if isinstance(container, list) else ()
    for key in keys:
        yield container, key
        yield from _places(container[key])


@st.composite
def _changed_value(draw, value: object, odd: tuple) -> object:
    """The value with one value in it, or the whole, deleted or replaced."""
    whole = [value]
    places = list(_places(whole))
    (parent, key), (other, of) = (places[draw(st.integers(0, len(places) - 1))] for _ in range(2))
    if not draw(st.integers(0, 5)):
        del parent[key]
    else:
        near, old = [other[of]], parent[key]
        if isinstance(old, int | float):
            near += [old + 1, old - 1, -old, old * 1000, old * 1.0000001, float(old), str(old)]
        elif isinstance(old, str):
            near += [old[:-1], f"0{old}", f"/{old}", f"{old}/..", f"é{old}", f"{old}\r", old * 50]
        parent[key] = copy.deepcopy(draw(st.sampled_from(near) | st.sampled_from(odd or _ODD) | st.sampled_from(_ODD)))
    return whole[0] if whole else None


@st.composite
def _changed_bytes(draw, data: bytes) -> bytes:
    """The data with a part cut out and another in its place."""
    if not draw(st.integers(0, 7)):
        return draw(st.sampled_from(_WHOLE))
    at, length = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 1, 1, 8, 1000, len(data)]))
    new = draw(st.binary(min_size=1, max_size=64) | st.sampled_from([data[at : at + length] * 2, *_BYTES]))
    return data[:at] + new + data[at + length :]


class Damage:
    """What was done and the damaged content; without it, what is in the file's place."""

    def __init__(self, what: str, content: bytes | None = None):
        self.what, self.content = what, content

    def __repr__(self) -> str:
        return f"Damage({self.what})"


@st.composite
def damage(draw, content: Callable[[], bytes], format: Format) -> Damage:
    """One to five changes of a file's bytes or values; in one case of twenty something else is in the file's place."""
    kind = draw(st.sampled_from(["value"] * 12 * (format.decode is not None) + ["bytes"] * 7 + ["place"]))
    if kind == "place":
        return Damage(draw(st.sampled_from(["a link out of the run folder", "a folder", "nothing"])))
    changed = format.decode(content()) if kind == "value" else content()
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 5]))):
        changed = draw(_changed_value(changed, format.odd) if kind == "value" else _changed_bytes(changed))
    try:
        changed = format.encode(changed) if kind == "value" else changed
    except Exception:  # no file of this format holds it
        reject()
    at = next((i for i, (a, b) in enumerate(zip(content(), changed, strict=False)) if a != b), 0)
    return Damage(f"{kind}, from byte {at} on: {changed[at : at + 60]!r}", changed)
