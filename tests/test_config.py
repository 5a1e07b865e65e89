"""An experiment's YAML: every key is checked, what is wrong is named in one message, no file runs code."""

import re

import pytest
import yaml

from selection.run.config import REPOSITORY, Selection, from_repository, load_experiment
from selection.run.errors import UserError

OTHERS = ("reproduce", "families.yaml")  # no experiments
CONFIGS = sorted(p for p in (REPOSITORY / "configs").rglob("*.yaml") if not {p.name, p.parent.name} & set(OTHERS))
OWN_DATA = REPOSITORY / "configs" / "own_data.yaml"
LEFT_TO_THE_USER = ["small_model", "target_model", "template", "dataset"]  # by own_data.yaml
BASE = {key: "x" for key in ("output_dir", *LEFT_TO_THE_USER)}


@pytest.fixture
def load(tmp_path):
    """Reads an experiment of BASE with `changes`, and with `text` behind it."""

    def load(changes: dict | None = None, text: str = "", overrides: list[str] = ()):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(BASE | (changes or {})) + text, encoding="utf-8")
        return load_experiment(path, overrides)

    return load


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_committed_configuration_loads_the_same_from_any_working_directory(path, tmp_path, monkeypatch):
    overrides = [f"{key}=x" for key in LEFT_TO_THE_USER] if path == OWN_DATA else []
    found = []
    for folder in (REPOSITORY, tmp_path):
        monkeypatch.chdir(folder)
        run = load_experiment(path, overrides)
        folders = [run.data_folder, run.small_scores, run.target_scores, run.verification, run.coresets]
        assert all(each.is_absolute() and each.is_relative_to(run.folder) for each in folders)
        found.append((run, folders))
    assert found[0] == found[1]


def test_a_missing_key_is_named_also_in_the_configuration_for_own_data():
    for count, key in enumerate(LEFT_TO_THE_USER[1:]):  # mode recommended has no small model
        given = [f"{given}=x" for given in LEFT_TO_THE_USER[1 : count + 1]]
        with pytest.raises(UserError, match=f"key {key} is missing"):
            load_experiment(OWN_DATA, given)
    with pytest.raises(UserError, match="key small_model is missing"):
        load_experiment(OWN_DATA, [*given, "dataset=x", "selection.mode=paper"])


def test_the_configurations_of_the_paper_hold_the_published_settings(load):
    paths = [path for path in CONFIGS if path.parent.name == "paper"]
    assert len(paths) == 3 * 3  # model families and data sets
    for experiment in (load(), *map(load_experiment, paths)):
        assert experiment.selection == Selection()
        assert (experiment.eval_size, experiment.split_seed, experiment.cutoff_len) == (0.1, 42, 1024)
        assert experiment.small_training == {"num_train_epochs": 3}
        assert experiment.target_training == {"num_train_epochs": 4}
    for path in paths:
        training = load_experiment(path).training
        assert training["learning_rate"] == (2e-4 if "wmt19" in path.name else 1e-4)
        assert training["per_device_train_batch_size"] == 8
        assert (training["lr_scheduler_type"], training["lora_target"]) == ("cosine", "all")
    published = Selection(mode="paper", hardest_cutoff=0.1, num_strata=50, verify_per_stratum=10)
    assert Selection() == published and published.rates == [0.8, 0.5, 0.3, 0.2, 0.1]


def test_relative_paths_count_from_the_repository_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_repository("runs/x") == REPOSITORY / "runs" / "x"
    assert from_repository(str(tmp_path / "x")) == from_repository("~/x") == tmp_path / "x"


def test_the_mode_says_what_the_target_scores_unless_told_otherwise():
    assert Selection(mode="released").verify_all and Selection(mode="paper", verify="all").verify_all
    assert not Selection(mode="paper").verify_all and not Selection(mode="released", verify="sampled").verify_all


