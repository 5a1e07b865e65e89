"""coreset.py on score files: what it writes, that it repeats to the byte and is fast, and how it refuses."""

import importlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import assert_one_line_error, run_script

from selection.method.staff import choose_staff, stratify
from selection.run.cli import run_stage
from selection.scores.folder import ScoreFolder, read_scores
from selection.scores.verification import Settings, cut_strata, draw, verify, write_verification

NUM_ROWS = 205  # no rate below makes it a whole number of rows
STRATA = ["--num_strata", "8", "--verify_per_stratum", "4"]
RNG = np.random.default_rng(0)
SPECULATIVE = RNG.lognormal(size=NUM_ROWS)
TARGET = SPECULATIVE * RNG.lognormal(sigma=0.3, size=NUM_ROWS)


@pytest.fixture
def coreset(monkeypatch, capsys):
    """Runs the script in this process with the given arguments; gives exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the script changes it
    main = importlib.import_module("selection.coreset").main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["coreset.py", *map(str, arguments)])
        try:
            run_stage(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def write_scores(path: Path, effort: np.ndarray, rows: np.ndarray | None = None) -> Path:
    """A plain file, or a score folder where `path` has no ending."""
    rows = np.arange(len(effort)) if rows is None else rows
    ids = np.array([f"id{row}" for row in rows])
    if path.suffix:
        table = pa.table({"index": rows, "id": ids, "effort": effort[rows]})
        (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(table, path)
    else:
        counts = np.ones(len(rows), dtype=np.int32)
        columns = dict(index=rows, id=ids, n_prompt_tokens=counts, n_response_tokens=counts, effort=effort[rows])
        folder = ScoreFolder(path, {"data_fingerprint": "fingerprint"}, len(effort))
        folder.plan(rows, lambda missing: [[missing.tolist()]])
        folder.write_part([rows.tolist()], columns | {"loss": effort[rows]})
    return path


@pytest.fixture
def files(tmp_path) -> list:
    """Arguments that name the scores of both models."""
    small = write_scores(tmp_path / "small.csv", SPECULATIVE)
    return ["--scores", small, "--target_scores", write_scores(tmp_path / "target.csv", TARGET), *STRATA]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("ending", [".csv", ".parquet", ""], ids=["csv", "parquet", "folder"])
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_coreset_per_rate_is_written_with_its_strata(coreset, tmp_path, mode, ending):
    small = write_scores(tmp_path / f"small{ending}", SPECULATIVE)
    target = write_scores(tmp_path / f"target{ending}", TARGET)
    arguments = ["--scores", small, "--target_scores", target, "--mode", mode, *STRATA, "--seed", 3]
    code, _, stderr = coreset(*arguments, "--rate", 0.1, 0.2, "--out", tmp_path / "out")
    assert (code, stderr) == (0, "")
    assert sorted(contents(tmp_path / "out")) == ["staff-0.1.json", "staff-0.2.json"]

    records = verify(SPECULATIVE, read_scores(target), Settings(mode, 8, 4, 0.1, seed=3))
    ratios = [record.verification_ratio for record in records]
    for rate, m in ((0.1, 20), (0.2, 41)):
        written = json.loads((tmp_path / "out" / f"staff-{rate}.json").read_text())
        chosen = choose_staff(SPECULATIVE, stratify(SPECULATIVE, 8, 0.1), ratios, m, mode, seed=3)
        assert [written[key] for key in ("method", "mode", "rate", "seed")] == ["staff", mode, rate, 3]
        assert written["data_fingerprint"] == (None if ending else "fingerprint")
        assert written["indices"] == sorted(set(written["indices"])) == chosen.rows.tolist()
        assert written["ids"] == [f"id{row}" for row in written["indices"]]
        assert sum(stratum["budget"] for stratum in written["strata"]) == m == len(written["indices"])
        for stratum, record in zip(written["strata"], records, strict=True):
            assert stratum["score_range"] == list(record.score_range)
            assert (stratum["size"], stratum["verified"]) == (record.size, record.verified)
            assert stratum["verification_ratio"] == record.verification_ratio


def test_a_file_without_ids_gives_none(coreset, tmp_path):
    for name in ("small.csv", "target.csv"):
        pa.csv.write_csv(pa.table({"index": [2, 0, 1], "effort": [3.0, 1.0, 2.0]}), tmp_path / name)
    files = ["--scores", tmp_path / "small.csv", "--target_scores", tmp_path / "target.csv"]
    assert coreset(*files, "--rate", 0.7, "--out", tmp_path / "out")[0] == 0
    written = json.loads((tmp_path / "out" / "staff-0.7.json").read_text())
    assert written["ids"] is None and written["data_fingerprint"] is None and len(written["indices"]) == 2


def test_the_same_call_writes_the_same_bytes_and_another_seed_others(coreset, files, tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        coreset(*files, "--method", "staff", "random", "--rate", 0.3, "--seed", seed, "--out", tmp_path / name)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert sorted(first) == ["random-0.3.json", "staff-0.3.json"]
    assert first == again
    for name in first:
        assert json.loads(first[name])["indices"] != json.loads(other[name])["indices"]


def test_a_rate_is_cut_alone_as_among_others(coreset, files, tmp_path):
    coreset(*files, "--rate", 0.1, 0.5, 0.2, "--out", tmp_path / "together")
    coreset(*files, "--rate", 0.2, "--out", tmp_path / "alone")
    assert contents(tmp_path / "alone")["staff-0.2.json"] == contents(tmp_path / "together")["staff-0.2.json"]


def test_rates_that_differ_do_not_overwrite_each_other(coreset, files, tmp_path):
    code, _, _ = coreset(*files, "--rate", 0.1234561, 0.1234562, "--out", tmp_path / "out")
    assert code == 2 or len(contents(tmp_path / "out")) == 2


def test_target_scores_of_the_drawn_rows_are_enough(coreset, tmp_path):
    settings = Settings("paper", 8, 4, 0.1, seed=0)
    drawn = np.sort(np.concatenate(draw(cut_strata(SPECULATIVE, settings), settings)))
    assert len(drawn) < NUM_ROWS
    small = write_scores(tmp_path / "small.csv", SPECULATIVE)
    target = write_scores(tmp_path / "target.csv", TARGET, drawn)
    files = ["--scores", small, "--target_scores", target, *STRATA, "--seed", 0]
    code, _, stderr = coreset(*files, "--rate", 0.1, "--out", tmp_path / "out")
    assert (code, stderr) == (0, "")

    lacking = write_scores(tmp_path / "lacking.csv", TARGET, drawn[drawn != drawn[3]])
    files[3] = lacking
    code, _, stderr = coreset(*files, "--rate", 0.1, "--out", tmp_path / "refused")
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert f"row {drawn[3]} " in stderr and str(lacking) in stderr
    assert contents(tmp_path / "refused") == {}


def test_100_000_rows_are_cut_in_seconds(coreset, tmp_path):
    effort = np.random.default_rng(0).lognormal(size=100_000)
    small = write_scores(tmp_path / "small.parquet", effort)
    files = ["--scores", small, "--target_scores", write_scores(tmp_path / "target.parquet", effort)]
    start = time.perf_counter()
    assert coreset(*files, "--rate", 0.1, "--out", tmp_path / "out")[0] == 0
    assert time.perf_counter() - start < 3  # about 0.3 s; the bound is for a busy machine
    assert len(json.loads((tmp_path / "out" / "staff-0.1.json").read_text())["indices"]) == 10_000


# A stored verification instead of target scores


def verification_of(path: Path, speculative: np.ndarray) -> Path:
    """A verification of these scores, as verify.py writes it, under the settings of `files`."""
    settings = Settings("paper", 8, 4, 0.1, seed=42)
    target = read_scores(write_scores(path.with_suffix(".csv"), TARGET))
    small = read_scores(write_scores(path.with_name("verified.csv"), speculative))
    write_verification(path, settings, small, verify(speculative, target, settings))
    return path


def test_a_stored_verification_gives_the_coreset_of_the_target_scores(coreset, files, tmp_path):
    coreset(*files, "--rate", 0.2, "--out", tmp_path / "from scores")
    stored = verification_of(tmp_path / "verification.json", SPECULATIVE)
    files[2:4] = ["--verification", stored]
    assert coreset(*files, "--rate", 0.2, "--out", tmp_path / "from verification")[0] == 0
    assert contents(tmp_path / "from verification") == contents(tmp_path / "from scores") != {}


@pytest.mark.parametrize(
    "other",
    [np.arange(NUM_ROWS, dtype=np.float64), np.repeat([1.0, 2.0], [105, 100]), SPECULATIVE[::-1]],
    ids=["more strata", "fewer strata", "as many strata"],
)
def test_a_verification_of_other_scores_is_refused(coreset, files, tmp_path, other):
    files[2:4] = ["--verification", verification_of(tmp_path / "verification.json", other)]
    code, _, stderr = coreset(*files, "--rate", 0.2, "--out", tmp_path / "out")
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert contents(tmp_path / "out") == {}


def test_a_verification_under_other_settings_is_refused_by_key(coreset, files, tmp_path):
    files[2:4] = ["--verification", verification_of(tmp_path / "verification.json", SPECULATIVE)]
    code, _, stderr = coreset(*files, "--hardest_cutoff", 0.2, "--rate", 0.2, "--out", tmp_path / "out")
    assert code == 2 and "hardest_cutoff" in stderr and contents(tmp_path / "out") == {}


# Refusals: one line, exit code 2, nothing written

REFUSED = {
    "rate 0": (["--rate", 0], "rate 0 "),
    "rate 1.5": (["--rate", 1.5], "rate 1.5 "),
    "rate nan": (["--rate", math.nan], "rate nan "),
    "rate that keeps none": (["--rate", 0.001], "rate 0.001 "),
    "one bad rate among good ones": (["--rate", 0.1, 1.5], "rate 1.5 "),
    "K 0": (["--num_strata", 0], "num_strata"),
    "b_v 0": (["--verify_per_stratum", 0], "verify_per_stratum"),
    "cutoff 1": (["--hardest_cutoff", 1], "hardest_cutoff"),
    "cutoff nan": (["--hardest_cutoff", math.nan], "hardest_cutoff"),
    "seed -1": (["--seed", -1], "seed"),
    "no such scores": (["--scores", "nowhere.csv"], "nowhere.csv"),
    "no such target scores": (["--target_scores", "nowhere.csv"], "nowhere.csv"),
    "no such configuration": (["--config_path", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line_and_nothing_is_written(coreset, files, tmp_path, name):
    arguments, said = REFUSED[name]
    code, _, stderr = coreset(*files, "--rate", 0.1, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and said in stderr
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("left_out", ["--scores", "--target_scores", "--rate", "--out"])
def test_an_argument_left_out_is_named(coreset, files, tmp_path, left_out):
    arguments = [*files, "--rate", 0.1, "--out", tmp_path / "out"]
    position = arguments.index(left_out)
    code, _, stderr = coreset(*arguments[:position], *arguments[position + 2 :])
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and left_out in stderr
    assert contents(tmp_path / "out") == {}


def test_without_target_scores_the_random_baseline_is_not_written_either(coreset, files, tmp_path):
    arguments = [*files[:2], "--method", "random", "staff", "--rate", 0.1, "--out", tmp_path / "out"]
    assert coreset(*arguments)[0] == 2
    assert contents(tmp_path / "out") == {}


def test_scores_of_different_data_are_refused(coreset, tmp_path):
    small = write_scores(tmp_path / "small.csv", SPECULATIVE)
    target = write_scores(tmp_path / "target.csv", np.append(TARGET, 1.0))  # one row more
    files = ["--scores", small, "--target_scores", target, *STRATA]
    code, _, stderr = coreset(*files, "--rate", 0.1, "--out", tmp_path / "out")
    assert code == 2 and "different data" in stderr and contents(tmp_path / "out") == {}


def test_scores_of_our_folder_go_with_a_plain_file(coreset, tmp_path):
    small = write_scores(tmp_path / "small", SPECULATIVE)
    files = ["--scores", small, "--target_scores", write_scores(tmp_path / "target.csv", TARGET), *STRATA]
    assert coreset(*files, "--rate", 0.1, "--out", tmp_path / "out")[0] == 0


def test_a_folder_that_cannot_be_written_is_named(coreset, files, tmp_path):
    code, _, stderr = coreset(*files, "--rate", 0.1, "--out", tmp_path / "small.csv")
    assert code == 2 and stderr.startswith("error: cannot write") and "small.csv" in stderr


# As a user calls it, from a working directory of their own


def test_the_script_writes_relative_to_the_working_directory(files, tmp_path):
    files[1], files[3] = "small.csv", "target.csv"
    done = run_script("selection/coreset.py", *files, "--rate", "0.1", "--out", "out", cwd=tmp_path)
    assert done.stderr == ""
    assert list(contents(tmp_path / "out")) == ["staff-0.1.json"]


@pytest.mark.parametrize(
    ("scores", "rate", "said"),
    [("small.csv", "1.5", "rate 1.5"), ("nowhere.parquet", "0.1", "nowhere.parquet"), ("bad.csv", "0.1", "bad.csv")],
    ids=["rate", "missing file", "empty index cell"],
)
def test_the_script_refuses_in_one_line(files, tmp_path, scores, rate, said):
    (tmp_path / "bad.csv").write_text("index,effort\n0,1.5\n,2.5\n")
    files[1] = scores
    done = run_script("selection/coreset.py", *files, "--rate", rate, "--out", "out", cwd=tmp_path, check=False)
    assert_one_line_error(done, said)
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path / "out") == {}
