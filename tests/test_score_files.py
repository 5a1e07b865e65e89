"""Scores and coresets on disk: what is written is read back, and what is damaged or foreign is refused by name."""

import datetime
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from selection.run.errors import UserError
from selection.run.products import atomic_path, read_json, write_json
from selection.scores.coresets import Coreset, check_fits, read_coreset, write_coreset
from selection.scores.folder import SCHEMA, ScoreFolder, Scores, read_ids, read_scores

IDENTITY = {"data_fingerprint": "fingerprint", "model": "small", "precision": "fp32"}
NUM_ROWS = 10
EVERY = np.arange(NUM_ROWS)


def one_row_batches(missing: np.ndarray) -> list[list[list[int]]]:
    """Parts of at most two batches of one row."""
    return [[[int(row)] for row in missing[i : i + 2]] for i in range(0, len(missing), 2)]


def never(missing):
    raise AssertionError(f"planned again: {missing}")


def rows_of(parts: list) -> list[int]:
    return sorted(row for part in parts for batch in part for row in batch)


def columns_of(part: list[list[int]]) -> dict[str, np.ndarray]:
    rows = np.array([row for batch in part for row in batch])
    ids = np.array([f"id{row}" for row in rows])
    counts = {"n_prompt_tokens": rows + 5, "n_response_tokens": rows + 1}
    return {"index": rows, "id": ids, **counts, "loss": rows / 3, "effort": rows / 7}


def open_folder(path: Path, **changes) -> ScoreFolder:
    return ScoreFolder(path, IDENTITY | changes, NUM_ROWS)


def write_all(folder: ScoreFolder, parts: list) -> None:
    for part in parts:
        folder.write_part(part, columns_of(part))


def filled_folder(path: Path, rows=EVERY) -> Path:
    folder = open_folder(path)
    write_all(folder, folder.plan(np.array(rows), one_row_batches))
    folder.finish(np.array(rows))
    return path


# The score folder


def test_a_folder_is_read_as_it_was_written(tmp_path):
    folder = filled_folder(tmp_path / "scores", rows=[7, 2, 9, 0, 1, 3, 8, 4, 6, 5])
    scores = read_scores(folder)
    assert scores.index.tolist() == EVERY.tolist()
    assert scores.of_all_rows().tobytes() == (EVERY / 7).tobytes()
    assert scores.ids == read_ids(folder, EVERY) == [f"id{row}" for row in EVERY]
    assert (scores.fingerprint, scores.num_rows) == ("fingerprint", NUM_ROWS)
    assert read_ids(folder, np.array([2, 7])) == ["id2", "id7"]
    manifest = read_json(folder / "manifest.json")
    assert (manifest["identity"], manifest["left_out"]) == (IDENTITY, [])


def test_a_part_holds_every_column_under_its_type(tmp_path):
    folder, part = open_folder(tmp_path / "scores"), [[3, 1], [4]]
    folder.write_part(part, columns_of(part))
    (path,) = folder.path.glob("part-*.parquet")
    table = pa.parquet.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert table.to_pydict() == {name: values.tolist() for name, values in columns_of(part).items()}


@pytest.mark.parametrize("change", [{"model": "other"}, {"data_fingerprint": "other"}, {"phi": "v_weight"}])
def test_a_folder_of_another_identity_is_refused_by_key_and_stays(tmp_path, change):
    filled_folder(tmp_path / "scores")
    before = {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()}
    with pytest.raises(UserError, match=next(iter(change))):
        open_folder(tmp_path / "scores", **change)
    assert {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()} == before


def test_an_interrupted_plan_goes_on_with_the_same_batches(tmp_path):
    folder = open_folder(tmp_path / "scores")
    parts = folder.plan(EVERY, one_row_batches)
    assert rows_of(parts) == EVERY.tolist()
    write_all(folder, parts[1:3])

    again = open_folder(tmp_path / "scores")
    left = again.plan(EVERY, never)
    assert left == [parts[0], *parts[3:]]
    write_all(again, left)
    assert again.plan(EVERY, never) == []
    again.finish(EVERY)
    assert read_scores(tmp_path / "scores").of_all_rows().tolist() == (EVERY / 7).tolist()