def test_set_overrides_keys_reaches_into_sections_and_powers_of_ten_are_numbers_as_in_the_file(load):
    for text in ("1e-4", "2E5", "-1e-4", "1.5e-4"):
        assert load(text=f"training:\n  learning_rate: {text}\n").training == {"learning_rate": float(text)}
        assert load(overrides=[f"training.learning_rate={text}"]).training == {"learning_rate": float(text)}

    given = {"selection": {"num_strata": 7, "seed": 1}, "training": {"deepspeed": {"stage": 2}}}
    changes = ["template=a", "template=b", "selection.num_strata=9", "selection.rates=[0.5]", "training.lora_rank=4"]
    experiment = load(given, overrides=changes)
    assert experiment.template == "b" and experiment.training == {"lora_rank": 4, "deepspeed": {"stage": 2}}
    assert experiment.selection == Selection(num_strata=9, seed=1, rates=[0.5])


NO_OVERRIDES = ["template", "=3", "template.name=x", "selection.num_strata=0", "selection.odd=1", "unheard_of=1"]
NO_OVERRIDES += ["training.dataset=a", "training=[1", "max_samples=2024-13-45"]


def test_an_override_that_makes_no_sense_is_refused_by_key(load):
    for override in NO_OVERRIDES:
        with pytest.raises(UserError, match=override.split("=")[0].rsplit(".", 1)[-1] or "--set =3"):
            load(overrides=[override])
    with pytest.raises(UserError, match="unknown key :"):
        load({"": 4})


def test_an_unknown_key_is_asked_for_by_its_likely_name(load):
    for override, meant in {
        "tempalte=a": "template",
        "selection.num_stratas=3": "selection.num_strata",
        "num_strata=3": "selection.num_strata",  # in no section
        "dataset=[{path: a, quotta: 1}]": "dataset.quota",
        "dataset_format.column={}": "dataset_format.columns",
    }.items():
        with pytest.raises(UserError, match=rf"unknown key \S+: did you mean {re.escape(meant)}\? "):
            load(overrides=[override])
    with pytest.raises(UserError, match=r"unknown key selection\.odd: selection/run"):
        load(overrides=["selection.odd=1"])


WRONG = {
    "max_samples": ["100", 1],
    "eval_size": [0.0, 1.0, True],
    "precision": ["fp8"],
    "selection": [[1]],
    "training": ["none", {"num_train_epochs": float("inf")}],
    "selection.rates": [[], 0.1, [0.1, 0.0], [1.5], [float("nan")], ["0.1"]],
    "selection.num_strata": [0, 2.0, "50"],
    "selection.hardest_cutoff": [1.0, -0.1, float("nan")],
    "selection.methods": [["best"], []],
    "split_seed": [2**32],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_type_or_value_is_named(load, key):
    section, _, name = key.rpartition(".")
    for value in WRONG[key]:
        with pytest.raises(UserError, match=f"key {key}"):
            load({section: {name: value}} if section else {name: value})


@pytest.mark.parametrize("section", ["training", "small_training", "target_training"])
def test_a_key_that_the_stage_sets_cannot_be_given_for_tuning(load, section):
    for key in ("model_name_or_path", "stage", "dataset", "val_size", "bf16", "resume_from_checkpoint", "packing"):
        with pytest.raises(UserError, match=f"{section}.*{key} cannot be given"):
            load({section: {"learning_rate": 0.1, key: "x"}})


def test_a_file_that_is_no_experiment_is_refused_by_name(tmp_path):
    path = tmp_path / "experiment.yaml"
    contents = [b"", b"# nothing but a comment\n", b"- a\n- b\n", b"just text\n", b"a: [1, 2\n", b"a: b: c\n"]
    contents += [b"{" * 1000, b"\xff\xfe\x00\x80" * 20, b"\x00\x01\x02", b"max_samples: 0x_\n"]
    for content in [None, *contents]:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"experiment\.yaml"):
            load_experiment(path)
    with pytest.raises(UserError, match=str(tmp_path)):  # a folder
        load_experiment(tmp_path)
