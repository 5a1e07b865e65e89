"""Damage every kind of input file at random and see how the stages take it. Run by hand:

    FUZZ_CASES=100 python -m pytest -n 2 tests/fuzz.py      # --hypothesis-seed 7: the same cases in every run

Each case copies a small finished run, damages one file in it and calls what reads it, in a process of its own. It must
end in success or in one line `error: …` with exit code 2: never in a traceback, after 60 s, with a file written beside
the run folder, with code of the file run, or with a wrong result (KINDS). Files that carry a hash must give the
undamaged result or be refused; numbers that nothing vouches for must give a sound one.
"""

import atexit
import contextlib
import gc
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # copying cases would take longer than running them
_HOME = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_MEMORY))  # all that is written, the caches of the libraries too
_CASE = _HOME / "case"
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {"HF_HOME": str(_HOME / "cache"), "CUDA_VISIBLE_DEVICES": ""}
sys.dont_write_bytecode = True  # a case that imports a script writes nothing

from selection.run.ending import run_stage

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, biology, run_main
from damage import BYTES, CSV, JSON, JSON_LINES, NPY, PARQUET, PT, SAFETENSORS, SEALED, YAML, Damage, damage
from hypothesis import HealthCheck, Phase, given, settings

from selection.rows.split import row_id, rows_of, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import load_experiment
from selection.run.products import write_json
from selection.scores import coresets as coreset_files
from selection.scores.folder import read_scores

