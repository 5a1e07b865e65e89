"""The report of a run: its figures against the libraries', and the page itself in a headless Chromium."""

import base64
import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, chromium
from conftest import HOSTILE, copy_of, run_main, scored_run, write_pool
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from selection.method.rules import clusters_of
from selection.report import page as report_page
from selection.report.charts import bars, bin_edges
from selection.report.run_data import (
    STATUSES,
    against_all,
    correlations,
    evaluations,
    number,
    project,
    read_run,
    side_by_side,
)
from selection.rows.split import rows_of, split_numbers
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES, TARGET_TUNING, VERIFICATION, Cost, ledger_path
from selection.run.products import write_json
from selection.scores.folder import read_scores
from selection.scores.verification import Settings, stratified_score

N = 120  # rows of the training split


@pytest.fixture(scope="module")
def experiment(finished_run, tmp_path_factory):
    """The finished run with a ledger and evaluations."""
    experiment = copy_of(finished_run, tmp_path_factory.mktemp("report") / "run")
    costs = [Cost(SPECULATIVE_SCORES, "small/one", N, 100, 10, 5.0), Cost(VERIFICATION, "large/one", 40, 30, 40, 3.0)]
    costs += [Cost(TARGET_TUNING, "staff-0.2", 24, 80, 40, 10.0), Cost(TARGET_TUNING, "full", N, 400, 40, 100.0)]
    ledger_path(experiment.folder).write_text("".join(json.dumps(vars(cost)) + "\n" for cost in costs))
    for name, score in (("full", 41.237), ("staff-0.2", 40.5), ("untuned", 3)):
        metrics = {"rouge-1": 60, "rouge-2": 20, "rouge-l": score, "bleu-4": 9.999, "samples": 30, "code_version": "1"}
        if name == "full":  # the others are of an earlier version
            other = {"rouge_score-1": 61.5, "rouge_score-2": 21.25, "rouge_score-l": 42.125, "sacrebleu": 8.5}
            metrics |= other | {"sacrebleu_signature": "nrefs:1|case:mixed"}
        write_json(experiment.folder / "eval" / name / "metrics.json", metrics)
    return experiment


@pytest.fixture
def copy(experiment, tmp_path):
    return copy_of(experiment, tmp_path / "run")


@pytest.fixture(scope="module")
def page(experiment):
    """The page, the data in it, and what `read_run` gives."""
    path, (figures, shown, refused) = report_page.write_report(experiment), read_run(experiment)
    text = path.read_text(encoding="utf-8")
    return SimpleNamespace(path=path, text=text, data=data_of(text), figures=figures, shown=shown, refused=refused)


def made_up(folder, num_rows: int, like=lambda values: values, **selection):
    """A run with random scores; `like` is given lengths, features and scores, and says what they are."""
    rng = np.random.default_rng(0)
    rows = [{"instruction": f"gene {i}", "input": "", "output": "kinase " * (8 + i % 60)} for i in range(num_rows)]
    n = num_rows - int(np.ceil(0.2 * num_rows))
    lengths, features = like(rng.integers(20, 300, n)), like(rng.normal(size=(n, 6)))
    effort = like(rng.lognormal(sigma=0.6, size=n) / np.sqrt(lengths))
    target = like(effort * rng.lognormal(sigma=0.3, size=n))
    settings = {"num_strata": 8, "verify_per_stratum": 5, "rates": [0.5], "columns": ["hidden_state"]} | selection
    return scored_run(folder, rows, effort, target, lengths, features, methods=["staff"], **settings)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_staff_comes_first_and_a_coreset_that_does_not_fit_is_named(page, copy):
    assert [each.name for each in page.shown] == ["staff-0.2", "staff-0.5", "random-0.2", "random-0.5"]
    assert not page.refused
    for name, old, new in (("staff-0.5", '"rate": 0.5', '"rate": 0.4'), ("random-0.5", '"random"', "[]")):
        path = copy.coresets / f"{name}.json"
        path.write_text(path.read_text().replace(old, new))
    (copy.coresets / "broken.json").write_text("{")
    _, shown, refused = read_run(copy)
    assert [each.name for each in shown] == ["staff-0.2", "random-0.2"]
    assert [line.split(" ")[0] for line in refused] == ["staff-0.5", "broken", "random-0.5"]
    shutil.rmtree(copy.coresets)
    with pytest.raises(UserError, match=r"has no coreset yet: run coreset\.py"):
        read_run(copy)


