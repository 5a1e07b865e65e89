"""The instrument: held-out log likelihood, worth, RS2, pools with known faults, random subsets."""

import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    REPOSITORY,
    assert_one_line_error,
    biology,
    copy_of,
    run_main,
    run_script,
    write_jsonl,
    write_pool,
)
from sklearn.isotonic import IsotonicRegression
from transformers import AutoModelForCausalLM

from finetune.likelihood import held_out_losses
from scripts.paper import pools, purity, subsets
from scripts.paper.worth import falling, worth
from selection.method.baselines import rs2
from selection.method.interval import null_ratios
from selection.method.staff import verification_ratio
from selection.report.annotated import annotated
from selection.report.charts import bars
from selection.report.look import write_suspects
from selection.report.run_data import read_run
from selection.rows.split import rows_of, split_numbers, training_split
from selection.rows.tokens import empty_turn, tokenised_rows, tokenised_split
from selection.run.config import Method, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import LOOK, read_ledger, selection_costs
from selection.run.metrics import read_metrics
from selection.scores import suspects as pool_suspects
from selection.scores.coresets import check_fits, read_coreset
from selection.scores.pool import read_suspects
from selection.scores.row_figures import _behind, load_row_scorer, row_figures
from selection.scores.suspects import KINDS, find_suspects, how_far_to_trust