CASES = int(os.environ.get("FUZZ_CASES", "20"))  # of each kind
PLAIN = settings(database=None, deadline=None, suppress_health_check=HealthCheck)
SECONDS = 60  # of one case at most
MEMORY = 6 * 2**30  # bytes that a case may ask for beyond what it starts with
WRITABLE = ("run", "out", "tmp")  # folders of a case in which a stage may write
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
    return {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


def run_experiment() -> dict:
    shutil.rmtree("run/coresets")
    stage("selection.coreset", *CONFIG)
    return coresets("run/coresets")


def run_data(name: str) -> list:
    changes = [f"dataset={json.dumps(os.path.abspath(name))}", f"output_dir={json.dumps(str(Path.cwd() / 'out'))}"]
    experiment = load_experiment("experiment.yaml", changes)
    training_split(experiment)
    return sorted(row_id(row) for part in ("train", "eval") for row in rows_of(experiment, part))


def run_cut(scores: str, *more: str) -> dict:
    stage("selection.coreset", "--scores", scores, *more, "--rate", *RATES, "--num_strata", 3, "--out", "out")
    return coresets("out")


def run_select(file: str) -> list:
    split, coreset = training_split(load_experiment("experiment.yaml")), coreset_files.read_coreset(Path(file))
    coreset_files.check_fits(coreset, split.ids, split.fingerprint, file)
    return coreset.indices.tolist()


def run_tokenised() -> list:
    experiment = load_experiment("experiment.yaml")
    rows = tokenised_rows(experiment, experiment.target_model, "train", training_split(experiment).rows)
    return [rows[key][:] for key in ("input_ids", "labels")]


def run_split() -> list:
    return training_split(load_experiment("experiment.yaml")).ids


def run_scores(*changes: str) -> list:
    """The speculative model's scores, made twice: weights that no file gives would be drawn anew each time."""
    made, where = [], ["--set", f"output_dir={Path.cwd()}/out"]
    shutil.copytree("run/small", "out/small")
    for seed in (1, 2):
        shutil.rmtree("out/scores", ignore_errors=True)
        torch.manual_seed(seed)
        stage("selection.effort_score", *CONFIG, *where, *changes)
        made.append(read_scores(Path("out/scores/small")).effort.tolist())
    return made


# What is wrong with a result: called in the case's folder with the result and that of the undamaged file


def same(result: object, reference: object) -> str | None:
    return None if result == reference else "another result than from the undamaged file"


def anything(result: object, reference: object) -> None:
    """A tokenizer, a bare list and a table are what their files say."""


def sound_coresets(result: dict, reference: object) -> str | None:
    """Distinct rows of the split, as many as the rate asks for."""
    for name, record in result.items():
        rows, count = record["indices"], record["num_rows"]
        size = max(1, math.floor(record["rate"] * count + 1e-9))
        if rows != sorted(set(rows)) or len(rows) != size or rows[0] < 0 or rows[-1] >= count:
            return f"{name}: not {size} rows of the split"
    return None


def plain_numbers(result: str, reference: object) -> str | None:
    """No figure that is none or below zero."""
    found = re.search(r"\b(nan|inf|None)\b|(?<![\w.])-[\d.]*[1-9]", result)
    return f"prints {found[0]}" if found else None


def sound_rows(name: str, result: list, reference: object) -> str | None:
    """Where plain Python finds rows of text in the file, the split has just these."""
    try:
        if name.endswith("parquet"):
            rows = pd.read_parquet(name).to_dict("records")
        else:
            rows = [json.loads(line) for line in Path(name).read_bytes().decode().split("\n") if line.strip()]
        ids = sorted(row_id({key: row[key] + "" for key in row}) for row in rows)
    except Exception:  # plain Python does not read it
        return None
    as_made = all(set(row) == {"id", "instruction", "input", "output"} for row in rows)
    return same(result, ids) if as_made else None


def listed_rows(result: list, reference: list) -> str | None:
    """A coreset that has lost its hashes is one from elsewhere: its row numbers are all there is."""
    record = json.loads(Path(STAFF).read_text())
    hashed = record.get("ids") and record.get("data_fingerprint")
    return same(result, reference if hashed else sorted(record["indices"]))


def repeats(result: list, reference: list) -> str | None:
    return None if result[0] == result[1] else "weights that the file does not give were drawn at random"


_folders = partial(run_cut, SMALL, "--target_scores", TARGET)
_methods = partial(_folders, "--method", "staff", "length")
_verified = partial(run_cut, SMALL, "--verification", VERIFICATION)
_parquet = partial(run_cut, "scores.parquet", "--target_scores", "scores.csv")
_csv = partial(run_cut, "scores.csv", "--target_scores", "scores.parquet")
_moderate = partial(run_cut, "scores.csv", "--method", "moderate", "--features", "features.npy")
_costs = partial(stage, "scripts.costs", *CONFIG, "--tuned")
_untuned = partial(run_scores, "--set", "small_training.num_train_epochs=0")
KINDS = {  # a file, its format, what reads it, and what can be wrong with the result
    "experiment": ("experiment.yaml", YAML, run_experiment, sound_coresets),
    "data.jsonl": ("data.jsonl", JSON_LINES, partial(run_data, "data.jsonl"), partial(sound_rows, "data.jsonl")),
    "data.csv": ("data.csv", CSV, partial(run_data, "data.csv"), anything),
    "data.parquet": ("data.parquet", PARQUET, partial(run_data, "data.parquet"), partial(sound_rows, "data.parquet")),
    "score part": (f"{SMALL}/part-*", PARQUET, _methods, same),
    "manifest": (MANIFEST, JSON, _folders, same),
    "manifest, sealed": (MANIFEST, SEALED, _folders, sound_coresets),
    "scores.parquet": ("scores.parquet", PARQUET, _parquet, sound_coresets),
    "scores.csv": ("scores.csv", CSV, _csv, sound_coresets),
    "features.npy": ("features.npy", NPY, _moderate, sound_coresets),
    "verification": (VERIFICATION, JSON, _verified, same),
    "verification, sealed": (VERIFICATION, SEALED, _verified, sound_coresets),
    "coreset.json": (STAFF, JSON, partial(run_select, STAFF), listed_rows),
    "coreset.pt": ("rows.pt", PT, partial(run_select, "rows.pt"), anything),
    "costs": ("run/costs.jsonl", JSON_LINES, _costs, plain_numbers),
    "draft": ("model/draft.json", JSON, _costs, plain_numbers),
    "hashes": ("run/hashes.json", JSON, _costs, same),
    "split": (SPLIT, JSON, run_split, same),
    "split, sealed": (SPLIT, SEALED, run_split, anything),
    "split's rows": ("run/data/train.arrow", BYTES, run_split, same),
    "dataset_info": ("run/data/dataset_info.json", JSON, run_tokenised, same),
    "metrics": ("run/eval/staff-0.3/metrics.json", JSON, _costs, plain_numbers),
    "config": ("model/config.json", JSON, _untuned, repeats),
    "weights": ("model/model.safetensors", SAFETENSORS, _untuned, repeats),
    "made_from": ("run/small/made_from.json", JSON, run_scores, repeats),
    "adapter_config": ("run/small/adapter_config.json", JSON, run_scores, repeats),
    "adapter": ("run/small/adapter_model.safetensors", SAFETENSORS, run_scores, repeats),
    "tokenizer": ("model/tokenizer.json", JSON, run_tokenised, anything),
    "tokenizer_config": ("model/tokenizer_config.json", JSON, run_tokenised, anything),
}


def run_case(call: Callable, wrong: Callable[[object], str | None]) -> tuple[str, object]:
    """Call it in a fork, in the case's folder: ("succeeded", result), ("refused", line) or ("failed", why)."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(_run(call, wrong)))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else ("failed", f"still at work after {SECONDS} s")
    except EOFError:
        return "failed", "the process ended at once"
    finally:
        process.kill()
        process.join()


def _run(call: Callable, wrong: Callable) -> tuple[str, object]:
    os.chdir(_CASE)
    tempfile.tempdir, log = str(_CASE / "tmp"), _CASE / "tmp" / "log"
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", errors="backslashreplace")
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    before, seen, code, results = _snapshot(), [], 0, []
    _watch(seen)
    try:
        run_stage(lambda: results.append(call()))
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        ours = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(str(REPOSITORY))]
        return "failed", f"traceback: {type(error).__name__}: {str(error)[:300]} ({ours[-1]})"
    if happened := seen + [f"changed {path}" for path, _ in before ^ _snapshot()]:
        return "failed", happened[0]
    sys.stdout.flush()
    said = [line for line in log.read_text("utf-8", "replace").split("\n") if line.startswith("error:")]
    if code == 2 and len(said) == 1 and said[0].isprintable() and len(said[0]) <= 1000:
        return "refused", said[0]
    if code or said:
        return "failed", f"exit code {code}, {len(said)} error lines: {said[:1]!r:.300}"
    result = json.loads(json.dumps(results[0]))
    why = wrong(result)
    return ("failed", f"wrong result: {why}") if why else ("succeeded", result)


def _snapshot() -> set[tuple]:
    """What lies beside the folders in which a stage may write, and what hostile code would make anywhere."""
    found = [path for path in _CASE.rglob("*") if path.relative_to(_CASE).parts[0] not in WRITABLE]
    status = {path: path.lstat() for path in [*found, *_CASE.rglob("PWNED")]}
    return {(path, (s.st_mode, s.st_size, path.is_dir() or s.st_mtime_ns)) for path, s in status.items()}


def _watch(seen: list[str]) -> None:
    """Note what this process does from now on that no input file may make it do."""
    allowed = [*(_CASE / name for name in WRITABLE), _HOME / "cache", Path(os.devnull)]
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod"}
    starts = {"os.system", "os.exec", "os.posix_spawn", "socket.connect", "pty.spawn"}

    def hook(name: str, arguments: tuple) -> None:
        first, paths = arguments[0] if arguments else None, []
        if name == "open" and arguments[2] & writes:
            paths = [first]
        elif name in changes and arguments[-1] == -1:  # else relative to an open folder
            paths = arguments[:2] if name == "os.rename" else [arguments[1] if name == "os.symlink" else first]
        elif name in starts or (name == "subprocess.Popen" and arguments[1][:2] != ["git", "-C"]):
            seen.append(f"{name} {arguments}")
        elif name == "exec" and getattr(first, "co_filename", "").startswith(str(_CASE)):
            seen.append(f"runs {first.co_filename}")
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):  # else an open file
                folder, file = os.path.split(os.fsdecode(path))
                where = Path(os.path.realpath(folder or "."), file)
                seen.extend([f"{name} {where}"] * (not any(where.is_relative_to(each) for each in allowed)))

    sys.addaudithook(hook)


def copy_case(base: Path, case: Path) -> Path:
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(base, case, symlinks=True, copy_function=shutil.copyfile)
    (case / "experiment.yaml").write_text(json.dumps(EXPERIMENT).replace("@", str(case)))
    for name in WRITABLE:
        (case / name).mkdir(exist_ok=True)
    return case


@pytest.fixture(scope="session")
def finished(tiny_model) -> Path:
    """Data, a model, a selection, and every other file that KINDS names."""
    base = _HOME / "base"
    rows = sorted(biology(300), key=lambda row: len(row["output"]))[:14]
    (base / "around").mkdir(parents=True)
    (base / "around" / "canary.txt").write_text("sings")
    data = pd.DataFrame(rows)
    data.to_json(base / "data.jsonl", orient="records", lines=True, force_ascii=False)
    data.to_csv(base / "data.csv", index=False)
    data.to_parquet(base / "data.parquet")
    shutil.copytree(tiny_model, base / "model")
    work = copy_case(base, _HOME / "making")
    for script in ("finetune.finetune", "selection.effort_score", "selection.verify", "selection.coreset"):
        run_main(script, "--config_path", work / "experiment.yaml")

    scores = read_scores(work / SMALL)
    table = pd.DataFrame({"index": scores.index, "effort": scores.effort})
    table.to_parquet(work / "scores.parquet")
    table.to_csv(work / "scores.csv", index=False)
    np.save(work / "features.npy", np.eye(len(table), 3, dtype="f4"))
    torch.save([0, 2, 5], work / "rows.pt")
    paid = {"target": "model", "calibration_ids": [], "cost": {"tokens": 1000, "parameters": 1000, "seconds": 1.0}}
    write_json(work / "model" / "draft.json", paid)
    cost = {"stage": "target tuning", "what": "staff-0.3", "tokens": 1000, "seconds": 9.5, "samples": 12}
    with (work / "run" / "costs.jsonl").open("a") as file:
        file.write(json.dumps(cost) + "\n")
    metrics = {"rouge-1": 60, "rouge-2": 20, "rouge-l": 50.5, "bleu-4": 9, "samples": 2, "code_version": "1"}
    write_json(work / "run/eval/staff-0.3/metrics.json", metrics)
    coreset_files.code_version = lambda: "fuzz"  # asks git each time
    gc.freeze()  # else every case copies what it never touches
    return work


@pytest.mark.parametrize("name", KINDS)
def test_damage_ends_in_one_line_or_in_a_sound_result(name, finished):
    file, format, read, wrong = KINDS[name]
    content = next(copy_case(finished, _CASE).glob(file)).read_bytes()
    verdict, reference = run_case(read, lambda result: None)
    assert verdict == "succeeded", reference

    @settings(PLAIN, max_examples=CASES, phases=[Phase.generate])
    @given(damage(lambda: content, format))
    def cases(found: Damage) -> None:
        path = next(copy_case(finished, _CASE).glob(file))
        shutil.move(path, linked := _CASE / "around" / "linked")
        if found.content is not None:
            path.write_bytes(found.content)
        elif found.what == "a folder":
            path.mkdir()
        elif found.what != "nothing":
            path.symlink_to(linked)
        verdict, said = run_case(read, lambda result: wrong(result, reference))
        assert verdict != "failed", said

    cases()
