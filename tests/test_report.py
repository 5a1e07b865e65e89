"""The report of a run: its figures against the libraries', and the page itself in a headless Chromium."""

import base64
import hashlib
import html.parser
import importlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from selection.method.interval import ratio_interval
from selection.report import page as report_page
from selection.rows.split import split_numbers, training_split
from selection.run.config import DatasetFormat, Experiment, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING, TARGET_TUNING, VERIFICATION, Cost, ledger_path
from selection.run.products import write_json
from selection.scores.folder import ScoreFolder, read_scores
from selection.scores.identity import score_identity, write_experiment
from selection.scores.verification import (
    Settings,
    cut_strata,
    draw,
    stratified_score,
    verified_pairs,
    verify,
    write_verification,
)

HOSTILE = {
    "instruction": "</script><img src=x onerror=\"document.title='hit'\"><!--<script>",
    "input": "{{ 7 * 7 }} ${document.title='hit'} \u2028 &lt;b&gt;",
    "output": "<svg onload=\"document.title='hit'\">'\"`</td></table>",
}
HOSTILE_PROMPT = f"{HOSTILE['instruction']}\n{HOSTILE['input']}"
LEFT_OUT = 7  # row of the training split
WORDS = ["gene", "protein", "binding", "transport", "membrane", "synthesis", "pathway", "kinase"]
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def make_run(
    folder: Path, num_rows: int, left_out: tuple[int, ...] = (LEFT_OUT,), like=lambda values: values, **selection
) -> Experiment:
    """A run as the stages leave it, without their models: rows, scores with features, verification, costs, coresets.

    `like` is given the random lengths, features and scores of both models, and says what they are.
    """
    rng = np.random.default_rng(0)

    words = rng.choice(WORDS, 1000).tolist()

    def text(i: int, count: int) -> str:
        return " ".join(words[i * 7 % 900 :][:count])

    rows = [
        {"instruction": f"{text(i, 5)} {i}", "input": "", "output": text(i + 1, 8 + i % 60)}
        for i in range(num_rows - 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    data, path = folder / "rows.jsonl", folder / "experiment.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:40], HOSTILE, *rows[40:]]), encoding="utf-8")
    settings = {"num_strata": 8, "verify_per_stratum": 5, "rates": [0.2, 0.5], "columns": ["hidden_state"]} | selection
    keys = {"output_dir": str(folder / "run"), "small_model": "small/one", "target_model": "large/one"}
    keys |= {"template": "chatml", "dataset": str(data), "eval_size": 0.2, "selection": settings}
    path.write_text(json.dumps(keys), encoding="utf-8")
    experiment = load_experiment(str(path))
    split, settings = training_split(experiment), Settings.of(experiment.selection)
    every = np.arange(len(split.rows))
    lengths = like(rng.integers(20, 300, len(every)))
    effort = like(rng.lognormal(sigma=0.6, size=len(every)) / np.sqrt(lengths))
    effort[list(left_out)] = np.nan
    write_scores(
        experiment, experiment.small_model, split, every, effort, lengths, like(rng.normal(size=(len(every), 6)))
    )
    raw = read_scores(experiment.small_scores, settings.columns, ids=False)
    scores = stratified_score(raw, settings)
    drawn = np.sort(scores.index[np.concatenate(draw(cut_strata(scores.effort, settings), settings))])
    theirs = like(effort * rng.lognormal(sigma=0.3, size=len(every)))
    write_scores(experiment, experiment.target_model, split, drawn, theirs, lengths, rng.normal(size=(len(drawn), 6)))
    target = read_scores(experiment.target_scores, settings.columns, ids=False)
    records = verify(scores.effort, target, settings, index=scores.index)
    write_verification(experiment.verification, settings, raw, records)
    write_experiment(experiment)
    costs = [
        Cost(SPECULATIVE_TUNING, "small/one", len(every), 300, 10, 20.0),
        Cost(SPECULATIVE_SCORES, "small/one", len(every), 100, 10, 5.0),
        Cost(VERIFICATION, "large/one", len(drawn), 30, 40, 3.0),
        Cost(TARGET_TUNING, "staff-0.2", 24, 80, 40, 10.0),
        Cost(TARGET_TUNING, "full", len(every), 400, 40, 100.0),
    ]
    ledger_path(experiment.folder).write_text("".join(json.dumps(vars(cost)) + "\n" for cost in costs))
    for name, score in (("full", 41.237), ("staff-0.2", 40.5), ("untuned", 3)):
        metrics = {"rouge-1": 60, "rouge-2": 20, "rouge-l": score, "bleu-4": 9.999, "samples": 38, "code_version": "1"}
        if name == "full":  # the others are of an earlier version
            other = {"rouge_score-1": 61.5, "rouge_score-2": 21.25, "rouge_score-l": 42.125, "sacrebleu": 8.5}
            metrics |= other | {"sacrebleu_signature": "nrefs:1|case:mixed"}
        write_json(experiment.folder / "eval" / name / "metrics.json", metrics)
    cut_coresets(path)
    return experiment


def write_scores(experiment, model, split, rows, effort, lengths, features) -> None:
    folder = experiment.small_scores if model == experiment.small_model else experiment.target_scores
    order = np.random.default_rng(1).permutation(len(rows))  # parts are sorted by length
    rows, features = rows[order], features[order]
    scores = ScoreFolder(folder, score_identity(experiment, split, model, None), len(split.rows), ["hidden_state"])
    scores.plan(rows, lambda missing: [[missing.tolist()]])
    columns = {"index": rows, "id": np.array(split.ids)[rows], "effort": effort[rows], "loss": effort[rows] / 2}
    counts = {"n_prompt_tokens": lengths[rows], "n_response_tokens": lengths[rows]}
    scores.write_part([rows.tolist()], {**columns, **counts, "hidden_state": features.astype(np.float32)})
    scores.finish(np.sort(rows))


def cut_coresets(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path.copy())  # the script changes it
        patch.setattr(sys, "argv", ["coreset.py", "--config_path", str(path)])
        importlib.import_module("selection.coreset").main()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    return make_run(tmp_path_factory.mktemp("report"), 190)


@pytest.fixture
def copy(experiment, tmp_path) -> Experiment:
    """The run once more, to be changed."""
    shutil.copytree(experiment.folder, tmp_path / "run")
    return experiment.model_copy(update={"output_dir": str(tmp_path / "run")})


@pytest.fixture(scope="module")
def page(experiment) -> Path:
    return report_page.write_report(experiment)


@pytest.fixture(scope="module")
def run(experiment):
    return report_page.read_run(experiment)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# What the page says, against the libraries


def test_staff_comes_first_and_every_coreset_is_there(run):
    _, shown, refused = run
    assert [each.name for each in shown] == ["staff-0.2", "staff-0.5", "random-0.2", "random-0.5"]
    assert refused == []


def test_histogram_counts_every_scored_row_once_where_numpy_counts_it(run):
    figures, shown, _ = run
    effort = figures.effort[np.isfinite(figures.effort)]
    for each in shown:
        bins = report_page.bar_data(each)["bins"]
        edges = report_page.bin_edges(effort, each.strata)
        totals = np.zeros(len(edges) - 1)
        for bar in bins:
            totals[np.searchsorted(edges, (bar["low"] + bar["high"]) / 2) - 1] += bar["rows"]
        cut = each.strata[-1]["high"]
        below = np.histogram(effort[effort <= cut], edges)[0]
        above = np.histogram(np.minimum(effort[effort > cut], edges[-1]), edges)[0]
        slack = np.isclose(edges[:-1], cut) | np.isclose(edges[1:], cut)  # the highest row of all strata is on an edge
        assert np.array_equal(totals[~slack], (below + above)[~slack])
        by_status = {name: sum(b["rows"] for b in bins if b["status"] == name) for name in report_page.STATUSES}
        assert by_status["chosen"] == each.m
        assert sum(by_status.values()) == len(effort)
        assert by_status["hardest, dropped"] == int((each.stratum[np.isfinite(figures.effort)] < 0).sum()) - int(
            (each.chosen & (each.stratum < 0)).sum()
        )
        assert all(b["low"] >= cut * (1 - 1e-9) for b in bins if b["status"] == "hardest, dropped")
        assert all(b["high"] <= cut * (1 + 1e-9) for b in bins if b["status"] == "not chosen")


def test_strata_have_the_coresets_own_budgets_and_the_librarys_intervals(run, experiment):
    _, shown, _ = run
    scores, target = (read_scores(p, ids=False) for p in (experiment.small_scores, experiment.target_scores))
    settings = Settings.of(experiment.selection)
    pairs = verified_pairs(scores.effort, target, settings, cut_strata(scores.effort, settings), scores.index)
    for each in shown[:2]:
        about = json.loads((experiment.coresets / f"{each.name}.json").read_text())
        assert [s["budget"] for s in each.strata] == [s["budget"] for s in about["strata"]]
        assert [s["fill"] for s in each.strata] == [s["of_which_random_fill"] for s in about["strata"]]
        assert sum(s["budget"] for s in each.strata) == each.m == len(about["indices"])
        assert [s["ratio"] for s in each.strata] == [s["verification_ratio"] for s in about["strata"]]
        for s, (_, ours, theirs) in zip(each.strata, pairs, strict=True):
            assert (s["ratio_low"], s["ratio_high"]) == pytest.approx(
                ratio_interval(theirs, ours, s["size"]), nan_ok=True
            )
        parts = report_page.bar_data(each)["budgets"]
        assert sum(p["rows"] for p in parts) == sum(s["size"] for s in about["strata"])
    random = shown[2]
    assert random.strata_of == "staff-0.2"
    for s in random.strata:
        assert s["budget"] == int((random.chosen & (shown[0].stratum == s["stratum"])).sum())


def test_strata_of_the_length_residual_lie_on_its_axis(tmp_path):
    changes = {"mode": "extended", "length_control": "residual", "rates": [0.2], "methods": ["staff"]}
    experiment = make_run(tmp_path, 190, **changes)
    figures, (shown,), _ = report_page.read_run(experiment)
    settings = Settings.of(experiment.selection)
    scores = stratified_score(read_scores(experiment.small_scores, settings.columns), settings)
    assert np.array_equal(shown.score[scores.index], scores.effort) and np.isnan(shown.score[LEFT_OUT])
    assert np.array_equal(figures.effort[scores.index], read_scores(experiment.small_scores).effort)
    assert not np.isnan([s["ratio_low"] for s in shown.strata if s["verified"] > 1]).any()
    bars = report_page.bar_data(shown)["bins"]
    assert min(b["low"] for b in bars) == scores.effort.min()
    assert "length residual of effort score of the speculative model" in report_page.render(experiment)


def test_correlations_and_points_are_those_of_the_scores(run, page, experiment):
    small, target = (
        read_scores(p, ["effort", "n_response_tokens"]) for p in (experiment.small_scores, experiment.target_scores)
    )
    at = small.positions(target.index)
    text = page.read_text(encoding="utf-8")
    expected = spearmanr(small.effort[at], target.effort).statistic
    assert f"rank correlation {report_page.correlation(expected)}, " in text
    expected = spearmanr(small.effort, small.columns["n_response_tokens"]).statistic
    assert f"rank correlation {report_page.correlation(expected)}." in text
    rows, numbers = data_of(text)["rows"], split_numbers(experiment)["train"]
    at = [rows["row"].index(row) for row in numbers[small.index]]
    assert [rows["length"][i] for i in at] == small.columns["n_response_tokens"].tolist()
    assert [rows["effort"][i] for i in at] == pytest.approx(small.effort.tolist())
    assert sum(value is not None for value in rows["target"]) == len(target.index)
    bases = data_of(text)["bases"]
    assert sorted(bases["points"]["row"]) == sorted(numbers[small.index])
    assert dict(zip(bases["pairs"]["row"], bases["pairs"]["target"], strict=True)) == pytest.approx(
        dict(zip(numbers[target.index].tolist(), target.effort.tolist(), strict=True))
    )


def test_map_is_scikit_learns(page, experiment):
    scores = read_scores(experiment.small_scores, ["effort", "hidden_state"])
    pca = PCA(2).fit(scores.columns["hidden_state"].astype(float))
    expected = pca.transform(scores.columns["hidden_state"].astype(float))
    points = data_of(page.read_text(encoding="utf-8"))["bases"]["points"]
    assert np.column_stack([points["x"], points["y"]]) == pytest.approx(expected, abs=1e-4)
    first, second = (f"{100 * share:.0f} %" for share in pca.explained_variance_ratio_)
    assert f"hold {first} and {second} of" in page.read_text(encoding="utf-8")
    fifth = report_page.fifths(scores.effort)[0]
    assert (
        np.bincount(fifth).tolist()
        == np.histogram(scores.effort, np.quantile(scores.effort, np.linspace(0, 1, 6)))[0].tolist()
    )


def test_the_sentence_on_costs(page):
    text = page.read_text(encoding="utf-8")
    for said in ("Selection took 28", "that tuning the target on everything took", "on staff-0.2, 10.0 s, it is 38 %"):
        assert said in text


def test_evaluations_with_the_rows_that_each_target_was_tuned_on(page):
    section = re.search(r'<section id="evaluation">.*?</section>', page.read_text(encoding="utf-8"), re.S)[0]
    assert [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall("<tr>(.*?)</tr>", section)[1:]] == [
        ["staff-0.2", "24", "40.50", "60.00", "20.00", "10.00", "–", "–", "–", "–", "38"],
        ["full", "152", "41.24", "60.00", "20.00", "10.00", "42.12", "61.50", "21.25", "8.50", "38"],
        ["untuned", "–", "3.00", "60.00", "20.00", "10.00", "–", "–", "–", "–", "38"],
    ]
    assert "words as jieba cuts them" in section
    assert "one seed is no evidence" in section and "warning" not in section


def test_evaluations_that_cannot_be_read_are_named_in_a_line(copy):
    (copy.folder / "eval" / "staff-0.2" / "metrics.json").unlink()
    path = copy.folder / "eval" / "full" / "metrics.json"
    path.write_text(path.read_text().replace("41.237", "-1"))
    (copy.folder / "eval" / ".random-0.2.partial").mkdir()  # of an evaluation that was cut off
    evaluated, unread = report_page.evaluations(copy, ["staff-0.2", "random-0.2"])
    assert list(evaluated) == ["untuned"]
    assert [line.split(" is not shown")[0] for line in unread] == [
        "The evaluation of staff-0.2",
        "The evaluation of full",
    ]
    assert "rouge-l" in unread[1]
    shutil.rmtree(copy.folder / "eval")
    assert report_page.evaluations(copy, ["staff-0.2"]) == ({}, [])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(0, 600))
def test_texts_are_cut_no_more_than_the_limit_asks(lengths, total):
    longest = report_page.longest_text(lengths, total)
    if longest is None:
        assert sum(lengths) <= total
    else:
        assert sum(min(length, longest) for length in lengths) <= total
        assert sum(min(length, longest + 1) for length in lengths) > total


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"instruction": "a", "input": "b", "output": "c", "more": 1}, {}, ("a\nb", "c")),
        ({"q": "a", "r": "c", "input": "not named"}, {"columns": {"prompt": "q", "response": "r"}}, ("a", "c")),
        (
            {"s": "be", "h": [["x", "y"]], "q": "a", "r": "c"},
            {"columns": {"prompt": "q", "response": "r", "system": "s", "history": "h"}},
            ("be\nx\ny\na", "c"),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]},
            {"formatting": "sharegpt"},
            ("human: a", "c"),
        ),
        (
            {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}], "system": "be"},
            {"formatting": "openai", "columns": {"messages": "m", "system": "system"},
             "tags": {"role_tag": "role", "content_tag": "content"}},
            ("be\nuser: a", "c"),
        ),
    ],
)  # fmt: skip
def test_texts_of_rows(row, form, expected):
    assert report_page.texts_of(row, DatasetFormat(**form)) == expected


