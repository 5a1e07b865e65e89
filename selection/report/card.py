"""A run as a data set for the hub: every row and each coreset as Parquet, with a data set card and the report."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from selection.report.annotated import annotated
from selection.report.export import rows_in_order
from selection.report.page import render
from selection.rows.hub import record_of
from selection.rows.split import finished_split
from selection.run.config import Experiment, from_repository
from selection.run.errors import UserError
from selection.run.ledger import selection_costs
from selection.run.products import code_version, read_record, rebuilding

_PLACE = "<this data set or its folder>"
_SHARD = 100_000  # rows of a Parquet file
_OF_A_CORESET = ("stratum", "verification_ratio", "verified", "chosen", "reason")  # the others are every coreset's


def licence_of(experiment: Experiment, given: str | None) -> str:
    """`given`, or what the hub says of all data sets. Raises: UserError where no licence is known."""
    known = {record_of(from_repository(each.path)).get("licence", "") for each in experiment.data_sets}
    if not given and (len(known) > 1 or "" in known):
        raise UserError("--card: the licence of the data is not known: give the hub's id of it, as --licence cc-by-4.0")
    return given or known.pop()


def write_card(experiment: Experiment, coresets: list[Path], folder: Path, licence: str) -> list[str]:
    """A folder ready to push; an earlier one is replaced. Returns a line about each configuration.

    Configuration "full" has every row, as it was, with `annotated`'s columns (staff_…, and <coreset>_… for what differs
    between coresets); each coreset's has the rows it chose. Split "test" of all is what was held out.
    Raises: UserError where `folder` is something else."""
    split = finished_split(experiment)
    figures = _figures([(path.stem, annotated(experiment, path, split)) for path in coresets])
    rows = rows_in_order(experiment, split)
    if taken := sorted(set(figures.column_names) & set(rows.column_names)):
        raise UserError(f"the data have a column {taken[0]} already, which the card writes: rename it in the data")
    if folder.exists() and "card_of" not in (read_record(r) if (r := folder / "made_from.json").exists() else {}):
        raise UserError(f"{folder} is no card of a run: remove it or give another --out")
    train = np.array(figures["staff_split"].to_pylist()) == "train"
    parts = {"full/train": train, "full/test": ~train}
    parts |= {f"{p.stem}/train": figures[f"{p.stem}_chosen"].to_numpy(zero_copy_only=False) for p in coresets}
    with rebuilding(folder, {"card_of": experiment.folder.name, "code_version": code_version()}) as draft:
        for name, wanted in parts.items():
            _write_shards(draft / "data" / name, rows, figures, np.flatnonzero(wanted))
        counts = {name: int(wanted.sum()) for name, wanted in parts.items() if wanted.any()}
        _card(experiment, coresets, counts, licence).save(draft / "README.md")
        (draft / "report.html").write_text(render(experiment), encoding="utf-8")
    return [f"{name}: {count} rows" for name, count in counts.items()]


def _figures(of_each: list[tuple[str, pa.Table]]) -> pa.Table:
    first = of_each[0][1]
    columns = {f"staff_{name}": first[name] for name in first.column_names if name not in _OF_A_CORESET}
    return pa.table(columns | {f"{name}_{key}": table[key] for name, table in of_each for key in _OF_A_CORESET})


def _write_shards(path: Path, rows: "datasets.Dataset", figures: pa.Table, numbers: np.ndarray) -> None:  # noqa: F821
    """Write <path>-00000-of-N.parquet and so on; nothing where there is no row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.unify_schemas([rows.features.arrow_schema, figures.schema])
    shards = [numbers[start : start + _SHARD] for start in range(0, len(numbers), _SHARD)]
    for number, shard in enumerate(shards):
        own = rows.select(shard)[:].combine_chunks()
        table = pa.table([*own.columns, *figures.take(shard).columns], schema=schema)
        pa.parquet.write_table(table, path.with_name(f"{path.name}-{number:05d}-of-{len(shards):05d}.parquet"))


