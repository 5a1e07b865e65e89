"""Scores and coresets on disk: what is written is read back, and what is damaged or foreign is refused by name."""

import contextlib
import datetime
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from conftest import everything_in
from hypothesis import given, settings
from hypothesis import strategies as st

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


def rows_of(parts: list) -> list[int]:
    return [row for part in parts for batch in part for row in batch]


def columns_of(part: list[list[int]]) -> dict[str, np.ndarray]:
    rows = np.array(rows_of([part]))
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


def test_a_folder_is_read_as_it_was_written(tmp_path):
    folder = filled_folder(tmp_path / "scores", rows=[7, 2, 9, 0, 1, 3, 8, 4, 6, 5])
    scores = read_scores(folder)
    assert scores.index.tolist() == EVERY.tolist()
    assert scores.of_all_rows().tobytes() == (EVERY / 7).tobytes()
    assert scores.ids == [f"id{row}" for row in EVERY]
    assert read_ids(folder, EVERY, np.array([2, 7])) == [scores.ids, ["id2", "id7"]]
    assert (scores.fingerprint, scores.num_rows) == ("fingerprint", NUM_ROWS)
    manifest = read_json(folder / "manifest.json")
    assert (manifest["identity"], manifest["left_out"]) == (IDENTITY, [])
    tables = [pa.parquet.read_table(part) for part in sorted(folder.glob("part-*"))]
    assert all(table.schema.equals(SCHEMA) for table in tables)
    rows = [int(row) for table in tables for row in table["index"].to_pylist()]
    assert pa.concat_tables(tables).to_pydict() == {name: each.tolist() for name, each in columns_of([rows]).items()}


def test_a_folder_of_another_identity_is_refused_by_key_and_stays(tmp_path):
    before = everything_in(filled_folder(tmp_path / "scores"))
    for key in ("model", "data_fingerprint", "phi"):
        with pytest.raises(UserError, match=key):
            open_folder(tmp_path / "scores", **{key: "other"})
    assert everything_in(tmp_path / "scores") == before
    open_folder(tmp_path / "begun").plan(EVERY, one_row_batches)
    open_folder(tmp_path / "begun", model="other")  # without scores there is nothing to mix


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 9), min_size=1), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_plan_holds_the_rows_without_a_score_and_an_interrupted_one_goes_on_with_the_same_batches(requests):
    with tempfile.TemporaryDirectory() as folder:
        path, done = Path(folder) / "scores", set()
        for rows, count in requests:
            parts = open_folder(path).plan(np.array(sorted(rows)), one_row_batches)
            assert sorted(rows_of(parts)) == sorted(rows - done)
            write_all(open_folder(path), parts[:count])
            done.update(rows_of(parts[:count]))
            if done:  # before, a plan binds nobody
                assert open_folder(path).plan(np.array(sorted(rows)), None) == parts[count:]  # none is asked for anew
        write_all(open_folder(path), open_folder(path).plan(EVERY, one_row_batches))
        open_folder(path).finish(EVERY)
        assert read_scores(path).of_all_rows().tolist() == (EVERY / 7).tolist()