def test_only_rows_without_a_score_are_planned_and_a_plan_without_a_finished_part_binds_nobody(tmp_path):
    folder = open_folder(filled_folder(tmp_path / "scores", rows=[1, 4, 5]))
    assert folder.plan(np.array([1, 4, 5]), never) == []
    write_all(folder, folder.plan(EVERY, one_row_batches))
    assert read_scores(folder.path).of_all_rows().tolist() == (EVERY / 7).tolist()
    open_folder(tmp_path / "begun").plan(EVERY, one_row_batches)
    other = ScoreFolder(tmp_path / "begun", {"data_fingerprint": "another"}, NUM_ROWS)
    assert len(other.plan(np.array([3]), one_row_batches)) == 1


@pytest.mark.parametrize(("planned", "asked", "left"), [(EVERY, [1, 7], [7]), ([0, 1, 5], EVERY, range(2, NUM_ROWS))])
def test_a_plan_in_progress_is_narrowed_or_widened_to_the_rows_asked_for(tmp_path, planned, asked, left):
    folder = open_folder(tmp_path / "scores")
    write_all(folder, folder.plan(np.array(planned), one_row_batches)[:1])  # rows 0 and 1
    assert rows_of(open_folder(tmp_path / "scores").plan(np.array(asked), one_row_batches)) == list(left)


def test_a_folder_without_parts_or_manifest_is_refused(tmp_path):
    folder = tmp_path / "scores"
    with pytest.raises(UserError, match="run the scoring stage first"):
        read_scores(folder)
    open_folder(folder).plan(EVERY, one_row_batches)
    with pytest.raises(UserError, match="no finished part"):
        read_scores(folder)
    for damage in (lambda: (folder / "manifest.json").write_text("[]"), (folder / "manifest.json").unlink):
        damage()
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_scores(folder)