def test_histogram_counts_every_row_once_where_numpy_counts_it(page):
    effort = page.figures["effort"].to_numpy()
    for each in page.shown:
        bins, edges, cut = bars(each)[0], bin_edges(effort, each.strata), each.strata[-1]["high"]
        totals = np.zeros(len(edges) - 1)
        np.add.at(totals, np.searchsorted(edges, (bins["low"] + bins["high"]) / 2) - 1, bins["rows"])
        slack = np.isclose(edges[:-1], cut) | np.isclose(edges[1:], cut)  # the highest row of all strata is on an edge
        assert np.array_equal(totals[~slack], np.histogram(np.minimum(effort, edges[-1]), edges)[0][~slack])
        counts = bins.groupby("status")["rows"].sum().reindex(STATUSES, fill_value=0)
        dropped = int(((each.stratum < 0) & ~each.chosen).sum())
        assert counts.tolist() == [each.m, len(effort) - each.m - dropped, dropped]
        assert (bins[bins["status"] == "hardest, dropped"]["low"] >= cut * (1 - 1e-9)).all()
        assert (bins[bins["status"] == "not chosen"]["high"] <= cut * (1 + 1e-9)).all()


def test_strata_have_the_coresets_own_budgets_and_intervals_around_its_v(page, experiment):
    shown = {each.name: each for each in page.shown}
    for name in ("staff-0.2", "staff-0.5"):
        strata = json.loads((experiment.coresets / f"{name}.json").read_text())["strata"]
        for ours, own in zip(shown[name].strata, strata, strict=True):
            assert all(ours[key] == own[key] for key in ("budget", "of_which_random_fill", "size"))
            middle = np.sqrt(ours["ratio_low"] * ours["ratio_high"])
            assert middle == pytest.approx(own["verification_ratio"]) or len(own["verified"]) < min(5, own["size"])
        assert sum(s["budget"] for s in strata) == shown[name].m
        assert bars(shown[name])[2]["rows"].sum() == sum(s["size"] for s in strata)
    random, stratum = shown["random-0.2"], shown["staff-0.2"].stratum
    taken = [int((random.chosen & (stratum == s["stratum"])).sum()) for s in random.strata]
    assert random.strata_of == "staff-0.2" and [s["budget"] for s in random.strata] == taken


def test_strata_of_the_length_residual_lie_on_its_axis_and_a_row_without_a_score_says_so(tmp_path):
    def left_out(values):
        if values.dtype == float and values.ndim == 1:
            values[7] = np.nan
        return values

    experiment = made_up(tmp_path, 150, left_out, mode="extended", length_control="residual")
    figures, (shown,), _ = read_run(experiment)
    settings = Settings.of(experiment.selection)
    scores = stratified_score(read_scores(experiment.small_scores, settings.columns), settings)
    assert np.array_equal(shown.score[scores.index], scores.effort) and np.isnan(shown.score[7])
    assert np.array_equal(figures["effort"][scores.index], read_scores(experiment.small_scores).effort)
    assert bars(shown)[0]["low"].min() == scores.effort.min()
    text = report_page.render(experiment)
    assert "length residual of effort score of the speculative model" in text and "; 1 row without one" in text
    data = data_of(text)
    at, coreset = data["rows"]["effort"].index(None), data["coresets"][0]
    assert data["reasons"][coreset["reason"][at]] == "left out: its loss or score is not finite"