def test_of_more_rows_than_the_table_holds_it_has_all_chosen_ones(experiment, run, monkeypatch):
    figures, shown, _ = run
    monkeypatch.setattr(report_page, "MOST_ROWS", 40)
    table = report_page.table_rows(experiment, figures, shown[0], seed=1)
    assert len(table["index"]) == 40 and set(np.flatnonzero(shown[0].chosen)) < set(table["index"])
    assert "40 of 152 rows of the training split: all 30 chosen by staff-0.2" in report_page.table_note(
        table, figures, shown[0], 1
    )
    assert np.array_equal(table["index"], report_page.table_rows(experiment, figures, shown[0], seed=1)["index"])
    monkeypatch.setattr(report_page, "MOST_ROWS", 20)
    table = report_page.table_rows(experiment, figures, shown[0], seed=1)
    assert shown[0].chosen[table["index"]].all() and "20 of the 30 chosen" in report_page.table_note(
        table, figures, shown[0], 1
    )


# The page as a file


class Tags(html.parser.HTMLParser):
    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.images = [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        self.open += [] if tag in self.VOID else [tag]
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()


def test_page_is_well_formed_and_asks_for_nothing(page):
    text = page.read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == [] and len(set(tags.ids)) == len(tags.ids) and tags.images == 0
    assert [address for address in tags.addresses if not address.startswith("#")] == []
    assert page.stat().st_size < 3e6


def test_policy_lets_the_pages_own_scripts_run_and_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{each}'" for each in hashes]
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}


