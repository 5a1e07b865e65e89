"""Prepare the data sets: rebuild or check the two committed slices, or fetch the paper's own data.

    python scripts/prepare_data.py go_biology --check    # the committed slice against its Debian package
    python scripts/prepare_data.py kazakh_english --source libreoffice-l10n-kk_7.4.7.deb
    python scripts/prepare_data.py bioinstruct           # from the Hugging Face hub
    python scripts/prepare_data.py wmt19_kk_en --source ~/wmt19    # local files named after their splits

Needs apt-get, the hub or --source. go_biology and kazakh_english are taken out of the Debian packages r-bioc-go.db and
libreoffice-l10n-kk (`apt-get download` without --source) and written to data/NAME.jsonl, a seeded sample of all rows
that pass the selection. bioinstruct, dialogsum and wmt19_kk_en are the paper's data, all official splits pooled in the
order train, validation, test, and go to data/prepared/NAME.jsonl.

Every file has one JSON object a line with the keys id, instruction, input, output (alpaca form). The prompt wording is
ours except for BioInstruct, whose rows carry their own instruction. Licences: data/README.md.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

import contextlib
import gettext
import itertools
import json
import random
import re
import sqlite3
import struct
import subprocess
import tempfile
from collections.abc import Iterator

from selection.run.cli import argument_parser, run_stage
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.products import atomic_path

DATA = Path(__file__).resolve().parents[1] / "data"
Row = dict[str, str]  # the keys of alpaca_row

FULL_ROWS = {  # rows that pass the selection; for the paper's data, its published counts
    "go_biology": 23_011,
    "kazakh_english": 6_280,
    "bioinstruct": 25_005,
    "dialogsum": 14_460,
    "wmt19_kk_en": 128_649,
}

PACKAGES = {  # name -> Debian package, and the version of it that the committed slice was made from
    "go_biology": ("r-bioc-go.db", "3.16.0-1"),
    "kazakh_english": ("libreoffice-l10n-kk", "4:7.4.7-1+deb12u14"),
}
GO_SQLITE = "usr/lib/R/site-library/GO.db/extdata/GO.sqlite"
KK_CATALOGUES = "usr/lib/libreoffice/program/resource/kk/LC_MESSAGES"
SLICE_ROWS, SLICE_SEED = 3_000, 42  # of each committed file, which stays below 1,000,000 bytes
GO_WORDS, KK_WORDS = (6, 60), (4, 40)
ONTOLOGIES = {"BP": "biological process", "MF": "molecular function", "CC": "cellular component"}
GO_BOILERPLATE = (  # thousands of definitions that differ only in the term they repeat
    "Any process that modulates",
    "Any process that stops",
    "Any process that activates",
    "Any process that increases",
    "Catalysis of the reaction",
)

HUB = {  # name -> arguments of datasets.load_dataset
    "bioinstruct": ("bio-nlp-umass/bioinstruct",),
    "dialogsum": ("knkarthick/dialogsum",),
    "wmt19_kk_en": ("wmt/wmt19", "kk-en"),
}
COLUMNS = {
    "bioinstruct": ("instruction", "input", "output"),
    "dialogsum": ("dialogue", "summary"),
    "wmt19_kk_en": ("translation",),  # {"kk": text, "en": text}
}
SPLITS = ("train", "validation", "test")  # the order of pooling
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def alpaca_row(row_id: str, instruction: str, source: str, output: str) -> Row:
    return {"id": row_id, "instruction": instruction, "input": source, "output": output}


def to_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


# The two slices out of Debian packages


def call(command: list[str], folder: Path) -> None:
    """Runs a packaging tool in `folder`; its failure is the user's to mend."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine; give --source the folder of an unpacked package"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"`{' '.join(command)}` failed ({reason}); give --source a whole .deb file or the folder of an unpacked one"
        ) from None


@contextlib.contextmanager
def unpacked(package: str, source: Path | None) -> Iterator[Path]:
    """The folder with the package's files: `source` itself, or its .deb (or a fresh download) unpacked."""
    if source is not None and not source.exists():
        raise UserError(f"--source {source} does not exist; give a .deb file or the folder of an unpacked one")
    if source is not None and source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if source is None:
            call(["apt-get", "download", package], folder)
            source = next(folder.glob("*.deb"), folder / f"{package}.deb")
        call(["dpkg", "-x", str(source.resolve()), "root"], folder)
        yield folder / "root"


def words_within(text: str, bounds: tuple[int, int]) -> bool:
    """Whether the number of words (parts between white space) is within the bounds, both inclusive."""
    return bounds[0] <= len(text.split()) <= bounds[1]


def without_duplicates(rows: list[Row]) -> list[Row]:
    """The first row of each (instruction, input, output)."""
    first = {}
    for row in rows:
        first.setdefault((row["instruction"], row["input"], row["output"]), row)
    return list(first.values())


