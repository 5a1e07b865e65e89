"""Prepare the data sets: rebuild or check the two committed slices, or fetch the paper's own data.

    python scripts/prepare_data.py go_biology --check    # the committed slice against its Debian package
    python scripts/prepare_data.py kazakh_english --source libreoffice-l10n-kk_7.4.7.deb
    python scripts/prepare_data.py bioinstruct           # from the Hugging Face hub
    python scripts/prepare_data.py wmt19_kk_en --source ~/wmt19    # local files named after their splits

Needs apt-get, the hub or --source. Writes JSON Lines with the keys id, instruction, input and output: a seeded sample
of go_biology and kazakh_english to data/NAME.jsonl; all of bioinstruct, dialogsum and wmt19_kk_en (the paper's data,
pooled in the order train, validation, test) to data/prepared/NAME.jsonl. Selection, prompts, licences: data/README.md.
"""

import contextlib
import gettext
import itertools
import json
import random
import re
import shlex
import sqlite3
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import pandas as pd

from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.products import atomic_path

FULL_ROWS = {"go_biology": 23_011, "kazakh_english": 6_280}  # that pass the selection, before a sample is drawn
FULL_ROWS |= {"bioinstruct": 25_005, "dialogsum": 14_460, "wmt19_kk_en": 128_649}  # as published
PACKAGES = {  # name -> Debian package, and the version of it that the committed slice was made from
    "go_biology": ("r-bioc-go.db", "3.16.0-1"),
    "kazakh_english": ("libreoffice-l10n-kk", "4:7.4.7-1+deb12u14"),
}
GO_SQLITE = "usr/lib/R/site-library/GO.db/extdata/GO.sqlite"
KK_CATALOGUES = "usr/lib/libreoffice/program/resource/kk/LC_MESSAGES"
SLICE_ROWS, SLICE_SEED = 3_000, 42
GO_WORDS, KK_WORDS = range(6, 61), range(4, 41)  # how many words a kept text may have
ONTOLOGIES = {"BP": "biological process", "MF": "molecular function", "CC": "cellular component"}
# Thousands of definitions differ only in the term that they repeat.
GO_BOILERPLATE = re.compile("Any process that (modulates|stops|activates|increases)|Catalysis of the reaction")
_TRANSLATE = "Translate the following Kazakh sentence into English."
HUB = {  # name -> arguments of datasets.load_dataset; instruction (None: a column); columns of input and output
    "bioinstruct": (("bio-nlp-umass/bioinstruct",), None, "input", "output"),
    "dialogsum": (("knkarthick/dialogsum",), "Summarize the following dialogue.", "dialogue", "summary"),
    "wmt19_kk_en": (("wmt/wmt19", "kk-en"), _TRANSLATE, "translation.kk", "translation.en"),  # a dict by language
}
SPLITS = ("train", "validation", "test")  # the order of pooling

Row = tuple[str, str, str, str]  # id, instruction, input, output


def to_line(row: Row) -> str:
    return json.dumps(dict(zip(("id", "instruction", "input", "output"), row, strict=True)), ensure_ascii=False)


@contextlib.contextmanager
def unpacked(package: str, source: Path | None) -> Iterator[Path]:
    """The folder with the package's files: `source` itself, or its .deb (or a fresh download) unpacked."""
    if source is not None and source.is_dir():
        yield source
        return
    command = f"apt-get download {package} && dpkg -x *.deb root"
    if source is not None:
        command = f"dpkg -x {shlex.quote(str(source.resolve()))} root"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"`{command}` failed ({reason}): give --source a whole .deb or an unpacked one")
        yield Path(folder, "root")


def without_duplicates(rows: list[Row]) -> list[Row]:
    """The first row of each (instruction, input, output)."""
    return list(pd.DataFrame(rows, columns=range(4)).drop_duplicates([1, 2, 3]).itertuples(index=False, name=None))


def draw_slice(rows: list[Row]) -> list[Row]:
    """At most SLICE_ROWS of the rows, ordered by id; which ones does not depend on the order of `rows`."""
    return sorted(random.Random(SLICE_SEED).sample(sorted(rows), min(SLICE_ROWS, len(rows))))


def go_rows(package: Path) -> list[Row]:
    """Terms of the Gene Ontology with their definitions, except those that begin like GO_BOILERPLATE."""
    path = package / GO_SQLITE
    if not path.is_file():
        raise UserError(f"the package has no {GO_SQLITE}: give --source an r-bioc-go.db package")
    query = "SELECT go_id, term, ontology, definition FROM go_term WHERE definition IS NOT NULL ORDER BY go_id"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            terms = database.execute(query).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path} is no readable GO.db database ({error}): take the package afresh") from None
    rows = []
    for go_id, term, ontology, text in terms:
        if ontology in ONTOLOGIES and len(text.split()) in GO_WORDS and not GO_BOILERPLATE.match(text):
            rows.append((go_id, f'Explain the {ONTOLOGIES[ontology]} "{term}".', "", text))
    return without_duplicates(rows)


