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
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # copying cases would take longer than running them
_HOME = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_MEMORY))  # all that is written, the caches of the libraries too
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {"HF_HOME": str(_HOME / "cache"), "MPLCONFIGDIR": str(_HOME / "cache"), "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, run_script
from damage import BYTES, CSV, JSON, JSON_LINES, NPY, PARQUET, PT, SAFETENSORS, SEALED, YAML, Damage, Format, damage
from hypothesis import HealthCheck, Phase, event, given, settings
from sandbox import WRITABLE, in_fork, run_case

from selection.method.effort import EffortScorer
from selection.rows.split import row_id, rows_of, training_split
from selection.rows.tokens import tokenised_rows
from selection.run import model_folder
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.scores import coresets as coreset_files
from selection.scores import models
from selection.scores.folder import read_scores

CASES = int(os.environ.get("FUZZ_CASES", "20"))  # of each kind
RATES = (0.3, 0.6)
CONFIG = ("--config_path", "experiment.yaml")
EXPERIMENT = {  # "@" is the case's folder
    "output_dir": "@/run", "small_model": "@/model", "target_model": "@/model", "template": "chatml",
    "dataset": "@/data.jsonl", "eval_size": 0.15, "cutoff_len": 256, "precision": "fp32",
    "selection": {"num_strata": 3, "verify_per_stratum": 1, "rates": RATES, "precision": "fp32", "self_test": 0},
    "training": {"seed": 7, "lora_rank": 2}, "small_training": {"num_train_epochs": 0},
    "target_training": {"num_train_epochs": 1, "max_steps": 1}, "evaluation": {"max_new_tokens": 2},
}  # fmt: skip
GRID = {"tasks": {"biology": {"config": "@/experiment.yaml", "set": ["cutoff_len=200"]}}}
GRID |= {"methods": ["full", "random", "staff"], "rates": [0.3], "seeds": [1]}
_SCRIPTS = ("scripts/costs.py", "selection/coreset.py", "selection/effort_score.py", "finetune/finetune-select.py")
_SCRIPTS += ("finetune/eval.py", "scripts/paper/reproduce.py", "scripts/paper/tables.py")


@cache
def script(path: str) -> dict:
    """A script's globals; its imports stay with this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path.copy())
        return runpy.run_path(str(REPOSITORY / path), run_name="fuzz")


def stage(path: str, *arguments: object, **replaced: Callable) -> str:
    """Run a script as the command line would, after some functions that it imported were replaced; what it prints."""
    sys.argv = [path, *map(str, arguments)]
    main = script(path)["main"]
    main.__globals__.update(replaced)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue()


def coresets(folder: str) -> dict:
    found = {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    return {name: {k: v for k, v in record.items() if k != "code_version"} for name, record in found.items()}


def run_experiment() -> dict:
    stage("scripts/costs.py", *CONFIG)
    shutil.rmtree("run/coresets")
    stage("selection/coreset.py", *CONFIG)
    return coresets("run/coresets")


def run_grid() -> list:
    from scripts.paper import cells

    jobs = []
    cells.run_jobs = lambda given, *_: jobs.extend(given)
    stage("scripts/paper/reproduce.py", "--config", "grid.yaml", "--results", "out", "--runs", "run/grid")
    return [[job.name, [command[0] for command in job.commands]] for job in jobs]


def run_data(name: str) -> list:
    changes = [f"dataset={json.dumps(os.path.abspath(name))}", f"output_dir={json.dumps(str(Path.cwd() / 'out'))}"]
    experiment = load_experiment("experiment.yaml", changes)
    training_split(experiment)
    return sorted(row_id(row) for part in ("train", "eval") for row in rows_of(experiment, part))


def run_cut(scores: str, target: str | None, *more: str) -> dict:
    given = ["--target_scores", target] if target else []
    sizes = ("--rate", *RATES, "--num_strata", 3, "--verify_per_stratum", 1)
    stage("selection/coreset.py", "--scores", scores, *given, *more, *sizes, "--out", "out")
    return coresets("out")


def run_select(file: str) -> list:
    chosen = []

    def tune_once(experiment, model, name, rows, *_, **__) -> None:
        chosen.extend(map(row_id, rows))

    stage("finetune/finetune-select.py", *CONFIG, "--select_path", file, tune_once=tune_once)
    return sorted(map(run_split().index, chosen))


def run_plan() -> list:
    changes = ("--set", f"output_dir={Path.cwd()}/begun", "--set", "selection.tokens_per_batch=150")
    stage("selection/effort_score.py", *CONFIG, *changes)
    return read_scores(Path("begun/scores/small")).of_all_rows().tolist()


def run_cells() -> str:
    from matplotlib.figure import Figure

    from scripts.paper.cells import read_cells, write_cells

    write_cells(Path("out/cells.csv"), read_cells(Path("run/cells.csv")), [])
    return stage("scripts/paper/tables.py", "run", draw_curves=lambda *_: Figure())


def run_tokenised() -> list:
    experiment = load_experiment("experiment.yaml")
    rows = tokenised_rows(experiment, experiment.target_model, "train", training_split(experiment).rows)
    return [rows[key][:] for key in ("input_ids", "labels")]


def run_split() -> list:
    return training_split(load_experiment("experiment.yaml")).ids


def run_tuned() -> list:
    """A tuned target that is there already is reused, never tuned again."""
    stage("finetune/finetune-select.py", *CONFIG, "--select_path", STAFF)
    stage("finetune/eval.py", *CONFIG)
    return sorted(path.name for path in Path("run/target").iterdir())


def run_model(tuned: str | None = None) -> list:
    """Scores of two rows, twice: weights that no file gives would be drawn anew each time."""
    path, scores = model_folder.model_path(str(Path.cwd() / "model")), []
    models.parameters_of(path)
    if tuned:
        model_folder.check_base(Path(tuned), path)
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = models.load_for_scoring(path, Path(tuned) if tuned else None, "fp32")
        if model.get_input_embeddings().num_embeddings <= 90:
            raise UserError("token out of range (the stages say so)")
        ids = [list(range(40, 60)), list(range(80, 91))]
        efforts = EffortScorer(model).score(ids, [[-100] * 5 + row[5:] for row in ids])["effort"]
        if not efforts.isfinite().all():
            raise UserError("a score is not finite (the stages say so)")
        scores.append(efforts.tolist())
    return scores


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


def sound_jobs(result: list, reference: object) -> str | None:
    odd = [command for _, commands in result for command in commands if not (REPOSITORY / command).is_file()]
    return f"runs {odd[0]}" if odd else None


def plain_numbers(result: str, reference: object) -> str | None:
    """No figure that is none or below zero, in the last part of what is printed."""
    found = re.search(r"\b(nan|inf|None)\b|(?<![\w.])-[\d.]*[1-9]", result.split("\n\n")[-1])
    return f"prints {found[0]}" if found else None


def finite_numbers(result: str, reference: object) -> str | None:
    """No figure that is none, unless the word is a name in the file itself."""
    words = Path("run/cells.csv").read_text()
    found = [word for word in ("nan", "inf") if re.search(rf"\b{word}\b", result) and word not in words]
    return f"prints {found[0]}" if found else None


def sound_rows(name: str, result: list, reference: object) -> str | None:
    """Where plain Python finds rows of text in the file, the split has just these."""
    path = Path(name)
    try:
        text = "" if path.suffix == ".parquet" else path.read_bytes().decode("utf-8")  # line ends as they are
        rows = {
            ".parquet": lambda: pd.read_parquet(path).to_dict("records"),
            ".csv": lambda: list(csv.DictReader(io.StringIO(text, newline=""), strict=True)),
            ".json": lambda: json.loads(text),
            ".jsonl": lambda: [json.loads(line) for line in text.split("\n") if line.strip()],
        }[path.suffix]()
        ids = sorted(row_id({key: row[key] + "" for key in row}) for row in rows)
    except Exception:  # plain Python does not read it
        return None
    columns = {"id", "instruction", "input", "output"}
    return "other rows than the file's" if ids != result and all(set(row) == columns for row in rows) else None


def as_listed(result: list, reference: object) -> str | None:
    rows = torch.load("rows.pt", weights_only=True)
    return None if result == sorted(map(int, rows)) else "other rows than the file's"


def same_or_without_hashes(result: list, reference: list) -> str | None:
    """A coreset that has lost its hashes is one from elsewhere: its row numbers are all there is."""
    record = json.loads(Path(STAFF).read_text())
    if record.get("ids") and record.get("data_fingerprint"):
        return same(result, reference)
    return None if result == sorted(record["indices"]) else "other rows than its indices"


def close(result: list, reference: list) -> str | None:
    """A score's last bits depend on what shares its batch."""
    return None if np.allclose(result, reference, rtol=1e-4) else "other scores"


def repeats(result: list, reference: list) -> str | None:
    return None if result[0] == result[1] else "weights that the file does not give were drawn at random"


class Kind(NamedTuple):
    """An input file. `run` is called in the case's folder and gives something that JSON can hold."""

    file: str
    format: Format
    run: Callable[[], object]
    wrong: Callable[[object, object], str | None]
    tuned: bool = False  # needs a tuned target


def data(name: str, format: Format) -> Kind:
    return Kind(name, format, partial(run_data, name), partial(sound_rows, name))


SMALL, TARGET, STAFF, TUNED = (
    "run/scores/small",
    "run/scores/target",
    "run/coresets/staff-0.3.json",
    "run/target/staff-0.3",
)
MANIFEST, PLAN, VERIFICATION = f"{SMALL}/manifest.json", "begun/scores/small/plan.json", "run/verification.json"
SPLIT, STAFF = "run/data/split.json", "run/coresets/staff-0.3.json"
_both, _verified = partial(run_cut, SMALL, TARGET), partial(run_cut, SMALL, None, "--verification", VERIFICATION)
_methods = partial(run_cut, SMALL, TARGET, "--method", "staff", "length")
_parquet, _csv = partial(run_cut, "scores.parquet", "scores.csv"), partial(run_cut, "scores.csv", "scores.parquet")
_moderate = partial(run_cut, "scores.csv", None, "--method", "moderate", "--features", "features.npy")
_costs, _metrics = partial(stage, "scripts/costs.py", *CONFIG), partial(stage, "finetune/eval.py", *CONFIG)
_adapted = partial(run_model, TUNED)
KINDS = {
    "experiment": Kind("experiment.yaml", YAML, run_experiment, sound_coresets),
    "grid": Kind("grid.yaml", YAML, run_grid, sound_jobs),
    "data.json": data("data.json", JSON),
    "data.jsonl": data("data.jsonl", JSON_LINES),
    "data.csv": data("data.csv", CSV),
    "data.parquet": data("data.parquet", PARQUET),
    "score part": Kind(f"{SMALL}/part-*", PARQUET, _methods, same),
    "score part, target": Kind(f"{TARGET}/part-*", PARQUET, _both, same),
    "manifest": Kind(MANIFEST, JSON, _both, same),
    "manifest, sealed": Kind(MANIFEST, SEALED, _both, sound_coresets),
    "score plan": Kind(PLAN, JSON, run_plan, close),
    "score plan, sealed": Kind(PLAN, SEALED, run_plan, close),
    "scores.parquet": Kind("scores.parquet", PARQUET, _parquet, sound_coresets),
    "scores.csv": Kind("scores.csv", CSV, _csv, sound_coresets),
    "features.npy": Kind("features.npy", NPY, _moderate, sound_coresets),
    "verification": Kind(VERIFICATION, JSON, _verified, same),
    "verification, sealed": Kind(VERIFICATION, SEALED, _verified, sound_coresets),
    "coreset.json": Kind(STAFF, JSON, partial(run_select, STAFF), same_or_without_hashes),
    "coreset.pt": Kind("rows.pt", PT, partial(run_select, "rows.pt"), as_listed),
    "costs": Kind("run/costs.jsonl", JSON_LINES, _costs, plain_numbers),
    "draft": Kind("model/draft.json", JSON, _costs, plain_numbers),
    "hashes": Kind("run/hashes.json", JSON, _costs, same),
    "cells": Kind("run/cells.csv", CSV, run_cells, finite_numbers),
    "split": Kind(SPLIT, JSON, run_split, same),
    "split, sealed": Kind(SPLIT, SEALED, run_split, anything),
    "split's rows": Kind("run/data/train.arrow", BYTES, run_split, same),
    "dataset_info": Kind("run/data/dataset_info.json", JSON, run_tokenised, same),
    "made_from": Kind(f"{TUNED}/made_from.json", JSON, run_tuned, same, tuned=True),
    "metrics": Kind("run/eval/staff-0.3/metrics.json", JSON, _metrics, plain_numbers, tuned=True),
    "config": Kind("model/config.json", JSON, run_model, repeats),
    "weights": Kind("model/model.safetensors", SAFETENSORS, run_model, repeats),
    "adapter_config": Kind(f"{TUNED}/adapter_config.json", JSON, _adapted, repeats, tuned=True),
    "adapter": Kind(f"{TUNED}/adapter_model.safetensors", SAFETENSORS, _adapted, repeats, tuned=True),
    "tokenizer": Kind("model/tokenizer.json", JSON, run_tokenised, anything),
    "tokenizer_config": Kind("model/tokenizer_config.json", JSON, run_tokenised, anything),
}


def copy_case(base: Path, case: Path) -> Path:
    shutil.copytree(base, case, symlinks=True, copy_function=shutil.copyfile)
    for name, value in (("experiment.yaml", EXPERIMENT), ("grid.yaml", GRID)):
        (case / name).write_text(json.dumps(value).replace("@", str(case)))
    for name in WRITABLE:
        (case / name).mkdir(exist_ok=True)
    return case


@pytest.fixture(scope="session")
def finished() -> Path:
    """Data, model, a selection, an interrupted scoring run, and every other file that KINDS names."""
    base = _HOME / "base"
    lines = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines[:300]), key=lambda row: len(row["output"]))[:14]
    (base / "around").mkdir(parents=True)
    (base / "around" / "canary.txt").write_text("sings")
    (base / "data.json").write_text(json.dumps(rows))
    data = pd.DataFrame(rows)
    data.to_json(base / "data.jsonl", orient="records", lines=True, force_ascii=False)
    data.to_csv(base / "data.csv", index=False)
    data.to_parquet(base / "data.parquet")
    run_script("scripts/make_tiny_model.py", "--out", base / "model")
    work = copy_case(base, _HOME / "making")
    for command in (["effort_score"], ["verify", "--set", "selection.verify=all"], ["verify"], ["coreset"]):
        run_script(f"selection/{command[0]}.py", *CONFIG, *command[1:], cwd=work)
    in_fork(_interrupted, work)
    assert (work / PLAN).exists()

    scores = read_scores(work / SMALL)
    table = pd.DataFrame({"index": scores.index, "effort": scores.effort})
    table.to_parquet(work / "scores.parquet")
    table.to_csv(work / "scores.csv", index=False)
    np.save(work / "features.npy", np.random.default_rng(0).normal(size=(len(table), 3)).astype("f4"))
    torch.save([0, 2, 5], work / "rows.pt")
    paid = {"tokens": 1000, "parameters": 1000, "seconds": 1.0}
    (work / "model" / "draft.json").write_text(json.dumps({"target": "model", "calibration_ids": [], "cost": paid}))
    with (work / "run" / "costs.jsonl").open("a") as file:
        cost = {"stage": "target tuning", "what": "full", "tokens": 1000, "seconds": 9.5, "samples": 12}
        file.write(json.dumps(cost) + "\n")
    _write_cells(work / "run" / "cells.csv")
    for path in _SCRIPTS:  # once, for all the cases that are forked from this process
        script(path)
    coreset_files.code_version = lambda: "fuzz"  # asks git each time
    gc.freeze()  # else every case copies what it never touches
    return work


