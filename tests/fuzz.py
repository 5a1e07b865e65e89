"""Damage every kind of input file at random and see how the stages take it.

    python tests/fuzz.py                                   # 500 cases of each kind
    python tests/fuzz.py --kind manifest --case 17         # one case again, with all it printed

Needs nothing but the stack. Each case copies a small finished run, mutates one file in it and calls the script that
reads it, in a process of its own. It must end in success or in exactly one line `error: …` with exit code 2: never in a
traceback, after 60 s, with a file written beside the run folder, with code of the file run, or with a wrong result.
What is wrong is said for each kind by its `wrong` in KINDS: files that carry a hash must give the unmutated result or
be refused, for what nothing can vouch (a stranger's numbers) the result must be sound.
"""

import contextlib
import copy
import csv
import gc
import io
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # copying cases would take longer than running them
_HOME = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_MEMORY))  # all that is written, the caches of the libraries too
os.environ |= {"HF_HOME": str(_HOME / "cache"), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(_HOME / "cache")}

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from selection.rows.split import row_id, rows_of, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.cli import argument_parser, run_stage
from selection.run.config import REPOSITORY, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import VERIFICATION
from selection.run.model_folder import model_path
from selection.run.products import _seal
from selection.scores import coresets as coreset_files
from selection.scores import identity, scoring
from selection.scores.folder import read_scores
from selection.scores.models import load_for_scoring, parameters_of

SECONDS = 60  # of one case at most
MEMORY = 6 * 2**30  # bytes that a case may ask for beyond what it starts with
WRITABLE = ("run", "out", "tmp")  # folders of a case in which a stage may write
ROWS, RATES = 14, (0.3, 0.6)
_ARGUMENTS = ["--rate", *map(str, RATES), "--num_strata", "3", "--verify_per_stratum", "1", "--out", "out"]


# Mutations. Each takes what is to be changed and a random.Random.

_ODD = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**53 + 1, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, "", " ", "x", "0", "1e400", "nan", "null", "x" * 5000, "\0", "\ud800", "\x1b[31m", "é\u202e",
    "../../around/x", "/etc/passwd", "around/canary.txt", "~nobody/x", "https://localhost/x", [], {}, [[]], [None],
    {"": None}, [1e308] * 50, "PLACEHOLDER-NEST",
    "!!python/object/apply:os.system ['touch PWNED']", "${jndi:x}", "{{ ''.__class__ }}",
]  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 8, 64, 1000])
        chunk = data[at : at + length]
        what = rng.randrange(9)
        if what <= 1 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif what == 2:
            del data[at:]
        elif what == 3:
            del data[at : at + length]
        elif what == 4:
            data[at:at] = chunk * rng.choice([1, 1, 50])
        elif what == 5:
            other = rng.randrange(len(data) + 1)
            data[at : at + length], data[other : other + length] = data[other : other + length], chunk
        elif what == 6:
            data[at : at + length] = rng.randbytes(length)
        elif what == 7:
            data[at:at] = rng.choice(
                [b"\0", b"\xff\xfe", b"\xc3", b"\r", b"\n\n", b"[" * 5000, b"9" * 5000, b"NaN", b"-"]
            )
        elif rng.random() < 0.2:
            data[:] = rng.choice(
                [b"", b"\0" * 100, rng.randbytes(200), b"null", b"[]", b"{}", b"PK\3\4", b"\x1f\x8b\x08"]
            )
    return bytes(data)


def mutate_value(value: object, rng: random.Random) -> object:
    """A JSON-like value with one node changed."""
    nodes = list(_nodes(value))
    parent, key = rng.choice(nodes)
    if parent is None:
        return copy.deepcopy(rng.choice(_ODD))
    old = parent[key]
    what = rng.randrange(8)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "", key + " ", key.upper(), "__class__", "\0"])] = parent.pop(key)
    elif what == 2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), old)
    elif what == 3 and isinstance(parent, list):
        other = rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif what <= 4:
        other_parent, other_key = rng.choice(nodes[1:])
        with contextlib.suppress(KeyError, IndexError):
            parent[key] = json.loads(json.dumps(other_parent[other_key]))
    elif what == 5 and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice([old + 1, old - 1, -old, old * 1000, old * 1.0000001, float(old), str(old)])
    elif what == 6 and isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        parent[key] = old[:at] + rng.choice(["", "0", "a", "/", "\0", "\n", "..", "é", "\\"]) + old[at + 1 :]
    else:
        parent[key] = copy.deepcopy(rng.choice(_ODD))
    return value


def _nodes(value: object, parent=None, key=None):
    """(container, key) of every node; (None, None) for the whole, which comes first."""
    yield parent, key
    for k, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _nodes(child, value, k)


def _to_json(value: object) -> bytes:
    return json.dumps(value).replace('"PLACEHOLDER-NEST"', "[" * 3000 + "]" * 3000).encode()


def mutate_sealed(data: bytes, rng: random.Random) -> bytes:
    """With the checksum that fits, which anybody can compute."""
    data = mutate_json(data, rng)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        value = {key: each for key, each in json.loads(data).items() if key != "sha256"}
        data = _to_json(value | {"sha256": _seal(value)})
    return data


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 3])):
        if isinstance(value, dict | list):
            value = mutate_value(value, rng)
    return _to_json(value)


