"""An experiment's YAML: every key is checked, what is wrong is named in one message, no file runs code."""

from pathlib import Path

import pytest
import yaml

from selection.run.config import REPOSITORY, Selection, from_repository, load_experiment, validated
from selection.run.errors import UserError

OTHERS = ("reproduce", "families.yaml")  # no experiments
CONFIGS = sorted(p for p in (REPOSITORY / "configs").rglob("*.yaml") if not {p.name, p.parent.name} & set(OTHERS))
BASE = {
    "output_dir": "runs/test",
    "small_model": "models/small",
    "target_model": "models/target",
    "template": "chatml",
    "dataset": "data/rows.jsonl",
}
LEFT_TO_THE_USER = ["small_model", "target_model", "template", "dataset"]  # by configs/own_data.yaml


@pytest.fixture
def load(tmp_path):
    """Reads an experiment of BASE with `changes`, and with `text` behind it."""

    def load(changes: dict | None = None, text: str = "", overrides: list[str] = ()):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(BASE | (changes or {})) + text, encoding="utf-8")
        return load_experiment(str(path), overrides)

    return load


# The committed configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_committed_configuration_loads_the_same_from_any_working_directory(path, tmp_path, monkeypatch):
    overrides = [f"{key}=x" for key in LEFT_TO_THE_USER] if path.name == "own_data.yaml" else []
    monkeypatch.chdir(REPOSITORY)
    here = load_experiment(str(path), overrides)
    folders = [here.folder, here.data_folder, here.small_scores, here.target_scores, here.verification, here.coresets]
    monkeypatch.chdir(tmp_path)
    there = load_experiment(str(path), overrides)
    assert there == here
    assert folders == [
        there.folder, there.data_folder, there.small_scores, there.target_scores, there.verification, there.coresets
    ]  # fmt: skip
    assert all(folder.is_absolute() and folder.is_relative_to(here.folder) for folder in folders)


def test_the_configuration_for_own_data_asks_for_what_only_the_user_knows():
    given = []
    for key in LEFT_TO_THE_USER:
        with pytest.raises(UserError, match=f"key {key} is missing"):
            load_experiment(str(REPOSITORY / "configs" / "own_data.yaml"), given)
        given.append(f"{key}=x")


def test_the_configurations_of_the_paper_hold_the_published_settings():
    paths = [path for path in CONFIGS if path.parent.name == "paper"]
    assert len(paths) == 3 * 3  # model families and data sets
    for path in paths:
        experiment = load_experiment(str(path))
        assert experiment.selection == Selection()
        assert (experiment.eval_size, experiment.split_seed, experiment.cutoff_len) == (0.1, 42, 1024)
        assert experiment.training["learning_rate"] == (2e-4 if "wmt19" in path.name else 1e-4)
        assert experiment.training["per_device_train_batch_size"] == 8
        assert (experiment.training["lr_scheduler_type"], experiment.training["lora_target"]) == ("cosine", "all")
        assert (experiment.small_training, experiment.target_training) == (
            {"num_train_epochs": 3},
            {"num_train_epochs": 4},
        )


def test_relative_paths_count_from_the_repository_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_repository("runs/x") == REPOSITORY / "runs" / "x"
    assert from_repository(str(tmp_path / "x")) == tmp_path / "x"
    assert from_repository("~/x") == tmp_path / "x"


# Values


def test_what_is_absent_takes_the_published_value(load):
    selection = load().selection
    published = (0.1, 50, 10, "paper")
    assert (selection.hardest_cutoff, selection.num_strata, selection.verify_per_stratum, selection.mode) == published
    assert selection.rates == [0.8, 0.5, 0.3, 0.2, 0.1]
    assert (load().eval_size, load().split_seed, load().cutoff_len) == (0.1, 42, 1024)
    assert (load().small_training, load().target_training) == ({"num_train_epochs": 3}, {"num_train_epochs": 4})


@pytest.mark.parametrize(
    ("mode", "verify", "verify_all"),
    [
        ("paper", "by_mode", False),
        ("released", "by_mode", True),
        ("paper", "all", True),
        ("released", "sampled", False),
    ],
)
def test_the_mode_says_what_the_target_scores_unless_told_otherwise(mode, verify, verify_all):
    assert Selection(mode=mode, verify=verify).verify_all is verify_all


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("2E5", 2e5), ("-1e-4", -1e-4), ("1.5e-4", 1.5e-4), ("1.0e-4", 1e-4)]
)
def test_powers_of_ten_are_numbers_in_the_file_and_in_set(load, text, number):
    assert load(text=f"training:\n  learning_rate: {text}\n").training == {"learning_rate": number}
    assert load(overrides=[f"training.learning_rate={text}"]).training == {"learning_rate": number}


def test_keys_of_llama_factory_are_handed_over_as_they_are(load):
    keys = {"learning_rate": 1.0e-4, "lora_target": "all", "lora_rank": 8, "deepspeed": {"stage": 2}}
    assert load({"training": keys}).training == keys


# Overrides


def test_set_overrides_keys_and_reaches_into_sections(load):
    experiment = load(
        {"selection": {"num_strata": 7, "seed": 1}},
        overrides=["template=llama2", "selection.num_strata=9", "selection.rates=[0.5, 0.25]", "training.lora_rank=4"],
    )
    assert experiment.template == "llama2"
    assert (experiment.selection.num_strata, experiment.selection.seed) == (9, 1)
    assert experiment.selection.rates == [0.5, 0.25]
    assert experiment.training == {"lora_rank": 4}