def _interrupted(case: Path) -> None:
    score, batches = EffortScorer.score, iter([1])

    def breaking_off(*arguments):
        next(batches)  # StopIteration at the second
        return score(*arguments)

    EffortScorer.score = breaking_off
    os.chdir(case)
    run_plan()


def _write_cells(path: Path) -> None:
    """Full data, Random and STAFF of a committed grid, with three evaluation rows."""
    cells = pd.read_csv(REPOSITORY / "data/results/smollm2_cpu/cells.csv", dtype=str, keep_default_na=False)
    cells = cells[cells.method.isin(("full", "random", "staff")) & (cells.rate != "0.1")].assign(eval_rows="3")
    for column in [name for name in cells if name.endswith("_by_sample")]:
        values = cells[column].str.split().str[:3]
        cells[column] = values.str.join(" ")
        if (metric := column.removesuffix("_by_sample")) in ("rouge_l", "bleu_4"):
            cells[metric] = values.map(lambda each: f"{np.mean(list(map(float, each))):.4f}")
    cells.to_csv(path, index=False)


@pytest.fixture(scope="session")
def tuned(finished) -> Path:
    work = copy_case(finished, _HOME / "tuning")
    run_script("finetune/finetune-select.py", *CONFIG, "--select_path", STAFF, cwd=work)
    run_script("finetune/eval.py", *CONFIG, cwd=work)
    return work