def test_evaluation_by_log_likelihood_alone(make_experiment, rows, tmp_path):
    """nll is transformers' own loss, answer by answer; RS2's coreset is tuned on for its own number of passes."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*rows[20:], rows[3] | {"id": "again"}])
    small, evaluation = {"num_train_epochs": 0}, {"generate": False}
    changes = {"small_training": small, "evaluation": evaluation, "eval_data": held_out}
    config = make_experiment(rows[:20], target_training={"num_train_epochs": 3}, **changes)
    run_script("selection/effort_score.py", "--config_path", config)
    run_script("selection/coreset.py", "--config_path", config, "--method", "rs2", "--rate", 0.25, 0.5)
    experiment = load_experiment(config)
    assert split_numbers(experiment)["train"].tolist() == list(range(20)) and len(rows_of(experiment, "eval")) == 11
    paths = [experiment.coresets / f"rs2-{rate}.json" for rate in (0.25, 0.5)]
    assert [(len(c.indices), c.num_train_epochs) for c in map(read_coreset, paths)] == [(15, 1.0), (20, 1.5)]
    run_script("finetune/finetune-select.py", "--config_path", config, "--select_path", paths[1])
    state = json.loads((experiment.tuned_target("rs2-0.5") / "trainer_state.json").read_text())
    assert state["max_steps"] == 8  # 20 rows in steps of 4, one and a half times, as transformers rounds
    done = run_script("finetune/eval.py", "--config_path", config, "--tuned", "untuned", "rs2-0.5")
    assert "nll" in done.stdout and "\n1 of 11 held-out rows have an exact copy in the training split\n" in done.stdout
    assert importlib.import_module("finetune.eval").all_there(experiment) == ["rs2-0.5", "untuned"]
    metrics = read_metrics(experiment.folder / "eval" / "untuned")
    assert metrics["copies_in_training"] == 1
    model = AutoModelForCausalLM.from_pretrained(experiment.target_model, dtype=torch.float32)
    tokenised = tokenised_rows(experiment, experiment.target_model, "eval", rows_of(experiment, "eval"))
    own = []
    for row in tokenised:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        own.append(model(**batch).loss.item())
    assert metrics["by_sample"]["nll"] == pytest.approx(own, abs=1e-4)
    assert metrics["nll"] == pytest.approx(np.mean(own), abs=1e-4)
    assert held_out_losses(experiment, None, "fp16") == pytest.approx(own, abs=0.02)
    assert "rouge-l" not in metrics and not (experiment.folder / "eval" / "untuned" / "predictions.jsonl").exists()
    assert read_metrics(experiment.folder / "eval" / "rs2-0.5")["nll"] < metrics["nll"]
    exported = run_script("scripts/export.py", experiment.folder, "--coreset", "rs2-0.5").stdout
    assert "passes over these rows: 1.5, " in exported
    page = (experiment.folder / "export" / "rs2-0.5" / "README.md").read_text()
    assert page.count(", num_train_epochs=1.5)") == 2 and "\n    num_epochs: 1.5\n" in page
    Path(held_out).write_text(Path(held_out).read_text() + json.dumps(rows[0]) + "\n")
    done = run_script("finetune/eval.py", "--config_path", config, "--tuned", "untuned", check=False)
    assert_one_line_error(done, "belongs to other data")


def test_a_random_coreset_of_a_fresh_run_is_exported_beside_eval_data_of_other_columns(make_experiment, rows, tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [row | {"id": number} for number, row in enumerate(rows[20:])])
    config = make_experiment(rows[:20], eval_data=held_out)
    run_main("selection.coreset", "--config_path", config, "--method", "random")
    folder = load_experiment(config).folder
    run_main("scripts.export", folder)
    assert len((folder / "export" / "random-0.5" / "annotated.jsonl").read_text().splitlines()) == 20


def test_rs2_takes_as_many_steps_as_passes_over_one_subset():
    for rate, passes in ((0.1, 4), (0.25, 4), (0.3, 4), (0.8, 2.5)):
        share, epochs = rs2(rate, passes)
        assert share <= 1 and share * epochs == pytest.approx(rate * passes)
    assert rs2(0.3, 3) == (0.9, 1.0)  # not a row less


def test_null_ratios_are_the_mean_over_shuffles():
    rng = np.random.default_rng(0)
    ours = [np.sort(rng.random(n)) + low for n, low in ((4, 0.0), (10, 1.0), (7, 2.0))]
    theirs = rng.random(21)
    ends, shuffled = np.cumsum([4, 10, 7])[:-1], []
    for _ in range(4000):
        parts = np.split(rng.permutation(theirs), ends)
        shuffled.append([verification_ratio(a, b) for a, b in zip(parts, ours, strict=True)])
    sums = np.array([each.sum() for each in ours]), np.array([theirs.sum(), 0.0, 0.0])
    found = null_ratios(np.array([4, 10, 7]), *sums)
    assert found == pytest.approx(np.mean(shuffled, 0), rel=0.02) and found[0] > found[1] > found[2]
    found = null_ratios(np.array([4, 0, 7]), np.array([1.0, np.nan, 2.0]), np.array([1.0, np.nan, 1.0]))
    assert np.isnan(found[1]) and np.isfinite(found[[0, 2]]).all()


def test_worth_counts_random_rows():
    """On a curve that falls by 0.1 with each doubling, and is 1 for a random subset's own loss, noise or not."""
    sizes = 20.0 * 2 ** np.arange(5)
    losses = 3 - 0.1 * np.arange(5)
    found = worth(sizes, np.array([losses] * 3), np.array([2.85, 9.0, 0.0]), 1)
    assert found == pytest.approx([20 * 2**1.5, 20, 320])  # the last two are the curve's ends
    noisy = losses + np.random.default_rng(0).normal(scale=0.1, size=(50, 5))
    expected = [IsotonicRegression(increasing=False).fit_transform(range(5), curve) for curve in noisy]
    assert falling(noisy) == pytest.approx(np.array(expected))
    noisy = falling(losses + np.random.default_rng(0).normal(scale=0.01, size=(500, 5)))
    found = worth(sizes, noisy, noisy[:, 2], 80)
    assert abs(np.median(found) - 1) < 0.05
    assert np.median(worth(sizes, noisy, noisy[:, 2] - 0.1, 80)) == pytest.approx(2, rel=0.1)


def test_pools_have_the_faults_that_they_name_and_leave_the_held_out_rows_alone(tmp_path):
    data, other = (REPOSITORY / "data" / f"{name}.jsonl" for name in ("go_biology", "kazakh_english"))
    options = ["--other", other, "--out", tmp_path, "--seeds", 1, 2, "--rows", 200, "--held_out", 50]
    run_main("scripts.paper.pools", data, *options)
    held_out = {row["id"] for row in pools.read_rows(tmp_path / "held_out.jsonl")}
    for seed in (1, 2):
        folder = tmp_path / f"seed-{seed}"
        clean = pools.read_rows(folder / "clean.jsonl")
        assert len(held_out) == 50 and not held_out & {row["id"] for row in clean}
        for name, (_, share) in pools.POOLS.items():
            rows, faulty = pools.read_rows(folder / f"{name}.jsonl"), pools.is_faulty(folder / f"{name}.jsonl")
            assert faulty.sum() == round(200 * share) and len(rows) == 200
            assert all((own == before) != fault for own, before, fault in zip(rows, clean, faulty, strict=True))
            assert name == "other_30" or not held_out & {row["id"] for row in rows}
        swapped = pools.read_rows(folder / "swapped_30.jsonl")
        assert Counter(row["output"] for row in swapped) == Counter(row["output"] for row in clean)
        changed = [len(a["output"]) - len(b["output"]) for a, b in zip(swapped, clean, strict=True) if a != b]
        assert np.median(np.abs(changed)) < 10  # of about 160 letters
        copied = pools.read_rows(folder / "copies_50.jsonl")
        assert len({row["id"] for row in copied}) == 100
        assert len({json.dumps(row) for row in copied}) == 150  # half of the copies are exact