def test_the_same_run_gives_the_same_page(page, experiment):
    before = page.read_bytes()
    assert report_page.write_report(experiment).read_bytes() == before


# What may be missing


def test_without_a_coreset_one_line_says_so(copy):
    shutil.rmtree(copy.coresets)
    with pytest.raises(UserError, match=r"has no coreset yet: run coreset\.py"):
        report_page.render(copy)


def test_with_other_coresets_alone_there_are_no_strata(copy):
    for path in copy.coresets.glob("staff-*.json"):
        path.unlink()
    text = report_page.render(copy)
    assert "No coreset of STAFF can be shown" in text and "Selection took" not in text
    assert {"scores", "target", "length", "map"} == set(data_of(text)["charts"])
    assert data_of(text)["coresets"][0]["data"]["strata"] == []


def test_without_verification_features_and_costs_the_rest_is_there(copy):
    shutil.rmtree(copy.target_scores)
    ledger_path(copy.folder).unlink()
    parts = copy.small_scores / "manifest.json"
    del parts
    scores = read_scores(copy.small_scores, ["effort", "n_response_tokens"])
    shutil.rmtree(copy.small_scores)
    split, every = training_split(copy), np.arange(152)
    effort = np.insert(scores.effort, LEFT_OUT, np.nan)
    lengths = np.insert(scores.columns["n_response_tokens"], LEFT_OUT, 5)
    folder = ScoreFolder(copy.small_scores, {"data_fingerprint": split.fingerprint}, 152)
    folder.plan(every, lambda missing: [[missing.tolist()]])
    columns = {"index": every, "id": np.array(split.ids), "effort": effort, "loss": effort}
    folder.write_part([every.tolist()], {**columns, "n_prompt_tokens": lengths, "n_response_tokens": lengths})
    folder.finish(every)
    text = report_page.render(copy)
    assert set(data_of(text)["charts"]) == {"scores", "length"}
    for said in (
        "The target has scored no row",
        "The scores have no features",
        "has no cost ledger yet",
        "no interval is known",
    ):
        assert said in text
    assert all(s["ratio_low"] is None for s in data_of(text)["coresets"][0]["data"]["strata"])