def test_an_unfinished_folder_names_the_first_row_without_a_score_and_a_truncated_part_is_named(tmp_path):
    scores = read_scores(filled_folder(tmp_path / "scores", rows=[0, 1, 3, 5]))
    with pytest.raises(UserError, match="row 2 "):
        scores.of_all_rows()
    with pytest.raises(UserError, match="row 4 "):
        scores.at(np.array([5, 0, 4]))
    assert scores.at(np.array([5, 0, 3])).tolist() == [5 / 7, 0.0, 3 / 7]
    part = next((tmp_path / "scores").glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(UserError, match=part.name):
        read_scores(tmp_path / "scores")


# Plain files


def write_scores(path: Path, **columns: list) -> Path:
    (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("ids", [None, ["c", "a", "b"], ["0012", "0007", "1"], ["2024-01-02", "2024-01-01", "x"]])
def test_a_plain_file_is_read_in_the_order_of_its_rows_and_ids_stay_the_text_that_they_are(tmp_path, suffix, ids):
    columns = {"id": ids} if ids else {}
    path = write_scores(tmp_path / f"s{suffix}", extra=[1, 1, 1], effort=[0.1, 2.5, 7.0], index=[2, 0, 1], **columns)
    scores, expected = read_scores(path), ids and [ids[1], ids[2], ids[0]]
    assert scores.index.tolist() == [0, 1, 2]
    assert scores.of_all_rows().tolist() == [2.5, 7.0, 0.1]
    assert (scores.ids, scores.fingerprint, scores.num_rows) == (expected, None, None)
    assert read_ids(path, np.array([0, 2])) == (ids and expected[::2])


@pytest.mark.parametrize(
    "ids", [[datetime.date(2024, 1, 1)] * 2, [b"\xff", b"a"], [0.5, np.nan]], ids=["date", "bytes", "nan"]
)
def test_parquet_ids_that_are_no_text_are_refused_or_made_text(tmp_path, ids):
    path = write_scores(tmp_path / "scores.parquet", index=[0, 1], effort=[1.0, 2.0], id=ids)
    try:
        assert {type(name) for name in read_scores(path).ids} == {str}
    except UserError as refusal:
        assert str(path) in str(refusal)


BAD_COLUMNS = {
    "no index": (dict(effort=[1.0, 2.0]), "no column index"),
    "no effort": (dict(index=[0, 1], loss=[1.0, 2.0]), "no column effort"),
    "nan": (dict(index=[0, 7, 1], effort=[1.0, np.nan, 2.0]), "row 7 has effort nan"),
    "missing score": (dict(index=[0, 7, 1], effort=[1.0, None, 2.0]), "row 7 has effort nan"),
    "infinite": (dict(index=[0, 7, 1], effort=[1.0, np.inf, 2.0]), "row 7 has effort inf"),
    "negative": (dict(index=[0, 7, 1], effort=[1.0, -0.5, 2.0]), "row 7 has effort -0.5"),
    "twice": (dict(index=[0, 7, 1, 7], effort=[1.0, 2.0, 2.0, 2.0]), "row 7 has more than one score"),
    "negative index": (dict(index=[0, -1], effort=[1.0, 2.0]), "column index"),
    "fractional index": (dict(index=[0.5, 1.5], effort=[1.0, 2.0]), "column index"),
    "missing index": (dict(index=[0, None], effort=[1.0, 2.0]), "column index"),
    "text index": (dict(index=["a", "b"], effort=[1.0, 2.0]), "column index"),
    "text effort": (dict(index=[0, 1], effort=["a", "b"]), "column effort"),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_scores_are_refused_naming_file_and_row_and_nothing_else_is_said(tmp_path, name, suffix):
    columns, said = BAD_COLUMNS[name]
    path = write_scores(tmp_path / f"scores{suffix}", **columns)
    with warnings.catch_warnings(), pytest.raises(UserError) as refusal:
        warnings.simplefilter("error")  # a warning would be a second line on stderr
        read_scores(path)
    assert str(path) in str(refusal.value) and said in str(refusal.value)


BAD_FILES = {
    "empty.csv": b"",
    "empty.parquet": b"",
    "header only.csv": b"index,effort\n",
    "ragged.csv": b"index,effort\n0,1\n1,2,3\n",
    "binary.csv": bytes(range(256)) * 3,
    "text.parquet": b"index,effort\n0,1\n",
    "column twice.csv": b"index,effort,effort\n0,1,2\n",
    "scores.json": b'{"index": [0], "effort": [1.0]}',
    "scores": b"index,effort\n0,1\n",
    "missing.csv": None,
    "missing.parquet": None,
    "missing": None,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name):
    if BAD_FILES[name] is not None:
        (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(UserError, match=name):
        read_scores(tmp_path / name)


@pytest.mark.parametrize(("index", "hole"), [([0, 1, 3], 2), ([1, 2], 0), ([0, 10**15], 1)], ids=str)
def test_a_hole_in_the_index_is_named(tmp_path, index, hole):
    scores = read_scores(write_scores(tmp_path / "scores.parquet", index=index, effort=[1.0] * len(index)))
    with pytest.raises(UserError, match=f"row {hole} "):
        scores.of_all_rows()


# Coresets


def write_list(path: Path, value: object) -> Path:
    """`value` as the list of a published .pt, or under `indices` of our JSON."""
    path.write_text(json.dumps({"indices": value})) if path.suffix == ".json" else torch.save(value, path)
    return path


def test_a_coreset_is_read_as_it_was_written(tmp_path):
    scores = Scores(np.arange(4), {"effort": np.ones(4)}, None, "fingerprint", 4, "scores")
    path = write_coreset(tmp_path, "staff", 0.5, np.array([1, 3]), ["b", "d"], scores, {"seed": 42})
    coreset = read_coreset(path)
    assert (coreset.name, coreset.indices.tolist(), coreset.ids) == ("staff-0.5", [1, 3], ["b", "d"])
    assert (coreset.fingerprint, coreset.num_rows) == ("fingerprint", 4)
    check_fits(coreset, ["a", "b", "c", "d"], "fingerprint", "coreset")
    with pytest.raises(ValueError):
        write_coreset(tmp_path / "out", "staff", 0.5, np.array([1]), None, scores, {"seed": float("nan")})
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("value", [[5, 0, 3], (5, 0, 3), torch.tensor([5, 0, 3])], ids=["list", "tuple", "tensor"])
def test_rows_of_a_published_list_or_of_json_by_hand_come_in_ascending_order_with_their_ids(tmp_path, value):
    coreset = read_coreset(write_list(tmp_path / "staff-0.1.pt", value))
    assert (coreset.name, coreset.indices.tolist(), coreset.ids) == ("staff-0.1", [0, 3, 5], None)
    (tmp_path / "by-hand.json").write_text(json.dumps({"indices": list(map(int, value)), "ids": ["f", "a", "d"]}))
    coreset = read_coreset(tmp_path / "by-hand.json")
    assert (coreset.indices.tolist(), coreset.ids, coreset.fingerprint) == ([0, 3, 5], ["a", "d", "f"], None)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize(
    "indices", [[2, 0, 2], [0, -1], [True], [0.0, 1.0], ["0", "1"], [0, None], [[0]], [], [0, 2**63]], ids=str
)
def test_indices_that_are_no_distinct_row_numbers_are_refused(tmp_path, suffix, indices):
    path = write_list(tmp_path / f"coreset{suffix}", indices)
    with pytest.raises(UserError) as refusal:
        read_coreset(path)
    said = "row 2 is chosen more than once" if indices == [2, 0, 2] else "indices"
    assert str(path) in str(refusal.value) and said in str(refusal.value)


class MakesFolder:
    """Unpickled by an unguarded reader, this makes a folder where it is run."""

    def __reduce__(self):
        return os.mkdir, ("made",)


NO_CORESETS = [
    *(torch.tensor([0.0, 1.0]), torch.tensor([True]), torch.tensor([[0, 1]]), torch.tensor(3), {"indices": [0, 1]}),
    MakesFolder(),
    *("[1, 2]", "{}", '{"indices": 3}', '{"indices": [0, 1], "ids": ["a"]}', b"", b"\xff\x00\x80" * 50, None),
]


@pytest.mark.parametrize("content", NO_CORESETS, ids=lambda content: type(content).__name__)
def test_a_file_that_is_no_coreset_is_refused_by_name_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "coreset.json", tmp_path / "coreset.pt"):
        if isinstance(content, str | bytes):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=path.name):
            read_coreset(path)
    assert not (tmp_path / "made").exists()
    if isinstance(content, MakesFolder):
        torch.load(path, weights_only=False)  # unguarded, it does run
        assert (tmp_path / "made").exists()


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_a_truncated_coreset_is_refused_by_name(tmp_path, suffix):
    path = write_list(tmp_path / f"coreset{suffix}", list(range(100)))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=path.name):
        read_coreset(path)


@pytest.mark.parametrize(
    ("rows", "ids", "fingerprint", "said"),
    [
        ([0, 2], ["a", "c"], "fingerprint", None),
        ([0, 2], None, None, None),
        ([0, 3], None, None, "row 3 is outside"),
        ([0, 2], ["a", "b"], "fingerprint", "row 2 has id c"),
        ([0, 2], ["a", "c"], "other", "fingerprint other"),
        ([0, 2], None, "other", "fingerprint other"),
    ],
)
def test_a_coreset_of_other_data_is_refused(rows, ids, fingerprint, said):
    given = Coreset("c", np.array(rows), ids, fingerprint), ["a", "b", "c"], "fingerprint", "c.json"
    if said is None:
        check_fits(*given)
        return
    with pytest.raises(UserError, match=f"c.json: .*{said}"):
        check_fits(*given)


def test_an_interrupted_write_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "folder" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(UserError, match=r"file\.json/below\.json"):
        write_json(path / "below.json", {})