@pytest.fixture
def pool(make_experiment, rows, tmp_path):
    """The experiment of a pool of 30 rows with 9 stock answers, and which these are."""
    made = pools.make_pools(rows, rows, 1)["boilerplate_30"]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[:5])
    config = make_experiment([row for row, _ in made], name="pool", eval_data=held_out)
    kinds = [kind for _, kind in made]
    (tmp_path / "pool.kinds.json").write_text(json.dumps(kinds))
    return config, np.array(kinds) != "clean"


def test_figures_of_rows_are_those_of_single_passes(pool):
    experiment = load_experiment(pool[0])
    rows = tokenised_split(experiment, experiment.target_model, training_split(experiment))
    model = AutoModelForCausalLM.from_pretrained(experiment.target_model, dtype=torch.float32)
    around, known = empty_turn(experiment, experiment.target_model), {}
    columns = row_figures(rows, load_row_scorer(experiment.target_model, "fp32"), around, known)
    assert len(known) == len(rows)

    def loss(ids: list[int], first: int) -> np.ndarray:
        """Of each token from `first` on."""
        logits = model(torch.tensor([ids])).logits[0, first - 1 : -1]
        return -logits.log_softmax(-1).gather(1, torch.tensor(ids[first:])[:, None])[:, 0].detach().numpy()

    for number in (0, 7):
        ids, start = rows[number]["input_ids"], rows[number]["labels"].count(-100)
        alone = around[0] + ids[start:]
        assert columns["loss"][number] == pytest.approx(loss(ids, start).mean(), rel=1e-4)
        assert columns["loss_without_prompt"][number] == pytest.approx(loss(alone, len(around[0])).mean(), rel=1e-4)
        # chatml ends a response with <|im_end|> and a line break.
        assert columns["end_loss"][number] == pytest.approx(loss(alone, len(around[0]))[-2:].sum(), rel=1e-4)
        assert columns["n_response_tokens"][number] == len(ids) - start
    # All 30 rows were tried, each behind the prompt of another one; and with the first half of its response.
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in rows]
    tried = np.random.default_rng(0).permutation(30).tolist()
    for other, number in ((tried[4], tried[5]), (tried[-1], tried[0])):
        response = rows[number]["input_ids"][len(prompts[number]) :]
        alone = prompts[other] + response
        assert columns["loss_swapped"][number] == pytest.approx(loss(alone, len(prompts[other])).mean(), rel=1e-4)
        half = around[0] + response[: (len(response) - 2) // 2] + response[-2:]
        assert columns["end_loss_cut"][number] == pytest.approx(loss(half, len(around[0]))[-2:].sum(), rel=1e-4)
    assert all(np.isfinite(values).all() and len(values) == 30 for values in purity.suspicions(columns).values())


def test_suspects_are_what_a_pool_was_made_with():
    """Faults that the text shows, whatever the model says; on clean rows the text alone accuses hardly any."""
    clean, other = (pools.read_rows(REPOSITORY / "data" / f"{name}.jsonl") for name in ("go_biology", "kazakh_english"))
    other = [row | {"output": row["input"]} for row in other]  # answers in Kazakh
    rng = np.random.default_rng(0)
    says = {name: np.ones(400) for name in ("loss", "n_response_tokens")}
    says |= {"loss_without_prompt": np.full(400, 2.0), "hidden_state": rng.normal(size=(400, 8))}
    made = pools.make_pools(clean[:400], other, 1)
    kinds = {"boilerplate_30": {"stock answer"}, "cut_30": {"cut off"}, "copies_50": {"copy", "near copy"}}
    kinds |= {"other_30": {"other language"}, "clean": set()}
    says |= {"loss_swapped": np.full(400, 1.5), "end_loss_cut": np.full(400, 5.0)}
    for name, wanted in kinds.items():
        texts = [(row["instruction"] + row["input"], row["output"]) for row, _ in made[name]]
        says["end_loss"] = np.array([1.0 if answer.endswith(".") else 6.0 for _, answer in texts])
        found, _ = find_suspects(*map(list, zip(*texts, strict=True)), says)
        faulty = np.array([kind != "clean" for _, kind in made[name]])
        of_kind = found[[bool(wanted & {kind, *also}) for kind, also in zip(found.kind, found.also, strict=True)]]
        if name == "copies_50":  # of two copies the later one is suspect, whichever was the first
            assert len(of_kind) >= 0.97 * faulty.sum()
            assert (found.group[found.kind == "copy"] < found.row[found.kind == "copy"]).all()
        else:
            # Some halves are whole sentences, or the same as another row's.
            assert faulty[of_kind.row].sum() >= 0.95 * faulty.sum()
            assert (~faulty[found.row]).sum() <= 0.03 * len(faulty), found[~faulty[found.row]]


def test_labels_are_no_stock_answers_and_a_row_without_figures_is_far_from_all():
    rng = np.random.default_rng(0)
    names = ("loss", "n_response_tokens", "loss_without_prompt", "end_loss", "loss_swapped", "end_loss_cut")
    says = {name: np.ones(60) for name in names}
    says["hidden_state"] = rng.normal(size=(60, 8))
    says["hidden_state"][7] = np.nan
    found, _ = find_suspects([f"Is {row} a {row % 7}?" for row in range(60)], ["yes", "no"] * 30, says)
    assert "stock answer" not in set(found.kind) and "far from all" in set(found.kind[found.row == 7])


def test_what_the_model_cannot_tell_from_a_planted_fault_is_no_suspect():
    """Where half as many own answers look faulty as such with the fault put in, none is listed for it."""
    rng, rows = np.random.default_rng(0), 100
    says = {"n_response_tokens": np.full(rows, 4.0), "loss_without_prompt": np.full(rows, 2.0)}
    says |= {"hidden_state": rng.normal(size=(rows, 8)), "end_loss": np.linspace(0, 10, rows)}
    says["end_loss_cut"] = np.r_[np.linspace(8, 12, 41), np.full(rows - 41, np.nan)]
    says["loss_swapped"] = np.r_[np.full(24, 2.1), np.full(36, 1.9), np.full(40, np.nan)]  # 40 % of 60 are found
    texts = [f"{row} {row * 7} what?" for row in range(rows)], [f"{row} {row * 3} this" for row in range(rows)]

    def look() -> tuple[dict[str, set[int]], dict]:
        found, tried = find_suspects(*texts, says)
        said = list(zip(found.row, found.kind, found.also, strict=True))
        return {kind: {row for row, own, also in said if kind in (own, *also)} for kind in KINDS}, tried

    for wrong, told in ((19, True), (20, False), (0, True)):
        says["loss"] = np.r_[np.full(wrong, 2.1), np.full(rows - wrong, 1.9)]
        flagged, tried = look()
        assert flagged["unexplained"] == set(range(wrong if told else 0))
        assert flagged["cut off"] == set(np.flatnonzero(says["end_loss"] > 9)) and len(flagged["cut off"]) == 10
        assert tried == {"unexplained": [wrong / rows, 0.4], "cut off": [0.1, 0.75]}
        unexplained = how_far_to_trust(tried).partition("; ")[2]
        assert unexplained.startswith("unexplained: " + ("the model finds 40%" if told else "none is listed, 20% look"))
    says["end_loss"] = says["end_loss"] + 3
    assert len(look()[0]["cut off"]) == 0 and look()[1]["cut off"] == [0.4, 0.75]
    says["end_loss_cut"][:] = np.nan  # answers of one token have no half
    assert not look()[0]["cut off"] and "cut off" not in look()[1]
    # Stock answers have no prompt of their own: they say nothing of whether the model can tell.
    texts[1][19:40], says["loss"] = ["I cannot say"] * 21, np.r_[np.full(40, 2.1), np.full(60, 1.9)]
    says["loss_swapped"][:60] = np.r_[np.full(48, 2.1), np.full(12, 1.9)]
    flagged, tried = look()
    assert tried["unexplained"] == [0.241, 0.692] and len(flagged["unexplained"]) == 40


def test_a_borrowed_prompt_makes_no_row_longer_than_all_others():
    other, own = ((1, 2, 3, 4, 5), (-100, -100, -100, 4, 5)), ((7, 8, 9, 9), (-100, 8, -100, 9))
    assert _behind(other, own, 9) == ((1, 2, 3, 8, 9, 9), (-100, -100, -100, 8, -100, 9))
    assert _behind(other, own, 5) == ((2, 3, 8, 9, 9), (-100, -100, 8, -100, 9))


def test_a_pool_is_looked_at_before_anything_is_paid_and_leaves_cleaned(pool, tmp_path):
    experiment, call = load_experiment(pool[0]), ("scripts/check_pool.py", "--config_path", pool[0])
    path = experiment.pool / "suspects.jsonl"
    said = run_script(*call, "--dry-run").stdout
    would = f"look at the rows: would list suspect rows with {experiment.small_model} -> {path}\n"
    assert said == would and not experiment.pool.exists()
    done = run_script(*call)
    assert run_script(*call, "--dry_run").stdout == f"look at the rows: would take the list of {path}\n"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    summary = json.loads((experiment.pool / "pool.json").read_text())
    assert summary["rows"] == 30 and 1 < len(lines) == summary["suspects"] == sum(summary["kinds"].values()) < 30
    rows = pools.read_rows(pool[0].with_name("pool.jsonl"))
    assert all(line["answer"] == rows[line["row"]]["output"] and line["kind"] for line in lines)
    assert f"{len(lines)} of 30 rows are suspect" in done.stdout and "\nwhat selection can gain here: " in done.stdout
    assert_one_line_error(run_script("scripts/check_pool.py", "--target", "x", check=False), "--config_path, or")

    # A row that a user says is right comes back; the model is not asked again.
    write_jsonl(path, lines[1:])
    done = run_script(*call)
    assert "reusing" in done.stderr and len(path.read_text().splitlines()) == len(lines) - 1
    suspects = {line["row"]: line["kind"] for line in lines[1:]}
    clean = [row for row in range(30) if row not in suspects]
    assert read_coreset(experiment.coresets / "clean.json").indices.tolist() == clean
    tune = ("finetune/finetune-select.py", "--config_path", pool[0], "--dry_run", "--select_path")
    assert f"on clean ({len(clean)} rows)" in run_script(*tune, experiment.coresets / "clean.json").stdout
    run_script("scripts/export.py", experiment.folder)
    exported = experiment.folder / "export" / "clean"
    assert [int(line) for line in (exported / "indices.txt").read_text().split()] == clean
    for line in map(json.loads, (exported / "annotated.jsonl").read_text().splitlines()):
        kind = suspects.get(row := line["staff_row"])
        assert line["staff_reason"] == (f"left out: suspect ({kind})" if kind else "chosen by clean"), row
    report = run_script("scripts/report.py", experiment.folder).stdout.strip()  # of a run without any score
    page = Path(report).read_text()
    assert f"<p>{len(suspects)} of 30 rows of the data" in page and "What selection can gain here" in page

    write_jsonl(path, lines[2:])
    done = run_script("scripts/export.py", experiment.folder, check=False)
    assert_one_line_error(done, "clean.json was made with another list of suspects")
    path.write_text("{}\n")
    assert_one_line_error(run_script(*call, check=False), "line 1 is no suspect row", "run scripts/check_pool.py")
    path.unlink()
    assert "reusing" not in run_script(*call).stderr and len(path.read_text().splitlines()) == len(lines)


def test_what_selection_can_gain_is_what_was_measured():
    texts = {"go_biology": (*pool_suspects._GAINS.values(), pool_suspects._NO_GAIN)}
    for data, said in (texts | {"kazakh_english": (pool_suspects._UNREAD,)}).items():
        measured = (REPOSITORY / "data" / "results" / f"worth_{data}" / "tables.md").read_text()
        for text in said:
            figures = re.findall(r"−?[\d.]+ \(−?[\d.]+ to −?[\d.]+\)", text)
            assert figures and all(figure in measured for figure in figures), text
    gain, stock = pool_suspects.possible_gain, {"stock answer": 30, "cut off": 29}
    assert "few rows" in gain({"stock answer": 4, "listed": 90}, 100, {"unexplained": [0.1, 0.4]})
    assert "30% of the rows: stock answer" in gain(stock, 100, {})  # a list from before the trial
    assert gain(stock, 100, {"unexplained": [0.2, 0.4]}) == pool_suspects._UNREAD


def test_committed_coresets_choose_among_the_rows_that_pools_makes(tmp_path):
    data, other = (REPOSITORY / "data" / f"{name}.jsonl" for name in ("go_biology", "kazakh_english"))
    run_script("scripts/paper/pools.py", data, "--other", other, "--out", tmp_path, "--seeds", 1)
    files = {"dataset": tmp_path / "seed-1" / "clean.jsonl", "eval_data": tmp_path / "held_out.jsonl"}
    changes = [f"{key}={json.dumps(str(path))}" for key, path in (files | {"output_dir": tmp_path / "run"}).items()]
    split = training_split(load_experiment(REPOSITORY / "configs" / "pools" / "go_biology.yaml", changes))
    paths = list((REPOSITORY / "selection" / "selected_data" / "go_biology").glob("*/*.json"))
    assert len(paths) == 10 * 5 * 3
    for path in paths:
        coreset = read_coreset(path)
        check_fits(coreset, split.ids, split.fingerprint, str(path))
        assert len(coreset.indices) == int(1000 * float(path.stem.rpartition("-")[2]))


def test_readme_has_the_figures_of_the_pools():
    table = pd.read_csv(REPOSITORY / "data" / "results" / "pools" / "go_biology" / "suspects.csv")
    found = table.groupby(["pool", "seed"])[["rows", "faulty"]].sum().groupby("pool").mean().round(1)
    names = tuple(f"| {name} |" for name in found.index)
    lines = (REPOSITORY / "scripts" / "README.md").read_text(encoding="utf-8").splitlines()
    said = [line.strip("| ").split(" | ")[:4] for line in lines if line.startswith(names)]
    assert {name: tuple(map(float, rest)) for name, *rest in said} == {
        name: (round(1000 * pools.POOLS[name][1]), *found.loc[name]) for name in found.index
    }


LEAVE_OUT = ("--set", "selection.leave_out=suspects")


def test_suspects_have_their_rows_numbers_in_the_data_where_bad_rows_are_left_out(tmp_path):
    found = pd.DataFrame({"row": [1, 0], "kind": "copy", "group": [0, -1]})
    write_suspects(tmp_path / "s.jsonl", found, ["p", "q"], ["a", "b"], [3, 7])
    named = [(each["row"], each["group"], each["prompt"]) for each in read_suspects(tmp_path / "s.jsonl")]
    assert named == [(7, 3, "q"), (3, -1, "p")]


def test_recommended_is_suspects_out_then_rs2_and_clusters_by_one_pass_of_the_target(
    make_experiment, rows, other_target, tmp_path, capsys
):
    training_split(here := load_experiment(make_experiment(rows)))
    numbers = split_numbers(here)
    rows[numbers["eval"][1]] = rows[numbers["train"][0]]  # held out, but scored as its copy; the first one is not
    config = make_experiment(rows, "copies")

    def options(name: str, *more: str) -> list:
        changes = ["selection.mode=recommended", f"output_dir={tmp_path / name}", *more]
        return ["--config_path", config, *(part for change in changes for part in ("--set", change))]

    run_main("finetune.finetune", *options("mine"))
    run_main("selection.effort_score", *options("mine"))
    run_main("scripts.check_pool", *options("other"))  # which has no scores to take the figures from
    (run, lines), (other, again) = (
        (load_experiment(config, options(name)[3::2]), read_suspects(tmp_path / name / "pool" / "suspects.jsonl"))
        for name in ("mine", "other")
    )
    assert run.small_model == run.target_model and 0 < len(lines) < 30
    for one, two in zip(lines, again, strict=True):
        assert (one["row"], one["kind"]) == (two["row"], two["kind"])
        assert one["unexplained"] == pytest.approx(two["unexplained"], abs=2e-3)
    (paid,), (alone,) = ([cost for cost in read_ledger(each.folder) if cost.stage == LOOK] for each in (run, other))
    assert 0 < paid.tokens < alone.tokens / 3 and paid.more_tokens == alone.more_tokens > 0  # of five held-out rows
    assert paid in selection_costs(run, "clusters")

    assert f"none, speculation direct: {run.target_model} scores every row" in capsys.readouterr().err
    run_main("selection.verify", *options("mine"))
    assert "nothing to do" in capsys.readouterr().err and not run.verification.exists()
    run_main("selection.coreset", *options("mine"), "--rate", "0.2")
    chosen = numbers["train"][read_coreset(run.coresets / "clusters-0.2.json").indices]
    assert len(chosen) == 4 and not {line["row"] for line in lines} & set(chosen.tolist())
    run_main("scripts.report", run.folder)
    page = (run.folder / "report.html").read_text()
    assert "there is no small model" in page and "same order?" not in page

    # A list of another model's, and one that is no list of these rows, are refused before anything is scored.
    listed = tmp_path / "new" / "pool" / "suspects.jsonl"
    shutil.copytree(other.pool, listed.parent)
    with pytest.raises(UserError, match="model_fingerprint: stored"):
        run_main("selection.effort_score", *options("new", f"target_model={other_target}"))
    write_jsonl(listed, [{"row": 99}])
    for name, *more in (["selection.effort_score"], ["finetune.finetune", "selection.speculation=published"]):
        with pytest.raises(UserError, match="lists row 99"):
            run_main(name, *options("new", *more))
    assert not any((tmp_path / "new" / name).exists() for name in ("scores", "small"))


def test_leaving_suspects_out_is_choosing_among_the_other_rows(make_experiment, tmp_path):
    """By every method: the same choice as from scores that never had these rows."""
    experiment = load_experiment(config := make_experiment(biology(60)))
    training_split(experiment)
    numbers, rng = split_numbers(experiment), np.random.default_rng(0)
    out = np.array([3, 4, 5, 19, 30, 41, 47])  # of the training split
    listed = [*numbers["train"][out].tolist(), *numbers["eval"][:2].tolist()]
    path = write_pool(experiment, [{"row": row, "kind": "copy"} for row in listed])
    columns = {name: rng.lognormal(size=48) for name in ("effort", "el2n", "entropy")}
    columns |= {name: rng.lognormal(size=48) for name in ("loss", "loss_untuned", "loss_without_prompt")}
    columns |= {"n_response_tokens": rng.integers(5, 90, 48), "hidden_state": rng.normal(size=(48, 4))}
    columns["loss_by_pass"], methods = rng.lognormal(size=(48, 2)), [m for m in get_args(Method) if m != "rds"]

    def cut(name: str, rows: np.ndarray, *arguments: str) -> dict[str, dict]:
        table = {"index": np.arange(len(rows))} | {column: list(values[rows]) for column, values in columns.items()}
        pq.write_table(pa.table(table), scores := tmp_path / f"{name}.parquet")
        options = ["--scores", scores, "--target_scores", scores, "--out", tmp_path / name, *arguments]
        run_main("selection.coreset", "--config_path", config, "--method", *methods, *options)
        return {each.stem: json.loads(each.read_text()) for each in (tmp_path / name).glob("*.json")}

    kept = np.delete(np.arange(48), out)
    found, expected = cut("whole", np.arange(48), *LEAVE_OUT), cut("without", kept, "--rate", 24 / 41)
    expected = {name.replace(str(24 / 41), "0.5"): coreset for name, coreset in expected.items()}
    assert len(found) == len(methods)
    for name, coreset in found.items():
        assert coreset["indices"] == kept[expected[name]["indices"]].tolist(), name
        assert coreset["left_out"] == {"copy": out.tolist()} and coreset["num_rows"] == 48
    assert found["rs2-0.5"]["num_train_epochs"] == pytest.approx(expected["rs2-0.5"]["num_train_epochs"])
    path.write_text(path.read_text().split("\n", 1)[1])
    assert cut("edited", np.arange(48), *LEAVE_OUT)["staff-0.5"]["left_out"] == {"copy": out[1:].tolist()}


def test_a_coreset_and_a_verification_of_another_list_are_refused(finished_run, stage, tmp_path):
    experiment, config = copy_of(finished_run, tmp_path / "run"), finished_run.record
    here = ("--set", f"output_dir={tmp_path / 'run'}")
    asked, numbers = (*here, *LEAVE_OUT), split_numbers(experiment)["train"]
    chosen = experiment.coresets / "random-0.5.json"

    def refused(name: str, *arguments: object) -> str:
        code, _, err = stage(name, config, *arguments)
        assert code == 2 and err.count("error:") == 1, err
        return err

    assert "suspects.jsonl: run scripts/check_pool.py" in refused("selection.verify", *asked)
    path = write_pool(experiment, [{"row": int(numbers[row]), "kind": "cut off"} for row in (7, 8, 60)])
    tune = ("finetune.finetune-select", "--select_path", chosen, "--dry_run")
    assert "(leave_out: stored null" in refused(*tune, *asked)  # verification.json
    for name in ("selection.verify", "selection.coreset"):
        assert stage(name, config, *asked)[0] == 0
    verification = json.loads(experiment.verification.read_text())
    assert verification["left_out"] == 3
    assert not {7, 8, 60} & {row for stratum in verification["strata"] for row in stratum["verified"]}
    assert sum(stratum["size"] for stratum in verification["strata"]) == 117 - 11
    assert "made otherwise (leave_out" in refused("selection.coreset", *here)
    assert stage(*tune[:1], config, *tune[1:], *asked)[0] == 0
    for name in ("staff-0.5", "random-0.5"):
        table = annotated(experiment, experiment.coresets / f"{name}.json").to_pylist()
        found = {line["index"] for line in table if line["reason"] == "left out: suspect (cut off)"}
        assert found == {7, 8, 60}
    _, shown, unread = read_run(experiment)
    assert not unread and sum(bars(shown[0])[0]["rows"]) == 117

    path.write_text(path.read_text().replace(f'"row": {numbers[60]},', f'"row": {numbers[61]},'))
    assert "(left_out_sha256: stored" in refused("selection.coreset", *asked)
    assert "was made with another list of suspects" in refused(*tune, *asked)
    path.write_text('{"row": 150}')
    assert "lists row 150, the data have 150 rows" in refused("selection.verify", *asked)
    path.write_text("")  # the user says that all are right
    for name, *arguments in (("selection.verify",), ("selection.coreset",), tune):
        assert stage(name, config, *arguments, *asked)[0] == 0
    assert json.loads(chosen.read_text())["left_out"] == {}


def test_the_oracle_takes_randoms_rows_but_the_faulty(pool):
    config, faulty = pool
    run_script("scripts/paper/oracle.py", "--config_path", config)
    oracle = read_coreset(load_experiment(config).coresets / "oracle-0.5.json").indices
    assert len(oracle) == 15 and not faulty[oracle].any()
    done = run_script("scripts/paper/oracle.py", "--config_path", config, "--set", "selection.rates=[0.9]", check=False)
    assert_one_line_error(done, "21 clean ones")


def test_subsets_lean_and_the_regression_finds_what_matters(pool, tmp_path):
    """Subsets of one script; and planted losses, which follow one score: its slope's interval holds the truth."""
    values = np.random.default_rng(0).normal(size=(400, 3))
    means = np.array([values[subsets.lean_subset(values, 40, 0.7, number)].mean(0) for number in range(60)])
    chance = np.array([values[subsets.lean_subset(values, 40, 0.0, number)].mean(0) for number in range(60)])
    assert (means.std(0) > 2 * chance.std(0)).all() and abs(means.mean()) < 0.15
    rng, found = np.random.default_rng(1), pd.DataFrame(means, columns=["a", "b", "c"])
    found["nll"] = 2 + 0.05 * (found.a - found.a.mean()) / found.a.std(ddof=0)
    answers = found.nll.to_numpy()[:, None] + rng.normal(scale=0.05, size=(60, 30))
    found["nll_by_sample"] = [" ".join(f"{loss:.4f}" for loss in row) for row in answers]
    found = found.assign(rows=40, tokens=1000.0, clusters=3.0, **{"unique rows": 40})
    text = subsets.format_table(found, ["a", "b", "c"], load_experiment(pool[0]))
    of = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in text.splitlines() if line.startswith("| ")}
    slope, low, high = (float(part.strip("()to ").replace("−", "-")) for part in of["a"].replace("to", " ").split())
    assert low < 50 < high and abs(slope - 50) < 10

    options = ["--config_path", pool[0], "--set", "evaluation.generate=false", "--subsets", 2, "--rows", 6]
    run_script("scripts/paper/subsets.py", *options, "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "subsets.csv")
    assert len(table) == 2 and table["faulty"].between(0, 1).all() and (tmp_path / "out" / "subsets.md").exists()