def test_without_any_scores_random_coresets_are_still_listed(copy):
    for path in copy.coresets.glob("staff-*.json"):
        path.unlink()
    shutil.rmtree(copy.small_scores)
    text = report_page.render(copy)
    assert "has scored nothing in this run" in text and data_of(text)["charts"] == {}
    assert sum(data_of(text)["groups"][g]["chosen"] for g in data_of(text)["coresets"][0]["group"]) == 30


def test_a_coreset_that_does_not_fit_is_named_and_the_others_are_shown(copy):
    for name, change in (
        ("staff-0.5", ('"rate": 0.5', '"rate": 0.4')),
        ("random-0.5", ('"method": "random"', '"method": []')),
    ):
        path = copy.coresets / f"{name}.json"
        path.write_text(path.read_text().replace(*change))
    (copy.coresets / "broken.json").write_text("{")
    _, shown, refused = report_page.read_run(copy)
    assert [each.name for each in shown] == ["staff-0.2", "random-0.2"]
    assert [line.split(" ")[0] for line in refused] == ["broken", "random-0.5", "staff-0.5"]


def test_rows_left_out_in_scoring_say_so(page, experiment):
    data = data_of(page.read_text(encoding="utf-8"))
    at = data["rows"]["row"].index(int(split_numbers(experiment)["train"][LEFT_OUT]))
    assert data["rows"]["effort"][at] is None and data["coresets"][0]["stratum"][at] == -1
    assert data["groups"][data["coresets"][0]["group"][at]] == {
        "chosen": False, "reason": "left out: its loss or score is not finite",
    }  # fmt: skip
    assert "; 1 row without one" in page.read_text(encoding="utf-8")


