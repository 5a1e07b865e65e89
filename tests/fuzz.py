"""Damage every kind of input file at random and see how the stages take it. Run by hand:

    FUZZ_CASES=100 python -m pytest -n 2 tests/fuzz.py      # --hypothesis-seed 7: the same cases in every run

Each case copies a small finished run, damages one file in it and calls the script that reads it, in a process of its
own. It must end in success or in one line `error: …` with exit code 2: never in a traceback, after 60 s, with a file
written beside the run folder, with code of the file run, or with a wrong result (KINDS). Files that carry a hash must
give the undamaged result or be refused; numbers that nothing vouches for must give a sound one.
"""

import atexit
import contextlib
import csv
import gc
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # copying cases would take longer than running them
_HOME = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_MEMORY))  # all that is written, the caches of the libraries too
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {"HF_HOME": str(_HOME / "cache"), "MPLCONFIGDIR": str(_HOME / "cache"), "CUDA_VISIBLE_DEVICES": ""}
sys.dont_write_bytecode = True  # a case that imports a script writes nothing

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, run_main, run_script
from damage import BYTES, CSV, JSON, JSON_LINES, NPY, PARQUET, PT, SAFETENSORS, SEALED, YAML, Damage, Format, damage
from hypothesis import HealthCheck, Phase, event, given, settings
from sandbox import WRITABLE, run_case

import finetune.tuning  # noqa: F401  for all the cases, which are forked from this process
from selection.rows.split import row_id, rows_of, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import load_experiment
from selection.run.products import write_json
from selection.scores import coresets as coreset_files
from selection.scores.folder import read_scores

CASES = int(os.environ.get("FUZZ_CASES", "20"))  # of each kind
RATES = (0.3, 0.6)
CONFIG = ("--config_path", "experiment.yaml")
EXPERIMENT = {  # "@" is the case's folder
    "output_dir": "@/run", "small_model": "@/model", "target_model": "@/model", "template": "chatml",
    "dataset": "@/data.jsonl", "eval_size": 0.15, "cutoff_len": 256, "precision": "fp32",
    "selection": {"methods": ["staff"], "rates": RATES, "num_strata": 3, "precision": "fp32", "self_test": 0},
    "training": {"seed": 7, "lora_rank": 2, "max_steps": 1}, "small_training": {"num_train_epochs": 1},
}  # fmt: skip
SMALL, TARGET = "run/scores/small", "run/scores/target"
MANIFEST, VERIFICATION, SPLIT = f"{SMALL}/manifest.json", "run/verification.json", "run/data/split.json"
STAFF = "run/coresets/staff-0.3.json"


# What reads the file: called in the case's folder; gives something that JSON can hold


def stage(script: str, *arguments: object) -> str:
    """What a script prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_main(script, *arguments)
    return printed.getvalue()


def coresets(folder: str) -> dict:
    found = {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    return {name: {k: v for k, v in record.items() if k != "code_version"} for name, record in found.items()}


def run_experiment() -> dict:
    stage("scripts.costs", *CONFIG)
    shutil.rmtree("run/coresets")
    stage("selection.coreset", *CONFIG)
    return coresets("run/coresets")


def run_data(name: str) -> list:
    changes = [f"dataset={json.dumps(os.path.abspath(name))}", f"output_dir={json.dumps(str(Path.cwd() / 'out'))}"]
    experiment = load_experiment("experiment.yaml", changes)
    training_split(experiment)
    return sorted(row_id(row) for part in ("train", "eval") for row in rows_of(experiment, part))


def run_cut(scores: str, *more: str) -> dict:
    sizes = ("--rate", *RATES, "--num_strata", 3)
    stage("selection.coreset", "--scores", scores, *more, *sizes, "--out", "out")
    return coresets("out")


def run_select(file: str) -> list:
    """The rows that the target would be tuned on."""
    chosen = []
    tuning = importlib.import_module("finetune.finetune-select")
    tuning.tune_once = lambda experiment, model, name, rows, *_, **__: chosen.extend(map(row_id, rows))
    stage("finetune.finetune-select", *CONFIG, "--select_path", file)
    return sorted(map(run_split().index, chosen))


def run_tokenised() -> list:
    experiment = load_experiment("experiment.yaml")
    rows = tokenised_rows(experiment, experiment.target_model, "train", training_split(experiment).rows)
    return [rows[key][:] for key in ("input_ids", "labels")]


def run_split() -> list:
    return training_split(load_experiment("experiment.yaml")).ids


def run_scores(tuned: bool = False) -> list:
    """The speculative model's scores, made twice: weights that no file gives would be drawn anew each time."""
    changes = [f"output_dir={Path.cwd()}/out"] + ["small_training.num_train_epochs=0"] * (not tuned)
    if tuned:
        shutil.copytree("run/small", "out/small")
    made = []
    for seed in (1, 2):
        shutil.rmtree("out/scores", ignore_errors=True)
        torch.manual_seed(seed)
        stage("selection.effort_score", *CONFIG, *(word for change in changes for word in ("--set", change)))
        made.append(read_scores(Path("out/scores/small")).effort.tolist())
    return made