def kk_rows(package: Path) -> list[Row]:
    """Kazakh -> English pairs of LibreOffice's user interface, without mark-up, plural forms and untranslated ones.

    Removes the context before \\x04, the accelerator marks "~" and "_", and white space at the ends. An id is the
    module and a running number over its kept pairs, ordered by context and English."""
    paths = sorted((package / KK_CATALOGUES).glob("*.mo"))
    if not paths:
        raise UserError(f"the package has no {KK_CATALOGUES}/*.mo: give --source a libreoffice-l10n-kk one")
    rows = []
    for path in paths:
        try:
            with path.open("rb") as file:
                # gettext has no public way to list a catalogue; this attribute has been there since Python 2
                catalogue = gettext.GNUTranslations(file)._catalog
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise UserError(f"{path} is no readable .mo file ({error}): take the package afresh") from None
        for key in sorted(key for key in catalogue if isinstance(key, str)):  # a tuple: a plural form
            sides = key.rpartition("\x04")[2], catalogue[key]
            english, kazakh = sides = [re.sub("[~_]", "", side).strip() for side in sides]
            good_length = all(len(side.split()) in KK_WORDS for side in sides)
            if good_length and "<" not in english + kazakh and english != kazakh:
                rows.append((path.stem, "Translate the following Kazakh text into English.", kazakh, english))
    modules = itertools.groupby(without_duplicates(rows), key=lambda row: row[0])
    return [(f"{module}:{n:04d}", *row[1:]) for module, group in modules for n, row in enumerate(group, start=1)]


def check_slice(rows: list[Row], path: Path) -> None:
    """Raises: UserError naming the first line in which the file differs from the rows."""
    try:
        stored = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): call this without --check to write it") from None
    for number, (line, row) in enumerate(itertools.zip_longest(stored, rows), start=1):
        if row is None or line != to_line(row):
            wanted = f"{row[0]} belongs there" if row else f"the source gives {len(rows):,} rows"
            raise UserError(f"{path}: row {number} differs from the source ({wanted}): write it without --check")


def paper_rows(name: str, source: Path | None, cache: str) -> list[Row]:
    """The rows of all splits of a data set of the paper, from the hub or from files in folder `source`; ids from 0.

    Raises: UserError where a column is missing, a field is no text, or a response is empty. No row is dropped: the
    published counts include every row."""
    import datasets  # only here: it takes seconds, and the two slices do not need it

    arguments, options = HUB[name][0], {}
    if source is not None:
        datasets.disable_progress_bars()
        arguments, options = (str(source),), {"cache_dir": cache}  # the user's own cache would keep copies
        if any(source.glob("*.csv")):
            options["keep_default_na"] = False  # "" and "None" are text
    try:
        parts = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # the hub's client and the parsers raise errors of many types
        reason, files = error.__cause__ or error, f"JSON, CSV or Parquet files named after {', '.join(SPLITS)}"
        said = f"cannot read {' '.join(arguments)} ({type(reason).__name__}: {reason})"
        raise UserError(f"{said}: give --source a folder of {files}") from None
    _, instruction, *columns = HUB[name]
    columns, tables = columns if instruction else ["instruction", *columns], []
    for split in (split for split in SPLITS if split in parts):
        part = parts[split].flatten()
        if missing := [column for column in columns if column not in part.column_names]:
            raise UserError(f"{name}, {split}: no column {', '.join(missing)}: name them {', '.join(columns)}")
        tables.append(part.to_pandas()[columns])
    table = pd.concat(tables, ignore_index=True)
    if instruction:
        table.insert(0, "instruction", instruction)
    else:  # BioInstruct, where many tasks need no input
        table["input"] = table["input"].fillna("")
    good = table.map(lambda field: isinstance(field, str)).all(axis=1)
    good &= table.iloc[:, -1].astype(str).str.strip() != ""
    if bad := table.index[~good].tolist():
        first = f"first rows: {', '.join(map(str, bad[:3]))} (from 0, over the pooled splits)"
        said = f"{len(bad):,} rows have an empty response or a field that is not text"
        raise UserError(f"{name}: {said}; {first}: mend them in local files (--source)")
    return [(f"{name}:{i}", *texts) for i, texts in enumerate(table.itertuples(index=False, name=None))]


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("name", metavar="NAME", choices=FULL_ROWS, help=", ".join(FULL_ROWS) + "; required")
    source_help = "a .deb file or unpacked folder; a folder of data files; default: fetched"
    parser.add_argument("--source", type=Path, help=source_help)
    parser.add_argument("--out", type=Path, help="file to write; default: data/[prepared/]NAME.jsonl")
    parser.add_argument("--check", action="store_true", help="write nothing, compare a slice with its source")
    parser.add_argument("--any_count", action="store_true", help="take a source with another number of rows")
    options = parser.parse_args(argv)
    name, source, is_slice = options.name, options.source, options.name in PACKAGES
    out = options.out or REPOSITORY / "data" / ("" if is_slice else "prepared") / f"{name}.jsonl"
    if options.check and not is_slice:
        raise UserError(f"--check is for the committed slices ({', '.join(PACKAGES)}): leave it out for {name}")
    if source is not None and not source.exists():
        raise UserError(f"--source {source} does not exist")
    if is_slice:
        with unpacked(PACKAGES[name][0], source) as package:
            pool = go_rows(package) if name == "go_biology" else kk_rows(package)
    else:
        with tempfile.TemporaryDirectory() as cache:
            pool = paper_rows(name, source, cache)
    if len(pool) != FULL_ROWS[name] and not options.any_count:
        reference = " ".join(PACKAGES[name]) if is_slice else "the published data set"
        counts = f"the source gives {len(pool):,} rows, but {reference} has {FULL_ROWS[name]:,}"
        raise UserError(f"{name}: {counts}: take that one, or accept any number with --any_count")
    rows = draw_slice(pool) if is_slice else pool
    say(f"{name}: {len(pool):,} rows in the source, {len(rows):,} of them belong in {out}")
    if options.check:
        check_slice(rows, out)
        print("the file has exactly these rows")
        return
    with atomic_path(out) as draft:
        draft.write_text("".join(to_line(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    print(f"written: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_stage(main)