@pytest.fixture
def script(monkeypatch, capsys):
    """A function that calls scripts/report.py; its output."""
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "scripts"), *sys.path])

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        spec = importlib.util.spec_from_file_location("report_script", REPOSITORY / "scripts" / "report.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_script_takes_a_run_folder_wherever_it_is_and_ends_with_the_page(script, copy):
    out = script(copy.folder)
    assert out.splitlines()[-1] == str(copy.folder / "report.html") and (copy.folder / "report.html").stat().st_size
    (copy.folder / "experiment.yaml").unlink()
    with pytest.raises(UserError, match=r"no experiment\.yaml"):
        script(copy.folder)
    with pytest.raises(UserError, match="either a run folder or --config_path"):
        script()


# The page in a browser


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        opened.look()
        yield opened


@pytest.fixture
def opened(chromium, page):
    chromium.open(page)
    yield chromium
    assert [address for address in chromium.requests() if address != page.resolve().as_uri()] == []
    assert chromium.complaints() == []


def column(chromium, number: int) -> list[str]:
    return chromium.run(
        f"[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[{number}].textContent)"
    )


def found(chromium) -> str:
    return chromium.run("document.getElementById('found').value")


GIVE = "{{ const e = document.getElementById('{}'); e.value = {}; e.dispatchEvent(new Event('input')); }}"


def give(chromium, element: str, value: str) -> None:
    """As a user's input does."""
    chromium.run(GIVE.format(element, json.dumps(value)))


def show_figures(chromium, count: int) -> None:
    """Scroll past every figure; wait until all are live."""
    for _ in range(200):
        live = chromium.run(
            "(() => { for (const e of document.querySelectorAll('.chart')) if (!e.querySelector('.chart > div')) "
            "{ e.scrollIntoView(); break; } return document.querySelectorAll('.chart > div svg').length; })()"
        )
        if live == count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{live} of {count} figures live")


@in_chromium
def test_figures_become_live_and_keep_to_the_page(opened):
    show_figures(opened, 4)


@in_chromium
def test_every_column_sorts_both_ways(opened, page):
    data = data_of(page.read_text(encoding="utf-8"))
    rows, coreset = data["rows"], data["coresets"][0]
    stratum = [None if s < 0 else s for s in coreset["stratum"]]
    values = {name: rows[name] for name in ("row", "prompt", "response", "effort", "target", "length")}
    values |= {"stratum": stratum, "ratio": [None if s is None else coreset["ratio"][s] for s in stratum]}
    values |= {name: [data["groups"][g][name] for g in coreset["group"]] for name in ("chosen", "reason")}
    for name, of in values.items():
        for direction in (1, -1) if name != "row" else (-1, 1):  # it comes sorted by row
            opened.run(f"document.querySelector('th[data-column={name}] button').click()")
            known = sorted((i for i, v in enumerate(of) if v is not None), key=lambda i: of[i], reverse=direction < 0)
            order = known + [i for i, v in enumerate(of) if v is None]
            if direction < 0:  # equal ones stay in the order of rows
                order = sorted(known, key=lambda i: i)
                order.sort(key=lambda i: of[i], reverse=True)
                order += [i for i, v in enumerate(of) if v is None]
            assert column(opened, 0) == [str(rows["row"][i]) for i in order[:50]], (name, direction)
            sorted_by = opened.run(f"document.querySelector('th[data-column={name}]').ariaSort")
            assert sorted_by == {1: "ascending", -1: "descending"}[direction]


@in_chromium
def test_search_filters_and_pages(opened, page):
    data = data_of(page.read_text(encoding="utf-8"))
    rows, coreset = data["rows"], data["coresets"][0]
    texts = [
        f"{row}\n{p}\n{r}".lower() for row, p, r in zip(rows["row"], rows["prompt"], rows["response"], strict=True)
    ]
    assert found(opened) == "152 of 152 rows"
    give(opened, "search", "Kinase Gene")
    matching = sum("kinase gene" in text for text in texts)
    assert 0 < matching < 152 and found(opened) == f"{matching} of 152 rows"
    give(opened, "search", "")
    give(opened, "which", "1")
    assert found(opened) == "30 of 152 rows" and set(column(opened, 8)) == {"yes"}
    chosen = [i for i, g in enumerate(coreset["group"]) if data["groups"][g]["chosen"]]
    assert column(opened, 0) == [str(rows["row"][i]) for i in chosen]
    give(opened, "stratum", "2")
    assert set(column(opened, 6)) == {"2"} and len(column(opened, 0)) == sum(coreset["stratum"][i] == 2 for i in chosen)
    give(opened, "which", "0")
    give(opened, "stratum", "none")
    hardest = [i for i, s in enumerate(coreset["stratum"]) if s < 0]
    assert found(opened) == f"{len(hardest)} of 152 rows" and set(column(opened, 6)) == {"–"}
    give(opened, "which", "")
    give(opened, "stratum", "")
    seen = []
    for _ in range(4):
        seen += column(opened, 0)
        opened.run("document.getElementById('next').click()")
    assert seen == [str(row) for row in rows["row"]]
    assert opened.run("document.getElementById('page').textContent") == "page 4 of 4"
    assert opened.run("document.getElementById('next').disabled")


@in_chromium
def test_another_coreset_changes_head_table_strata_and_figures(opened, page):
    show_figures(opened, 4)
    before = opened.run("document.querySelector('#figure-scores svg').outerHTML")
    opened.run(GIVE.format("coreset", "'random-0.5'").replace("input", "change"))
    assert opened.run(
        "[...document.querySelectorAll('h1')].filter((h) => h.offsetParent).map((h) => h.textContent)[0]"
    ).startswith("75 of 152 rows random-0.5")
    give(opened, "which", "1")
    assert found(opened) == "75 of 152 rows"
    assert set(column(opened, 9)) == {"chosen by random"}
    shown = opened.run(
        "[...document.querySelectorAll('#scores > details')].filter((e)=>e.offsetParent).map((e) => e.dataset.coreset)"
    )
    assert shown == ["random-0.5"]
    for _ in range(100):
        if opened.run("document.querySelector('#figure-scores svg').outerHTML") != before:
            break
        time.sleep(0.05)
    assert opened.run("document.querySelector('#figure-scores svg').outerHTML") != before
    points = "[...document.querySelectorAll('#figure-length .mark-symbol.role-mark path')]"
    assert opened.run(f"{points}.filter((e) => e.getAttribute('fill') === 'var(--chosen)').length") == 75


@in_chromium
def test_a_click_on_a_point_finds_its_row(opened):
    show_figures(opened, 4)
    opened.run("document.getElementById('figure-length').scrollIntoView()")
    place = opened.run(
        "(() => { const point = document.querySelector('#figure-length .mark-symbol.role-mark path'); "
        "const r = point.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        opened.call("Input.dispatchMouseEvent", type=kind, **at)
    token, row = opened.run("document.getElementById('search').value").split(":")
    assert token == "row" and column(opened, 0) == [row]
    assert opened.run("document.querySelectorAll('#table tr.marked').length") == 1


@in_chromium
def test_a_row_is_found_by_its_number_alone(opened, page):
    rows = data_of(page.read_text(encoding="utf-8"))["rows"]["row"]
    row = next(row for row in rows if sum(str(row) in str(other) for other in rows) > 2)  # 5 is in 15 too
    give(opened, "search", f"Row: {row} ")
    assert column(opened, 0) == [str(row)] and found(opened) == "1 of 152 rows"
    assert opened.run("document.querySelector('#table tbody tr').classList.contains('marked')")
    give(opened, "search", "row:99999")
    assert column(opened, 0) == []
    give(opened, "search", "")
    assert found(opened) == "152 of 152 rows" and not opened.run("document.querySelector('tr.marked')")


def equal(values: np.ndarray) -> np.ndarray:
    return np.zeros_like(values) + values[0]


def equal_but_the_hardest(values: np.ndarray) -> np.ndarray:
    values = equal(values)
    values[-1] *= 9
    return values


FLAT = {
    "all equal": (60, equal, {}),
    "equal but the hardest": (60, equal_but_the_hardest, {}),
    "one row verified": (60, lambda values: values, {"num_strata": 1, "verify_per_stratum": 1}),
    "eight rows": (8, lambda values: values, {"num_strata": 1, "verify_per_stratum": 1}),
    "two rows": (3, lambda values: values, {}),
}


@pytest.mark.parametrize("case", FLAT)
def test_scores_that_span_nothing_are_drawn(tmp_path, case):
    num_rows, like, selection = FLAT[case]
    experiment = make_run(tmp_path, num_rows, (), like, **{"rates": [0.5], "methods": ["staff"]} | selection)
    data = data_of(report_page.write_report(experiment).read_text(encoding="utf-8"))
    figures, [shown], _ = report_page.read_run(experiment)
    bars, (*strata, last) = data["coresets"][0]["data"], data["coresets"][0]["data"]["strata"]
    assert sum(b["rows"] for b in bars["bins"]) == len(figures.row)
    assert sum(b["rows"] for b in bars["budgets"]) == sum(s["size"] for s in shown.strata)
    assert all(s["low"] < s["high"] for s in (*strata, last))
    assert all(b["high"] <= last["high"] + 1e-9 for b in bars["bins"] if b["status"] != "hardest, dropped")
    [cut] = bars["cut"]
    assert (cut["high"] > cut["low"]) == (figures.effort.max() > shown.strata[-1]["high"])


@in_chromium
def test_equal_scores_leave_the_console_empty(chromium, tmp_path):
    page = report_page.write_report(make_run(tmp_path, 60, (), equal, rates=[0.2], methods=["staff"]))
    chromium.open(page)
    show_figures(chromium, 3)  # equal features make no map
    assert chromium.complaints() == []


@in_chromium
def test_of_one_verified_row_the_interval_is_not_known_and_the_console_stays_empty(chromium, tmp_path):
    page = report_page.write_report(make_run(tmp_path, 60, (), verify_per_stratum=1, rates=[0.2], methods=["staff"]))
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>\d+</td>(.*?)</tr>", re.search('<div class="wide strata">.*?</table>', text, re.S)[0])
    cells = [re.findall("<td>([^<]*)", row) for row in rows]
    assert {verified for _, _, _, verified, *_ in cells} == {"1"}
    for _, _, size, _, ratio, interval, *_ in cells:
        assert interval == (f"{ratio} to {ratio}" if size == "1" else "not known")
    unknown = sum(interval == "not known" for _, _, _, _, _, interval, *_ in cells)
    assert unknown > 0
    assert "fewer than 5 verified rows" in text and "are not in this run" not in text
    chromium.open(page)
    show_figures(chromium, 4)
    assert chromium.complaints() == []
    points = "[...document.querySelectorAll('#figure-scores .mark-symbol.role-mark path')]"
    assert (
        chromium.run(f"{points}.map((e) => e.ariaLabel).filter((e) => e.includes('95 % interval: not known')).length")
        == unknown
    )


@in_chromium
def test_the_configuration_is_folded_on_screen_and_stands_on_paper(chromium, page):
    height = "document.querySelector('#settings pre').checkVisibility({contentVisibilityAuto: true})"
    seen = []
    for scripts, media in ((True, "screen"), (True, "print"), (False, "screen")):
        chromium.look(media=media)
        chromium.open(page, scripts=scripts)
        seen.append(chromium.run(height))
    chromium.look()
    assert seen == [False, True, True]


@in_chromium
def test_text_of_strangers_stays_text(opened, page):
    give(opened, "search", "onerror")
    shown = opened.run("document.querySelector('#table tbody td.text').textContent")
    assert shown == HOSTILE_PROMPT
    assert column(opened, 2) == [HOSTILE["output"]]
    give(opened, "search", "{{ 7 * 7 }}")
    assert found(opened) == "1 of 152 rows"
    assert opened.run("document.querySelectorAll('img, #table svg').length") == 0
    assert "hit" not in opened.run("document.title")


@in_chromium
def test_long_texts_open_on_a_click(opened, page):
    rows = data_of(page.read_text(encoding="utf-8"))["rows"]
    at = next(i for i, text in enumerate(rows["response"][:50]) if len(text) > 200)
    cell = f"document.querySelectorAll('#table tbody tr')[{at}].cells[2]"
    assert opened.run(f"{cell}.querySelector('div').checkVisibility()") is False
    opened.run(f"{cell}.querySelector('summary').click()")
    assert opened.run(f"{cell}.querySelector('div').checkVisibility()") is True
    assert opened.run(f"{cell}.querySelector('div').textContent") == rows["response"][at]


@in_chromium
def test_without_scripts_the_page_reads(chromium, page):
    chromium.open(page, scripts=False)
    visible = "(e) => e.checkVisibility() && e.getBoundingClientRect().height > 0"
    assert chromium.run(f"[...document.querySelectorAll('.chart > svg')].filter({visible}).length") == 4
    assert chromium.run(f"[...document.querySelectorAll('.scripted')].filter({visible}).length") == 0
    said = chromium.run(
        f"[...document.querySelectorAll('.unscripted')].filter({visible}).map((e) => e.textContent).join(' ')"
    )
    assert "Shown here are 100" in said and "staff-0.2 (30 rows), staff-0.5 (75 rows)" in said
    assert chromium.run(f"[...document.querySelectorAll('h1')].filter({visible}).length") == 1
    assert len(column(chromium, 0)) == 100
    assert column(chromium, 8) == ["yes"] * 30 + ["no"] * 70


@in_chromium
def test_light_and_dark(chromium, page):
    chromium.open(page)
    colours = []
    for scheme in ("light", "dark"):
        chromium.look(scheme=scheme)
        axis = "getComputedStyle(document.querySelector('.chart svg text')).fill"
        colours.append((chromium.run("getComputedStyle(document.body).backgroundColor"), chromium.run(axis)))
    chromium.look()
    brightness = [[sum(map(int, re.findall(r"\d+", each)[:3])) for each in pair] for pair in colours]
    assert brightness[0][0] > brightness[0][1] + 500 and brightness[1][1] > brightness[1][0] + 500


@in_chromium
def test_twenty_thousand_rows_load_and_react(chromium, tmp_path):
    experiment = make_run(tmp_path, 25_100, (), rates=[0.1], methods=["staff"])
    page = report_page.write_report(experiment)
    assert page.stat().st_size < 25e6
    assert chromium.open(page) < 15  # seconds; 1 to 6 seen
    assert found(chromium) == "20,000 of 20,000 rows"
    for script in (
        "document.querySelector('th[data-column=response] button').click()",
        GIVE.format("search", "'kinase gene'"),
    ):
        assert (
            chromium.run(f"(() => {{ const t = performance.now(); {script}; return performance.now() - t; }})()") < 3000
        )
    assert chromium.complaints() == []