def put(found: Damage, path: Path, around: Path) -> None:
    if found.content is not None:
        path.write_bytes(found.content)
        return
    shutil.copy(path, around / "linked")
    path.unlink()
    if found.what == "a folder":
        path.mkdir()
    elif found.what != "nothing":
        targets = {"a link to nothing": around / "nowhere", "a link to itself": path.name}
        path.symlink_to(targets.get(found.what, around / "linked"))


@pytest.mark.parametrize("name", KINDS)
def test_damage_ends_in_one_line_or_in_a_sound_result(name, request):
    kind, case = KINDS[name], _HOME / "case"
    base = request.getfixturevalue("tuned" if kind.tuned else "finished")
    shutil.rmtree(case, ignore_errors=True)
    content = next(copy_case(base, case).glob(kind.file)).read_bytes()
    verdict, reference = in_fork(run_case, kind.run, lambda result: None, case, _HOME / "cache")
    assert verdict == "succeeded", reference

    options = {"deadline": None, "database": None, "suppress_health_check": HealthCheck}

    @settings(max_examples=CASES, phases=[Phase.generate], **options)
    @given(damage(lambda: content, kind.format))
    def cases(found: Damage) -> None:
        shutil.rmtree(case, ignore_errors=True)
        copy_case(base, case)
        put(found, next(case.glob(kind.file)), case / "around")
        verdict, said = in_fork(run_case, kind.run, lambda result: kind.wrong(result, reference), case, _HOME / "cache")
        event(verdict)
        assert verdict != "failed", said

    cases()
    shutil.rmtree(case)
