"""Shared by the tests: a tiny model on disk, experiments on small data, and the scripts, each in its own process."""

import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from selection.run.ending import on_signals, run_stage

import pytest
from forks import REPOSITORY, start

on_signals(signal.default_int_handler)  # not yet as a script ends

# One thread, as in the scripts' processes: those are forked from this one, and OpenMP's threads do not survive that.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_PATIENCE = 900  # seconds after which a script counts as hung, on a busy machine too

# Files of more than 20 s, longest first: else one process may wait for the other at the end.
_LONG = ["grid", "demo", "faults", "stages", "architectures", "effort", "fake_device", "bench"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files, then the others in the order of names."""
    names = [f"test_{name}.py" for name in _LONG]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


def run_script(
    script: str | Path, *arguments: object, cwd: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess:
    """Run a script as a user would, a Python script in a fork of this process; `cwd` defaults to its own folder."""
    path = REPOSITORY / script
    command, cwd = [str(path), *map(str, arguments)], cwd or path.parent
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        if path.suffix == ".sh":
            options = {"cwd": cwd, "stdout": stdout, "stderr": stderr, "timeout": _PATIENCE}
            code = subprocess.run(["bash", *command], **options).returncode
        else:
            process = start(command, stdout.fileno(), stderr.fileno(), cwd)
            process.join(_PATIENCE)
            process.kill()
            process.join()
            code = process.exitcode
        said = [os.pread(file.fileno(), 2**24, 0).decode() for file in (stdout, stderr)]
    done = subprocess.CompletedProcess(command, code, *said)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_one_line_error(done: subprocess.CompletedProcess, *said: str) -> None:
    """Exit code 2, and one `error:` line on stderr, which says all of `said`; no traceback."""
    assert done.returncode == 2, done.stderr[-3000:]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in error


def baseline_by_rate(method: str, columns: dict, num_rows: int, selection, quotas=None):
    """A baseline's coreset, under the settings of `selection`, as a function of the rate."""
    from selection.method.baselines import baseline
    from selection.method.quotas import choose_by_rule
    from selection.method.staff import coreset_size

    settings = selection.num_strata, selection.hardest_cutoff, selection.seed
    rule = baseline(method, columns, num_rows, selection.rules, selection.baseline_variant, *settings)
    return lambda rate: choose_by_rule(rule, coreset_size(rate, num_rows), quotas)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_experiment(folder: Path, rows: list[dict], name: str, **changes) -> Path:
    """Write data and configuration of an experiment, with its run folder beside them; returns the latter's path."""
    keys = {"output_dir": str(folder / "run"), "template": "chatml", "eval_size": 0.2}
    keys["dataset"] = write_jsonl(folder / f"{name}.jsonl", rows)
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(keys | changes), encoding="utf-8")  # JSON is YAML
    return path


def rows_of_llama_factory(experiment, folder: Path, dataset: str, **keys):
    """The training rows that LLaMA-Factory itself makes of data sets that `folder` lists."""
    from selection.rows.llama_factory import import_llama_factory

    import_llama_factory()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    keys |= {
        "stage": "sft", "do_train": True, "model_name_or_path": experiment.target_model, "use_cpu": True,
        "template": experiment.template, "cutoff_len": experiment.cutoff_len, "overwrite_cache": True,
        "dataset_dir": str(folder), "dataset": dataset, "output_dir": str(experiment.folder / "elsewhere"),
    }  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(keys)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    return get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of 4 layers with a small tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    run_script("scripts/make_tiny_model.py", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory) -> None:
    """The tiny demo's two models, in their place; one process of the tests makes them, the others wait."""
    models = REPOSITORY / "models"
    models.mkdir(exist_ok=True)
    with (models / ".tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_script("scripts/make_tiny_model.py", "--out", models / "tiny")
        run = f"output_dir={tmp_path_factory.mktemp('draft') / 'run'}"
        draft = ["--config_path", REPOSITORY / "configs" / "tiny.yaml", "--set", run, "--target", models / "tiny"]
        run_script("scripts/make_draft.py", *draft, "--layers", 2, "--out", models / "tiny-2-layers")


@pytest.fixture
def make_experiment(tiny_model, tmp_path):
    """A function that writes a configuration for the tiny model and given rows, and returns its path."""

    def make(rows: list[dict], name: str = "experiment", **changes) -> Path:
        selection = {"rates": [0.5], "num_strata": 4, "verify_per_stratum": 2, "precision": "fp32"}
        keys = {"small_model": str(tiny_model), "target_model": str(tiny_model), "selection": selection}
        keys |= {"cutoff_len": 256, "precision": "fp32", "evaluation": {"max_new_tokens": 4}}
        keys["training"] = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 7}
        keys["small_training"] = keys["target_training"] = {"num_train_epochs": 1}
        return write_experiment(tmp_path, rows, name, **keys | changes)

    return make


