"""The list of suspect rows, which scripts/check_pool.py writes and a user may edit, and leaving its rows out."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, NotRequired

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter
from typing_extensions import TypedDict

from selection.rows.split import split_numbers
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.products import parse_json, read_json, read_sealed, refuse_difference
from selection.scores.folder import Scores

_Row = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
LeftOut = dict[str, list[_Row]]  # rows of the training split, ascending, by what is wrong with them
_RUN = "run scripts/check_pool.py with this configuration"


class Suspect(TypedDict):
    """A line of suspects.jsonl. All but the row may be missing where a user wrote it."""

    row: _Row  # in the data, from 0; several data sets are counted through
    kind: NotRequired[str]
    prompt: NotRequired[str]
    answer: NotRequired[str]
    unexplained: NotRequired[float | None]
    group: NotRequired[int]


class Pool(TypedDict):
    """What pool.json says, with counts of what was found."""

    __pydantic_config__ = ConfigDict(extra="allow")

    model: str  # that looked at the rows
    rows: PositiveInt  # of the data
    effort_by_length: float | None  # Spearman's of effort score and response tokens
    tried: NotRequired[dict[str, tuple[float, float]]]  # as `find_suspects` gives it
    data_fingerprint: str


_SUSPECT = TypeAdapter(Suspect)


def read_suspects(path: Path) -> list[Suspect]:
    """The lines of a suspects.jsonl. Raises: UserError where it is missing or no such list."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): remove it where it is there, and {_RUN}") from None
    suspects = []
    for number, line in enumerate(lines, 1):
        try:
            suspects += [_SUSPECT.validate_python(parse_json(line))] if line.strip() else []
        except (ValueError, RecursionError):  # pydantic's error is a ValueError
            todo = f"delete it, or remove the file and {_RUN}"
            raise UserError(f"{path}: line {number} is no suspect row: {todo}") from None
    return suspects


def suspects_in_training(experiment: Experiment, folder: Path) -> LeftOut:
    """The rows of the training split that `folder`'s suspects.jsonl lists. Raises: UserError where that is missing,
    damaged or of other data."""
    path, about = folder / "suspects.jsonl", folder / "pool.json"
    if lacking := [each for each in (path, about) if not each.exists()]:
        raise UserError(f"there is no {lacking[0]}: {_RUN}")
    suspects = {each["row"]: each.get("kind", "listed") for each in reversed(read_suspects(path))}
    stored, now = read_json(about, Pool), read_sealed(experiment.data_folder / "split.json")["fingerprint"]
    refuse_difference(path, stored, stored | {"data_fingerprint": now}, f"remove {folder} and {_RUN}")
    numbers, rows = split_numbers(experiment), {}
    if suspects and max(suspects) >= (count := 1 + max(each.max(initial=-1) for each in numbers.values())):
        raise UserError(f"{path} lists row {max(suspects)}, the data have {count} rows, from 0: delete that line")
    for row, number in enumerate(numbers["train"].tolist()):
        if number in suspects:
            rows.setdefault(suspects[number], []).append(row)
    return rows


def rows_left_out(experiment: Experiment | None) -> LeftOut | None:
    """What `selection.leave_out` leaves out; None: nothing is asked for. Raises: as `suspects_in_training`."""
    if experiment is None or experiment.selection.leave_out == "none":
        return None
    return suspects_in_training(experiment, experiment.pool)


def without(scores: Scores, left_out: LeftOut | None) -> Scores:
    """The scores as if scoring had left these rows out. Raises: UserError where no row is left."""
    if not left_out:
        return scores
    gone = np.isin(scores.index, all_rows(left_out))
    if gone.all():
        raise UserError("every row of the training split is listed as suspect: delete lines of suspects.jsonl")
    columns = {name: values[~gone] for name, values in scores.columns.items()}
    out = np.union1d(scores.left_out, scores.index[gone])
    return replace(scores, index=scores.index[~gone], columns=columns, left_out=out)


def all_rows(left_out: LeftOut | None) -> np.ndarray:
    """The rows of every kind, ascending."""
    return np.array(sorted(chain(*(left_out or {}).values())), dtype=np.int64)


def check_left_out(experiment: Experiment, path: Path, left_out: LeftOut | None) -> None:
    """Raises: UserError where the coreset in the file `path` of the run folder was not chosen from the rows that
    the list of suspects leaves now. One that leaves out none (`left_out` None) is held against the configuration."""
    asked = experiment.selection.leave_out == "suspects"
    if path.resolve().parent != experiment.coresets or (left_out is None and not asked):
        return
    now = all_rows(suspects_in_training(experiment, experiment.pool))
    if left_out is None or not np.array_equal(all_rows(left_out), now):
        was = "without leaving out suspects" if left_out is None else "with another list of suspects"
        what = f"pool/suspects.jsonl lists {len(now)} training rows"
        raise UserError(f"{path} was made {was} ({what}): cut it again (coreset.py; clean.json: check_pool.py)")
