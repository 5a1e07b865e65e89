"""Which small model and which template belong to a target: what configs/families.yaml says, and what a folder tells."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, RootModel

from selection.run.config import REPOSITORY, Section
from selection.run.products import read_record
from selection.run.yaml_file import check_keys, read_yaml

FAMILIES = REPOSITORY / "configs" / "families.yaml"


class Family(Section):
    """A family of configs/families.yaml."""

    template: str  # chat template of the target and the small model (LLaMA-Factory)
    models: list[str] = Field(min_length=1)  # model-hub names from small to large (paper: its three pairs; ours)
    small: str = "first"  # small model: the first of `models`, "none" (one is cut), or a model-hub name (ours)
    model_type: str | None = None  # of config.json, where it tells this template (ours)


@dataclass(frozen=True)
class Pair:
    """What is known of a target."""

    target: str  # model-hub name as listed, or an absolute folder
    small: str | None  # model-hub name or absolute folder; None: one has to be cut out of the target
    template: str | None  # None: unknown
    family: str | None  # name in configs/families.yaml; None: at most the template is known
    why: str  # how the target was recognised, or why it was not


@functools.cache
def read_families(path: Path = FAMILIES) -> dict[str, Family]:
    """Families by name. Raises: UserError for an unknown key or a wrong type."""
    return check_keys(RootModel[dict[str, Family]], read_yaml(path), str(path)).root


def local_folder(model: str) -> Path | None:
    """The folder that `model` names, from the working directory or else from the repository, by that name where it is a
    link; None: none."""
    paths = (os.path.abspath(base / Path(model).expanduser()) for base in (Path.cwd(), REPOSITORY))
    return next((Path(path) for path in paths if os.path.isdir(path)), None)


def find_pair(target: str) -> Pair:
    """The small model and the template of `target`, a model folder or hub name (in any case).

    A folder is known by its name (the last part of a hub name), else by _name_or_path in its config.json; else its
    model_type may tell the template. A sibling beside the folder goes before the hub's. Raises: UserError."""
    folder = local_folder(target)
    if folder is None:
        unknown = Pair(target, None, None, None, f"{target} is not in configs/families.yaml")
        return _listed(lambda model: model.lower() == target.lower(), None, "by its name") or unknown
    names = folder.name.lower(), folder.resolve().name.lower()  # of a link, or of what it leads to
    config = read_record(folder / "config.json")
    origin, model_type = str(config.get("_name_or_path", "")).lower(), config.get("model_type")
    pair = _listed(lambda model: _last(model) in names, folder, "by the folder's name")
    if pair := pair or _listed(lambda m: m.lower() == origin, folder, f"by _name_or_path in {folder / 'config.json'}"):
        return pair
    families = read_families().values()
    templates = {family.template for family in families if model_type and family.model_type == model_type}
    # Base or instruction-tuned, and which version, is unknown: only a speculator out of the target itself fits.
    template = templates.pop() if len(templates) == 1 else None
    why = f"neither the name of {folder} nor its config.json (model_type {model_type}) tells its family"
    return Pair(str(folder), None, template, None, f"by its model_type {model_type} alone" if template else why)


def _listed(is_it: Callable[[str], bool], folder: Path | None, why: str) -> Pair | None:
    """The pair of the first listed model for which `is_it(model)` holds."""
    listed = ((model, name, family) for name, family in read_families().items() for model in family.models)
    for model, name, family in listed:
        if is_it(model):
            small = {"first": family.models[0], "none": None}.get(family.small, family.small)
            small = None if small == model else small
            if folder and small:
                every = (p for place in (folder.parent, folder.resolve().parent) for p in sorted(place.iterdir()))
                beside = (p for p in every if p.name.lower() == _last(small))
                small = next((str(path) for path in beside if (path / "config.json").is_file()), small)
            return Pair(str(folder or model), small, family.template, name, why)
    return None


def _last(model: str) -> str:
    return model.rpartition("/")[2].lower()
