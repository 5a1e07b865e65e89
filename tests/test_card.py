"""export.py --card: a folder that the hub's own client and `datasets` read, pushed only by one who is logged in."""

import json
from pathlib import Path

import pytest
from conftest import copy_of, run_main
from datasets import Dataset, get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard

from selection.report.annotated import annotated
from selection.report.card import _card, licence_of, push, write_card
from selection.run.errors import UserError
from selection.scores.coresets import read_coreset


@pytest.fixture(scope="module")
def card(finished_run, tmp_path_factory):
    """The finished run's card of two coresets, made by the script's own main."""
    folder = tmp_path_factory.mktemp("card")
    given = ["--coreset", "staff-0.2", "random-0.5", "--licence", "cc-by-4.0", "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selection.report.card._SHARD", 50)
        run_main("scripts.export", finished_run.folder, "--card", *given)
    return folder / "card"


def test_datasets_loads_each_configuration_with_the_rows_it_names_as_they_were(card, finished_run, tmp_path):
    rows = [json.loads(line) for line in Path(finished_run.dataset).read_text().splitlines()]
    known = annotated(finished_run, finished_run.coresets / "staff-0.2.json").to_pylist()
    assert get_dataset_config_names(str(card)) == ["full", "staff-0.2", "random-0.5"]
    assert len(list((card / "data" / "full").glob("train-*-of-00003.parquet"))) == 3
    for name, size in (("full", 120), ("staff-0.2", 24), ("random-0.5", 60)):
        found = load_dataset(str(card), name, cache_dir=tmp_path)
        assert {key: len(part) for key, part in found.items()} == {"train": size, "test": 30}
        wanted = range(120) if name == "full" else read_coreset(finished_run.coresets / f"{name}.json").indices
        assert sorted(found["train"]["staff_index"]) == sorted(wanted)
        for row in [*found["train"], *found["test"]]:
            number, figures = row["staff_row"], known[row["staff_row"]]
            assert {key: row[key] for key in rows[number]} == rows[number]
            assert row["staff_effort"] == figures["effort"] and row["staff-0.2_reason"] == figures["reason"]


def test_the_card_says_where_the_rows_come_from_and_no_path_of_this_machine(card, finished_run):
    parsed = DatasetCard.load(card / "README.md")  # raises where the YAML does not hold
    assert parsed.data.license == "cc-by-4.0" and parsed.data.configs[0]["config_name"] == "full"
    text = parsed.text
    for said in ("data.jsonl", "tiny", "target", "chatml", "| staff-0.2 | staff | paper | 0.2 | 24 | 42 |"):
        assert said in text
    assert str(finished_run.folder.parent) not in parsed.content
    assert (card / "report.html").stat().st_size > 10_000


def test_licence_and_source_come_from_the_hubs_record_and_are_asked_for_else(finished_run, tmp_path):
    with pytest.raises(UserError, match="give the hub's id of it, as --licence"):
        run_main("scripts.export", finished_run.folder, "--card", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    source = tmp_path / "source" / "owner--rows.parquet"
    source.parent.mkdir()
    Dataset.from_json(finished_run.dataset, cache_dir=str(tmp_path / "cache")).to_parquet(source)
    about = {"given": "owner/rows:a@v1", "revision": "abc", "licence": "mit", "splits": {"train": 150}}
    source.with_suffix(".json").write_text(json.dumps(about))
    run = copy_of(finished_run, tmp_path / "run").model_copy(update={"dataset": str(source)})
    assert licence_of(run, None) == "mit" and licence_of(run, "cc0-1.0") == "cc0-1.0"
    made = _card(run, [], {"full/train": 1}, "mit")
    assert made.data.source_datasets == ["owner/rows"] and "owner/rows:a@v1, revision `abc`" in made.text


def test_only_a_whole_card_is_pushed_and_only_where_one_is_logged_in(card, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **keys):
            calls.append(("create", name, keys["private"], keys["repo_type"]))

        def upload_folder(self, **keys):
            calls.append(("upload", keys["repo_id"], keys["folder_path"], keys["repo_type"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(
        "huggingface_hub.DatasetCard.validate", lambda self: calls.append(("validate", self.data.license))
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="not logged in"):
        push(card, "me/rows")
    assert not calls
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    assert push(card, "me/rows") == "https://huggingface.co/datasets/me/rows"
    assert calls == [
        ("validate", "cc-by-4.0"),
        ("create", "me/rows", True, "dataset"),
        ("upload", "me/rows", card, "dataset"),
    ]


def test_a_folder_that_is_no_card_is_kept_and_a_card_is_replaced(card, finished_run, tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "mine.txt").write_text("x")
    coresets = [finished_run.coresets / "staff-0.2.json"]
    with pytest.raises(UserError, match="is no card of a run"):
        write_card(finished_run, coresets, tmp_path / "card", "mit")
    assert (tmp_path / "card" / "mine.txt").exists()
    write_card(finished_run, coresets, tmp_path / "other", "mit")
    write_card(finished_run, coresets, tmp_path / "other", "cc0-1.0")
    assert DatasetCard.load(tmp_path / "other" / "README.md").data.license == "cc0-1.0"
