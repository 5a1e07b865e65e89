"""The keys of every YAML, out of the pydantic models, into selection/README.md and finetune/README.md.

    python scripts/key_reference.py
    python scripts/key_reference.py --check    # exit code 2 where a file is not what the models say

Needs both files with the lines <!-- keys … --> and <!-- end -->, and for each key a docstring that ends with its
source. Writes the tables between these lines and leaves the rest.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

import yaml  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from selection.config import _SET_BY_THE_STAGE, REPOSITORY, Experiment, Grid  # noqa: E402
from selection.errors import UserError, run_stage  # noqa: E402
from selection.families import Family  # noqa: E402
from selection.files import atomic_path  # noqa: E402
from selection.stage import argument_parser  # noqa: E402

# The kinds of YAML, each with its model.
FILES: dict[str, type[BaseModel]] = {
    "An experiment: `configs/*.yaml`": Experiment,
    "A grid of cells: `configs/reproduce/*.yaml`": Grid,
    "A family of models, by its name: `configs/families.yaml`": Family,
}
# Of an experiment, what stands in finetune/README.md; all else stands in selection/README.md.
OF_TUNING = ("precision", "training", "small_training", "target_training", "evaluation")
BEGIN, END = "<!-- keys: python scripts/key_reference.py -->\n", "<!-- end -->\n"
# How the docstring of a key ends.
SOURCE = re.compile(r"\s*Source: ((?:paper|as released|LLaMA-Factory|ours)[^.]*)\.$")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 2 where a file is stale")
    check = parser.parse_args().check
    for path, text in readmes().items():
        if path.read_text(encoding="utf-8") == text:
            continue
        if check:
            raise UserError(f"{path.relative_to(REPOSITORY)} is stale: run python scripts/key_reference.py")
        with atomic_path(path) as draft:
            draft.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(REPOSITORY)}")


def readmes() -> dict[Path, str]:
    """Both files as they should be. Raises: UserError where a file lacks the marks, or a key its source."""
    taken = ", ".join(f"`{key}`" for key in sorted(_SET_BY_THE_STAGE))
    texts = {
        "selection": [block for heading, model in FILES.items() for block in as_markdown(heading, model, False)],
        "finetune": [*as_markdown("Tuning and evaluation in an experiment", Experiment, True),
                     "### Keys of LLaMA-Factory that cannot be given", taken],
    }  # fmt: skip
    return {REPOSITORY / folder / "README.md": _between(folder, blocks) for folder, blocks in texts.items()}


def _between(folder: str, blocks: list[str]) -> str:
    """The folder's README with `blocks` in the place of what stands between its marks."""
    path = REPOSITORY / folder / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{path} lacks the lines {BEGIN.strip()} and {END.strip()}: the tables go between them")
    return "\n\n".join([before + begin.rstrip(), *blocks, end + after])


def as_markdown(heading: str, model: type[BaseModel], of_tuning: bool) -> Iterator[str]:
    """Blocks of Markdown: a heading and tables of the keys of a model and of the sections in it.

    `of_tuning` asks for an experiment's keys that stand in finetune/README.md, else these are left out.
    """
    yield f"### {heading}"
    for name, section in _sections(model.model_json_schema()):
        rows = [
            _row(key, value, key in section.get("required", []), f"{name}.{key}".lstrip("."))
            for key, value in section["properties"].items()
            if "$ref" not in value  # which is a section, not a key
            and (((name or key).split(".")[0] in OF_TUNING) == of_tuning or model is not Experiment)
        ]
        if rows:
            if name:
                yield f"#### Under `{name}:`"
            if (about := SOURCE.sub("", section["about"])) and (name or not of_tuning):
                yield " ".join(about.split())
            yield "\n".join(["| key | type | default | meaning | source |", "|---|---|---|---|---|", *rows])


def _sections(schema: dict) -> Iterator[tuple[str, dict]]:
    """A model's JSON schema and those of the sections in it, with where they stand, e.g. "selection"; `about` says
    what they are."""

    def of(name: str, part: dict, about: str) -> Iterator[tuple[str, dict]]:
        yield name, part | {"about": about}
        for key, value in part["properties"].items():
            # An optional section ("anyOf" with null) stands for one that is listed by itself.
            if "anyOf" not in value and (inner := re.search(r"#/\$defs/(\w+)", str(value))):
                below = f"{key}.NAME" if "patternProperties" in value else key
                described = value.get("description", "") if "$ref" in value else ""
                yield from of(f"{name}.{below}".lstrip("."), schema["$defs"][inner[1]], described)

    return of("", schema, schema.get("description", ""))


def _row(key: str, value: dict, required: bool, full_name: str) -> str:
    found = SOURCE.search(described := value.get("description", ""))
    if not found:
        raise UserError(f"the docstring of {full_name} must end with where it comes from: {SOURCE.pattern}")
    default = "required" if required else "absent" if value["default"] is None else f"`{_as_yaml(value['default'])}`"
    cells = (f"`{key}`", kind(value), default, described[: found.start()], found[1])
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def _as_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def kind(value: dict) -> str:
    """A type of JSON schema, with its bounds, in words."""
    if any_of := value.get("anyOf", value.get("oneOf")):
        return " or ".join(kind(each) for each in any_of if each != {"type": "null"})
    if "$ref" in value:
        return "section, see below"
    if "const" in value or "enum" in value:
        values = ", ".join(f"`{_as_yaml(each)}`" for each in value.get("enum", [value.get("const")]))
        return f"one of {values}" if len(value.get("enum", [])) > 1 else values
    if value["type"] == "array":
        return f"list{', not empty' * bool(value.get('minItems'))}; each: {kind(value['items'])}"
    if value["type"] == "object":
        (inner,) = value.get("patternProperties", {"": value.get("additionalProperties")}).values()
        return f"mapping of name to {kind(inner)}" if isinstance(inner, dict) else "mapping"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{word} {value[bound]:,}" for bound, word in bounds.items() if bound in value]
    return " ".join([words[value["type"]], ", ".join(said)]).strip()


if __name__ == "__main__":
    run_stage(main)