def test_correlations_points_and_table_are_those_of_the_scores(page, experiment):
    names = ["effort", "n_response_tokens"]
    small, target = (read_scores(path, names) for path in (experiment.small_scores, experiment.target_scores))
    lengths, numbers = small.columns["n_response_tokens"], split_numbers(experiment)["train"]
    expected = spearmanr(small.at(target.index), target.effort).statistic
    assert f"rank correlation {number(expected, 2)}, " in page.text
    assert f"rank correlation {number(spearmanr(small.effort, lengths).statistic, 2)}." in page.text
    rows = page.data["rows"]
    shown = {row: pair for row, *pair in zip(rows["row"], rows["length"], rows["effort"], strict=True)}
    assert [shown[row] for row in numbers] == [list(pair) for pair in zip(lengths, small.effort, strict=True)]
    assert sum(value is not None for value in rows["target"]) == len(target.index)
    for name, of in (("length", small.index), ("target", target.index), ("map", small.index)):
        figure = re.search(rf'<figure id="figure-{name}">.*?</figure>', page.text, re.S)[0]
        said = [re.match(r"row (\d+), ([^:]*):", title) for title in re.findall("<title>(.*?)</title>", figure)]
        statuses = [page.shown[0].status(np.array([row]))[0] for row in of]
        assert sorted((int(m[1]), m[2]) for m in said) == sorted(zip(numbers[of].tolist(), statuses, strict=True))


def test_correlations_are_judged_by_what_can_be_shown():
    rng = np.random.default_rng(0)
    length = rng.permutation(np.arange(1.0, 401))
    alike, noise = rng.lognormal(size=400), rng.lognormal(size=400)

    def says(effort, target, verified=400) -> list[str | None]:
        target = np.where(np.arange(400) < verified, target, np.nan)
        found = correlations(pd.DataFrame({"effort": effort, "target": target, "length": length}))
        return [found[name] and found[name].says for name in ("target", "target_by_length", "length")]

    much, little = (f"the small model says {said} about the target" for said in ("much", "little"))
    by_length = [much, f"{little} beyond length", "the score is mostly length"]
    assert says(alike**0.1 / length, noise**0.1 / length) == by_length
    assert says(alike, alike + 0.01 * noise) == [much, f"{much} beyond length", "the score is no measure of length"]
    assert says(alike, noise)[0] == little
    assert says(alike, alike + 12 * noise, 12)[:2] == ["too few rows to tell"] * 2
    assert says(alike, alike, 1)[:2] == [None, None] and says(alike, alike, 5)[0] == "too few rows to tell"


def test_what_v_says_is_what_its_interval_leaves_out():
    strata = [{"ratio_low": 1.0, "ratio_high": 2.0, "null_ratio": n, "verified": 5, "size": 9} for n in (0.5, 1.5)]
    some, none, known = (
        report_page.ratios_say(SimpleNamespace(strata=each))
        for each in (strata, strata[1:], [strata[0] | {"verified": 9}])
    )
    assert some == "In 1 of 2 strata V differs from that by more than chance (95 %)." and known == ""
    assert none.startswith("In 0 of 1 strata ") and "nothing can be shown" in none


def test_coresets_stand_against_all_rows(page, experiment):
    lines = against_all(experiment, page.figures, page.shown, np.arange(N))
    length, effort = (page.figures[name].to_numpy() for name in ("length", "effort"))
    assert [line["name"] for line in lines] == ["all rows", "staff-0.2", "staff-0.5", "random-0.2", "random-0.5"]
    for line, chosen in zip(lines, [np.ones(N, bool), *(each.chosen for each in page.shown)], strict=True):
        assert line["length_quartiles"] == np.quantile(length[chosen], [0.25, 0.5, 0.75]).tolist()
        assert line["effort_quartiles"] == pytest.approx(np.quantile(effort[chosen], [0.25, 0.5, 0.75]).tolist())
        assert (line["tokens"], line["m"]) == (length[chosen].sum(), chosen.sum())
    features = read_scores(experiment.small_scores, ["effort", "hidden_state"]).columns["hidden_state"]
    cluster, _ = clusters_of(features, experiment.selection.seed)
    assert lines[0]["at_random"] == lines[0]["reached"] == lines[0]["clusters"] == 11
    assert lines[1]["reached"] == len(set(cluster[page.shown[0].chosen]))
    rng = np.random.default_rng(0)
    drawn = [len(set(cluster[rng.choice(N, 24, replace=False)])) for _ in range(2000)]
    assert lines[1]["at_random"] == pytest.approx(np.mean(drawn), abs=0.1)