def _card(experiment: Experiment, coresets: list[Path], counts: dict[str, int], licence: str) -> "DatasetCard":  # noqa: F821
    from huggingface_hub import DatasetCard, DatasetCardData

    def files(name: str, split: str) -> list[dict[str, str]]:
        there = f"{name}/{split}" in counts
        return [{"split": split, "path": f"data/{name}/{split}-*.parquet"}] if there else []

    names = ["full", *(path.stem for path in coresets)]
    configs = [{"config_name": name, "data_files": files(name, "train") + files("full", "test")} for name in names]
    configs[0]["default"] = True
    origins = [record_of(from_repository(each.path)) for each in experiment.data_sets]
    data = DatasetCardData(license=licence, tags=["coreset", "data-selection", "staff"], configs=configs)
    if on_hub := [each["given"] for each in origins if "revision" in each]:
        data.source_datasets = [name.partition("#")[0].partition("@")[0].partition(":")[0] for name in on_hub]
    sources = [
        f"{origin['given']}, revision `{origin['revision']}`"
        if "revision" in origin
        else f"{Path(each.path).name}, a file whose origin is not recorded"
        for each, origin in zip(experiment.data_sets, origins, strict=True)
    ]
    small, target = map(_shown, (experiment.small_model, experiment.target_model))
    lines = [
        f"---\n{data.to_yaml()}\n---\n\n# Coresets of {experiment.folder.name}\n",
        "Chosen by the STAFF suite (speculative coreset selection, [arXiv 2410.01296](https://arxiv.org/abs/2410.01296)),",
        f"version {code_version()}; `report.html` shows how.\n",
        f"- Data: {'; '.join(sources)}",
        f"- Small model: {small}; target: {target}; template: {experiment.template}; φ: {experiment.selection.phi}",
        f"- Split: seed {experiment.split_seed}, {counts.get('full/test', 0)} rows held out (split `test`)\n",
        "| configuration | method | rule | rate | rows | seed | selection cost (s) |",
        "|---|---|---|---:|---:|---:|---:|",
        f"| full | all rows | – | 1 | {counts.get('full/train', 0)} | – | – |",
    ]
    for path in coresets:
        about = {} if path.suffix == ".pt" else read_record(path)
        method = about.get("method", "a given list")
        cost = sum(each.seconds for each in selection_costs(experiment, method)) if about else 0
        cells = [path.stem, method, about.get("mode", "–"), about.get("rate", "–"), counts.get(f"{path.stem}/train", 0)]
        lines.append(f"| {' | '.join(map(str, [*cells, about.get('seed', '–'), f'{cost:.1f}' if cost else '–']))} |")
    lines += [
        "\n    from datasets import load_dataset\n",
        f'    rows = load_dataset("{_PLACE}", "{names[-1]}", split="train")\n',
        "Columns of the source are as they were. `staff_effort` and `staff_loss` are the small model's, per row;",
        "`<coreset>_chosen` and `<coreset>_reason` say what was chosen and why, `<coreset>_stratum` and",
        "`<coreset>_verification_ratio` where the row lies in STAFF's strata; null: not known.\n",
    ]
    return DatasetCard("\n".join(lines))


def _shown(model: str) -> str:
    """A hub's name as it is; of a folder of this machine its last part."""
    return from_repository(model).name if from_repository(model).is_dir() else model


def check_login() -> None:
    """Raises: UserError where the user is not logged in to the hub."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--push: you are not logged in to the hub, so nothing is uploaded: call `hf auth login` first")


def push(folder: Path, name: str) -> str:
    """Upload a card's folder as data set `name`, private where it is new; returns its address. Raises: UserError."""
    from huggingface_hub import DatasetCard, HfApi

    check_login()
    api = HfApi()
    try:
        readme = folder / "README.md"
        readme.write_text(readme.read_text(encoding="utf-8").replace(_PLACE, name), encoding="utf-8")
        DatasetCard.load(readme).validate()  # by the hub's own rules
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=name,
            repo_type="dataset",
            commit_message="Coresets by STAFF",
            ignore_patterns=["made_from.json", "checksums.json"],
            delete_patterns=["data/**"],  # shards of an earlier upload, of which there may have been more
        )
    except Exception as error:  # the hub's client raises errors of many types
        raise UserError(f"--push {name}: {error}: the folder is {folder}, nothing else was changed") from None
    return f"https://huggingface.co/datasets/{name}"