# What is wrong with a result: called in the case's folder with the result and that of the undamaged file


def same(result: object, reference: object) -> str | None:
    return None if result == reference else "another result than from the undamaged file"


def anything(result: object, reference: object) -> None:
    """A tokenizer is what its files say; check_tokenizer refuses one that loses text."""


def sound_coresets(result: dict, reference: object) -> str | None:
    """Distinct rows of the split, as many as the rate asks for."""
    for name, record in result.items():
        rows, count = record["indices"], record["num_rows"]
        if rows != sorted(set(rows)) or not rows or rows[0] < 0 or rows[-1] >= count:
            return f"{name}: not rows of the split"
        if len(rows) != max(1, math.floor(record["rate"] * count + 1e-9)):
            return f"{name}: {len(rows)} rows at rate {record['rate']} of {count}"
    return None


def plain_numbers(result: str, reference: object) -> str | None:
    """No figure that is none or below zero."""
    found = re.search(r"\b(nan|inf|None)\b|(?<![\w.])-[\d.]*[1-9]", result)
    return f"prints {found[0]}" if found else None


def sound_rows(name: str, result: list, reference: object) -> str | None:
    """Where plain Python finds rows of text in the file, the split has just these."""
    path = Path(name)
    try:
        text = "" if path.suffix == ".parquet" else path.read_bytes().decode("utf-8")  # line ends as they are
        rows = {
            ".parquet": lambda: pd.read_parquet(path).to_dict("records"),
            ".csv": lambda: list(csv.DictReader(io.StringIO(text, newline=""), strict=True)),
            ".jsonl": lambda: [json.loads(line) for line in text.split("\n") if line.strip()],
        }[path.suffix]()
        ids = sorted(row_id({key: row[key] + "" for key in row}) for row in rows)
    except Exception:  # plain Python does not read it
        return None
    columns = {"id", "instruction", "input", "output"}
    return "other rows than the file's" if ids != result and all(set(row) == columns for row in rows) else None


def listed_rows(result: list, reference: list) -> str | None:
    """A coreset that has lost its hashes is one from elsewhere: its row numbers are all there is."""
    record = json.loads(Path(STAFF).read_text())
    hashed = record.get("ids") and record.get("data_fingerprint")
    return same(result, reference if hashed else sorted(record["indices"]))


def listed_in_pt(result: list, reference: object) -> str | None:
    return same(result, sorted(map(int, torch.load("rows.pt", weights_only=True))))


def repeats(result: list, reference: list) -> str | None:
    return None if result[0] == result[1] else "weights that the file does not give were drawn at random"


class Kind(NamedTuple):
    """An input file, what reads it, and what can be wrong with the result."""

    file: str
    format: Format
    run: Callable[[], object]
    wrong: Callable[[object, object], str | None]


def data(name: str, format: Format) -> Kind:
    return Kind(name, format, partial(run_data, name), partial(sound_rows, name))


_folders = partial(run_cut, SMALL, "--target_scores", TARGET)
_methods = partial(_folders, "--method", "staff", "length")
_verified = partial(run_cut, SMALL, "--verification", VERIFICATION)
_parquet = partial(run_cut, "scores.parquet", "--target_scores", "scores.csv")
_csv = partial(run_cut, "scores.csv", "--target_scores", "scores.parquet")
_moderate = partial(run_cut, "scores.csv", "--method", "moderate", "--features", "features.npy")
_costs, _tuned = partial(stage, "scripts.costs", *CONFIG, "--tuned"), partial(run_scores, tuned=True)
KINDS = {
    "experiment": Kind("experiment.yaml", YAML, run_experiment, sound_coresets),
    "data.jsonl": data("data.jsonl", JSON_LINES),
    "data.csv": data("data.csv", CSV),
    "data.parquet": data("data.parquet", PARQUET),
    "score part": Kind(f"{SMALL}/part-*", PARQUET, _methods, same),
    "manifest": Kind(MANIFEST, JSON, _folders, same),
    "manifest, sealed": Kind(MANIFEST, SEALED, _folders, sound_coresets),
    "scores.parquet": Kind("scores.parquet", PARQUET, _parquet, sound_coresets),
    "scores.csv": Kind("scores.csv", CSV, _csv, sound_coresets),
    "features.npy": Kind("features.npy", NPY, _moderate, sound_coresets),
    "verification": Kind(VERIFICATION, JSON, _verified, same),
    "verification, sealed": Kind(VERIFICATION, SEALED, _verified, sound_coresets),
    "coreset.json": Kind(STAFF, JSON, partial(run_select, STAFF), listed_rows),
    "coreset.pt": Kind("rows.pt", PT, partial(run_select, "rows.pt"), listed_in_pt),
    "costs": Kind("run/costs.jsonl", JSON_LINES, _costs, plain_numbers),
    "draft": Kind("model/draft.json", JSON, _costs, plain_numbers),
    "hashes": Kind("run/hashes.json", JSON, _costs, same),
    "split": Kind(SPLIT, JSON, run_split, same),
    "split, sealed": Kind(SPLIT, SEALED, run_split, anything),
    "split's rows": Kind("run/data/train.arrow", BYTES, run_split, same),
    "dataset_info": Kind("run/data/dataset_info.json", JSON, run_tokenised, same),
    "metrics": Kind("run/eval/staff-0.3/metrics.json", JSON, _costs, plain_numbers),
    "config": Kind("model/config.json", JSON, run_scores, repeats),
    "weights": Kind("model/model.safetensors", SAFETENSORS, run_scores, repeats),
    "made_from": Kind("run/small/made_from.json", JSON, _tuned, repeats),
    "adapter_config": Kind("run/small/adapter_config.json", JSON, _tuned, repeats),
    "adapter": Kind("run/small/adapter_model.safetensors", SAFETENSORS, _tuned, repeats),
    "tokenizer": Kind("model/tokenizer.json", JSON, run_tokenised, anything),
    "tokenizer_config": Kind("model/tokenizer_config.json", JSON, run_tokenised, anything),
}