def test_answers_of_two_targets_of_one_rate_stand_side_by_side_as_text(copy):
    for name in ("untuned", "staff-0.2", "staff-0.5", "random-0.2"):
        folder = copy.folder / "eval" / name
        write_json(
            folder / "metrics.json", {"nll": 2, "samples": 30, "code_version": "1", "by_sample": {"nll": [1.25]}}
        )
        answers = [{"prompt": "", "predict": f"{name} says {n} <b>", "label": f"label {n}"} for n in range(30)]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    names, shown, why_not = side_by_side(copy, evaluations(copy, ["staff-0.2", "staff-0.5", "random-0.2"])[0])
    assert names == ["staff-0.2", "random-0.2"] and why_not == "" and len(shown) == 10
    assert shown[0]["answers"] == [("staff-0.2 says 0 <b>", 1.25), ("random-0.2 says 0 <b>", 1.25)]
    assert shown[9] == {
        "prompt": rows_of(copy, "eval")[9]["instruction"],
        "reference": "label 9",
        "answers": [("staff-0.2 says 9 <b>", None), ("random-0.2 says 9 <b>", None)],
    }
    text = report_page.render(copy)
    assert "Answers of staff-0.2 and random-0.2, side by side" in text and "says 9 &lt;b&gt;" in text
    (copy.folder / "eval" / "random-0.2" / "predictions.jsonl").write_text("[]\n")
    assert "The answers of random-0.2 are not shown: " in report_page.render(copy)


def test_the_table_of_costs_has_rows_of_the_untuned_target_and_of_tuning_on_everything(copy, capsys):
    changes = [f"output_dir={copy.folder}", "selection.methods=[staff]"]
    run_main("scripts.costs", "--config_path", copy.record, "--set", changes[0], "--set", changes[1], "--tuned")
    table = capsys.readouterr().out.split("(nll: ")[0].split("\n")
    found = [line.split()[:2] + line.split()[-4:] for line in table[2:] if line]
    assert found == [
        ["staff-0.2", "24", "8.0", "s", "10.0", "s"],
        ["full", "120", "0.0", "s", "100.0", "s"],
        ["untuned", "0", "0.0", "s", "0.0", "s"],
    ]


def test_map_is_scikit_learns(page, experiment):
    features = read_scores(experiment.small_scores, ["effort", "hidden_state"]).columns["hidden_state"].astype(float)
    pca = PCA(2).fit(features)
    places, explained = project(experiment, np.arange(N))
    assert places == pytest.approx(pca.transform(features)) and explained == list(pca.explained_variance_ratio_)
    first, second = (f"{100 * share:.0f} %" for share in explained)
    assert f"hold {first} and {second} of" in page.text


