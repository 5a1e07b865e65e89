"""Scale: what is chosen without sorting is what a stable sort chooses; files of many parts; a million rows."""

import json
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import run_main
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selection.method.staff import Choice, Strata, allocate_budgets, choose_staff, coreset_size, stratify
from selection.rows.tokens import _response_lengths
from selection.run.errors import UserError
from selection.run.products import file_digest, write_sealed
from selection.scores.folder import read_ids, read_scores

by_property = settings(max_examples=100, deadline=None)
rates = st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.9, 0.95, 1.0])


@st.composite
def score_arrays(draw, max_size=120) -> np.ndarray:
    """Ties, constants, zeros of both signs, long tails, neighbouring floats."""
    rng, size = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.integers(1, max_size))
    kinds = {
        "constant": np.full(size, draw(st.sampled_from([0.0, 0.1, 7.0, 1e-320]))),
        "few values": rng.choice([0.0, 0.5, 1.0, 7.0], size),
        "zeros": rng.choice([0.0, -0.0, 5e-324], size),
        "neighbours": np.nextafter(1.0, rng.choice([0.0, 1.0, 2.0], size)),
        "long tail": rng.lognormal(sigma=2, size=size) * rng.choice([1, 1e300], size, p=[0.95, 0.05]),
        "ascending": np.sort(rng.lognormal(size=size)),
    }
    return kinds[draw(st.sampled_from(list(kinds)))]


def plain_choice(scores: np.ndarray, strata: Strata, budgets: list[int], m: int, mode: str, seed: int) -> Choice:
    ranks = -scores if mode == "released" else np.random.default_rng([seed, 1]).random(len(scores))
    ranked = [rows[np.argsort(ranks[rows], kind="stable")] for rows in strata.members]
    chosen = np.concatenate([rows[:budget] for rows, budget in zip(ranked, budgets, strict=True)])
    unchosen = np.setdiff1d(np.concatenate(ranked), chosen)
    fill = unchosen[np.argsort(np.random.default_rng([seed, 2]).random(len(scores))[unchosen])[: m - len(chosen)]]
    filled = [int(np.isin(rows, fill).sum()) for rows in ranked]
    from_hardest = strata.hardest[: m - len(chosen) - len(fill)]
    rows = np.sort(np.concatenate([chosen, fill, from_hardest]))
    return Choice(rows, np.add(budgets, filled).tolist(), filled, len(from_hardest), np.sort(fill))


@by_property
@given(
    score_arrays(),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.1, 0.9]),
    rates,
    st.sampled_from(["paper", "released"]),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.3, 1, 9]),
)
def test_the_choice_is_that_of_the_plain_sort(scores, num_strata, cutoff, rate, mode, seed, ratio):
    assume(int(rate * len(scores)))
    strata, m = stratify(scores, num_strata, cutoff), coreset_size(rate, len(scores))
    rng = np.random.default_rng(seed)
    ratios = [ratio * rng.choice([0.0, 0.5, 2.0]) if rng.random() < 0.9 else None for _ in strata.members]
    for verified in (ratios, [0.0] * len(ratios)):  # published, a V of 0 everywhere leaves all to the fill
        plain = plain_choice(scores, strata, allocate_budgets(strata.sizes, verified, m, mode), m, mode, seed)
        for name, found in vars(choose_staff(scores, strata, verified, m, mode, seed)).items():
            assert np.array_equal(found, getattr(plain, name)), name
            assert isinstance(found, np.ndarray) or json.dumps(found)  # Python's numbers, as in the record


def write_parts(folder: Path, tables: list[pa.Table]) -> Path:
    folder.mkdir()
    manifest = {"identity": {"data_fingerprint": "x"}, "num_rows": 9, "columns": [], "left_out": []}
    write_sealed(folder / "manifest.json", manifest)
    for number, table in enumerate(tables):
        pa.parquet.write_table(table, folder / "new")
        (folder / "new").rename(folder / f"part-{number:03d}-{file_digest(folder / 'new')[:16]}.parquet")
    return folder


@pytest.mark.parametrize("num_parts", [1, 40])  # of 40 some are empty
@pytest.mark.parametrize("spread", [1, 10**14, 1.0], ids=str)
def test_parts_in_any_order_are_read_row_by_row(tmp_path, spread, num_parts):
    rng = np.random.default_rng(num_parts)
    columns = {
        "index": rng.choice(60, 30, replace=False) * spread,
        "id": [f"id{row}" for row in range(30)],
        "effort": rng.choice([0.0, 1.5, 2.5], 30),
        "n_response_tokens": rng.integers(1, 99, 30).astype(np.int32),
        "hidden_state": pa.array(list(rng.random((30, 3), dtype=np.float32)), pa.list_(pa.float32())),
    }
    table, names = pa.table(columns), ("effort", "n_response_tokens", "hidden_state")
    parts = [table.take(pa.array(rows)) for rows in np.array_split(np.arange(30), num_parts)]
    folder = write_parts(tmp_path / "scores", parts)
    scores, expected = read_scores(folder, names), table.take(pa.array(np.argsort(columns["index"])))
    assert (scores.index.dtype, scores.index.tolist()) == (np.int64, expected["index"].to_pylist())
    assert scores.ids == expected["id"].to_pylist() and read_scores(folder, ids=False).ids is None
    assert all(scores.columns[name].tolist() == expected[name].to_pylist() for name in names)
    assert read_ids(folder, scores.index[::4]) == [scores.ids[::4]]


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path):
    first = {"index": [0], "effort": [1.5], "hidden_state": [[1.0]]}
    ids = {"hidden_state": [[1.0]], "id": ["a"]}, "some parts have a column id, some have none"
    for other, said in (({"hidden_state": [[1.0, 2.0]]}, "lists of one length"), ({}, "no column hidden_state"), ids):
        second = {"index": pa.array([1], pa.int16()), "effort": [1.0], **other}
        folder = write_parts(tmp_path / said, [pa.table(first), pa.table(second)])
        with pytest.raises(UserError, match=said):
            read_scores(folder, ("effort", "hidden_state"))


def test_the_benchmark_measures_every_method_and_leaves_nothing(tmp_path, capsys):
    arguments = ["--rows", 300, "--features", 4, "--folder", tmp_path, "--method", "staff", "moderate"]
    run_main("scripts.bench.choice", *arguments)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:16].strip() for line in lines] == ["staff, paper", "staff, released", "moderate"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="at least 10 rows"):
        run_main("scripts.bench.choice", "--rows", 1)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_million_rows_are_cut_in_seconds_and_some_hundred_bytes_a_row(mode):
    scores, start = np.random.default_rng(0).lognormal(size=10**6), time.perf_counter()
    tracemalloc.start()
    strata = stratify(scores, 50, 0.1)
    choice = choose_staff(scores, strata, [1.0] * len(strata.members), 10**5, mode, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(choice.rows) == 10**5 and peak < 200 * 10**6
    assert time.perf_counter() - start < 5  # about 0.3 s; the bound is for a busy machine


def test_response_tokens_are_counted_in_some_bytes_a_row():
    chunk = pa.array([[-100] * 10 + [1] * 10] * 1000)
    tokenised = SimpleNamespace(data=pa.table({"labels": pa.chunked_array([chunk] * 100)}))
    _response_lengths(tokenised)  # imports
    tracemalloc.start()
    counts = _response_lengths(tokenised)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(counts) == 10**5 and (counts == 10).all() and peak < 40 * len(counts)  # at once: 160 a row and more
