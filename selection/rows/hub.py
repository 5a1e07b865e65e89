"""Data sets that are no file: of the model hub, or saved by `datasets`. They become one Parquet file of the run."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selection.run.errors import UserError
from selection.run.log import say, set_library_bars
from selection.run.products import atomic_path, file_digest, read_record, write_json

_HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?:#(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True)
class Source:
    """owner/name[:config][@revision][#split] on the hub, or a folder of save_to_disk[#split]; no split: all, pooled."""

    given: str
    folder: Path | None = None
    name: str = ""
    config: str | None = None
    revision: str | None = None
    split: str | None = None

    @property
    def file_name(self) -> str:
        shown = self.folder.name + f"#{self.split}" * bool(self.split) if self.folder else self.given
        return re.sub(r"[^\w.-]+", "--", shown) + ".parquet"


def find_source(given: str) -> Source | None:
    """What `--data` names, where that is no file; None where it is neither of the two."""
    whole, _, split = given.rpartition("#")
    for folder, of in ((given, None), (whole, split)):
        path = Path(folder or ".").expanduser().resolve()
        if folder and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return Source(f"{path}#{of}" if of else str(path), folder=path, split=of)
    on_hub = not Path(given).expanduser().exists() and _HUB_NAME.fullmatch(given)
    return Source(given, **on_hub.groupdict()) if on_hub else None


def fetch(source: Source, folder: Path, write_to: Path | None = None) -> Path:
    """The rows as a Parquet file in `folder`, or in `write_to` (a dry run) where it is not there yet.

    A .json beside it records the hub's revision, or the folder's files, and the rows of each split. What is there is
    taken without the hub. Raises: UserError for what cannot be had, and where `folder` has another by that name."""
    path = folder / source.file_name
    about: dict[str, Any] = {"given": source.given}
    if source.folder:
        about["files"] = {str(p.relative_to(source.folder)): file_digest(p) for p in _arrow_files(source.folder)}
    if path.exists() and (record := path.with_suffix(".json")).exists():
        stored = read_record(record)
        if stored.get("given") != source.given:
            raise UserError(f"{path} is of {stored.get('given')}, not of {source.given}: give another --run")
        if about.items() <= stored.items():
            say(f"data: reusing {path}, of {_named(stored)}")
            return path
    path = (write_to or folder) / source.file_name
    with tempfile.TemporaryDirectory() as cache:
        set_library_bars()
        parts = _saved(source) if source.folder else _on_hub(source, cache, about)
        rows = _pooled(parts, source)
        about["splits"] = {name: len(part) for name, part in parts.items() if source.split in (None, name)}
        with atomic_path(path) as draft:
            rows.to_parquet(draft)
    write_json(path.with_suffix(".json"), about)
    splits = ", ".join(f"{name} ({count:,})" for name, count in about["splits"].items() if name)
    several = ", pooled; name one with #split" if len(about["splits"]) > 1 else ""
    kept = folder / path.name
    kept = kept if path == kept else f"would be {kept}"
    say(f"data: {_named(about)}{f', splits {splits}' if splits else ''}{several} -> {kept}")
    return path


def record_of(path: Path) -> dict[str, Any]:
    """What `fetch` recorded of a data file; empty for a file of another origin."""
    record = path.with_suffix(".json")
    about = read_record(record) if path.suffix == ".parquet" and record.is_file() else {}
    return about if "splits" in about else {}


def _named(about: dict) -> str:
    return about["given"] + (f" at revision {about['revision']}" if "revision" in about else "")


def _arrow_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.arrow"))


def _saved(source: Source) -> dict[str, "datasets.Dataset"]:  # noqa: F821
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(source.folder))
    except Exception as error:  # a stranger's files make Arrow raise anything
        raise UserError(f"--data {source.given}: `datasets` cannot read it: {error}") from None
    return {"": found} if isinstance(found, Dataset) else dict(found)


def _on_hub(source: Source, cache: str, about: dict[str, Any]) -> dict[str, "datasets.Dataset"]:  # noqa: F821
    """The splits of a configuration; adds revision and licence to `about`. Only its files are downloaded."""
    from datasets import load_dataset
    from huggingface_hub import DatasetCard, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def snapshot(revision: str | None, patterns: list[str] | None) -> Path:
        what = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
        try:
            return Path(snapshot_download(source.name, **what))
        except HfHubHTTPError:
            raise
        except Exception:  # no network: it raises errors of many types, and for a commit does not look in the cache
            return Path(snapshot_download(source.name, local_files_only=True, **what))

    try:
        readme = snapshot(source.revision, ["README.md"]) / "README.md"
        about["revision"] = readme.parent.name
        card = DatasetCard.load(readme, ignore_metadata_errors=True).data.to_dict() if readme.exists() else {}
        if isinstance(card.get("license"), str):  # of several, none is sure
            about["licence"] = card["license"]
        folder = snapshot(about["revision"], _files(source, card.get("configs") or []))
        return dict(load_dataset(str(folder), source.config, cache_dir=cache))
    except UserError:
        raise
    except LocalEntryNotFoundError:
        how = f"`hf download --repo-type dataset {source.name}` where there is a network, or give a file"
        raise UserError(f"--data {source.given}: no such file, and the hub cannot be reached: {how}") from None
    except HfHubHTTPError as error:
        raise UserError(f"--data {source.given}: no such file, and the hub does not give it: {error}") from None
    except Exception as error:  # the parsers raise errors of many types
        reason = error.__cause__ or error
        raise UserError(f"--data {source.given}: `datasets` cannot read it: {reason}") from None


def _files(source: Source, configs: list[dict]) -> list[str] | None:
    """Patterns of the files that the configuration needs by the data set's card; None: all, as the card names none."""
    names = [each.get("config_name", "default") for each in configs]
    default = [name for name, each in zip(names, configs, strict=True) if each.get("default") or name == "default"]
    wanted = source.config or next(iter(default or names), None)
    if source.config is None and len(names) > 1 and not default:
        raise UserError(f"--data {source.given} has several configurations: add one of :{', :'.join(names)}")
    if configs and wanted not in names:
        raise UserError(f"--data {source.given}: its configurations are {', '.join(names)}")
    patterns = []
    for each in [each for name, each in zip(names, configs, strict=True) if name == wanted]:
        given = each.get("data_files") or []
        for entry in given if isinstance(given, list) else [given]:
            paths = entry.get("path", []) if isinstance(entry, dict) else entry
            patterns += paths if isinstance(paths, list) else [paths]
    return ["README.md", *patterns] if patterns else None


def _pooled(parts: dict[str, "datasets.Dataset"], source: Source) -> "datasets.Dataset":  # noqa: F821
    from datasets import concatenate_datasets

    if source.split is not None and source.split not in parts:
        there = ", ".join(filter(None, parts)) or "none by name"
        raise UserError(f"--data {source.given}: no split {source.split}; there: {there}")
    try:
        return parts[source.split] if source.split else concatenate_datasets(list(parts.values()))
    except ValueError:
        raise UserError(f"--data {source.given}: its splits have different columns: name one with #split") from None
