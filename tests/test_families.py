"""A start from a target and a data file: families, local folders, forms of rows, defaults, the whole of it."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, run_main, write_experiment, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from selection.rows.conversation import unusable_rows
from selection.rows.form import detect_form
from selection.rows.llama_factory import import_llama_factory
from selection.run.config import DatasetFormat, Selection, load_experiment
from selection.run.errors import UserError
from selection.run.families import find_pair, read_families
from selection.start import choose_models, default_run_folder, half_the_layers, start, strata_for

FAMILIES = read_families()
MODELS = [(name, model) for name, family in FAMILIES.items() for model in family.models]
TUNED = re.compile(r"instruct|-it$|-chat|phi|Qwen3-[\dAB.-]+B$", re.IGNORECASE)  # Qwen 3 names its base models instead


def billions(model: str) -> float | None:
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![\w.])", model.lower())
    return float(sizes[0][0]) / (1000 if sizes[0][1] == "m" else 1) if sizes else None


def test_llama_factory_knows_every_template_and_model():
    import_llama_factory()
    from llamafactory.data.template import TEMPLATES
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS

    templates = {hub: DEFAULT_TEMPLATE.get(name) for name, hubs in SUPPORTED_MODELS.items() for hub in hubs.values()}
    for name, model in MODELS:
        family = FAMILIES[name]
        assert family.template in TEMPLATES, name
        known = model if model in templates else model.replace("meta-llama/Llama-3.1", "meta-llama/Meta-Llama-3.1")
        assert known in templates, model
        assert templates[known] in (None, family.template), model  # it names none for base models
        assert family.small in ("first", "none") or family.small in templates, name


def test_every_listed_target_gets_a_smaller_sibling_of_its_kind_or_none():
    for name, model in MODELS:
        family = FAMILIES[name]
        pairs = [find_pair(spelled) for spelled in (model, model.lower(), model.upper())]
        assert {(pair.target, pair.template, pair.family) for pair in pairs} == {(model, family.template, name)}
        if (small := pairs[0].small) is None:
            assert family.small == "none" or model == family.models[0]
            continue
        assert small != model and bool(TUNED.search(small)) == bool(TUNED.search(model))
        assert not (billions(small) and billions(model)) or billions(small) < billions(model)
    for family in FAMILIES.values():  # from small to large
        sizes = [size for size in map(billions, family.models) if size]
        assert sizes == sorted(sizes)


def test_the_papers_pairs_are_those_of_its_configurations_and_a_wrong_file_is_one_message(tmp_path):
    for path in (REPOSITORY / "configs" / "paper").glob("*_dialogsum.yaml"):
        experiment = load_experiment(path)
        pair = find_pair(experiment.target_model)
        assert (pair.small, pair.template) == (experiment.small_model, experiment.template)
    (tmp_path / "families.yaml").write_text("Mine: {template: qwen, models: []}")
    with pytest.raises(UserError, match=r"Mine\.models"):
        read_families(tmp_path / "families.yaml")


@pytest.fixture
def model_folder(tmp_path):
    def make(name: str, **config):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").touch()
        return folder

    return make


def test_a_folder_is_known_by_its_name_its_config_or_its_type(model_folder):
    for name, config, small, template in (
        ("qwen2.5-7b", {"_name_or_path": "google/gemma-2-9b", "model_type": "llama"}, "Qwen/Qwen2.5-0.5B", "qwen"),
        ("a", {"_name_or_path": "qwen/QWEN2.5-7B", "model_type": "gemma2"}, "Qwen/Qwen2.5-0.5B", "qwen"),
        ("b", {"model_type": "gemma2"}, None, "gemma2"),
    ):
        folder = str(model_folder(name, **config))
        pair = find_pair(folder)
        assert (pair.target, pair.small, pair.template) == (folder, small, template)
    folder = model_folder("Qwen2.5-7B-Instruct")  # a sibling beside it goes before the hub's
    model_folder("Qwen2.5-0.5B")  # the base model is none
    beside = model_folder("QWEN2.5-0.5b-instruct") / "config.json"
    assert find_pair(str(folder)).small == str(beside.parent)
    beside.unlink()  # a download that has just begun
    assert find_pair(str(folder)).small == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_model_behind_a_link_keeps_the_name_that_was_given(model_folder, tmp_path):
    kept, sibling = model_folder("Qwen2.5-7B"), model_folder("Qwen2.5-0.5B")
    for name in ("mine", "Qwen2.5-14B"):  # known by what it leads to, or by its own name
        (link := tmp_path / name).symlink_to(kept)
        pair = find_pair(f"{tmp_path}/models/../{name}")
        assert (pair.target, pair.small, pair.template) == (str(link), str(sibling), "qwen")


def test_a_target_of_unknown_family_needs_a_template_and_what_is_given_goes_first(model_folder):
    folder = str(model_folder("mine", model_type="llama"))
    with pytest.raises(UserError, match=r"--template.*--small"):
        choose_models(folder)
    assert choose_models(folder, template="chatml").small is None
    given = choose_models("Qwen/Qwen2.5-7B", small="foo/small", template="chatml")
    assert (given.small, given.template) == ("foo/small", "chatml")
    with pytest.raises(UserError, match=r"--template chatlm: LLaMA-Factory has none of that name: .*chatml"):
        choose_models(folder, template="chatlm")


def test_a_sibling_of_the_hub_is_downloaded_cached_or_cut(model_folder, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    target, cached = str(model_folder("Qwen2.5-7B")), tmp_path / "models--Qwen--Qwen2.5-0.5B"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    sibling, cut = "Qwen/Qwen2.5-0.5B", "HF_HUB_OFFLINE is set); a speculator is cut out of the target"
    for offline, small, said in ((False, sibling, "to be downloaded from the hub"), (True, None, cut)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert choose_models(target).small == small and said in capsys.readouterr().err
    for name, text in (("snapshots/1/config.json", ""), ("refs/main", "1")):
        (cached / name).parent.mkdir(parents=True)
        (cached / name).write_text(text)
    assert choose_models(target).small == sibling and "which is here" in capsys.readouterr().err


def talk(role: str, content: str, *turns: tuple[str, str]) -> list[dict]:
    return [{role: who, content: what} for who, what in turns]


ASKED, ASKED_OPENLY = ((("human", "Say\none"), ("gpt", "1")), (("user", "Say\none"), ("assistant", "1")))
FORMS = {  # with a system prompt S where the name says so
    "alpaca": {"instruction": "Say", "input": "one", "output": "1"},
    "alpaca, system": {"instruction": "Say", "input": "one", "output": "1", "system": "S"},
    "alpaca without input": {"instruction": "Say\none", "output": "1", "id": 7},
    "prompt and completion, system": {"prompt": "Say\none", "completion": "1", "system": "S"},
    "question and answer": {"question": "Say\none", "answer": "1", "prompt": "x"},
    "Dolly": {"instruction": "Say", "context": "one", "response": "1", "category": "x"},
    "question, context and answer": {"question": "Say", "context": "one", "answer": "1"},
    "context and response": {"context": "Say\none", "response": "1"},
    "sharegpt": {"conversations": talk("from", "value", *ASKED)},
    "sharegpt, own tags": {"conversations": talk("from", "value", *ASKED_OPENLY)},
    "sharegpt, system column": {"conversations": talk("from", "value", *ASKED), "system": "S"},
    "messages": {"messages": talk("role", "content", *ASKED_OPENLY), "prompt": "x"},
    "messages, system turn": {"messages": talk("role", "content", ("system", "S"), *ASKED_OPENLY)},
}


def test_llama_factory_reads_every_form_to_the_same_sample():
    import_llama_factory()
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.hparams import DataArguments

    for name, row in FORMS.items():
        form, used = detect_form(list(row), [row], "my.jsonl")
        entry, attributes = DatasetFormat(**form).entry, DatasetAttr("file", dataset_name="rows")
        assert not unusable_rows([row], entry) and set(used) <= set(row)
        attributes.join(entry)
        sample = get_dataset_converter(attributes.formatting, attributes, DataArguments())(row)
        assert sample["_prompt"] == [{"role": "user", "content": "Say\none"}], name
        assert sample["_response"] == [{"role": "assistant", "content": "1"}], name
        assert sample["_system"] == ("S" if "system" in name else ""), name
    # No description where none is needed: the same rows would be other data than under a configuration by hand.
    assert detect_form(["conversations"], [FORMS["sharegpt"]], "")[0] == {"formatting": "sharegpt"}


def test_rows_of_another_form_are_one_message():
    for row, said in (
        ({"text": "a", "label": "b"}, r"text, label.*dataset_format\.columns\.prompt"),
        ({"prompt": talk("role", "content", ("user", "a")), "completion": "b"}, "prompt, completion"),
        ({"messages": "a"}, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "it is preference data .*: write the prompt and the good"),
        ({"prompt": "a", "completion": "b", "label": True}, "it is preference data .*label"),
        ({"messages": talk("role", "content", ("user", "a"), ("human", "b"), ("gpt", "c"))}, "roles human"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "tool_calls"),
    ):
        with pytest.raises(UserError, match=rf"--data my\.jsonl: .*{said}"):
            detect_form(list(row), [row], "my.jsonl")


@given(st.integers(1, 10**6))
def test_the_target_verifies_at_most_a_fifth(num_rows):
    published = Selection()
    k, b = strata_for(num_rows, published)
    assert k >= 1 and b >= 1 and k * b <= max(1, num_rows / 5)
    assert k * b > min(500, num_rows // 5) / 2  # and no less than half of what it might
    assert strata_for(num_rows + 1, published)[1] >= b >= min(3, max(1, num_rows // 5))
    assert num_rows < 2500 or (k, b) == (published.num_strata, published.verify_per_stratum)


@pytest.fixture
def begin(tiny_model, rows, tmp_path):
    data = Path(write_jsonl(tmp_path / "my.jsonl", rows))
    arguments = {"target": str(tiny_model), "data": [data], "template": "chatml", "run": tmp_path / "run"}
    return lambda **changes: start(**arguments | changes)


def test_a_start_writes_a_whole_experiment_of_published_settings(begin, tiny_model, tmp_path):
    path, cut = begin(overrides=["training.lora_rank=4", "selection.mode=paper"])
    run, draft, experiment = tmp_path / "run", str(tmp_path / "run" / "tiny-2-layers"), load_experiment(path)
    assert experiment.dataset == str(tmp_path / "my.jsonl")
    assert path == run / "start.yaml" and set(yaml.safe_load(path.read_text())) == set(type(experiment).model_fields)
    assert cut == ["--target", str(tiny_model), "--layers", "2", "--out", draft]
    assert (experiment.target_model, experiment.small_model) == (str(tiny_model), draft)
    assert (experiment.folder, experiment.template) == (run, "chatml")
    published = load_experiment(REPOSITORY / "configs" / "paper" / "gemma_dialogsum.yaml")
    for key in ("learning_rate", "lr_scheduler_type", "lora_target", "warmup_steps"):
        assert experiment.training[key] == published.training[key]
    assert experiment.training["lora_rank"] == 4
    strata = {"num_strata": 1, "verify_per_stratum": 3}  # of 27 training rows
    assert experiment.selection == Selection(**strata, columns=["hidden_state"])  # columns of configs/own_data.yaml
    for key in ("cutoff_len", "eval_size", "small_training", "target_training"):
        assert getattr(experiment, key) == getattr(published, key)


def test_a_start_recommends_and_a_small_model_asks_for_the_published_method(begin, tiny_model, capsys):
    path, cut = begin()
    settings = load_experiment(path).selection
    assert cut == [] and (settings.mode, settings.methods) == ("recommended", ["rs2", "clusters", "random"])
    said = capsys.readouterr().err
    assert "mode: recommended" in said and "selection.mode=paper" in said and "strata" not in said
    path, cut = begin(small=str(tiny_model))
    assert cut == [] and load_experiment(path).selection.mode == "paper"
    said = capsys.readouterr().err
    assert "mode: paper" in said and "strata: K" in said
    with pytest.raises(UserError, match="--small: mode recommended and speculation direct have no small model"):
        begin(small=str(tiny_model), overrides=["selection.mode=recommended"])


def test_direct_speculation_cuts_no_small_model(begin, tiny_model, capsys):
    direct = ["selection.mode=extended", "selection.speculation=direct"]
    path, cut = begin(overrides=direct)
    assert cut == [] and load_experiment(path).small_model == str(tiny_model)
    said = capsys.readouterr().err
    assert f"small model: {tiny_model}, the target itself: no other model is tuned\n" in said
    assert "at most a fifth" not in said  # it scores all
    with pytest.raises(UserError, match="speculation direct have no small model"):
        begin(small=str(tiny_model), overrides=direct)


def test_options_and_set_go_before_the_defaults(begin, tiny_model, tmp_path):
    changes = ["selection.num_strata=3", "max_samples=20", "eval_size=0.5"]
    path, cut = begin(small=str(tiny_model), rates=[0.3], overrides=changes)
    experiment, chosen = load_experiment(path), load_experiment(path).selection
    assert (cut, experiment.small_model, experiment.max_samples) == ([], str(tiny_model), 20)
    assert (chosen.rates, chosen.num_strata, chosen.verify_per_stratum) == ([0.3], 3, 2)
    (tmp_path / "other.json").write_text(json.dumps([{"q": "a", "a": "b"}] * 9))
    names = ["dataset_format.columns.prompt=q", "dataset_format.columns.response=a"]
    experiment = load_experiment(begin(data=[tmp_path / "other.json"], overrides=names)[0])
    assert experiment.dataset_format.columns == {"prompt": "q", "response": "a"}


def test_published_rates_that_keep_no_row_are_left_out_and_a_layer_is_not_cut(begin, capsys, model_folder, tiny_model):
    path, _ = begin(overrides=["max_samples=10"])
    assert load_experiment(path).selection.rates == [0.8, 0.5, 0.3, 0.2]
    assert "rates: 0.8, 0.5, 0.3, 0.2, not 0.1, which keeps none of 9 training rows; --rate" in capsys.readouterr().err
    config = json.loads((tiny_model / "config.json").read_text()) | {"num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"1 layer.*--small"):
        half_the_layers(str(model_folder("one", **config)))


def test_several_files_are_entries_with_a_form_each(begin, tmp_path):
    files = [Path(write_jsonl(tmp_path / f"{name}.jsonl", [FORMS[name]] * 20)) for name in ("alpaca", "messages")]
    experiment = load_experiment(begin(data=files)[0])
    assert [each.path for each in experiment.data_sets] == list(map(str, files))
    assert [each.dataset_format.columns for each in experiment.data_sets] == [{}, {"messages": "messages"}]
    assert experiment.selection.num_strata == 2  # of 36 training rows


def test_what_cannot_be_started_is_one_message_and_leaves_nothing(begin, tmp_path):
    released = ["selection.mode=released", "selection.verify=sampled"]
    for changes, said in (
        ({"overrides": ["template=qwen"]}, "--template"),
        ({"overrides": ["selection=5"]}, "key selection: "),
        ({"data": [REPOSITORY / "data" / "none.jsonl"]}, "none.jsonl: no such file"),
        ({"data": [Path("me/rows.v2")]}, "me/rows.v2: no such file, and the hub cannot be reached: `hf download"),
        ({"data": [tmp_path]}, f"{tmp_path} is a folder: give one or more of its files (my.jsonl)"),
        ({"data": [REPOSITORY / "data" / "paper_table1.csv"]}, "its columns"),
        ({"small": "./none-such"}, "no folder"),
        ({"overrides": ["eval_data=none.jsonl"]}, "eval_data none.jsonl: no such file (looked for"),
        ({"rates": [0.5, 0.03]}, "rate 0.03 of 27 rows keeps none: give a rate of 0.037 or more"),
        ({"overrides": ["training.lora_target=nowhere"]}, "no LoRA can be put on lora_target nowhere"),
        ({"overrides": [*released, "selection.verify_per_stratum=25"]}, "25 of 27 rows"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            begin(**changes)
        assert not (tmp_path / "run").exists()


def test_bad_rows_are_found_at_the_start_and_left_out_where_that_is_asked(begin, rows, tmp_path, tiny_model):
    bad = [row | {"output": ""} if number in (4, 29) else row for number, row in enumerate(rows)]
    data = Path(write_jsonl(tmp_path / "bad.jsonl", bad))
    with pytest.raises(
        UserError, match=r"bad\.jsonl: 2 of 30 rows .*: rows 4, 29 \(its response is blank\): .*--skip_bad"
    ):
        begin(data=[data])
    with pytest.raises(UserError, match=r"bad\.jsonl: 2 of 30 rows"):
        begin(overrides=[f"eval_data={data}"])
    assert not (tmp_path / "run").exists()
    assert not load_experiment(begin(data=[data], overrides=["max_samples=4"])[0]).skip_bad_rows  # none among these
    given = ["--target", tiny_model, "--data", data, "--template", "chatml", "--run", tmp_path / "other"]
    run_main("selection.start", *given, "--skip_bad_rows")
    assert load_experiment(tmp_path / "other" / "start.yaml").skip_bad_rows


def test_two_files_of_one_stem_get_a_run_folder_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("selection.start.REPOSITORY", tmp_path)
    first, second = tmp_path / "qa.jsonl", tmp_path / "qa.csv"
    run = default_run_folder(first, "T")
    assert run == tmp_path / "runs" / "qa-T" == default_run_folder(second, "T")  # while nothing is there
    run.mkdir(parents=True)
    write_experiment(run, [], "start", small_model="s", target_model="t", dataset=str(first))
    assert default_run_folder(first, "T") == run and not capsys.readouterr().err
    assert default_run_folder(second, "T") == tmp_path / "runs" / "qa.csv-T"
    assert f"as {run} is of {first}; --run" in capsys.readouterr().err


def test_a_second_start_reuses_and_another_one_is_refused_once_work_was_done(begin, tmp_path, capsys):
    path, cut = begin()
    before = path.stat().st_mtime_ns
    assert begin() == (path, cut) and path.stat().st_mtime_ns == before
    assert "reusing" in capsys.readouterr().err
    (tmp_path / "run" / "pool").mkdir()
    begin(rates=[0.5])  # a look at the pool binds to nothing
    (tmp_path / "run" / "scores").mkdir()
    begin(rates=[0.25], overrides=["selection.methods=[staff]"])  # these cut more coresets, and undo none
    chosen = load_experiment(path).selection
    assert (chosen.rates, chosen.methods) == ([0.25], ["staff"])
    before, dry = path.read_bytes(), tmp_path / "dry"
    planned, _ = begin(rates=[0.5], dry=dry)
    assert planned.parent == dry and load_experiment(planned).selection.rates == [0.5]
    with pytest.raises(UserError, match=r"selection\.seed: stored 42, now 1\): give the settings of .*--run"):
        begin(rates=[0.5], overrides=["selection.seed=1"])
    assert path.read_bytes() == before


@pytest.fixture
def selection_sh(tmp_path):
    """Calls selection.sh with a python that notes its calls, and answers as start.py and coreset.py do; gives these
    calls without folders, and what came to stderr."""
    python = """() { echo "$@" >> calls
        case $1 in
            *start.py) printf '%s\\n' my.yaml --target T --out D > "$3" ;;
            *launch.py) echo "staff at rate 0.5: 12 of 24 rows -> $PWD/my run/coresets/staff-0.5.json" ;;
        esac; }"""

    def call(*arguments: str, code: int = 0) -> tuple[list[str], str]:
        command = ["bash", REPOSITORY / "selection" / "selection.sh", *arguments]
        env = os.environ | {"BASH_FUNC_python%%": python}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        (calls := tmp_path / "calls").touch()
        noted = re.sub(r"\S*/(?=[\w-]+\.py)", "", calls.read_text()).splitlines()
        calls.unlink()
        return noted, done.stderr

    return call


STAGES = "finetune.py effort_score.py verify.py coreset.py"


def test_selection_sh_starts_cuts_and_goes_on_and_says_the_next_commands(selection_sh, tmp_path):
    (start, draft, *calls), said = selection_sh("--target", "T", "--data", "my.jsonl", "--set", "seed=1")
    assert start.startswith("start.py --answer ") and start.endswith(" --target T --data my.jsonl --set seed=1")
    assert draft == "make_draft.py --config_path my.yaml --target T --out D"
    assert calls == [f"launch.py {STAGES} costs.py report.py --config_path my.yaml"]
    tune, export = (shlex.split(line) for line in said.splitlines())
    coreset = tmp_path / "my run" / "coresets" / "staff-0.5.json"
    assert tune[3:] == ["--config_path", "my.yaml", "--select_path", str(coreset)]
    assert export[3:] == [str(tmp_path / "my run"), "--coreset", "staff-0.5"]
    for _, python, script, *_ in (tune, export):
        assert python == "python" and (tmp_path / script).is_file()


@pytest.mark.parametrize("config", [["my.yaml"], ["--config_path", "my.yaml"], ["--config-path=my.yaml"]])
def test_selection_sh_takes_its_configuration_in_every_form_and_a_dry_one_ends_with_the_plan(selection_sh, config):
    for arguments in ([*config, "--quiet", "--dry_run"], ["--quiet", "--dry-run", *config]):
        dry = f"launch.py {STAGES} --config_path my.yaml --quiet --dry_run"
        assert selection_sh(*arguments) == ([dry, "plan.py --config_path my.yaml --quiet"], "")


def test_a_wrong_call_of_selection_sh_starts_nothing(selection_sh):
    for arguments, said in (
        (["--sett", "a=1"], "unknown argument --sett"),
        (["my.yaml", "--rate", "0.1"], "unknown argument --rate"),
        (["my.yaml", "--config_path", "other.yaml"], "more than one configuration: my.yaml other.yaml"),
        (["--config_path"], "--config_path stands alone"),
        (["--target", "T", "--data", "my.jsonl", "--config_path", "my.yaml"], "or the configuration my.yaml"),
    ):
        assert (called := selection_sh(*arguments, code=2)) == ([], f"error: {called[1][7:]}") and said in called[1]
        assert called[1].count("\n") == 1