def draw_slice(rows: list[Row]) -> list[Row]:
    """At most SLICE_ROWS of the rows, ordered by id; which ones does not depend on the order of `rows`."""
    by_id = {row["id"]: row for row in rows}
    chosen = random.Random(SLICE_SEED).sample(sorted(by_id), min(SLICE_ROWS, len(by_id)))
    return [by_id[row_id] for row_id in sorted(chosen)]


def go_rows(package: Path) -> list[Row]:
    """Terms of the Gene Ontology and their definitions, from table go_term of the package's GO.sqlite.

    Kept: definitions of 6 to 60 words that do not begin like GO_BOILERPLATE, unchanged.
    """
    path = package / GO_SQLITE
    if not path.is_file():
        raise UserError(f"the package has no {GO_SQLITE}; give --source an r-bioc-go.db package")
    query = "SELECT go_id, term, ontology, definition FROM go_term WHERE definition IS NOT NULL ORDER BY go_id"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            terms = database.execute(query).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path} is no readable GO.db database ({error}); take the package afresh") from None
    rows = [
        alpaca_row(go_id, f'Explain the {ONTOLOGIES[ontology]} "{term}".', "", definition)
        for go_id, term, ontology, definition in terms
        if ontology in ONTOLOGIES and words_within(definition, GO_WORDS) and not definition.startswith(GO_BOILERPLATE)
    ]
    return without_duplicates(rows)


def read_catalogue(path: Path) -> dict[str, str]:
    """The messages of a .mo file, context + "\\x04" + English -> Kazakh, without those that have a plural."""
    try:
        with path.open("rb") as handle:
            # gettext has no public way to list a catalogue; this attribute has been there since Python 2
            catalogue = gettext.GNUTranslations(handle)._catalog
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise UserError(f"{path} is no readable .mo file ({error}); take the package afresh") from None
    return {key: text for key, text in catalogue.items() if isinstance(key, str)}  # a tuple: a plural form


def kk_rows(package: Path) -> list[Row]:
    """Kazakh -> English pairs of LibreOffice's user interface, from the package's .mo files.

    Kept: both sides 4 to 40 words, no "<" (mark-up) in either, really translated (the sides differ).
    Taken off: the context before \\x04, the accelerator marks "~" and "_", white space at the ends. An id is
    the module and a running number over its kept pairs in the order of context and English.
    """
    paths = sorted((package / KK_CATALOGUES).glob("*.mo"))
    if not paths:
        raise UserError(f"the package has no {KK_CATALOGUES}/*.mo; give --source a libreoffice-l10n-kk one")
    rows = []
    for path in paths:
        for key, text in sorted(read_catalogue(path).items()):
            message = key.rpartition("\x04")[2]
            english, kazakh = (re.sub("[~_]", "", side).strip() for side in (message, text))
            good_length = words_within(english, KK_WORDS) and words_within(kazakh, KK_WORDS)
            if good_length and "<" not in english + kazakh and english != kazakh:
                instruction = "Translate the following Kazakh text into English."
                rows.append(alpaca_row(path.stem, instruction, kazakh, english))
    rows = without_duplicates(rows)  # before the numbering, so that no number is missing
    for module, group in itertools.groupby(rows, key=lambda row: row["id"]):
        for number, row in enumerate(group, start=1):
            row["id"] = f"{module}:{number:04d}"
    return rows


def check_slice(rows: list[Row], path: Path) -> None:
    """Raises: UserError naming the first line in which the file differs from the rows."""
    try:
        stored = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); call this without --check to write it") from None
    pairs = itertools.zip_longest(stored, rows)  # None beyond the end of the shorter one
    for number, (line, row) in enumerate(pairs, start=1):
        if row is None or line != to_line(row):
            wanted = f"{row['id']} belongs there" if row else f"the source gives {len(rows):,} rows"
            raise UserError(
                f"{path} differs from its source first in row {number} ({wanted}); "
                f"call this without --check to write it anew"
            )


# The paper's data


def load_hub(name: str) -> list:
    """The official splits from the Hugging Face hub: (split, dataset) pairs in the order of SPLITS."""
    import datasets  # only here: it takes seconds, and the two slices do not need it

    try:
        loaded = datasets.load_dataset(*HUB[name])
    except Exception as error:  # the hub's client raises its own kinds; whichever it is, --source helps
        raise UserError(
            f"the hub is not reachable or does not give {' '.join(HUB[name])} "
            f"({type(error).__name__}: {error}); fetch its files elsewhere and give their folder to --source"
        ) from None
    return [(split, loaded[split]) for split in SPLITS if split in loaded]