def copy_case(base: Path, case: Path) -> Path:
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(base, case, symlinks=True, copy_function=shutil.copyfile)
    (case / "experiment.yaml").write_text(json.dumps(EXPERIMENT).replace("@", str(case)))
    for name in WRITABLE:
        (case / name).mkdir(exist_ok=True)
    return case


@pytest.fixture(scope="session")
def finished() -> Path:
    """Data, a model, a selection, and every other file that KINDS names."""
    base = _HOME / "base"
    lines = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines[:300]), key=lambda row: len(row["output"]))[:14]
    (base / "around").mkdir(parents=True)
    (base / "around" / "canary.txt").write_text("sings")
    data = pd.DataFrame(rows)
    data.to_json(base / "data.jsonl", orient="records", lines=True, force_ascii=False)
    data.to_csv(base / "data.csv", index=False)
    data.to_parquet(base / "data.parquet")
    run_script("scripts/make_tiny_model.py", "--out", base / "model")
    work = copy_case(base, _HOME / "making")
    for script in ("finetune/finetune", "selection/effort_score", "selection/verify", "selection/coreset"):
        run_script(f"{script}.py", *CONFIG, cwd=work)

    scores = read_scores(work / SMALL)
    table = pd.DataFrame({"index": scores.index, "effort": scores.effort})
    table.to_parquet(work / "scores.parquet")
    table.to_csv(work / "scores.csv", index=False)
    np.save(work / "features.npy", np.random.default_rng(0).normal(size=(len(table), 3)).astype("f4"))
    torch.save([0, 2, 5], work / "rows.pt")
    paid = {"tokens": 1000, "parameters": 1000, "seconds": 1.0}
    (work / "model" / "draft.json").write_text(json.dumps({"target": "model", "calibration_ids": [], "cost": paid}))
    with (work / "run" / "costs.jsonl").open("a") as file:
        cost = {"stage": "target tuning", "what": "staff-0.3", "tokens": 1000, "seconds": 9.5, "samples": 12}
        file.write(json.dumps(cost) + "\n")
    metrics = {"rouge-1": 60, "rouge-2": 20, "rouge-l": 50.5, "bleu-4": 9, "samples": 2, "code_version": "1"}
    write_json(work / "run/eval/staff-0.3/metrics.json", metrics)
    coreset_files.code_version = lambda: "fuzz"  # asks git each time
    gc.freeze()  # else every case copies what it never touches
    return work


def put(found: Damage, path: Path, around: Path) -> None:
    shutil.copy(path, around / "linked")
    path.unlink()
    if found.content is not None:
        path.write_bytes(found.content)
    elif found.what == "a folder":
        path.mkdir()
    elif found.what != "nothing":
        path.symlink_to(path.name if "itself" in found.what else around / "linked")


@pytest.mark.parametrize("name", KINDS)
def test_damage_ends_in_one_line_or_in_a_sound_result(name, finished):
    kind, case = KINDS[name], _HOME / "case"
    content = next(copy_case(finished, case).glob(kind.file)).read_bytes()
    verdict, reference = run_case(kind.run, lambda result: None, case, _HOME / "cache")
    assert verdict == "succeeded", reference

    options = {"deadline": None, "database": None, "suppress_health_check": HealthCheck}

    @settings(max_examples=CASES, phases=[Phase.generate], **options)
    @given(damage(content, kind.format))
    def cases(found: Damage) -> None:
        put(found, next(copy_case(finished, case).glob(kind.file)), case / "around")
        verdict, said = run_case(kind.run, lambda result: kind.wrong(result, reference), case, _HOME / "cache")
        event(verdict)
        assert verdict != "failed", said

    cases()
    shutil.rmtree(case)
