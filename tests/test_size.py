"""Nothing is sorted, held or written as a whole: against the plain versions that do, bit for bit."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import REPOSITORY, assert_one_line_error, baseline_by_rate, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.baselines import columns_of
from selection.method.staff import (
    Choice,
    Strata,
    allocate_budgets,
    choose_staff,
    choose_within_strata,
    coreset_size,
    draw_verification_samples,
    floor_share,
    lowest,
    min_max_normalise,
    stratify,
    verification_ratio,
)
from selection.run.config import Selection
from selection.run.errors import UserError
from selection.run.products import code_version, digest, file_digest, write_json, write_sealed
from selection.scores import coresets
from selection.scores.coresets import read_coreset, write_coreset
from selection.scores.folder import Scores, read_ids, read_scores
from selection.scores.verification import Settings, StratumRecord, verify, write_verification

by_property = settings(max_examples=100, deadline=None)
modes = st.sampled_from(["paper", "released"])
cutoffs = st.sampled_from([0.0, 0.1, 0.3, 0.9])
rates = st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.9, 0.95, 1.0])


@st.composite
def score_arrays(draw, max_size=120) -> np.ndarray:
    """Ties, constants, zeros of both signs, long tails, neighbouring floats."""
    size = draw(st.integers(1, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["constant", "few values", "zeros", "lognormal", "outlier", "neighbours", "ascending"]))
    if kind == "constant":
        return np.full(size, draw(st.sampled_from([0.0, 0.1, 7.0, 1e-320])))
    if kind == "few values":
        return rng.choice([0.0, 0.5, 1.0, 7.0], size)
    if kind == "zeros":
        return rng.choice([0.0, -0.0, 5e-324], size)
    if kind == "neighbours":
        return np.nextafter(1.0, rng.choice([0.0, 1.0, 2.0], size))
    scores = rng.lognormal(sigma=2, size=size)
    if kind == "outlier":
        scores[rng.integers(size)] *= 1e300
    return np.sort(scores) if kind == "ascending" else scores


# The plain versions


def plain_stratify(scores: np.ndarray, num_strata: int, hardest_cutoff: float) -> Strata:
    order = np.argsort(scores, kind="stable")
    num_kept = len(scores) - floor_share(hardest_cutoff, len(scores))
    kept, hardest = np.sort(order[:num_kept]), order[num_kept:]
    kept_scores = scores[kept].astype(np.float64)
    low, high = kept_scores.min(), kept_scores.max()
    num_strata = num_strata if high > low else 1
    edges = np.linspace(low, high, num_strata + 1)
    stratum = np.searchsorted(edges[1:-1], kept_scores, side="right")
    by_stratum = np.split(
        kept[np.argsort(stratum, kind="stable")], np.cumsum(np.bincount(stratum, minlength=num_strata))[:-1]
    )
    return Strata(
        members=[rows for rows in by_stratum if len(rows)],
        score_ranges=[(float(edges[i]), float(edges[i + 1])) for i, rows in enumerate(by_stratum) if len(rows)],
        hardest=hardest,
    )


def plain_draw(strata: Strata, verify_per_stratum: int, mode: str, seed: int) -> list[np.ndarray]:
    draws, ranks = [], np.random.default_rng([seed, 0]).random(strata.num_rows)
    for rows in strata.members:
        if mode == "released" and len(rows) <= verify_per_stratum:
            draws.append(rows[:0])
        else:
            draws.append(np.sort(rows[np.argsort(ranks[rows])[:verify_per_stratum]]))
    return draws


def plain_verify(speculative: np.ndarray, target: Scores, settings: Settings) -> list[StratumRecord]:
    strata = plain_stratify(speculative, settings.num_strata, settings.hardest_cutoff)
    draws = plain_draw(strata, settings.verify_per_stratum, settings.mode, settings.seed)
    drawn = np.concatenate(draws)
    normalised = min_max_normalise(speculative, reference=speculative)
    complete = len(target.index) == len(speculative)
    known = target.effort if complete else target.at(drawn)
    low, high = (0.0, 1.0) if complete or not len(drawn) else (normalised[drawn].min(), normalised[drawn].max())
    records = []
    for i, rows in enumerate(draws):
        sums = (None, None, None)
        if len(rows):
            ours = normalised[rows]
            theirs = low + (high - low) * min_max_normalise(target.at(rows), reference=known)
            sums = float(ours.sum()), float(theirs.sum()), verification_ratio(theirs, ours)
        records.append(StratumRecord(i, strata.score_ranges[i], strata.sizes[i], rows.tolist(), *sums))
    return records


def plain_choice(scores: np.ndarray, strata: Strata, budgets: list[int], m: int, mode: str, seed: int) -> Choice:
    ranks = -scores if mode == "released" else np.random.default_rng([seed, 1]).random(len(scores))
    chosen, spare = [], []
    for rows, budget in zip(strata.members, budgets, strict=True):
        ranked = rows[np.argsort(ranks[rows], kind="stable")]
        chosen.append(ranked[:budget])
        spare.append(ranked[budget:])
    missing = m - sum(map(len, chosen))
    unchosen = np.concatenate(spare)
    fill = unchosen[np.argsort(np.random.default_rng([seed, 2]).random(len(scores))[unchosen])[:missing]]
    filled = [int(np.isin(rows, fill, assume_unique=True).sum()) for rows in spare]
    from_hardest = strata.hardest[: missing - len(fill)]
    return Choice(
        rows=np.sort(np.concatenate([*chosen, fill, from_hardest])),
        budgets=[len(rows) + extra for rows, extra in zip(chosen, filled, strict=True)],
        filled=filled,
        from_hardest=len(from_hardest),
    )


def plain_first(order: np.ndarray, rate: float) -> list[int]:
    return np.sort(order[: coreset_size(rate, len(order))]).tolist()


def plain_read(paths: list[Path], columns: tuple[str, ...]) -> tuple[list, dict[str, np.ndarray], list | None] | str:
    """Index, columns and ids; or what is wrong."""
    table = pa.concat_tables([pa.parquet.read_table(path) for path in paths])
    index = table["index"].to_numpy()
    if not np.isfinite(index).all() or (index != np.floor(index)).any() or index.min() < 0:
        return "column index must hold row numbers"
    order = np.argsort(index, kind="stable")
    index = index[order].astype(np.int64)
    if len(repeated := index[1:][index[1:] == index[:-1]]):
        return f"row {repeated[0]} has more than one score"
    figures = {}
    for name in columns:
        if name == "hidden_state":
            figures[name] = np.array(table[name].to_pylist(), dtype=np.float32)[order]
            continue
        figures[name] = table[name].to_numpy()[order].astype(np.float64)
        if len(bad := np.flatnonzero(~(np.isnan(figures[name]) | (np.isfinite(figures[name]) & (figures[name] >= 0))))):
            return f"row {index[bad[0]]} has {name} {figures[name][bad[0]]} ({len(bad)} such rows in all)"
    ids = table["id"].cast(pa.string()).take(pa.array(order)).to_pylist() if "id" in table.column_names else None
    return index.tolist(), figures, ids


# The method


@by_property
@given(score_arrays(), st.integers(-1, 130), st.integers(0, 5))
def test_the_lowest_are_the_first_of_a_stable_sort(values, count, num_nan):
    """Rows that scoring left out are NaN."""
    values = values.copy()
    values[np.random.default_rng(count + 1).integers(len(values), size=num_nan)] = np.nan
    expected = np.argsort(values, kind="stable")[: max(count, 0)]
    assert np.flatnonzero(lowest(values, count)).tolist() == sorted(expected.tolist())


def assert_same(fast: Choice, plain: Choice) -> None:
    assert fast.rows.dtype == plain.rows.dtype and fast.rows.tolist() == plain.rows.tolist()
    assert (fast.budgets, fast.filled, fast.from_hardest) == (plain.budgets, plain.filled, plain.from_hardest)
    json.dumps([fast.budgets, fast.filled, fast.from_hardest])  # Python's numbers, as they go into the record


@by_property
@given(score_arrays(), st.sampled_from([1, 2, 3, 50, 255, 256, 300]), cutoffs)
def test_strata_are_those_of_the_plain_sort(scores, num_strata, cutoff):
    fast = stratify(scores, num_strata, cutoff)
    plain = plain_stratify(scores, num_strata, cutoff)
    assert [rows.tolist() for rows in fast.members] == [rows.tolist() for rows in plain.members]
    assert fast.hardest.tolist() == plain.hardest.tolist()
    assert fast.score_ranges == plain.score_ranges
    assert fast.hardest.dtype == fast.members[0].dtype == plain.members[0].dtype


def test_more_strata_than_two_bytes_number_are_those_of_the_plain_sort():
    scores = np.random.default_rng(0).random(2000)
    fast, plain = stratify(scores, 70_000, 0.1), plain_stratify(scores, 70_000, 0.1)
    assert [rows.tolist() for rows in fast.members] == [rows.tolist() for rows in plain.members]


@by_property
@given(score_arrays(), score_arrays(), st.integers(1, 60), st.integers(1, 40), cutoffs, modes, st.booleans())
def test_verification_is_that_of_the_plain_version(scores, others, num_strata, b_v, cutoff, mode, complete):
    settings_ = Settings(mode, num_strata, b_v, cutoff, seed=5)
    strata = stratify(scores, num_strata, cutoff)
    drawn = [rows.tolist() for rows in draw_verification_samples(strata, b_v, mode, 5)]
    assert drawn == [rows.tolist() for rows in plain_draw(strata, b_v, mode, 5)]
    rows = np.arange(len(scores)) if complete else np.unique(np.concatenate(drawn).astype(np.int64))
    target = Scores(rows, {"effort": np.resize(others, len(scores))[rows]}, None, None, None, "target")
    with np.errstate(over="ignore", invalid="ignore"):
        fast = verify(scores, target, settings_)
        assert repr(fast) == repr(plain_verify(scores, target, settings_))  # repr: to the last bit, and NaN is NaN
        assert repr(verify(scores, target, settings_, strata)) == repr(fast)


@by_property
@given(score_arrays(), st.integers(1, 60), cutoffs, rates, modes, st.integers(0, 9), st.sampled_from([0.0, 0.3, 1, 9]))
def test_the_choice_is_that_of_the_plain_sort(scores, num_strata, cutoff, rate, mode, seed, ratio):
    if floor_share(rate, len(scores)) == 0:
        return
    strata, m = stratify(scores, num_strata, cutoff), coreset_size(rate, len(scores))
    rng = np.random.default_rng(seed)
    ratios = [ratio * rng.choice([0.0, 0.5, 2.0]) if rng.random() < 0.9 else None for _ in strata.members]
    budgets = allocate_budgets(strata.sizes, ratios, m, mode)
    plain = plain_choice(scores, strata, budgets, m, mode, seed)
    assert_same(choose_staff(scores, strata, ratios, m, mode, seed), plain)
    none = [0] * len(budgets)
    assert_same(
        choose_within_strata(scores, strata, none, m, mode, seed), plain_choice(scores, strata, none, m, mode, seed)
    )


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("values", [0, 3, 2000])
def test_large_arrays_are_cut_as_by_the_plain_sort(mode, values):
    """Beyond what one vector instruction or one small sort holds."""
    rng = np.random.default_rng(1)
    scores = rng.lognormal(size=30_000) if values == 0 else rng.integers(0, values, 30_000).astype(np.float64)
    strata, plain = stratify(scores, 50, 0.1), plain_stratify(scores, 50, 0.1)
    assert [rows.tolist() for rows in strata.members] == [rows.tolist() for rows in plain.members]
    assert strata.hardest.tolist() == plain.hardest.tolist()
    for ratio, rate in ((1.0, 0.1), (0.2, 0.5), (1.0, 0.95)):
        m, ratios = coreset_size(rate, 30_000), [ratio] * len(strata.members)
        budgets = allocate_budgets(strata.sizes, ratios, m, mode)
        fast = choose_staff(scores, strata, ratios, m, mode, 3)
        assert_same(fast, plain_choice(scores, plain, budgets, m, mode, 3))


@pytest.mark.parametrize("method", ["grand", "el2n", "entropy", "random", "ccs", "length"])
@by_property
@given(scores=score_arrays(), rate=rates, seed=st.integers(0, 9))
def test_the_baselines_are_those_of_the_plain_sort(method, scores, rate, seed):
    if floor_share(rate, len(scores)) == 0:
        return
    selection = Selection(seed=seed, num_strata=7)
    values = np.round(np.minimum(scores, 1e9)) + 1 if method == "length" else scores
    columns = dict.fromkeys(columns_of(method, "published"), values)
    rows = baseline_by_rate(method, columns, len(values), selection)(rate).rows
    if method == "random":
        expected = plain_first(np.argsort(np.random.default_rng([seed, 3]).random(len(values))), rate)
    elif method in ("ccs", "length"):
        keys, m = 1 / values if method == "length" else values, coreset_size(rate, len(values))
        strata = plain_stratify(keys, 7, 0.1)
        budgets = allocate_budgets(strata.sizes, [None] * len(strata.members), m, "paper")
        expected = plain_choice(keys, strata, budgets, m, "paper", seed).rows.tolist()
    else:
        expected = plain_first(np.argsort(-values, kind="stable"), rate)
    assert rows.tolist() == expected


# Files


def write_parts(folder: Path, index: np.ndarray, num_parts: int, **columns: np.ndarray | list) -> list[Path]:
    folder.mkdir()
    manifest = {"identity": {"data_fingerprint": "x"}, "num_rows": len(index), "columns": [], "left_out": []}
    write_sealed(folder / "manifest.json", manifest)
    table, paths = pa.table({"index": index, **columns}), []
    for i, rows in enumerate(np.array_split(np.arange(len(index)), num_parts)):
        paths.append(write_part(folder, i, table.take(pa.array(rows))))
    return paths


def write_part(folder: Path, number: int, table: pa.Table) -> Path:
    pa.parquet.write_table(table, folder / "new")
    return (folder / "new").rename(folder / f"part-{number:03d}-{file_digest(folder / 'new')[:16]}.parquet")


INDICES = {
    "ascending": lambda rng, n: np.arange(n),
    "shuffled": lambda rng, n: rng.permutation(n),
    "ascending with gaps": lambda rng, n: np.sort(rng.choice(3 * n, n, replace=False)),
    "shuffled with gaps": lambda rng, n: rng.choice(3 * n, n, replace=False),
    "gap at the start": lambda rng, n: rng.permutation(n) + 1,
    "far apart": lambda rng, n: rng.permutation(n) * 10**14,
    "twice, neighbours": lambda rng, n: np.sort(np.append(np.arange(n - 1), rng.integers(n - 1))),
    "twice, apart": lambda rng, n: rng.permutation(np.append(np.arange(n - 1), rng.integers(n - 1))),
    "negative": lambda rng, n: rng.permutation(n) - 1,
    "as floats": lambda rng, n: rng.permutation(n).astype(np.float64),
    "fractions": lambda rng, n: rng.permutation(n) / 2,
    "NaN": lambda rng, n: np.append(rng.permutation(n - 1).astype(np.float64), np.nan),
}


@pytest.mark.parametrize("num_parts", [1, 3, 40])
@pytest.mark.parametrize("kind", INDICES)
def test_a_folder_is_read_as_by_the_plain_version(tmp_path, kind, num_parts):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        index = INDICES[kind](rng, 30)  # with 40 parts some are empty
        effort = rng.choice([0.0, 1.5, 2.5], 30)
        if seed == 2:
            effort[rng.integers(30, size=2)] = np.inf, -1.0
        columns = {
            "id": [f"id{row}" for row in range(30)] if seed else rng.integers(0, 99, 30),
            "effort": effort,
            "n_response_tokens": rng.integers(1, 99, 30).astype(np.int32),
            "hidden_state": pa.array(list(rng.random((30, 3), dtype=np.float32)), pa.list_(pa.float32())),
            "never": np.zeros(30),
        }
        paths = write_parts(tmp_path / str(seed), index, num_parts, **columns)
        names = ("effort", "n_response_tokens", "hidden_state")
        expected = plain_read(paths, names)
        if isinstance(expected, str):
            with pytest.raises(UserError) as refusal:
                read_scores(tmp_path / str(seed), names)
            assert expected in str(refusal.value) and str(tmp_path / str(seed)) in str(refusal.value)
            continue
        scores = read_scores(tmp_path / str(seed), names)
        assert (scores.index.tolist(), scores.ids) == (expected[0], expected[2])
        assert scores.index.dtype == np.int64
        for name in names:
            assert scores.columns[name].dtype == expected[1][name].dtype
            assert scores.columns[name].tobytes() == expected[1][name].tobytes()
        without = read_scores(tmp_path / str(seed), ("effort",), ids=False)
        assert without.ids is None and without.effort.tobytes() == scores.effort.tobytes()
        some = scores.index[::4]
        if some[-1] < 1000:  # `read_ids` is for complete scores
            assert read_ids(tmp_path / str(seed), some).to_pylist() == scores.ids[::4]


def test_numbers_of_other_types_in_other_parts_are_read(tmp_path):
    folder = tmp_path / "scores"
    write_parts(folder, np.array([2, 0]), 1, n_response_tokens=np.array([7, 8], dtype=np.int32))
    more = pa.table({"index": np.array([1], dtype=np.int16), "n_response_tokens": np.array([0.5])})
    write_part(folder, 1, more)
    assert read_scores(folder, ("n_response_tokens",)).columns["n_response_tokens"].tolist() == [8.0, 0.5, 7.0]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"effort": [1.0], "hidden_state": [[1.0, 2.0]]}, "lists of one length"),
        ({"effort": [1.0]}, "no column hidden_state"),
        ({"effort": [1.0], "hidden_state": [[1.0]], "id": ["a"]}, "only 1 of 2 parts have a column id"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path, other, said):
    folder = tmp_path / "scores"
    write_parts(folder, np.array([0]), 1, effort=[1.0], hidden_state=[[1.0]])
    write_part(folder, 1, pa.table({"index": [1], **other}))
    with pytest.raises(UserError, match=said):
        read_scores(folder, ("effort", "hidden_state"))


def plain_write(path: Path, rows: np.ndarray, scores: Scores, record: dict) -> None:
    value = {
        "method": "staff",
        "rate": 0.5,
        **record,
        "scores": scores.made_by,
        "num_rows": len(scores.index),
        "size": len(rows),
    }
    value |= {"data_fingerprint": scores.fingerprint, "code_version": code_version()}
    value |= {"indices_sha256": digest(rows.astype(np.int64).tobytes()), "indices": rows.tolist()}
    write_json(path, value | {"ids": [scores.ids[i] for i in rows] if scores.ids else None})


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("ids", ["text", "odd text", "none"])
def test_a_coreset_is_the_file_that_json_would_write(tmp_path, monkeypatch, chunk, ids):
    monkeypatch.setattr(coresets, "_CHUNK", chunk)
    index = np.random.default_rng(0).permutation(20)
    texts = {"text": [f"id{row}" for row in index], "odd text": ['"\\\n é\u2028, ', "", None, "]"] * 5}
    columns = {} if ids == "none" else {"id": texts[ids]}
    write_parts(tmp_path / "scores", index, 3, effort=np.ones(20), **columns)
    record = {"strata": [{"range": [0.1, 1e-9], "é": None}], "none": [], "seed": 4}
    everything = read_scores(tmp_path / "scores")
    for rows in (np.array([0]), np.array([3, 4, 11, 12, 19]), np.arange(20)):
        plain_write(tmp_path / "plain.json", rows, everything, record)
        expected = (tmp_path / "plain.json").read_bytes()
        lean = read_scores(tmp_path / "scores", ids=False).chosen(np.union1d(rows, [7]))
        assert lean.columns == {} and lean.num_rows == 20
        for scores in (everything, lean, replace(lean, num_rows=20)):
            path = write_coreset(tmp_path / "out", "staff", 0.5, Choice(rows=rows), scores, record)
            assert path.read_bytes() == expected
        assert read_coreset(path).indices.tolist() == rows.tolist()


def test_a_coreset_that_cannot_be_json_leaves_no_file(tmp_path):
    scores = Scores(np.arange(3), {}, None, None, None, "scores")
    with pytest.raises(ValueError):
        write_coreset(tmp_path / "out", "staff", 0.5, Choice(rows=np.array([1])), scores, {"seed": float("nan")})
    assert not (tmp_path / "out").exists()


def test_the_hash_of_the_scores_is_that_of_their_bytes(tmp_path):
    for effort in (np.arange(7.0), np.arange(14.0)[::2]):
        scores = Scores(np.arange(7), {"effort": effort}, None, None, 7, "scores")
        write_verification(tmp_path / "v.json", Settings("paper", 2, 2, 0.1, 0), scores, [])
        stored = json.loads((tmp_path / "v.json").read_text())
        assert stored["speculative_scores_sha256"] == digest(effort.tobytes())


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_ids_of_the_chosen_rows_alone_come_from_plain_files_too(tmp_path, ending):
    table, path = pa.table({"id": ["c", "a", "b"], "index": [2, 0, 1], "effort": [1.0, 2.0, 3.0]}), tmp_path / "s"
    (pa.csv.write_csv if ending == ".csv" else pa.parquet.write_table)(table, path.with_suffix(ending))
    assert read_ids(path.with_suffix(ending), np.array([0, 2])).to_pylist() == ["a", "c"]


# The benchmark


def test_the_benchmark_measures_every_method_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    spec = importlib.util.spec_from_file_location("bench_selection", REPOSITORY / "scripts" / "bench" / "choice.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "measure_apart", lambda script, job: bench.measure(**json.loads(json.dumps(job))))
    arguments = ["--rows", 300, 600, "--features", 4, "--folder", tmp_path, "--method", "staff", "moderate", "random"]
    monkeypatch.setattr(sys, "argv", ["bench_selection.py", *map(str, arguments)])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[1:]] == ["staff, paper", "staff, released", "moderate", "random"] * 2
    assert all(float(line.split()[-1]) > 0.02 for line in lines[1:])
    assert len(lines[1].split()) == len(lines[5].split()) - 1  # the growth
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_measures_in_a_process_of_its_own_and_refuses_in_one_line():
    done = run_script("scripts/bench/choice.py", "--rows", 300, "--method", "random")
    assert done.stdout.splitlines()[1].split()[:2] == ["random", "300"]
    done = run_script("scripts/bench/choice.py", "--rows", 1, check=False)
    assert_one_line_error(done, "at least 10 rows")