def load_folder(folder: Path, cache: str) -> list:
    """The files of `folder` that are named after a split: (path, dataset) pairs in the order of SPLITS."""
    import datasets

    if not folder.is_dir():
        raise UserError(f"--source {folder} is no folder; give one with files named after {', '.join(SPLITS)}")
    found = []
    for path in folder.iterdir():
        splits = [number for number, split in enumerate(SPLITS) if split in path.name.lower()]
        if not splits or path.suffix.lower() not in BUILDERS:
            continue
        if len(splits) > 1:
            raise UserError(f"{path} has the names of two splits in its name; rename it")
        found.append((splits[0], path))
    if not found:
        raise UserError(
            f"{folder} holds no {', '.join(BUILDERS)} file with {', '.join(SPLITS)} in its name; "
            f"give --source another folder or rename the files"
        )
    datasets.disable_progress_bars()
    parts = []
    for _, path in sorted(found):
        builder = BUILDERS[path.suffix.lower()]
        options = {"keep_default_na": False} if builder == "csv" else {}  # "" and "None" are text there
        try:
            part = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=cache, **options)
        except Exception as error:  # whatever a damaged file makes the parsers raise
            reason = error.__cause__ or error
            raise UserError(f"{path} cannot be read as {builder} ({reason}); mend or replace it") from None
        parts.append((path, part))
    return parts


def to_alpaca(name: str, sample: dict) -> tuple[object, object, object]:
    """Instruction, input and output of one sample as the data set has it; not yet checked to be text."""
    if name == "bioinstruct":
        source = "" if sample["input"] is None else sample["input"]  # many tasks need no input
        return sample["instruction"], source, sample["output"]
    if name == "dialogsum":
        return "Summarize the following dialogue.", sample["dialogue"], sample["summary"]
    pair = sample["translation"] if isinstance(sample["translation"], dict) else {}
    return "Translate the following Kazakh sentence into English.", pair.get("kk"), pair.get("en")


def pool_rows(name: str, parts: list) -> list[Row]:
    """The datasets of all (label, dataset) pairs as alpaca rows; ids count the pooled rows from 0.

    Raises: UserError where a column is missing, a field is not text, or a response is empty: such a row
    cannot just be dropped, since the published counts include every row.
    """
    rows, bad = [], []
    for label, part in parts:
        missing = [column for column in COLUMNS[name] if column not in part.column_names]
        if missing:
            raise UserError(
                f"{name}, {label}: column {', '.join(missing)} is missing (there are "
                f"{', '.join(part.column_names)}); name the columns as the hub: {', '.join(COLUMNS[name])}"
            )
        for sample in part:
            fields = to_alpaca(name, sample)
            if not all(isinstance(field, str) for field in fields) or not fields[2].strip():
                bad.append(str(len(rows)))
            rows.append(alpaca_row(f"{name}:{len(rows)}", *fields))
    if bad:
        raise UserError(
            f"{name}: {len(bad):,} rows have an empty response or a field that is not text; first rows: "
            f"{', '.join(bad[:3])} (counted from 0 over the pooled splits); mend them in local files and "
            f"give their folder to --source"
        )
    return rows


def build(name: str, source: Path | None) -> list[Row]:
    """All rows of a data set, before a slice is drawn."""
    if name in PACKAGES:
        with unpacked(PACKAGES[name][0], source) as package:
            return go_rows(package) if name == "go_biology" else kk_rows(package)
    if source is None:
        return pool_rows(name, load_hub(name))
    with tempfile.TemporaryDirectory() as cache:  # the user's own cache would keep copies of these files
        return pool_rows(name, load_folder(source, cache))


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("name", metavar="NAME", choices=FULL_ROWS, help=", ".join(FULL_ROWS) + "; required")
    parser.add_argument(
        "--source", type=Path, help="a .deb file or unpacked folder; a folder of data files; default: fetched"
    )
    parser.add_argument("--out", type=Path, help="file to write; default: data/[prepared/]NAME.jsonl")
    parser.add_argument("--check", action="store_true", help="write nothing, compare a slice with its source")
    parser.add_argument("--any_count", action="store_true", help="take a source with another number of rows")
    options = parser.parse_args(argv)

    name, is_slice = options.name, options.name in PACKAGES
    out = options.out or (DATA if is_slice else DATA / "prepared") / f"{name}.jsonl"
    if options.check and not is_slice:
        raise UserError(f"--check is for the committed slices ({', '.join(PACKAGES)}); leave it out for {name}")

    rows = build(name, options.source)
    if len(rows) != FULL_ROWS[name] and not options.any_count:
        reference = " ".join(PACKAGES[name]) if is_slice else "the published data set"
        raise UserError(
            f"{name}: the source gives {len(rows):,} rows, but {reference} has {FULL_ROWS[name]:,}; "
            f"take that one, or accept any number with --any_count"
        )
    pool = len(rows)
    if is_slice:
        rows = draw_slice(rows)
    say(f"{name}: {pool:,} rows in the source, {len(rows):,} of them belong in {out}")
    if options.check:
        check_slice(rows, out)
        print("the file has exactly these rows")
        return
    with atomic_path(out) as draft:
        draft.write_text("".join(to_line(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    print(f"written: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_stage(main)
