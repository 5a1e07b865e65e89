"""Which small model and which template belong to a target: what configs/families.yaml says, and what a folder tells."""

import functools
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from selection.run.config import REPOSITORY, Section, from_repository
from selection.run.products import read_record
from selection.run.yaml_file import check_keys, read_yaml

FAMILIES = REPOSITORY / "configs" / "families.yaml"


class Family(Section):
    """A family of configs/families.yaml."""

    template: str
    """LLaMA-Factory's chat template, for the target and the small model. Source: LLaMA-Factory's key of this name."""
    models: list[str] = Field(min_length=1)
    """Model-hub names from small to large. Source: paper (its three pairs); the others ours."""
    small: str = "first"
    """Small model of the family's targets: the first of `models`, "none" (one is cut), or a model-hub name.
    Source: ours."""
    model_type: str | None = None
    """`model_type` of config.json that tells this template; absent: it does not. Source: ours."""


class _Families(Section):
    families: dict[str, Family]


@dataclass(frozen=True)
class Pair:
    """What is known of a target. Without a small model one has to be cut out of it."""

    target: str  # model-hub name as it is listed, or an absolute folder
    small: str | None  # model-hub name or absolute folder
    template: str | None  # None: nothing is known of the target
    family: str | None  # name in configs/families.yaml; None: at most the template is known
    why: str  # how the target was recognised, or why it was not


@functools.cache
def read_families(path: Path = FAMILIES) -> dict[str, Family]:
    """Families by name. Raises: UserError for an unknown key or a wrong type."""
    return check_keys(_Families, {"families": read_yaml(str(path))}, str(path)).families


def local_folder(model: str) -> Path | None:
    """The folder that `model` names, from the working directory or else from the repository; None: none."""
    return next((path for path in (Path(model).expanduser().resolve(), from_repository(model)) if path.is_dir()), None)


def find_pair(target: str) -> Pair:
    """The small model and the template of `target`, a model folder or hub name (in any case).

    A folder is known by its name, which is the last part of a hub name, else by the hub name that its config.json
    carries; else its model_type may still tell the template. A sibling that lies beside the folder goes before the
    hub's. Raises: UserError for a folder whose config.json cannot be read.
    """
    families, folder = read_families(), local_folder(target)
    if folder is None:
        if found := _listed(families, lambda model: model.lower() == target.lower()):
            return _pair(families, *found, None, "by its name")
        return Pair(target, None, None, None, f"{target} is not in configs/families.yaml")

    config = read_record(folder / "config.json")
    origin = str(config.get("_name_or_path", "")).lower()
    if found := _listed(families, lambda model: _last(model) == folder.name.lower()):
        return _pair(families, *found, folder, "by the folder's name")
    if found := _listed(families, lambda model: model.lower() == origin):
        return _pair(families, *found, folder, f"by _name_or_path in {folder / 'config.json'}")
    model_type = config.get("model_type")
    templates = {family.template for family in families.values() if model_type and family.model_type == model_type}
    if len(templates) == 1:
        # Base or instruction-tuned, and which version, is unknown: only a speculator out of the target itself fits.
        return Pair(str(folder), None, templates.pop(), None, f"by its model_type {model_type} alone")
    why = f"neither the name of {folder} nor its config.json (model_type {model_type}) tells its family"
    return Pair(str(folder), None, None, None, why)


def _listed(families: dict[str, Family], is_it) -> tuple[str, str] | None:
    """The first family and model of it for which `is_it(model)` holds."""
    return next(((name, m) for name, family in families.items() for m in family.models if is_it(m)), None)


def _pair(families: dict[str, Family], name: str, model: str, folder: Path | None, why: str) -> Pair:
    family = families[name]
    small = {"first": family.models[0], "none": None}.get(family.small, family.small)
    small = None if small == model else small
    if folder is not None and small is not None:
        small = next((str(p) for p in sorted(folder.parent.iterdir()) if _is_model(p, _last(small))), small)
    return Pair(model if folder is None else str(folder), small, family.template, name, why)


def _last(model: str) -> str:
    return model.rpartition("/")[2].lower()


def _is_model(path: Path, name: str) -> bool:
    return path.name.lower() == name and (path / "config.json").is_file()