def test_costs_and_evaluations_and_those_that_cannot_be_read(page, copy):
    said = "Selection took 8.0 s, 8 % of the 100.0 s that tuning the target on everything took; with tuning the target "
    assert f"{said}on staff-0.2, 10.0 s, it is 18 %." in page.text
    text = re.search('<section id="evaluation">.*?</section>', page.text, re.S)[0]
    assert [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall("<tr>(.*?)</tr>", text)[1:]] == [
        ["staff-0.2", "24", "–", "40.50", "60.00", "20.00", "10.00", "–", "–", "–", "–", "30"],
        ["full", "120", "–", "41.24", "60.00", "20.00", "10.00", "42.12", "61.50", "21.25", "8.50", "30"],
        ["untuned", "–", "–", "3.00", "60.00", "20.00", "10.00", "–", "–", "–", "–", "30"],
    ]
    assert "words as jieba cuts them" in text and "one seed is no evidence" in text and "warning" not in text
    (copy.folder / "eval" / "staff-0.2" / "metrics.json").unlink()
    path = copy.folder / "eval" / "full" / "metrics.json"
    path.write_text(path.read_text().replace("41.237", "-1"))
    (copy.folder / "eval" / ".random-0.2.partial").mkdir()  # of an evaluation that was cut off
    evaluated, unread = evaluations(copy, ["staff-0.2", "random-0.2"])
    assert list(evaluated) == ["untuned"] and "rouge-l" in unread[1]
    named = [line.split(" is not shown")[0] for line in unread]
    assert named == ["The evaluation of staff-0.2", "The evaluation of full"]


def test_of_more_rows_than_the_table_holds_it_has_all_chosen_ones(experiment, page, monkeypatch):
    monkeypatch.setattr(report_page, "MOST_TEXT", 4000)
    for most in (40, 20):
        monkeypatch.setattr(report_page, "MOST_ROWS", most)
        table = report_page.table_rows(experiment, page.figures, page.shown[0], seed=1)
        assert len(table) == most and page.shown[0].chosen[table.index].sum() == min(most, 24)
        assert table.equals(report_page.table_rows(experiment, page.figures, page.shown[0], seed=1))
        assert max(table["response"].str.len()) == 4000 // most // 2 and table["response"].str.endswith("…").any()
    assert "20 of 120 rows of the training split: 20 of the 24 chosen by staff-0.2" in report_page.render(experiment)


def test_rows_that_were_cut_are_counted(copy, page):
    assert "longer than cutoff_len" not in page.text
    about = {"template": copy.template, "cutoff_len": copy.cutoff_len, "longest": 2000, "rows": [3, 5]}
    write_json(copy.data_folder / "cut.json", {copy.small_model: about})
    assert "; 2 rows longer than cutoff_len 1024: scored" in report_page.render(copy)


def test_page_asks_for_nothing_and_lets_its_own_script_alone_run(page):
    text = page.text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    ids = re.findall(r'<[^>]* id="([^"]*)"', markup)
    assert len(set(ids)) == len(ids) and not re.search(r"<(?:img|link|iframe)|<[^>]* (?:src|href|action)=", markup)
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{hashed}'; style-src 'unsafe-inline'; ")


def test_suspects_come_first_as_text_and_a_damaged_list_is_a_line(copy, page):
    assert '<section id="pool">' not in page.text
    hostile = {"row": 5, "prompt": HOSTILE["instruction"], "answer": HOSTILE["output"], "unexplained": None}
    cut = [{"row": row, "kind": "cut off", "prompt": "x", "answer": "long " * 99, "group": -1} for row in range(10, 17)]
    path = write_pool(copy, [hostile, *cut])
    text = report_page.render(copy)
    main, section = text.split("<main>")[1], re.search('<section id="pool">.*?</section>', text, re.S)[0]
    assert main.strip().startswith(section)
    assert "8 of 100 rows of the data (8 %) are suspect" in section and "response length over all rows" in section
    assert "cut off: 7 rows (the answer breaks off)" in section and "−0.5" in section
    assert re.findall(r"<tr><td>(\d+)", section) == ["10", "11", "12", "13", "14", "5"]  # five of a kind
    assert max(map(len, re.findall(r"long[^<]*", section))) == 300
    assert "&lt;svg" in section and "<svg" not in section and "<img" not in section
    path.write_text("[]")
    section = re.search('<section id="pool">.*?</section>', report_page.render(copy), re.S)[0]
    assert "line 1 is no suspect row" in section and "<table" not in section