@pytest.fixture
def other_target(tiny_model, tmp_path) -> str:
    """The tiny model with other random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "other-target"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "made_from*", "checksums*"))
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def biology(count: int) -> list[dict]:
    lines = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture
def rows() -> list[dict]:
    return biology(30)


def run_main(script: str, *arguments: object) -> None:
    """Call a script's main, e.g. of "selection.coreset", in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path.copy())  # the scripts change it
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script).main()


@pytest.fixture
def stage(capsys):
    """Runs a stage script in this process on a configuration; gives exit code, stdout and stderr."""

    def call(name: str, config: Path, *arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            run_stage(lambda: run_main(name, "--config_path", config, *arguments))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


HOSTILE = {
    "instruction": "</script><img src=x onerror=\"document.title='hit'\"><!--<script>",
    "input": "{{ 7 * 7 }} ${document.title='hit'} \u2028 &lt;b&gt;",
    "output": "<svg onload=\"document.title='hit'\">'\"`</td></table>",
}


@pytest.fixture(scope="session")
def finished_run(tiny_model, tmp_path_factory):
    """The experiment of a finished run, to be read alone: 150 rows with a column `about`, HOSTILE as row 40."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from selection.run.config import load_experiment

    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model, folder / "target")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model)).save_pretrained(folder / "target")
    rows = [row | {"about": {"number": number}} for number, row in enumerate(biology(150))]
    rows[40] |= HOSTILE
    selection = {"rates": [0.2, 0.5], "num_strata": 8, "verify_per_stratum": 5, "columns": ["hidden_state"]}
    keys = {"small_model": str(tiny_model), "target_model": str(folder / "target"), "precision": "fp32"}
    keys |= {"selection": selection | {"precision": "fp32", "self_test": 0}, "small_training": {"num_train_epochs": 0}}
    path = write_experiment(folder, rows, "data", **keys)
    for stage in ("effort_score", "verify", "coreset"):
        run_main(f"selection.{stage}", "--config_path", path)
    return load_experiment(path)


def copy_of(experiment, folder: Path):
    """The run once more in `folder`, to be changed."""
    shutil.copytree(experiment.folder, folder)
    return experiment.model_copy(update={"output_dir": str(folder)})


def scored_run(folder: Path, rows: list[dict], effort, target=None, lengths=None, features=None, keys=(), **selection):
    """The experiment of a run with given scores, arrays (N, …) by row of the training split, and its coresets."""
    import numpy as np

    from selection.rows.split import training_split
    from selection.run.config import load_experiment
    from selection.scores import verification as v
    from selection.scores.folder import ScoreFolder, read_scores
    from selection.scores.identity import score_identity

    folder.mkdir(parents=True, exist_ok=True)
    given = {"small_model": "small/one", "target_model": "large/one", "selection": selection}
    path = write_experiment(folder, rows, "rows", **given | dict(keys))
    experiment = load_experiment(path)
    split, settings = training_split(experiment), v.Settings.of(experiment.selection)
    every = np.arange(len(split.rows))
    target, lengths = 3 * effort if target is None else target, every + 1 if lengths is None else lengths

    def write_scores(folder: Path, model: str, wanted, values) -> None:
        order = np.random.default_rng(1).permutation(wanted)  # a scoring stage sorts by length
        identity = score_identity(experiment, split, model, None)
        scores = ScoreFolder(folder, identity, len(every), [] if features is None else ["hidden_state"])
        scores.plan(order, lambda missing: [[missing.tolist()]])
        columns = {"index": order, "id": np.array(split.ids)[order], "effort": values[order], "loss": values[order] / 2}
        columns |= {"n_prompt_tokens": lengths[order], "n_response_tokens": lengths[order]}
        columns |= {} if features is None else {"hidden_state": features[order].astype(np.float32)}
        scores.write_part([order.tolist()], columns)
        scores.finish(np.sort(wanted))

    write_scores(experiment.small_scores, experiment.small_model, every, effort)
    raw = read_scores(experiment.small_scores, settings.columns, ids=False)
    scores = v.stratified_score(raw, settings)
    drawn = scores.index[np.concatenate(v.draw(v.cut_strata(scores.effort, settings), settings))]
    write_scores(experiment.target_scores, experiment.target_model, np.sort(drawn), target)
    verified = read_scores(experiment.target_scores, settings.columns, ids=False)
    records = v.verify(scores.effort, verified, settings, index=scores.index)
    v.write_verification(experiment.verification, settings, raw, records)
    run_main("selection.coreset", "--config_path", path)
    return experiment


def write_pool(experiment, suspects: list[dict]) -> Path:
    """The files of check_pool.py with these suspects, for rows of a made split; returns the list."""
    from selection.rows.split import training_split
    from selection.run.products import write_json

    split = training_split(experiment)
    about = {"model": "x", "rows": 100, "effort_by_length": -0.5, "data_fingerprint": split.fingerprint}
    about |= {"tried": {"unexplained": [0.1, 0.5]}}
    write_json(experiment.pool / "pool.json", about)
    return Path(write_jsonl(experiment.pool / "suspects.jsonl", suspects))


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
