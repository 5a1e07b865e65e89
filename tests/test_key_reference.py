"""The two READMEs that list every key of every YAML are what the pydantic models say."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from scripts import key_reference
from selection.config import _SET_BY_THE_STAGE, REPOSITORY, Task, _Loader
from selection.errors import UserError, run_stage

READMES = {name: (REPOSITORY / name / "README.md").read_text(encoding="utf-8") for name in ("selection", "finetune")}


def top(heading: str) -> str:
    """What the keys at the top of a kind of YAML stand under here: "" of an experiment, "grid" of a grid."""
    return "" if heading.startswith(("An experiment", "Tuning")) else heading.split()[1]


def tables(readme: str) -> dict[str, dict[str, list[str]]]:
    """The cells of every row by section and key."""
    found, section = {}, ""
    for line in readme.splitlines():
        if line.startswith("### "):
            section = top(line[4:])
        elif line.startswith("#### Under "):
            section = line.split("`")[1].rstrip(":")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            assert len(cells) == 5, line
            of_section = found.setdefault(section, {})
            assert cells[0] not in of_section
            of_section[cells[0].strip("`")] = cells[1:]
    return found


def all_tables() -> dict[str, dict[str, list[str]]]:
    selection, finetune = (tables(READMES[name]) for name in ("selection", "finetune"))
    assert not set(selection[""]) & set(finetune[""])  # each key in one of the two
    return selection | finetune | {"": selection[""] | finetune[""]}


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["key_reference.py", *arguments])
        code = 0
        try:
            run_stage(key_reference.main)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


def test_the_committed_files_are_what_the_models_say(command):
    assert command("--check") == (0, "")


def test_a_stale_file_is_refused_by_name_and_mended_between_the_marks_alone(command, tmp_path, monkeypatch):
    monkeypatch.setattr(key_reference, "REPOSITORY", tmp_path)
    for name, text in READMES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text, encoding="utf-8")
    path = tmp_path / "selection" / "README.md"
    path.write_text("Mine.\n" + READMES["selection"].replace("`50`", "`51`") + "\nMine too.\n", encoding="utf-8")
    code, error = command("--check")
    assert code == 2
    assert error == "error: selection/README.md is stale: run python scripts/key_reference.py\n"
    assert command() == (0, "") and command("--check") == (0, "")
    assert path.read_text(encoding="utf-8") == "Mine.\n" + READMES["selection"] + "\nMine too.\n"
    path.write_text(READMES["selection"].replace("<!-- end -->", ""), encoding="utf-8")
    code, error = command()
    assert code == 2 and "lacks the lines" in error


def test_every_key_of_every_model_has_one_row_with_its_default_and_a_source():
    found = all_tables()
    models = [(top(heading), model) for heading, model in key_reference.FILES.items()]
    models.append(("tasks.NAME", Task))
    for section, model in models:
        keys = set()
        for key, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                models.append((f"{section}.{key}".lstrip("."), field.annotation))
                continue
            keys.add(key)
            kind, default, meaning, source = found[section][key]
            assert kind and meaning and source, key
            if field.is_required():
                assert default == "required"
            elif field.default is None:
                assert default == "absent"
            else:
                assert yaml.load(default.strip("`"), _Loader) == field.default
        assert keys == set(found[section])  # and no row of a key that is gone
    assert len(models) >= 7


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_the_committed_yamls_is_listed(path):
    found = all_tables()
    values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if path.parent.name == "reproduce":
        assert set(values) <= set(found["grid"])
        assert all(set(task) <= set(found["tasks.NAME"]) for task in values["tasks"].values())
    elif path.name == "families.yaml":
        assert set().union(*values.values()) <= set(found["family"])
    else:
        for key, value in values.items():
            assert set(value) <= set(found[key]) if isinstance(value, dict) and key in found else key in found[""]


def test_the_keys_that_cannot_be_given_are_all_listed():
    listed = READMES["finetune"].partition("### Keys of LLaMA-Factory that cannot be given")[2]
    assert {part for part in listed.split("<!--")[0].split("`")[1::2]} == _SET_BY_THE_STAGE


class Part(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)
    depth: int = Field(default=3, ge=1, le=10_000)
    """How deep; a | b. Source: paper."""


class Whole(BaseModel):
    """What it is."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    name: str
    """Its name.
    Source: ours; a second
    line."""
    mode: Literal["fast", "1"] = "1"
    """Which. Source: as released."""
    share: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[1e-5], min_length=1)
    """How much. Source: LLaMA-Factory's key."""
    bits: Literal[8] | int | None = None
    """How many. Source: paper, Table 1."""
    part: Part = Part()
    """One part. Source: ours."""
    parts: dict[str, Part] = {}
    """More of them. Source: ours."""
    on: bool = True
    """Whether. Source: ours."""


def test_types_bounds_and_sections_are_said_in_words():
    blocks = list(key_reference.as_markdown("Whole", Whole, False))
    assert blocks[:2] == ["### Whole", "What it is."]
    head = "| key | type | default | meaning | source |\n|---|---|---|---|---|\n"
    assert blocks[2] == head + "\n".join(
        [
            "| `name` | text | required | Its name. | ours; a second line |",
            "| `mode` | one of `fast`, `'1'` | `'1'` | Which. | as released |",
            "| `share` | list, not empty; each: number above 0, at most 1 | `[1.0e-05]` | How much. "
            "| LLaMA-Factory's key |",
            "| `bits` | `8` or whole number | absent | How many. | paper, Table 1 |",
            "| `parts` | mapping of name to section, see below | `{}` | More of them. | ours |",
            "| `on` | `true` or `false` | `true` | Whether. | ours |",
        ]
    )
    depth = head + r"| `depth` | whole number from 1, at most 10,000 | `3` | How deep; a \| b. | paper |"
    assert blocks[3:6] == ["#### Under `part:`", "One part.", depth]


@pytest.mark.parametrize("docstring", ["Meaning alone.", "Source: hearsay.", "Source: paper. And more."])
def test_a_key_without_a_source_is_named(docstring):
    class Unsourced(Whole):
        __doc__ = "What it is."
        extra: int = Field(default=1, description=docstring)

    with pytest.raises(UserError, match="docstring of extra must end with where it comes from"):
        list(key_reference.as_markdown("", Unsourced, False))


def test_the_readmes_name_files_that_exist():
    for name, text in READMES.items():
        scripts = [word for line in text.splitlines() if line.startswith("    ") for word in line.split()[1:2]]
        assert scripts and all((REPOSITORY / name / script).is_file() for script in scripts), Path(name)