def test_with_random_coresets_alone_there_are_no_strata(copy):
    for path in copy.coresets.glob("staff-*.json"):
        path.unlink()
    for scored in (True, False):
        text = report_page.render(copy)
        assert "No coreset of STAFF can be shown" in text and ("has scored nothing in this run" in text) != scored
        assert text.count("<svg") == (5 if scored else 0)  # two histograms, three figures of points
        shutil.rmtree(copy.small_scores, ignore_errors=True)


def test_conversations_without_target_scores_features_and_costs(tmp_path):
    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    rows = [{"conversations": [{"from": who, "value": said} for who, said in turns]}] * 60
    keys = {"dataset_format": {"formatting": "sharegpt"}}
    experiment = scored_run(tmp_path, rows, np.arange(1.0, 49), keys=keys, methods=["staff"], rates=[0.5])
    shutil.rmtree(experiment.target_scores)
    ledger_path(experiment.folder).unlink()
    text = report_page.render(experiment)
    for said in ("The target has scored no row", "The scores have no features", "has no cost ledger yet"):
        assert said in text
    assert "The scores that V is made of are not in this run: no interval is known." in text
    rows = data_of(text)["rows"]
    assert "turns that are marked as scored count for score and tokens too" in text
    assert set(rows["prompt"]) == {"user: a\nassistant (scored): b\nuser: c"} and set(rows["response"]) == {"d"}


@pytest.mark.parametrize("num_rows", [3, 8, 10])
@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize(("num_strata", "verify_per_stratum"), [(1, 1), (1, 2), (8, 1)])
def test_first_tries_with_a_few_rows_have_a_page(tmp_path, num_rows, spread, num_strata, verify_per_stratum):
    strata = {"num_strata": num_strata, "verify_per_stratum": verify_per_stratum}
    experiment = made_up(tmp_path, num_rows, lambda values: values[0] + spread * (values - values[0]), **strata)
    text = report_page.render(experiment)
    assert num_strata > 1 or spread == 0 or f"{verify_per_stratum} row" in text
    assert (text.count("<svg") >= 3 and "too few rows to tell" in text) or not spread or num_rows == 3
    assert ">nan<" not in text and "nan to nan" not in text


@pytest.mark.parametrize(("num_rows", "spread"), [(60, 0), (3, 1)])
def test_scores_that_span_nothing_are_drawn(tmp_path, num_rows, spread):
    experiment = made_up(tmp_path, num_rows, lambda values: values[0] + spread * (values - values[0]))
    figures, [shown], _ = read_run(experiment)
    bins, strata, budgets = bars(shown)
    assert bins["rows"].sum() == len(figures) and budgets["rows"].sum() == sum(s["size"] for s in shown.strata)
    assert (strata["low"] < strata["high"]).all()
    assert (bins[bins["status"] != "hardest, dropped"]["high"] <= strata["high"].max() + 1e-9).all()
    assert report_page.render(experiment).count("<svg") >= 3


def test_script_takes_a_run_folder_wherever_it_is_and_draws_the_same_page(copy, page, experiment, capsys):
    run_main("scripts.report", copy.folder)  # in this process: what draws the figures does not survive a fork
    written = copy.folder / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(written)
    assert written.read_text().replace(str(copy.folder), str(experiment.folder)) == page.text
    (copy.folder / "experiment.yaml").unlink()
    with pytest.raises(UserError, match=r"no experiment\.yaml"):
        run_main("scripts.report", copy.folder)
    with pytest.raises(UserError, match="RUN_DIR --config_path is required"):
        run_main("scripts.report")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with chromium() as browser:
        yield browser


