"""scripts/prepare_data.py on small files of the real schemas, and the two committed slices. No network."""

import io
import json
import sqlite3
import struct
from functools import partial
from itertools import accumulate
from pathlib import Path

import datasets
import pandas as pd
import pytest
from conftest import REPOSITORY

from scripts import prepare_data as script
from selection.run.errors import UserError

KEYS = ["id", "instruction", "input", "output"]


@pytest.fixture
def run(tmp_path):
    """Runs main on --source tmp_path/source and gives the rows that it wrote."""

    def run(name: str, *options: str) -> list[dict]:
        out = tmp_path / "out" / f"{name}.jsonl"
        script.main([name, "--source", str(tmp_path / "source"), "--out", str(out), *options])
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    (tmp_path / "source").mkdir()
    return run


WRITE = {
    ".json": partial(pd.DataFrame.to_json, orient="records"),
    ".jsonl": partial(pd.DataFrame.to_json, orient="records", lines=True),
    ".csv": partial(pd.DataFrame.to_csv, index=False),
    ".parquet": pd.DataFrame.to_parquet,
}


def write_mo(path: Path, messages: dict[str, str]) -> None:
    """A gettext catalogue: header, two tables of (length, offset), the texts with a zero after each."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    texts = [text.encode() + b"\0" for text in (*sorted(messages), *(messages[key] for key in sorted(messages)))]
    offsets = accumulate(map(len, texts), initial=28 + 8 * len(texts))
    table = b"".join(struct.pack("<2I", len(text) - 1, offset) for text, offset in zip(texts, offsets, strict=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    path.write_bytes(header + table + b"".join(texts))


def write_go(path: Path, terms: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE go_term (go_id TEXT, term TEXT, ontology TEXT, definition TEXT)")
        database.executemany("INSERT INTO go_term VALUES (?, ?, ?, ?)", terms)
    database.close()


def dialogue(*summaries: str) -> list[dict]:
    return [{"id": "x", "dialogue": f"#Person1#: {text}\n#Person2#: Yes.", "summary": text} for text in summaries]


@pytest.mark.parametrize("ending", WRITE)
def test_splits_are_pooled_in_order(run, tmp_path, monkeypatch, ending):
    for split, text in (("test", "c"), ("validation", "None"), ("train", "a")):
        WRITE[ending](pd.DataFrame(dialogue(text)), tmp_path / "source" / f"{split}-00000{ending}")
    (tmp_path / "source" / "README.md").write_text("no data: train test")
    monkeypatch.setitem(script.FULL_ROWS, "dialogsum", 3)  # the count check stays on
    rows = run("dialogsum")
    assert [row["output"] for row in rows] == ["a", "None", "c"]  # "None" is text, in a .csv too
    assert [row["id"] for row in rows] == ["dialogsum:0", "dialogsum:1", "dialogsum:2"]
    about = "Summarize the following dialogue.", "#Person1#: a\n#Person2#: Yes."
    assert rows[0] == dict(zip(KEYS, ("dialogsum:0", *about, "a"), strict=True))


def test_bioinstruct_keeps_its_own_prompt_and_the_count_is_checked(run, tmp_path):
    rows = [{"instruction": "Name it.", "input": text, "output": "Cell."} for text in ("a cell", None)]
    (tmp_path / "source" / "train.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"2 rows, but the published data set has 25,005: .*--any_count"):
        run("bioinstruct")
    assert not (tmp_path / "out").exists()
    written = run("bioinstruct", "--any_count")
    assert written[0] == {"id": "bioinstruct:0", **rows[0]} and written[1]["input"] == ""


def test_bad_files_are_refused(run, tmp_path):
    for name, rows, message in (
        ("dialogsum", [{"dialogue": "Hi"}], "train: no column summary: name them dialogue, summary"),
        ("dialogsum", dialogue("a", " ", "c", "", "", "d", ""), r"4 rows have an empty response .*: 1, 3, 4 \("),
        ("bioinstruct", [{"instruction": "Do.", "input": "", "output": 5}], "first rows: 0 "),
        ("wmt19_kk_en", [{"translation": {"kk": "a", "ru": "b"}}], "no column translation.en"),
        ("dialogsum", None, r"cannot read .*: give --source a folder of JSON, CSV or Parquet"),
    ):
        (tmp_path / "source" / "train.json").write_text(json.dumps(rows) if rows else '{"dialogue": ')
        with pytest.raises(UserError, match=message):
            run(name, "--any_count")
    assert not (tmp_path / "out").exists()


def test_the_hub(tmp_path, monkeypatch):
    def hub(*arguments):
        if arguments != ("wmt/wmt19", "kk-en"):
            raise ConnectionError("no route\nto the hub")
        pairs = {"validation": {"kk": "", "en": "Blank"}, "train": {"kk": "Сәлем", "en": "Hello"}}
        parts = {split: datasets.Dataset.from_list([{"translation": pair}]) for split, pair in pairs.items()}
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    out, about = tmp_path / "out.jsonl", "Translate the following Kazakh sentence into English."
    script.main(["wmt19_kk_en", "--any_count", "--out", str(out)])
    rows = [list(json.loads(line).values()) for line in out.open(encoding="utf-8")]
    assert rows == [["wmt19_kk_en:0", about, "Сәлем", "Hello"], ["wmt19_kk_en:1", about, "", "Blank"]]
    with pytest.raises(UserError, match=r"cannot read knkarthick/dialogsum \(ConnectionError: no route\s.*--source"):
        script.main(["dialogsum", "--out", str(tmp_path / "none.jsonl")])
    assert not (tmp_path / "none.jsonl").exists()


def words(number: int) -> str:
    return " ".join(f"w{i}" for i in range(number))


def test_go_selection(run, tmp_path):
    terms = [
        ("GO:0000003", "long", "BP", words(60)),
        ("GO:0000002", "short", "MF", words(6)),
        ("GO:0000001", "part", "CC", "A part  of it, it says here."),
        ("GO:0000007", "root", "universal", words(6)),
    ]
    bad = (words(61), words(5), None, "Any process that stops x in a cell.", "Catalysis of the reaction to x.")
    terms += [("GO:0000004", "x", "BP", definition) for definition in bad]
    write_go(tmp_path / "source" / script.GO_SQLITE, terms)
    assert [list(row.values()) for row in run("go_biology", "--any_count")] == [
        ["GO:0000001", 'Explain the cellular component "part".', "", "A part  of it, it says here."],
        ["GO:0000002", 'Explain the molecular function "short".', "", words(6)],
        ["GO:0000003", 'Explain the biological process "long".', "", words(60)],
    ]


def test_kazakh_selection(run, tmp_path):
    folder = tmp_path / "source" / script.KK_CATALOGUES
    messages = {
        "ctx|a\x04Save the ~file as draft ": "Файлды _жоба ретінде сақтау\n",
        "ctx|b\x04Save the file as _draft": "~Файлды жоба ретінде сақтау",  # the same pair again
        "ctx|c\x04One two three": "Бір екі үш төрт",
        "ctx|d\x04One two three four": "Бір екі үш",
        "ctx|e\x04Some <b>bold</b> words here": "Мұнда бірнеше қалың сөз",
        "ctx|f\x04LibreOffice Writer Calc Impress": "LibreOffice Writer Calc Impress",
        "ctx|g\x04%1 page of all\0%1 pages of all": "%1 бет барлығы осы",  # with a plural form
        "No context but four words": "Контекст жоқ төрт сөз",
    }
    write_mo(folder / "sw.mo", messages)
    write_mo(folder / "cui.mo", {"x\x04" + words(40): words(40) + "!", "y\x04" + words(41): "Бір екі үш төрт"})
    rows = run("kazakh_english", "--any_count")
    assert [(row["id"], row["input"], row["output"]) for row in rows] == [
        ("cui:0001", words(40) + "!", words(40)),
        ("sw:0001", "Контекст жоқ төрт сөз", "No context but four words"),
        ("sw:0002", "Файлды жоба ретінде сақтау", "Save the file as draft"),
    ]
    assert {row["instruction"] for row in rows} == {"Translate the following Kazakh text into English."}


def test_check_names_the_first_difference(run, tmp_path):
    terms = [(f"GO:{i:07d}", f"term {i}", "BP", words(6 + i)) for i in range(5)]
    write_go(tmp_path / "source" / script.GO_SQLITE, terms)
    run("go_biology", "--any_count")
    run("go_biology", "--any_count", "--check")
    out = tmp_path / "out" / "go_biology.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    for changed, row in (
        ([*lines[:2], lines[2].replace("w0", "w1"), *lines[3:]], r"row 3 .*\(GO:0000002 belongs there\)"),
        (lines[:4], r"row 5 .*\(GO:0000004 belongs there\)"),
        ([*lines, "\n"], r"row 6 .*\(the source gives 5 rows\)"),
    ):
        out.write_text("".join(changed))
        with pytest.raises(UserError, match=row):
            run("go_biology", "--any_count", "--check")
        assert out.read_text() == "".join(changed)


def test_bad_packages_are_refused(run, tmp_path, monkeypatch):
    for name in script.PACKAGES:
        with pytest.raises(UserError, match="the package has no usr/lib/"):
            run(name)
    go, kk = tmp_path / "source" / script.GO_SQLITE, tmp_path / "source" / script.KK_CATALOGUES / "sw.mo"
    write_go(go, [("GO:0000001", "t", "BP", words(6))])
    with pytest.raises(UserError, match=r"gives 1 rows, but r-bioc-go.db 3.16.0-1 has 23,011"):
        run("go_biology")
    kk.parent.mkdir(parents=True)
    for path in (go, kk, tmp_path / "x y.deb"):
        path.write_bytes(b"neither a database nor a catalogue, but long enough to be looked at" * 20)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, source, said in (
        ("go_biology", "source", "no readable GO.db database"),
        ("kazakh_english", "source", r"sw.mo is no readable .mo file"),
        ("go_biology", "x y.deb", "dpkg -x '.*: give --source"),
        ("dialogsum", "source", "leave it out for dialogsum"),
    ):
        more = ["--check"] if name == "dialogsum" else []
        with pytest.raises(UserError, match=said):
            script.main([name, "--source", str(tmp_path / source), *more])
    with pytest.raises(UserError, match=r"apt-get.*: give --source"):
        script.main(["go_biology"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["go_biology", "kazakh_english"])
def test_committed_slice(name):
    raw = (REPOSITORY / "data" / f"{name}.jsonl").read_bytes()
    rows = pd.read_json(io.BytesIO(raw), lines=True, dtype=str)
    assert len(raw) <= 1_000_000 and list(rows) == KEYS and len(rows) == script.SLICE_ROWS
    assert rows[["instruction", "output"]].map(str.strip).all(axis=None)
    assert rows.id.is_monotonic_increasing and rows.id.is_unique and not rows.duplicated(KEYS[1:]).any()
    page = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    assert f"| `{name}.jsonl` | {len(rows):,} | {len(raw):,} | {script.FULL_ROWS[name]:,} |" in page
    assert all(part in page for part in script.PACKAGES[name])