def test_the_last_of_two_overrides_holds(load):
    assert load(overrides=["template=a", "template=b"]).template == "b"


@pytest.mark.parametrize(
    "override",
    [
        "template",
        "=3",
        "template.name=x",
        "selection.num_strata=0",
        "selection.num_strata=ten",
        "selection.unheard_of=1",
        "unheard_of=1",
        "training.dataset=mine",
        "training=[1",
        "max_samples=2024-13-45",
        "max_samples=0x_",
    ],
)
def test_an_override_that_makes_no_sense_is_refused_by_key(load, override):
    with pytest.raises(UserError) as refusal:
        load(overrides=[override])
    assert override.split("=")[0].rsplit(".", 1)[-1] in str(refusal.value)


# Refusals


@pytest.mark.parametrize("key", BASE)
def test_a_missing_key_is_named(tmp_path, key):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in BASE.items() if k != key}))
    with pytest.raises(UserError, match=f"key {key} is missing"):
        load_experiment(str(path))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rates": [0.1]}, "rates"),
        ({"selection": {"rate": [0.1]}}, "selection.rate"),
        ({"evaluation": {"beam": 4}}, "evaluation.beam"),
    ],
)
def test_an_unknown_key_is_named_also_in_sections(load, changes, key):
    with pytest.raises(UserError, match=f"unknown key {key}:"):
        load(changes)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "output_dir", 3),
        ("", "max_samples", "100"),
        ("", "max_samples", 1),
        ("", "eval_size", 0.0),
        ("", "eval_size", 1.0),
        ("", "eval_size", True),
        ("", "split_seed", 1.5),
        ("", "cutoff_len", True),
        ("", "precision", "fp8"),
        ("", "selection", [1]),
        ("", "training", "none"),
        ("selection", "mode", "published"),
        ("selection", "rates", []),
        ("selection", "rates", 0.1),
        ("selection", "rates", [0.1, 0.0]),
        ("selection", "rates", [1.5]),
        ("selection", "rates", [-0.1]),
        ("selection", "rates", [float("nan")]),
        ("selection", "rates", ["0.1"]),
        ("selection", "num_strata", 0),
        ("selection", "num_strata", 2.0),
        ("selection", "num_strata", "50"),
        ("selection", "verify_per_stratum", 0),
        ("selection", "hardest_cutoff", 1.0),
        ("selection", "hardest_cutoff", -0.1),
        ("selection", "hardest_cutoff", float("nan")),
        ("selection", "methods", ["best"]),
        ("selection", "methods", []),
        ("selection", "seed", -1),
        ("selection", "tokens_per_batch", 0),
        ("evaluation", "max_new_tokens", 0),
    ],
)
def test_a_wrong_type_or_value_is_named(load, section, key, value):
    with pytest.raises(UserError) as refusal:
        load({section: {key: value}} if section else {key: value})
    assert f"key {section}.{key}" in str(refusal.value) if section else f"key {key}" in str(refusal.value)


@pytest.mark.parametrize("section", ["training", "small_training", "target_training"])
@pytest.mark.parametrize(
    "key",
    [
        "model_name_or_path", "adapter_name_or_path", "stage", "do_train", "dataset", "dataset_dir", "tokenized_path",
        "val_size", "max_samples", "template", "cutoff_len", "output_dir", "resume_from_checkpoint", "bf16", "fp16",
        "packing", "streaming", "trust_remote_code",
    ],
)  # fmt: skip
def test_a_key_that_the_stage_sets_cannot_be_given_for_tuning(load, section, key):
    with pytest.raises(UserError, match=f"{section}.*{key} cannot be given"):
        load({section: {"learning_rate": 0.1, key: "x"}})


def test_a_command_line_value_is_checked_like_one_of_the_file():
    assert validated(Selection(seed=3), {"num_strata": 5}) == Selection(seed=3, num_strata=5)
    with pytest.raises(UserError, match=r"command line.*num_strata"):
        validated(Selection(), {"num_strata": 0})


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir [MADE]", "!!python/object/new:os.mkdir [MADE]", "!!python/name:os.mkdir"],
)
def test_a_file_that_would_run_code_is_refused_and_does_not_run(load, tmp_path, value):
    made = tmp_path / "made"
    text = f"training:\n  learning_rate: {value.replace('MADE', str(made))}\n"
    with pytest.raises(UserError, match=r"experiment\.yaml"):
        load(text=text)
    assert not made.exists()
    with pytest.raises(UserError):
        load(overrides=[f"training.learning_rate={value.replace('MADE', str(made))}"])
    assert not made.exists()
    yaml.unsafe_load(text)  # unguarded, it does run
    assert made.exists() or "name" in value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# nothing but a comment\n",
        b"- a\n- b\n",
        b"just text\n",
        b"a: [1, 2\n",
        b"a: b: c\n",
        b"{" * 5000,
        b"\xff\xfe\x00\x80" * 20,
        b"\x00\x01\x02",
        b"max_samples: 2024-13-45\n",
        b"max_samples: 0x_\n",
    ],
    ids=["empty", "comment", "list", "text", "open", "colons", "deep", "no UTF-8", "control", "no date", "no number"],
)
def test_a_file_that_is_no_experiment_is_refused_by_name(tmp_path, content):
    path = tmp_path / "experiment.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"experiment\.yaml"):
        load_experiment(str(path))


@pytest.mark.parametrize("name", ["nowhere.yaml", ""], ids=["missing", "folder"])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    path: Path = tmp_path / name
    with pytest.raises(UserError, match=str(path)):
        load_experiment(str(path))
