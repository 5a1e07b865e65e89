"""coreset.py on score files: what it writes, that it repeats to the byte, and how it refuses."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from selection.run.ending import run_stage

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import run_main, run_script

from selection.method.staff import choose_staff, stratify
from selection.scores.folder import ScoreFolder, read_scores
from selection.scores.verification import Settings, cut_strata, draw, verify, write_verification

NUM_ROWS = 205  # no rate below makes it a whole number of rows
STRATA = ["--num_strata", "8", "--verify_per_stratum", "4"]
RNG = np.random.default_rng(0)
SPECULATIVE = RNG.lognormal(size=NUM_ROWS)
TARGET = SPECULATIVE * RNG.lognormal(sigma=0.3, size=NUM_ROWS)


@pytest.fixture
def coreset(capsys, tmp_path):
    """Runs the script in this process, --out `out`; gives exit code, stderr and the coresets written."""

    def call(*arguments: object, out: str = "out") -> tuple[int, str, dict[str, bytes]]:
        code = 0
        try:
            run_stage(lambda: run_main("selection.coreset", *arguments, "--out", tmp_path / out))
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err, contents(tmp_path / out)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def assert_refused(done: tuple[int, str, dict], *said: str) -> None:
    code, stderr, written = done
    assert (code, stderr.count("\n"), written) == (2, 1, {}) and stderr.startswith("error: "), stderr
    assert all(text in stderr for text in said), stderr


def write_scores(path: Path, effort: np.ndarray, rows: np.ndarray | None = None) -> Path:
    """A plain file, or a score folder where `path` has no ending."""
    rows = np.arange(len(effort)) if rows is None else rows
    columns = {"index": rows, "id": np.array([f"id{row}" for row in rows]), "effort": effort[rows]}
    if path.suffix:
        (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(pa.table(columns), path)
    else:
        columns |= dict.fromkeys(("n_prompt_tokens", "n_response_tokens", "loss"), np.ones(len(rows)))
        folder = ScoreFolder(path, {"data_fingerprint": "fingerprint"}, len(effort))
        folder.plan(rows, lambda missing: [[missing.tolist()]])
        folder.write_part([rows.tolist()], columns)
    return path


@pytest.fixture
def files(tmp_path) -> list:
    small = write_scores(tmp_path / "small.csv", SPECULATIVE)
    return ["--scores", small, "--target_scores", write_scores(tmp_path / "target.csv", TARGET), *STRATA]


@pytest.mark.parametrize(("mode", "ending"), [("paper", ".csv"), ("released", ".parquet"), ("paper", "")])
def test_a_coreset_per_rate_is_written_with_its_strata(coreset, tmp_path, mode, ending):
    small = write_scores(tmp_path / f"small{ending}", SPECULATIVE)
    target = write_scores(tmp_path / f"target{ending}", TARGET)
    arguments = ["--scores", small, "--target_scores", target, "--mode", mode, *STRATA, "--seed", 3]
    code, stderr, found = coreset(*arguments, "--rate", 0.1, 0.2)
    assert (code, stderr, sorted(found)) == (0, "", ["staff-0.1.json", "staff-0.2.json"])

    records = verify(SPECULATIVE, read_scores(target), Settings(mode, 8, 4, 0.1, seed=3))
    ratios = [record.verification_ratio for record in records]
    for rate, m in ((0.1, 20), (0.2, 41)):
        written = json.loads(found[f"staff-{rate}.json"])
        chosen = choose_staff(SPECULATIVE, stratify(SPECULATIVE, 8, 0.1), ratios, m, mode, seed=3)
        assert [written[key] for key in ("method", "mode", "rate", "seed")] == ["staff", mode, rate, 3]
        assert written["data_fingerprint"] == (None if ending else "fingerprint")
        assert written["indices"] == sorted(set(written["indices"])) == chosen.rows.tolist()
        assert written["ids"] == [f"id{row}" for row in written["indices"]]
        assert sum(stratum["budget"] for stratum in written["strata"]) == m == len(written["indices"])
        for stratum, record in zip(written["strata"], records, strict=True):
            expected = json.loads(json.dumps(asdict(record)))
            assert {key: stratum[key] for key in expected} == expected


def test_the_same_call_writes_the_same_bytes_another_seed_others_and_each_rate_its_own(coreset, files):
    rates = ("--rate", 0.3, 0.1, 0.1234561, 0.1234562)
    files += ["--method", "staff", "random", "--seed"]
    first, alone, other = (
        coreset(*files, seed, *rates[:count], out=f"{seed}-{count}")[2] for seed, count in ((1, 5), (1, 2), (2, 2))
    )
    assert sorted(alone) == ["random-0.3.json", "staff-0.3.json"]
    assert len(first) == 8 and alone.items() <= first.items()
    assert all(json.loads(alone[name])["indices"] != json.loads(other[name])["indices"] for name in alone)


def test_target_scores_of_the_drawn_rows_are_enough(coreset, tmp_path):
    settings = Settings("paper", 8, 4, 0.1, seed=0)
    drawn = np.sort(np.concatenate(draw(cut_strata(SPECULATIVE, settings), settings)))
    assert len(drawn) < NUM_ROWS
    small = write_scores(tmp_path / "small", SPECULATIVE)  # a folder of ours goes with a plain file
    arguments = ["--scores", small, *STRATA, "--seed", 0, "--rate", 0.1, "--target_scores"]
    assert coreset(*arguments, write_scores(tmp_path / "target.csv", TARGET, drawn))[:2] == (0, "")
    lacking = write_scores(tmp_path / "lacking.csv", TARGET, drawn[drawn != drawn[3]])
    assert_refused(coreset(*arguments, lacking, out="refused"), f"row {drawn[3]} ", str(lacking))


def test_a_stored_verification_gives_the_coreset_of_the_target_scores_or_is_refused(coreset, files, tmp_path):
    expected = coreset(*files, "--rate", 0.2, out="from scores")[2]
    settings, target = Settings("paper", 8, 4, 0.1, seed=42), read_scores(files[3])
    files[2:4] = ["--verification", tmp_path / "verification.json"]
    for speculative in (SPECULATIVE, np.repeat([1.0, 2.0], [105, 100]), SPECULATIVE[::-1]):
        small = read_scores(write_scores(tmp_path / "verified.csv", speculative))
        write_verification(files[3], settings, small, verify(speculative, target, settings))
        if speculative is SPECULATIVE:
            assert coreset(*files, "--rate", 0.2)[2] == expected != {}
            assert_refused(coreset(*files, "--hardest_cutoff", 0.2, "--rate", 0.2, out="refused"), "hardest_cutoff")
        else:
            assert_refused(coreset(*files, "--rate", 0.2, out="refused"))


def test_what_makes_no_sense_or_is_left_out_is_refused_in_one_line_and_nothing_is_written(coreset, files):
    for arguments, said in (
        (["--rate", 0.1, 1.5], "rate 1.5 "),
        (["--rate", 0.001], "rate 0.001 "),
        (["--hardest_cutoff", math.nan], "hardest_cutoff"),
        (["--scores", "nowhere.csv"], "nowhere.csv"),
        (["--target_scores", "nowhere.csv"], "nowhere.csv"),
        (["--config_path", "nowhere.yaml"], "nowhere.yaml"),
    ):
        assert_refused(coreset(*files, "--rate", 0.1, *arguments), said)
    arguments = ["--rate", 0.1, *files, "--method", "random", "staff"]
    for first, left_out in enumerate(("--rate", "--scores", "--target_scores")):
        assert_refused(coreset(*arguments[: 2 * first], *arguments[2 * first + 2 :]), left_out)


def test_scores_of_different_data_are_refused_and_a_folder_that_cannot_be_written_is_named(coreset, files, tmp_path):
    code, stderr, _ = coreset(*files, "--rate", 0.1, out="small.csv")
    assert code == 2 and stderr.startswith("error: cannot write") and "small.csv" in stderr
    files[3] = write_scores(tmp_path / "more.csv", np.append(TARGET, 1.0))  # one row more
    assert_refused(coreset(*files, "--rate", 0.1), "different data")


def test_the_script_counts_paths_from_the_working_directory(files, tmp_path):
    files[1], files[3] = "small.csv", "target.csv"
    done = run_script("selection/coreset.py", *files, "--rate", "0.1", "--out", "out", cwd=tmp_path)
    assert done.stderr == "" and list(contents(tmp_path / "out")) == ["staff-0.1.json"]