@pytest.fixture
def show(browser):
    """A function that opens a file in a fresh window, which must ask for nothing else and complain of nothing."""
    windows, complaints, asked = [], [], []

    def show(path, **looks):
        windows.append(window := browser.new_page(viewport={"width": 1200, "height": 900}, **looks))
        window.on("console", lambda message: complaints.append(message.text))
        window.on("pageerror", lambda error: complaints.append(str(error)))
        window.on("request", lambda request: asked.append(request.url))
        window.goto(path.resolve().as_uri())
        return window

    yield show
    assert (complaints, len(asked)) == ([], len(windows))
    for window in windows:
        window.close()


@pytest.fixture
def opened(show, page):
    return show(page.path)


def column(window, number: int) -> list[str]:
    return window.locator(f"#table tbody tr > td:nth-child({number + 1})").all_text_contents()


def found(window) -> str:
    return window.locator("#found").text_content()


def test_every_column_sorts_both_ways(opened, page):
    data = page.data
    rows, coreset = data["rows"], data["coresets"][0]
    stratum = [None if s < 0 else s for s in coreset["stratum"]]
    values = rows | {"stratum": stratum, "ratio": [None if s is None else coreset["ratio"][s] for s in stratum]}
    values["reason"] = [data["reasons"][i] for i in coreset["reason"]]
    values["chosen"] = [reason.startswith("chosen") for reason in values["reason"]]
    for name, of in values.items():
        for way in ("descending", "ascending") if name == "row" else ("ascending", "descending"):  # it comes by row
            opened.click(f"th[data-column={name}] button")
            known = [i for i, value in enumerate(of) if value is not None]
            order = sorted(known, key=lambda i: of[i], reverse=way == "descending")  # of equal ones the earlier row
            order += [i for i, value in enumerate(of) if value is None]
            assert column(opened, 0) == [str(rows["row"][i]) for i in order[:50]], (name, way)
            assert opened.get_attribute(f"th[data-column={name}]", "aria-sort") == way


def test_search_filters_pages_and_another_coreset(opened, page):
    data = page.data
    rows, coreset = data["rows"], data["coresets"][0]
    chosen = [i for i, reason in enumerate(coreset["reason"]) if data["reasons"][reason].startswith("chosen")]
    texts = [f"{p}\n{r}".lower() for p, r in zip(rows["prompt"], rows["response"], strict=True)]
    opened.fill("#search", "Biological Process")
    assert 0 < sum("biological process" in text for text in texts) == int(found(opened).split()[0]) < N
    opened.fill("#search", "")
    opened.select_option("#which", label="chosen")
    assert column(opened, 0) == [str(rows["row"][i]) for i in chosen] and set(column(opened, 8)) == {"yes"}
    opened.select_option("#stratum", "2")
    assert set(column(opened, 6)) == {"2"} and len(column(opened, 0)) == sum(coreset["stratum"][i] == 2 for i in chosen)
    opened.select_option("#which", label="not chosen")
    opened.select_option("#stratum", label="none: the hardest, left out")
    assert found(opened) == f"{coreset['stratum'].count(-1)} of 120 rows" and set(column(opened, 6)) == {"–"}
    opened.select_option("#coreset", "random-0.5")
    assert opened.locator("h1:visible").all_text_contents() == ["60 of 120 rows random-0.5"]
    assert "what random-0.5 takes" in opened.locator("#scores > details:visible summary").text_content()
    opened.select_option("#which", label="chosen")
    assert found(opened) == "60 of 120 rows" and set(column(opened, 9)) == {"chosen by random"}
    opened.select_option("#which", "")
    seen = column(opened, 0)
    while not opened.is_disabled("#next"):
        opened.click("#next")
        seen += column(opened, 0)
    assert seen == [str(row) for row in rows["row"]] and opened.locator("#page").text_content() == "page 3 of 3"