def mutate_jsonl(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    for _ in range(rng.choice([1, 1, 3])):
        number = rng.randrange(len(lines))
        value = json.loads(lines[number])
        lines[number] = _to_json(mutate_value(value, rng)) if isinstance(value, dict | list) else b"{}"
        if b"\n" in lines[number]:
            lines[number] = b"{}"
    return b"\n".join(lines) + b"\n"


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """The YAML are written as JSON, which is YAML; the rest is what only YAML has."""
    what = rng.randrange(6)
    if what == 0:
        bomb = 'a: &a ["x","x","x","x","x","x","x","x","x"]\n'
        bomb += "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        bomb = rng.choice([bomb, f"selection: {{rates: *a}}\n{bomb}", f"{bomb}training: {{learning_rate: *i}}\n"])
        own = "\n".join(f"{key}: {json.dumps(value)}" for key, value in json.loads(data).items())
        return rng.choice([bomb, f"{bomb}{own}", f"{own}\nsmall_training: &x {{a: *x}}\n"]).encode()
    if what == 1:
        tags = [
            "!!python/object/apply:os.system ['touch PWNED']",
            "!!python/name:os.system",
            "!!binary x",
            "!!set {a, b}",
        ]
        tags += [
            "!!timestamp 2001-99-99",
            "0x",
            "1:2:3",
            "!!float x",
            "? [a]\n: b",
            "<<: 1",
            "*unknown",
            "&a [*a]",
            "=",
            "---\n---",
        ]
        lines = [f"{key}: {json.dumps(value)}" for key, value in json.loads(data).items()]
        number = rng.randrange(len(lines))
        lines[number] = lines[number].split(":")[0] + ": " + rng.choice(tags)
        return "\n".join(lines).encode()
    return mutate_json(data, rng)


def mutate_csv(data: bytes, rng: random.Random) -> bytes:
    rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
    row = rng.randrange(len(rows))
    what = rng.randrange(6)
    if what == 0:
        rows.insert(rng.randrange(len(rows)), rows[row])
    elif what == 1:
        del rows[row]
    elif what == 2:
        column = rng.randrange(len(rows[0]))
        rows = [r[:column] + r[column + 1 :] for r in rows]
    elif what == 3:
        rows[row] = rows[row] + ["x"] if rng.random() < 0.5 else rows[row][:-1]
    else:
        rows[row][rng.randrange(len(rows[row]))] = str(rng.choice(_ODD)).replace("\ud800", "?")
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def mutate_parquet(data: bytes, rng: random.Random) -> bytes:
    """A whole Parquet file that holds something else."""
    table = pa.parquet.read_table(io.BytesIO(data))
    column = rng.randrange(table.num_columns)
    name, values, row = table.column_names[column], table.column(column).to_pylist(), rng.randrange(len(table))
    kinds = [
        pa.string(),
        pa.float32(),
        pa.int8(),
        pa.int64(),
        pa.bool_(),
        pa.large_string(),
        pa.dictionary(pa.int8(), pa.string()),
    ]
    kinds += [pa.date32(), pa.decimal128(20, 3), pa.uint64(), pa.float16(), pa.list_(pa.float64())]
    what = rng.randrange(9)
    if what == 0:
        table = table.drop([name])
    elif what == 1:
        table = table.append_column(name, table.column(column))
    elif what == 2:
        table = pa.concat_tables([table, table.slice(row, 1)])
    elif what == 3:
        table = table.slice(0, rng.choice([0, row]))
    elif what == 4:
        table = table.replace_schema_metadata(
            {rng.choice(["pandas", "ARROW:schema", "x"]): rng.choice(["{", "x" * 10**6, "\0"])}
        )
        if rng.random() < 0.5:
            table = table.take(pa.array(rng.sample(range(len(table)), len(table))))
    elif what == 5:
        table = table.set_column(column, name, pa.nulls(len(table), rng.choice([table.schema[column].type, pa.null()])))
    else:
        if what == 6:
            values[row] = rng.choice([None, *(v for v in _ODD if isinstance(v, int | float))])
        else:
            kind = rng.choice(kinds)
            values = [[v] for v in values] if pa.types.is_list(kind) else values
        try:
            new = pa.array(values) if what == 6 else pa.array(values).cast(kind)
        except (pa.ArrowException, OverflowError, TypeError):
            new = pa.array([str(v) for v in values])
        table = table.set_column(column, name, new)
    out = io.BytesIO()
    pa.parquet.write_table(table, out, row_group_size=rng.choice([1, 1000]), version=rng.choice(["1.0", "2.6"]))
    return out.getvalue()


class _Payload:
    """Pickled: a shell command for whoever unpickles it."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def mutate_npy(data: bytes, rng: random.Random) -> bytes:
    array, out = np.load(io.BytesIO(data)), io.BytesIO()
    what = rng.randrange(6)
    if what == 0:
        np.save(out, np.array([_Payload()], dtype=object), allow_pickle=True)
    elif what == 1:
        shape = rng.choice(
            ["(1000000000000, 3)", "(-1, 3)", "(14, 0)", "(14,)", "()", "(14, 10000000000)", "(" * 300, "(14, 3.0)"]
        )
        numbers = rng.choice(["<f4", "|O", "<U9", "<M8", "|V4", "<c8"])
        header = f"{{'descr': '{numbers}', 'fortran_order': False, 'shape': {shape}, }}"
        header = header.ljust(117) + "\n"
        out.write(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + array.tobytes())
    elif what == 2:
        np.savez(out, a=array)
    elif what == 3:
        pickle.dump(_Payload(), out)
    else:
        array = array.astype(rng.choice(["f2", "f8", "i1", "u8", "c8", "?", "S3", "M8[s]"]))
        np.save(out, array[: rng.choice([14, 14, 3])].T if rng.random() < 0.3 else array)
    return out.getvalue()


def mutate_pt(data: bytes, rng: random.Random) -> bytes:
    rows, out = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
    values = [
        _Payload(),
        {"indices": rows},
        [rows],
        torch.tensor(rows).float(),
        torch.tensor([rows]),
        torch.tensor(rows).to_sparse(),
    ]
    values += [
        [*rows, rows[0]],
        [*rows, -1],
        [*rows, 2**70],
        [*rows, True],
        [*rows, None],
        [],
        "x",
        None,
        torch.tensor(3),
    ]
    values += [
        torch.empty(2**40, dtype=torch.int64, device="meta"),
        [1.0, 2.0],
        set(rows),
        range(3),
        torch.ones(1).expand(10**9),
    ]
    torch.save(rng.choice(values), out)
    if rng.random() < 0.1:
        return pickle.dumps(_Payload())
    return out.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Its header, which is JSON, changed and put back."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], rng)
    said = len(header) if rng.random() < 0.9 else rng.choice([0, 2**63 - 1, 2**40, len(header) * 2])
    return said.to_bytes(8, "little") + header + data[8 + length :]


def mutate_path(path: Path, around: Path, rng: random.Random) -> None:
    """Something else where the file was."""
    what = rng.randrange(6)
    if what == 0:  # a link that leads out of the run folder: nothing may be written through it
        shutil.copy(path, around / "linked")
    path.unlink()
    if what == 0:
        path.symlink_to(around / "linked")
    elif what == 1:
        path.mkdir()
    elif what == 2:
        path.symlink_to(around / "nowhere")
    elif what == 3:
        path.symlink_to(path.name)  # a loop
    elif what == 4:
        path.mkdir()
        (path / "config.json").write_text("{}")


# What is run, and what a success must look like


@dataclass(frozen=True)
class Kind:
    """An input file. `run` is called in the case's folder and gives something that JSON can hold; `wrong` says what is
    wrong with it (the case's folder, the result, the result on the unmutated file), or None."""

    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    run: Callable[[Path], object]
    wrong: Callable[[Path, object, object], str | None]
    needs: tuple[str, ...] = ()  # what of `prepare`


def same(case: Path, result: object, reference: object) -> str | None:
    """For files that carry a hash, or are checked against something that does."""
    return None if result == reference else "another result than from the unmutated file"


def sound_coresets(case: Path, result: dict, reference: object) -> str | None:
    """For numbers that nothing vouches for: distinct rows of the split, as many as the rate asks for."""
    for name, record in result.items():
        rows = record["indices"]
        if rows != sorted(set(rows)) or not rows or rows[0] < 0 or rows[-1] >= record["num_rows"]:
            return f"{name}: not rows of the split"
        if len(rows) != max(1, math.floor(record["rate"] * record["num_rows"] + 1e-9)):
            return f"{name}: {len(rows)} rows at rate {record['rate']} of {record['num_rows']}"
    return None


def plain_numbers(case: Path, result: str, reference: object) -> str | None:
    """For what is summed up and printed: finite figures alone, none below zero."""
    found = re.search(r"\b(nan|inf|None)\b|(?<![\w.])-[\d.]*[1-9]", result)
    return f"prints {found[0]}" if found else None


def finite_numbers(case: Path, result: str, reference: object) -> str | None:
    """For tables: no figure that is none, unless the word is a name in the file itself."""
    words = (case / "run" / "cells.csv").read_text()
    found = [word for word in ("nan", "inf") if re.search(rf"\b{word}\b", result) and word not in words]
    return f"prints {found[0]}" if found else None


def stage(script: str, *arguments: object, **replaced: Callable) -> None:
    """Run a stage script as the command line would, after some functions it imported were replaced."""
    sys.argv = [script, *map(str, arguments)]
    main = SCRIPTS[script]["main"]
    main.__globals__.update(replaced)
    main()


def coresets(out: Path) -> dict:
    found = {path.name: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    return {name: {k: v for k, v in record.items() if k != "code_version"} for name, record in found.items()}


def run_experiment(case: Path) -> dict:
    stage("scripts/costs.py", "--config_path", "experiment.yaml")
    shutil.rmtree("run/coresets")
    stage("selection/coreset.py", "--config_path", "experiment.yaml")
    return coresets(case / "run" / "coresets")


def run_grid(case: Path) -> list:
    jobs = []
    stage(
        "scripts/paper/reproduce.py", "--config", "grid.yaml", "--results", "out", "--runs", "run/grid",
        run_jobs=lambda given, *_: jobs.extend(given),
    )  # fmt: skip
    return [[job.name, [command[0] for command in job.commands]] for job in jobs]


def sound_jobs(case: Path, result: list, reference: object) -> str | None:
    scripts = {command for _, commands in result for command in commands}
    return None if scripts <= {s for s in SCRIPTS if s.startswith(("finetune", "selection"))} else f"runs {scripts}"


def run_data(name: str) -> Callable[[Path], list]:
    def run(case: Path) -> list:
        changes = [f"dataset={json.dumps(str(case / name))}", f"output_dir={json.dumps(str(case / 'out'))}"]
        experiment = load_experiment("experiment.yaml", changes)
        training_split(experiment)
        return sorted(row_id(row) for part in ("train", "eval") for row in rows_of(experiment, part))

    return run


def sound_rows(name: str) -> Callable[[Path, list, object], str | None]:
    """Where plain Python finds rows of text in the file, the split has just these."""

    def wrong(case: Path, result: list, reference: object) -> str | None:
        try:
            rows = _plain_rows(case / name)
            expected = sorted(map(row_id, rows)) if _are_texts(rows) else None
        except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException):
            return None
        return None if expected in (None, result) else "other rows than the file's"

    return wrong


def _are_texts(rows: object) -> bool:
    keys = {"id", "instruction", "input", "output"}
    whole = isinstance(rows, list) and all(isinstance(row, dict) and set(row) == keys for row in rows)
    return whole and all(isinstance(value, str) for row in rows for value in row.values())


def _plain_rows(path: Path) -> object:
    if path.suffix == ".parquet":
        return pa.parquet.read_table(path).to_pylist()
    text = path.read_bytes().decode("utf-8")  # line ends as they are
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    return (
        json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    )


def cut(scores: str, target: str | None, *more: str) -> Callable[[Path], dict]:
    def run(case: Path) -> dict:
        given = ["--target_scores", target] if target else []
        stage("selection/coreset.py", "--scores", scores, *given, *more, *_ARGUMENTS)
        return coresets(case / "out")

    return run


def run_select(file: str) -> Callable[[Path], list]:
    def run(case: Path) -> list:
        chosen = []
        stage(
            "finetune/finetune-select.py", "--config_path", "experiment.yaml", "--select_path", file,
            tune_once=lambda experiment, model, name, rows, *_: chosen.append([name, list(rows)]),
        )  # fmt: skip
        return chosen

    return run


def same_or_without_hashes(case: Path, result: list, reference: list) -> str | None:
    """A coreset that has lost its hashes is one from elsewhere: its row numbers are all there is."""
    record = json.loads((case / "run/coresets/staff-0.3.json").read_text())
    if record.get("ids") and record.get("data_fingerprint"):
        return same(case, result, reference)
    return None if len(result[0][1]) == len(record["indices"]) else "other rows than its indices"


def run_plan(case: Path) -> list:
    """Scoring goes on from a stored plan; the model, its rows and the self-test are those of the fixture."""
    experiment = load_experiment("experiment.yaml", ["selection.self_test=0"])
    scoring.load_for_scoring = lambda *_, **__: FIXTURE["model"]
    scoring.tokenised_split = lambda *_: FIXTURE["tokenised"]
    split = training_split(experiment)
    folder = case / "run" / "scores" / "begun"
    scoring.score_rows(
        experiment, split, experiment.target_model, None, np.arange(len(split.rows)), folder, VERIFICATION
    )
    return read_scores(folder).of_all_rows().tolist()


def close(case: Path, result: list, reference: list) -> str | None:
    """A score's last bits depend on what shares its batch."""
    return None if np.allclose(result, reference, rtol=1e-4) else "other scores"


def run_costs(case: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stage("scripts/costs.py", "--config_path", "experiment.yaml")
    return printed.getvalue()


def run_cells(case: Path) -> str:
    from scripts.paper.cells import read_cells, write_cells

    cells = read_cells(case / "run" / "cells.csv")
    write_cells(case / "out" / "cells.csv", cells, [])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stage(
            "scripts/paper/tables.py",
            "run",
            draw_curves=lambda grid, estimates, files: [f.write_text("") for f in files.values()],
        )
    return printed.getvalue()


def run_tokenised(case: Path) -> list:
    experiment = load_experiment("experiment.yaml")
    rows = tokenised_rows(experiment, str(case / "model"), "train", training_split(experiment).rows)
    return [rows[key][:] for key in ("input_ids", "labels")]


def run_split(case: Path) -> list:
    split = training_split(load_experiment("experiment.yaml"))
    return [split.fingerprint, split.ids]


def run_tuned(case: Path) -> str:
    """A tuned target that is there already is reused, never tuned again."""
    before = sorted(path.name for path in (case / "run" / "target").iterdir())
    stage(
        "finetune/finetune-select.py",
        "--config_path",
        "experiment.yaml",
        "--select_path",
        "run/coresets/staff-0.3.json",
    )
    stage("finetune/eval.py", "--config_path", "experiment.yaml")
    after = sorted(path.name for path in (case / "run" / "target").iterdir())
    return "reused" if before == after else "tuned again"


def run_metrics(case: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stage("finetune/eval.py", "--config_path", "experiment.yaml")
    return printed.getvalue().split("\n\n")[-1]


def run_model(tuned: str | None = None) -> Callable[[Path], list]:
    """Scores of four rows, twice: weights that no file gives would be drawn anew each time."""

    def run(case: Path) -> list:
        # The command line's other readers of a model folder.
        path = model_path(str(case / "model"))
        parameters_of(path)
        if tuned:
            identity.check_base(case / tuned, path)
        scores = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = load_for_scoring(path, case / tuned if tuned else None, "fp32")
            scorer = scoring.EffortScorer(model)
            rows = FIXTURE["tokenised"][:4]
            if max(map(max, rows["input_ids"])) >= model.get_input_embeddings().num_embeddings:
                raise UserError("token out of range (score_rows says so)")
            efforts = scorer.score(rows["input_ids"], rows["labels"])["effort"]
            if not efforts.isfinite().all():
                raise UserError("a score is not finite (score_rows says so)")
            scores.append(efforts.tolist())
        return scores

    return run


def repeats(case: Path, result: list, reference: list) -> str | None:
    return None if result[0] == result[1] else "weights that the file does not give were drawn at random"


def anything(case: Path, result: object, reference: object) -> None:
    """A tokenizer is what its files say; check_tokenizer refuses one that loses text."""


_SMALL, _TARGET = "run/scores/small", "run/scores/target"
_STAFF, _TUNED, _LENGTH = "run/coresets/staff-0.3.json", "run/target/staff-0.3", ("--method", "staff", "length")
_MODERATE = ("--method", "moderate", "--features", "features.npy")
_VERIFICATION = "run/verification.json"
KINDS = {
    "experiment": Kind("experiment.yaml", mutate_yaml, run_experiment, sound_coresets),
    "grid": Kind("grid.yaml", mutate_yaml, run_grid, sound_jobs),
    "data.json": Kind("data.json", mutate_json, run_data("data.json"), sound_rows("data.json")),
    "data.jsonl": Kind("data.jsonl", mutate_jsonl, run_data("data.jsonl"), sound_rows("data.jsonl")),
    "data.csv": Kind("data.csv", mutate_csv, run_data("data.csv"), sound_rows("data.csv")),
    "data.parquet": Kind("data.parquet", mutate_parquet, run_data("data.parquet"), sound_rows("data.parquet")),
    "score part": Kind(f"{_SMALL}/part-*", mutate_parquet, cut(_SMALL, _TARGET, *_LENGTH), same),
    "score part, target": Kind(f"{_TARGET}/part-*", mutate_parquet, cut(_SMALL, _TARGET), same),
    "manifest": Kind(f"{_SMALL}/manifest.json", mutate_json, cut(_SMALL, _TARGET), same),
    "score plan": Kind("run/scores/begun/plan.json", mutate_json, run_plan, close),
    "scores.parquet": Kind("scores.parquet", mutate_parquet, cut("scores.parquet", "scores.csv"), sound_coresets),
    "scores.csv": Kind("scores.csv", mutate_csv, cut("scores.csv", "scores.parquet"), sound_coresets),
    "features.npy": Kind("features.npy", mutate_npy, cut("scores.csv", None, *_MODERATE), sound_coresets),
    "verification": Kind(_VERIFICATION, mutate_json, cut(_SMALL, None, "--verification", _VERIFICATION), same),
    "manifest, sealed": Kind(f"{_SMALL}/manifest.json", mutate_sealed, cut(_SMALL, _TARGET), sound_coresets),
    "score plan, sealed": Kind("run/scores/begun/plan.json", mutate_sealed, run_plan, close),
    "verification, sealed": Kind(
        _VERIFICATION, mutate_sealed, cut(_SMALL, None, "--verification", _VERIFICATION), sound_coresets
    ),
    "split, sealed": Kind("run/data/split.json", mutate_sealed, run_split, anything),
    "coreset.json": Kind(_STAFF, mutate_json, run_select(_STAFF), same_or_without_hashes),
    "coreset.pt": Kind("rows.pt", mutate_pt, run_select("rows.pt"), same),
    "costs": Kind("run/costs.jsonl", mutate_jsonl, run_costs, plain_numbers),
    "draft": Kind("model/draft.json", mutate_json, run_costs, plain_numbers),
    "hashes": Kind("run/hashes.json", mutate_json, run_costs, same),
    "cells": Kind("run/cells.csv", mutate_csv, run_cells, finite_numbers),
    "split": Kind("run/data/split.json", mutate_json, run_split, same),
    "split's rows": Kind("run/data/train.arrow", mutate_bytes, run_split, same),
    "dataset_info": Kind("run/data/dataset_info.json", mutate_json, run_tokenised, same),
    "made_from": Kind(f"{_TUNED}/made_from.json", mutate_json, run_tuned, same, ("tuned",)),
    "metrics": Kind("run/eval/staff-0.3/metrics.json", mutate_json, run_metrics, plain_numbers, ("tuned",)),
    "config": Kind("model/config.json", mutate_json, run_model(), repeats),
    "weights": Kind("model/model.safetensors", mutate_safetensors, run_model(), repeats),
    "adapter_config": Kind(f"{_TUNED}/adapter_config.json", mutate_json, run_model(_TUNED), repeats, ("tuned",)),
    "adapter": Kind(f"{_TUNED}/adapter_model.safetensors", mutate_safetensors, run_model(_TUNED), repeats, ("tuned",)),
    "tokenizer": Kind("model/tokenizer.json", mutate_json, run_tokenised, anything),
    "tokenizer_config": Kind("model/tokenizer_config.json", mutate_json, run_tokenised, anything),
}

_STAGES = ("scripts/costs.py", "selection/coreset.py", "selection/effort_score.py", "selection/verify.py")
_STAGES += (
    "finetune/finetune.py",
    "finetune/finetune-select.py",
    "finetune/eval.py",
    "scripts/paper/reproduce.py",
    "scripts/paper/tables.py",
)
SCRIPTS: dict[str, dict] = {}
FIXTURE: dict[str, object] = {}


def prepare(base: Path, kinds: list[Kind]) -> None:
    """A small finished run in `base`: paths in its YAML start with @, which a case replaces by its own folder."""
    for script in _STAGES:
        SCRIPTS[script] = runpy.run_path(str(REPOSITORY / script), run_name="fuzz")
    coreset_files.code_version = lambda: "fuzz"  # asks git each time
    lines = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines[:300]), key=lambda row: len(row["output"]))[:ROWS]
    base.mkdir()
    (base / "data.json").write_text(json.dumps(rows))
    (base / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.Table.from_pylist(rows)
    pa.parquet.write_table(table, base / "data.parquet")
    with (base / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([table.column_names, *([row[k] for k in table.column_names] for row in rows)])
    sys.argv = ["make_tiny_model.py", "--out", str(base / "model")]
    runpy.run_path(str(REPOSITORY / "scripts" / "make_tiny_model.py"), run_name="fuzz")["main"]()
    selection = {"num_strata": 3, "verify_per_stratum": 1, "rates": list(RATES), "precision": "fp32", "self_test": 0}
    keys = {
        "output_dir": "@/run", "small_model": "@/model", "target_model": "@/model", "template": "chatml",
        "dataset": "@/data.jsonl", "eval_size": 0.15, "cutoff_len": 256, "precision": "fp32", "selection": selection,
        "training": {"seed": 7, "lora_rank": 2}, "small_training": {"num_train_epochs": 0},
        "target_training": {"num_train_epochs": 1, "max_steps": 1},
        "evaluation": {"max_new_tokens": 2},
    }  # fmt: skip
    grid = {"tasks": {"biology": {"config": "@/experiment.yaml", "set": ["cutoff_len=200"]}}}
    grid |= {"methods": ["full", "random", "staff"], "rates": [0.3], "seeds": [1]}
    (base / "experiment.yaml").write_text(json.dumps(keys))
    (base / "grid.yaml").write_text(json.dumps(grid))
    (base / "around").mkdir()
    (base / "around" / "canary.txt").write_text("sings")

    work = copy_case(base, base.with_name("making"))
    os.chdir(work)
    config = ["--config_path", "experiment.yaml"]
    stage("selection/effort_score.py", *config)
    stage("selection/verify.py", *config, "--set", "selection.verify=all")
    stage("selection/verify.py", *config)
    stage("selection/coreset.py", *config)
    if any("tuned" in kind.needs for kind in kinds):
        stage("finetune/finetune-select.py", *config, "--select_path", "run/coresets/staff-0.3.json")
        stage("finetune/eval.py", *config)
    experiment = load_experiment("experiment.yaml")
    split = training_split(experiment)
    FIXTURE["tokenised"] = tokenised_rows(experiment, str(work / "model"), "train", split.rows)
    FIXTURE["model"] = load_for_scoring(str(work / "model"), None, "fp32")

    shutil.copytree(work / "run" / "scores" / "small", begun := work / "run" / "scores" / "begun")
    shutil.rmtree(begun)
    score_batch, calls = scoring._score_batch, []

    def breaking_off(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_batch(*arguments)

    scoring._score_batch = breaking_off
    small_batches = load_experiment("experiment.yaml", ["selection.self_test=0", "selection.tokens_per_batch=150"])
    with contextlib.suppress(KeyboardInterrupt):
        scoring.score_rows(
            small_batches, split, experiment.target_model, None, np.arange(len(split.rows)), begun, VERIFICATION
        )
    scoring._score_batch = score_batch
    if not (begun / "plan.json").exists():
        raise RuntimeError("the fixture of an interrupted scoring run has no plan")

    scores = read_scores(experiment.small_scores)
    table = pa.table({"index": scores.index, "effort": scores.effort})
    pa.parquet.write_table(table, work / "scores.parquet")
    (work / "scores.csv").write_text(
        "index,effort\n" + "".join(f"{i},{e}\n" for i, e in zip(scores.index, scores.effort, strict=True))
    )
    np.save(work / "features.npy", np.random.default_rng(0).normal(size=(len(scores.index), 3)).astype("f4"))
    torch.save([0, 2, 5], work / "rows.pt")
    paid = {"tokens": 1000, "parameters": 1000, "seconds": 1.0}
    (work / "model" / "draft.json").write_text(json.dumps({"target": "model", "calibration_ids": [], "cost": paid}))
    (work / "run" / "cells.csv").write_text(_cells())
    with (work / "run" / "costs.jsonl").open("a") as file:
        file.write(
            json.dumps({"stage": "target tuning", "what": "full", "tokens": 1000, "seconds": 9.5, "samples": 12}) + "\n"
        )
    for path in ("experiment.yaml", "grid.yaml"):
        (work / path).unlink()
        shutil.copy(base / path, work / path)
    shutil.rmtree(base)
    work.rename(base)


def _cells() -> str:
    """Two methods, a rate, two seeds, three evaluation rows."""
    out = io.StringIO(newline="")
    from scripts.paper.cells import COLUMNS

    tables = SCRIPTS["scripts/paper/tables.py"]
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for method, rate, cost in (("full", 1.0, 0), ("random", 0.5, 0), ("staff", 0.5, 10)):
        for seed in (1, 2):
            row = dict.fromkeys(COLUMNS, "0") | {
                "task": "t",
                "target": "m",
                "method": method,
                "mode": "paper",
            }
            row |= {
                "rate": rate,
                "seed": seed,
                "size": 5,
                "num_rows": 10,
                "eval_rows": 3,
                "rouge_l": 20 + seed,
                "bleu_4": 9,
            }
            row |= {"rouge_l_by_sample": f"{10 + seed} {20 + seed} {30 + seed}", "bleu_4_by_sample": "8 9 10"}
            row |= {f"selection_{unit}": cost for unit in tables["UNITS"]} | {
                "tuning_seconds": 5,
                "tuning_flops": 7,
                "tuning_tokens": 8,
            }
            row |= {
                "device": "CPU",
                "precision": "fp32",
                "commit": "x",
                "settings": "y",
                "paper_target": "",
                "paper_task": "",
            }
            writer.writerow(row)
    return out.getvalue()


# The cases


def copy_case(base: Path, case: Path) -> Path:
    shutil.copytree(base, case, symlinks=True, copy_function=shutil.copyfile)
    for name in ("experiment.yaml", "grid.yaml"):
        (case / name).write_text((case / name).read_text().replace("@", str(case)))
    for name in WRITABLE:
        (case / name).mkdir(exist_ok=True)
    return case


def mutated(kind: Kind, case: Path, rng: random.Random) -> None:
    path = next(case.glob(kind.file))
    if rng.random() < 0.05:
        mutate_path(path, case / "around", rng)
        return
    mutate = kind.mutate if rng.random() < 0.6 else mutate_bytes
    path.write_bytes(mutate(path.read_bytes(), rng))


def snapshot(case: Path) -> dict[str, tuple]:
    """What lies beside the folders in which a stage may write."""
    found = {}
    for folder, folders, files in os.walk(case):
        if Path(folder) == case:
            folders[:] = [name for name in folders if name not in WRITABLE]
        for name in (*folders, *files):
            path = Path(folder) / name
            status = path.lstat()
            found[str(path.relative_to(case))] = (
                status.st_mode,
                status.st_size,
                0 if name in folders else status.st_mtime_ns,
            )
    return found


@dataclass
class Watch:
    """What this process does, while `case` is set, that no input file may make it do."""

    case: Path | None = None
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.case is None:
            return
        first = arguments[0] if arguments else None
        if event == "open" and isinstance(first, str | bytes) and arguments[2] & _WRITES:
            self._check(first, "writes")
        elif event in (
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.symlink",
            "os.link",
            "os.truncate",
            "os.chmod",
        ):
            for path in arguments[:2] if event == "os.rename" else [arguments[1] if event == "os.symlink" else first]:
                if (
                    isinstance(path, str | bytes | os.PathLike) and arguments[-1] == -1
                ):  # else relative to an open folder
                    self._check(path, event)
        elif event == "subprocess.Popen" and arguments[1][:2] != ["git", "-C"]:
            self.seen.append(f"starts {arguments[1]}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "socket.connect", "pty.spawn"):
            self.seen.append(f"{event} {arguments}")
        elif event == "exec" and getattr(first, "co_filename", "").startswith(str(self.case)):
            self.seen.append(f"runs {first.co_filename}")

    def _check(self, path: str | bytes | os.PathLike, what: str) -> None:
        folder, name = os.path.split(os.fsdecode(path))
        where = os.path.join(os.path.realpath(folder or "."), name)
        allowed = [*(self.case / name for name in WRITABLE), _HOME / "cache", Path(os.devnull)]
        if not any(Path(where).is_relative_to(each) for each in allowed):
            self.seen.append(f"{what} {where}")


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def try_case(kind: Kind, case: Path, watch: Watch, reference: object) -> tuple[str, object]:
    """("succeeded", result), ("refused", line) or ("failed", why)."""
    before, result, code = snapshot(case), None, 0
    watch.case, watch.seen = case, []
    with (case / "tmp" / "log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115

    def main() -> None:
        nonlocal result
        result = kind.run(case)

    try:
        run_stage(main)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        trace = traceback.format_exc()
        print(trace, flush=True)
        at = [line.strip() for line in trace.splitlines() if str(REPOSITORY) in line and ".venv" not in line]
        where = at[-1].replace(str(REPOSITORY) + "/", "") if at else ""
        return "failed", f"traceback: {trace.strip().splitlines()[-1][:300]} ({where})"
    finally:
        watch.case = None
        sys.stdout.flush()
        sys.stderr.flush()
    said = [
        line for line in (case / "tmp" / "log").read_text("utf-8", "replace").split("\n") if line.startswith("error:")
    ]
    if watch.seen:
        return "failed", watch.seen[0]
    after = snapshot(case)
    if changed := [path for path in {**before, **after} if before.get(path) != after.get(path)]:
        return "failed", f"changed beside the run folder: {changed[0]}"
    if any(case.rglob("PWNED")):
        return "failed", "code of the file was run"
    if code == 2 and len(said) == 1:
        clear = said[0].isprintable() and len(said[0]) <= 1000
        return (
            ("refused", said[0])
            if clear
            else ("failed", f"no clear line: {said[0][:300]!r} ({len(said[0])} characters)")
        )
    if code or said:
        return "failed", f"exit code {code}, {len(said)} error lines"
    result = json.loads(json.dumps(result))
    why = kind.wrong(case, result, reference) if reference is not None else None
    return ("failed", f"wrong result: {why}") if why else ("succeeded", result)


def work(name: str, base: Path, numbers: list[int | None], seed: int, reference: object, write: int) -> None:
    """In a process of its own, cases one after the other until one fails: it may have left anything behind. Case None
    is the unmutated file. Each is announced, then its verdict said, in lines of JSON."""
    kind, watch = KINDS[name], Watch()
    sys.addaudithook(watch)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    with open(write, "w", encoding="utf-8") as out:
        for number in numbers:
            print(json.dumps({"begin": number}), file=out, flush=True)
            try:
                case = copy_case(base, _HOME / f"case-{number}")
                if number is not None:
                    mutated(kind, case, random.Random(f"{seed} {name} {number}"))
                os.chdir(case)
                tempfile.tempdir = str(case / "tmp")
                verdict = try_case(kind, case, watch, reference)
            except BaseException:
                verdict = "failed", "the fuzz script itself: " + traceback.format_exc()
            print(json.dumps({"number": number, "verdict": verdict}), file=out, flush=True)
            if verdict[0] == "failed":
                break
            if KEEP is False:
                shutil.rmtree(case)


KEEP = False


class Worker:
    """The parent's side of `work`."""

    def __init__(self, name: str, base: Path, numbers: list, seed: int, reference: object):
        self.numbers, self.current, self.deadline, self.text = numbers, None, time.monotonic() + SECONDS, b""
        self.read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(BaseException):
                work(name, base, numbers, seed, reference, write)
            os._exit(0)
        os.close(write)

    def verdicts(self) -> tuple[list[tuple], bool]:
        """What has been decided since the last call as (number, verdict, what was said), and whether it has ended."""
        found, ended = [], False
        if select.select([self.read], [], [], 0)[0]:
            piece = os.read(self.read, 2**20)
            ended = not piece
            *lines, self.text = (self.text + piece).split(b"\n")
            for line in map(json.loads, lines):
                self.deadline = time.monotonic() + SECONDS
                if "begin" in line:
                    self.current = line["begin"]
                    continue
                self.numbers = self.numbers[1:]
                found.append((line["number"], *line["verdict"]))
                self.current = None
        if not ended and time.monotonic() > self.deadline:
            os.kill(self.pid, signal.SIGKILL)
            found.append((self.current, "failed", f"still at work after {SECONDS} s"))
            self.numbers, ended = self.numbers[1:], True
        elif ended and self.current is not None:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            found.append((self.current, "failed", f"the process ended with {status}"))
            self.numbers = self.numbers[1:]
            self.pid = 0
        if ended:
            os.close(self.read)
            if self.pid:
                os.waitpid(self.pid, 0)
        return found, ended


def fuzz(name: str, base: Path, numbers: list[int], seed: int, workers: int) -> dict[str, list]:
    """Run the cases of a kind. Returns, by verdict, (number, what was said)."""

    def run(cases: list, reference: object, count: int):
        running = [Worker(name, base, cases[first::count], seed, reference) for first in range(min(count, len(cases)))]
        while running:
            select.select([worker.read for worker in running], [], [], 1)
            for worker in list(running):
                found, ended = worker.verdicts()
                yield from found
                if ended:
                    running.remove(worker)
                    if worker.numbers:
                        running.append(Worker(name, base, worker.numbers, seed, reference))

    ((_, verdict, reference),) = run([None], None, 1)
    if verdict != "succeeded":
        raise UserError(f"the unmutated {name} does not pass: {reference}")
    verdicts = {"succeeded": [], "refused": [], "failed": []}
    for number, verdict, said in run(numbers, reference, workers):
        verdicts[verdict].append((number, said))
        if KEEP:
            print((_HOME / f"case-{number}" / "tmp" / "log").read_text("utf-8", "replace"))
        shutil.rmtree(_HOME / f"case-{number}", ignore_errors=True)
    return verdicts


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=KINDS,
        metavar="KIND",
        default=list(KINDS),
        help=f"{', '.join(KINDS)}; default: all",
    )
    parser.add_argument("--count", type=int, default=500, help="cases of each kind; default: 500")
    parser.add_argument("--seed", type=int, default=0, help="of the damage; default: 0")
    parser.add_argument("--case", type=int, help="only this one, by number, with all it prints; default: all")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time; default: 2")
    arguments = parser.parse_args()
    global KEEP
    KEEP, started = arguments.case is not None, time.monotonic()
    numbers = list(range(arguments.count)) if arguments.case is None else [arguments.case]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        prepare(_HOME / "base", [KINDS[name] for name in arguments.kind])
    gc.freeze()  # else every worker copies what it never touches
    print(f"{'input':<22}{'cases':>8}{'succeeded':>12}{'refused':>10}{'failed':>9}{'seconds':>10}", flush=True)
    totals, failures = [0, 0, 0], []
    for name in arguments.kind:
        begun = time.monotonic()
        verdicts = fuzz(name, _HOME / "base", numbers, arguments.seed, arguments.workers)
        counts = [len(found) for found in verdicts.values()]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        seconds = time.monotonic() - begun
        print(f"{name:<22}{sum(counts):>8}{counts[0]:>12}{counts[1]:>10}{counts[2]:>9}{seconds:>10.1f}", flush=True)
        failures += [(name, number, why) for number, why in verdicts["failed"]]
    seconds = time.monotonic() - started
    print(f"{'in all':<22}{sum(totals):>8}{totals[0]:>12}{totals[1]:>10}{totals[2]:>9}{seconds:>10.1f}")
    for name, number, why in failures:
        print(f"failed: --kind {name!r} --seed {arguments.seed} --case {number}: {why}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    try:
        run_stage(main)
    finally:
        os.chdir(REPOSITORY)
        shutil.rmtree(_HOME, ignore_errors=True)