def test_a_folder_without_parts_or_manifest_is_refused(tmp_path):
    folder = tmp_path / "scores"
    with pytest.raises(UserError, match=r"run (verify|effort_score)\.py first"):
        read_scores(folder)
    open_folder(folder).plan(EVERY, one_row_batches)
    with pytest.raises(UserError, match="no finished part"):
        read_scores(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_scores(folder)


def test_unfinished_scores_name_the_first_row_without_a_score(tmp_path):
    scores = read_scores(filled_folder(tmp_path / "scores", rows=[0, 1, 3, 5]))
    far = read_scores(write_scores(tmp_path / "scores.parquet", index=[0, 1, 10**15], effort=[1.0] * 3))
    for unfinished in (scores, far):
        with pytest.raises(UserError, match="row 2 "):
            unfinished.of_all_rows()
    with pytest.raises(UserError, match="row 4 "):
        scores.at(np.array([5, 0, 4]))
    assert scores.at(np.array([5, 0, 3])).tolist() == [5 / 7, 0.0, 3 / 7]


def write_scores(path: Path, **columns: list) -> Path:
    (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_plain_file_is_read_in_the_order_of_its_rows_and_ids_stay_the_text_that_they_are(tmp_path, suffix):
    for ids in (None, ["c", "a", "b"], ["0012", "0007", "1"], ["2024-01-02", "2024-01-01", "x"]):
        columns = {"effort": [0.1, 2.5, 7.0], "index": [2, 0, 1]} | ({"id": ids} if ids else {})
        path = write_scores(tmp_path / f"s{suffix}", extra=[1, 1, 1], **columns)
        scores, expected = read_scores(path), ids and [ids[1], ids[2], ids[0]]
        assert (scores.index.tolist(), scores.of_all_rows().tolist()) == ([0, 1, 2], [2.5, 7.0, 0.1])
        assert (scores.ids, scores.fingerprint, scores.num_rows) == (expected, None, None)
        assert read_ids(path, np.array([0, 2])) == [ids and expected[::2]]


def test_parquet_ids_that_are_no_text_are_refused_or_made_text(tmp_path):
    for ids in ([datetime.date(2024, 1, 1)] * 2, [b"\xff", b"a"], [0.5, np.nan]):
        path = write_scores(tmp_path / "scores.parquet", index=[0, 1], effort=[1.0, 2.0], id=ids)
        with contextlib.suppress(UserError):
            assert {type(name) for name in read_scores(path).ids} == {str}


BAD_COLUMNS = [
    (dict(effort=[1.0, 2.0]), "no column index"),
    (dict(index=[0, 1], loss=[1.0, 2.0]), "no column effort"),
    (dict(index=[0, 7, 1, 7], effort=[1.0, 2.0, 2.0, 2.0]), "row 7 has more than one score"),
    (dict(index=[0, 1], effort=["a", "b"]), "column effort"),
]
BAD_COLUMNS += [(dict(index=[7, 1], effort=[bad, 2.0]), f"row 7 has effort {bad}") for bad in (np.nan, np.inf, -0.5)]
BAD_COLUMNS += [(dict(index=index, effort=[1.0]), "column index") for index in ([-1], [0.5], [None], ["a"])]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_bad_scores_are_refused_naming_file_and_row_and_nothing_else_is_said(tmp_path, suffix):
    for columns, said in BAD_COLUMNS:
        path = write_scores(tmp_path / f"scores{suffix}", **columns)
        with warnings.catch_warnings(), pytest.raises(UserError) as refusal:
            warnings.simplefilter("error")  # a warning would be a second line on stderr
            read_scores(path)
        assert str(path) in str(refusal.value) and said in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    header, binary = b"index,effort\n", bytes(range(256)) * 3
    for content in (b"", header, header + b"0,1\n1,2,3\n", binary, b"index,effort,effort\n0,1,2\n", None):
        for name in ("scores.csv", "scores.parquet", "scores.json"):
            (tmp_path / name).unlink(missing_ok=True) if content is None else (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name):
                read_scores(tmp_path / name)


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


def test_rows_of_a_published_list_or_of_json_by_hand_come_in_ascending_order_with_their_ids(tmp_path):
    for value in ([5, 0, 3], torch.tensor([5, 0, 3])):
        coreset = read_coreset(write_list(tmp_path / "staff-0.1.pt", value))
        assert (coreset.name, coreset.indices.tolist(), coreset.ids) == ("staff-0.1", [0, 3, 5], None)
    (tmp_path / "by-hand.json").write_text('{"indices": [5, 0, 3], "ids": ["f", "a", "d"]}')
    coreset = read_coreset(tmp_path / "by-hand.json")
    assert (coreset.indices.tolist(), coreset.ids, coreset.fingerprint) == ([0, 3, 5], ["a", "d", "f"], None)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_indices_that_are_no_distinct_row_numbers_are_refused(tmp_path, suffix):
    for indices in ([2, 0, 2], [0, -1], [True], [0.0, 1.0], ["0", "1"], [0, None], [[0]], [], [0, 2**63]):
        path = write_list(tmp_path / f"coreset{suffix}", indices)
        said = "row 2 is chosen more than once" if indices == [2, 0, 2] else "indices"
        with pytest.raises(UserError, match=f"{path}.*{said}"):
            read_coreset(path)


def test_a_file_that_is_no_coreset_is_refused_by_name(tmp_path):
    no_lists = torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor(3), {"indices": [0, 1]}, None
    for content in (*no_lists, b"[1, 2]", b"{}", b'{"indices": [0, 1], "ids": ["a"]}', b'{"indices": [0, 1', b"\xff\0"):
        for path in (tmp_path / "coreset.json", tmp_path / "coreset.pt"):
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
            with pytest.raises(UserError, match=path.name):
                read_coreset(path)


def test_a_coreset_of_other_data_is_refused():
    for rows, ids, fingerprint, said in (
        ([0, 3], None, None, "row 3 is outside"),
        ([0, 2], ["a", "b"], "fingerprint", "row 2 has id c"),
        ([0, 2], ["a", "c"], "other", "fingerprint other"),
    ):
        with pytest.raises(UserError, match=f"c.json: .*{said}"):
            check_fits(Coreset("c", np.array(rows), ids, fingerprint), ["a", "b", "c"], "fingerprint", "c.json")


def test_an_interrupted_write_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "folder" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(UserError, match=r"file\.json/below\.json"):
        write_json(path / "below.json", {})
