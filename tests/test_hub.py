"""--data with the hub's names and save_to_disk folders; a folder stands in for the hub's cache."""

import re
from pathlib import Path

import pytest
from conftest import biology
from datasets import Dataset, DatasetDict, load_dataset

from selection.rows.hub import fetch, find_source, record_of
from selection.rows.read import raw_rows
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.products import read_record
from selection.start import start

SHA = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
license: cc-by-4.0
configs:
- config_name: terms
  default: true
  data_files:
  - {split: train, path: "terms/train-*.parquet"}
  - {split: test, path: terms/test.parquet}
- config_name: other
  data_files: other.parquet
---
"""


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The hub's cache with owner/go-bio: two splits of 20 and 10 rows in one configuration, and 5 rows in another."""
    repo = tmp_path / "hub" / "datasets--owner--go-bio"
    snapshot = repo / "snapshots" / SHA
    (snapshot / "terms").mkdir(parents=True)
    (repo / "refs").mkdir()
    for reference in ("main", "v1"):
        (repo / "refs" / reference).write_text(SHA)
    rows = Dataset.from_list(biology(35))
    (snapshot / "README.md").write_text(CARD)
    for name, of in (("terms/train-0.parquet", (0, 20)), ("terms/test.parquet", (20, 30)), ("other.parquet", (30, 35))):
        rows.select(range(*of)).to_parquet(snapshot / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return rows.to_list()


def rows_in(path: Path) -> list[dict]:
    with raw_rows(path) as rows:
        return rows.to_list()


def test_names_of_the_hub_give_the_rows_they_name_and_their_revision_is_recorded(cached, tmp_path):
    for number, (given, wanted, splits) in enumerate(
        (
            ("owner/go-bio", cached[:30], {"train": 20, "test": 10}),
            ("owner/go-bio:terms@v1#test", cached[20:30], {"test": 10}),
            (f"owner/go-bio@{SHA}#train", cached[:20], {"train": 20}),
            ("owner/go-bio:other", cached[30:], {"train": 5}),
        )
    ):
        path = fetch(find_source(given), tmp_path / str(number))
        assert rows_in(path) == wanted
        assert record_of(path) == {"given": given, "revision": SHA, "licence": "cc-by-4.0", "splits": splits}
    for given, said in (
        ("owner/go-bio#dev", "no split dev; there: train, test"),
        ("owner/go-bio:none", "its configurations are terms, other"),
        ("owner/go-bio@v2", "the hub cannot be reached"),
        ("owner/none", "the hub cannot be reached: `hf download --repo-type dataset owner/none`"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            fetch(find_source(given), tmp_path / "failed")
        assert not (tmp_path / "failed").exists()


def test_what_was_fetched_is_taken_without_the_hub(cached, tmp_path, monkeypatch):
    path = fetch(find_source("owner/go-bio"), tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    before = path.stat().st_mtime_ns
    assert fetch(find_source("owner/go-bio"), tmp_path / "run", tmp_path / "dry") == path
    assert path.stat().st_mtime_ns == before and not (tmp_path / "dry").exists()
    with pytest.raises(UserError, match="the hub cannot be reached"):  # half of it is not enough
        path.with_suffix(".json").unlink()
        fetch(find_source("owner/go-bio"), tmp_path / "run")


def test_a_start_from_the_hub_is_an_experiment_on_the_fetched_file(cached, tmp_path, tiny_model):
    given = {"target": str(tiny_model), "template": "chatml", "run": tmp_path / "run"}
    path, _ = start(data=[Path("owner/go-bio#train")], dry=tmp_path / "dry", **given)
    assert path.parent == tmp_path / "dry" and not (tmp_path / "run").exists()
    experiment = load_experiment(start(data=[Path("owner/go-bio#train")], **given)[0])
    assert Path(experiment.dataset).parent == tmp_path / "run" / "source"
    assert rows_in(Path(experiment.dataset)) == cached[:20]
    assert read_record(Path(experiment.dataset).with_suffix(".json"))["revision"] == SHA


def test_folders_of_save_to_disk_and_arrow_files_are_read_and_a_changed_one_is_read_again(tmp_path, rows):
    parts = DatasetDict(train=Dataset.from_list(rows[:20]), dev=Dataset.from_list(rows[20:]))
    parts.save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one", num_shards=2)
    assert rows_in(fetch(find_source(str(tmp_path / "both")), tmp_path / "run")) == rows
    assert rows_in(fetch(find_source(f"{tmp_path / 'both'}#dev"), tmp_path / "run")) == rows[20:]
    path = fetch(find_source(str(tmp_path / "one")), tmp_path / "run")
    assert rows_in(path) == rows[:20]
    assert rows_in(next((tmp_path / "both" / "dev").glob("*.arrow"))) == rows[20:]
    numbers = [row | {"output": number} for number, row in enumerate(rows)]
    Dataset.from_list(numbers).save_to_disk(tmp_path / "one")
    assert rows_in(fetch(find_source(str(tmp_path / "one")), tmp_path / "run")) == numbers
    Dataset.from_list(rows).save_to_disk(tmp_path / "elsewhere" / "one")
    with pytest.raises(UserError, match="give another --run"):
        fetch(find_source(str(tmp_path / "elsewhere" / "one")), tmp_path / "run")
    assert find_source(str(tmp_path)) is None and find_source("my.jsonl") is None
    assert len(load_dataset("parquet", data_files=str(path), split="train", cache_dir=tmp_path / "c")) == len(rows)