def test_a_row_is_found_by_its_number_or_by_a_click_on_its_point(opened, page):
    rows = page.data["rows"]["row"]
    row = next(row for row in rows if sum(str(row) in str(other) for other in rows) > 2)  # 5 is in 15 too
    opened.fill("#search", f"Row: {row} ")
    assert column(opened, 0) == [str(row)] and opened.locator("#table tr.marked").count() == 1
    opened.fill("#search", "row:99999")
    assert column(opened, 0) == []
    opened.fill("#search", "")
    assert found(opened) == "120 of 120 rows" and opened.locator("tr.marked").count() == 0
    point = opened.locator("#figure-length path:has(title)").last
    point.click()
    assert [opened.input_value("#search")] == [f"row:{row}" for row in column(opened, 0)]
    assert f"row {column(opened, 0)[0]}," in point.text_content()


def test_text_of_strangers_stays_text_and_long_texts_open_on_a_click(opened, page):
    rows = page.data["rows"]
    at = next(i for i, text in enumerate(rows["response"][:50]) if len(text) > 200)
    details = opened.locator("#table tbody > tr").nth(at).locator("td:nth-child(3) details")
    assert not details.locator("div").is_visible()
    details.locator("summary").click()
    assert details.locator("div").is_visible() and details.locator("div").text_content() == rows["response"][at]
    opened.fill("#search", "onerror")
    assert column(opened, 1) == [f"{HOSTILE['instruction']}\n{HOSTILE['input']}"]
    assert column(opened, 2) == [HOSTILE["output"]]
    assert opened.locator("img, #table svg").count() == 0 and "hit" not in opened.title()


def test_without_scripts_the_page_reads(show, page):
    window = show(page.path, java_script_enabled=False)
    assert window.locator("svg:visible").count() == 4 and window.locator(".scripted:visible").count() == 0
    said = " ".join(window.locator(".unscripted:visible").all_text_contents())
    assert "Shown here are 100" in said and "staff-0.2 (24 rows), staff-0.5 (60 rows)" in said
    assert window.locator("h1:visible").count() == 1
    assert column(window, 8) == ["yes"] * 24 + ["no"] * 76
    window.locator("#scores summary").nth(1).click()
    assert window.locator("#scores svg:visible").count() == 2


def test_rows_that_are_shown_are_downloaded_and_the_next_commands_copied(opened, page):
    opened.fill("#search", "biological process")
    with opened.expect_download() as download:
        opened.click("#download")
    lines = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert download.value.suggested_filename == "staff-0.2.jsonl"
    assert len(lines) == int(found(opened).split()[0]) < N and column(opened, 0) == [str(e["row"]) for e in lines[:50]]
    assert column(opened, 9) == [each["reason"] for each in lines[:50]] and "biological" in lines[0]["prompt"]
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.click("[data-copy]:visible")
    opened.get_by_text("Copied").wait_for()
    commands = opened.evaluate("navigator.clipboard.readText()").splitlines()
    assert [command.split()[1] for command in commands] == [
        "finetune/finetune-select.py",
        "finetune/eval.py",
        "scripts/export.py",
    ]
    assert all("staff-0.2" in command for command in commands)


def test_on_a_telephone_what_is_wide_scrolls_with_a_hint_and_the_page_does_not(opened):
    hint = "(part) => [part.scrollWidth > part.clientWidth, getComputedStyle(part, '::before').content]"
    wide = opened.locator(".chart:visible, .wide:visible")
    assert {part.evaluate(hint)[1] for part in wide.all()} == {"none"}
    opened.set_viewport_size({"width": 400, "height": 800})
    found = [part.evaluate(hint) for part in wide.all()]
    assert len(found) >= 7 and sum(scrolls for scrolls, _ in found) >= 6
    assert {said for _, said in found} == {'"scroll sideways →"'}
    assert opened.evaluate("document.documentElement.scrollWidth") == 400


def test_the_configuration_is_folded_on_screen_alone(opened):
    shown = "document.querySelector('#settings pre').checkVisibility({contentVisibilityAuto: true})"
    assert not opened.evaluate(shown)
    opened.emulate_media(media="print")
    assert any(opened.evaluate(shown) or opened.wait_for_timeout(100) for _ in range(100))
