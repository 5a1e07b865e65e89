"""Make pools of training rows with known faults out of a clean slice, and the rows to evaluate on.

    python scripts/paper/pools.py data/go_biology.jsonl --other data/kazakh_english.jsonl --out runs/pools/go_biology

Needs rows with the columns id, instruction, input, output. Writes OUT/held_out.jsonl, the same for all seeds and never
changed, and for each seed and pool OUT/seed-N/POOL.jsonl and OUT/seed-N/POOL.kinds.json, which says of each row, in
order, what was done to it ("clean": nothing). All pools of a seed are made from the same rows.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from collections.abc import Callable

from selection.run.ending import run_stage

import numpy as np

from selection.run.cli import argument_parser
from selection.run.errors import UserError
from selection.run.products import atomic_path, read_json

Rows = list[dict[str, str]]
STOCK_ANSWERS = (
    "I am sorry, but I cannot help with that.",
    "Please consult the documentation for more information.",
    "As an AI language model, I do not have enough information to answer this question.",
    "This is a very interesting question that has many different aspects.",
    "There is no further information available at this time.",
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("data", type=Path, help="JSON Lines file of clean rows")
    parser.add_argument(
        "--other", type=Path, required=True, help="rows of another task, for the pool other_30; required"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pools; required")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of rows and faults; default: 1")
    parser.add_argument("--rows", type=int, default=1000, help="in each pool; default: 1000")
    parser.add_argument("--held_out", type=int, default=300, help="rows to evaluate on; default: 300")
    arguments = parser.parse_args()
    clean, other = read_rows(arguments.data), read_rows(arguments.other)
    if (most := max(round(share * arguments.rows) for _, share in POOLS.values())) > len(other):
        raise UserError(f"{arguments.other} has {len(other)} rows: give at least {most}")
    if arguments.rows + arguments.held_out > len(clean):
        wanted = f"{arguments.rows} rows and {arguments.held_out} held out"
        raise UserError(f"{arguments.data} has {len(clean)} rows: too few for {wanted}")
    order = np.random.default_rng(0).permutation(len(clean))
    held_out, rest = order[: arguments.held_out], order[arguments.held_out :]
    write_rows(arguments.out / "held_out.jsonl", [clean[row] for row in held_out])
    for seed in arguments.seeds:
        rows = [clean[row] for row in np.random.default_rng(seed).permutation(rest)[: arguments.rows]]
        for name, made in make_pools(rows, other, seed).items():
            folder = arguments.out / f"seed-{seed}"
            write_rows(folder / f"{name}.jsonl", [row for row, _ in made])
            with atomic_path(folder / f"{name}.kinds.json") as draft:
                draft.write_text(json.dumps([kind for _, kind in made]) + "\n", encoding="utf-8")
        print(f"seed {seed}: {len(POOLS)} pools of {len(rows)} rows -> {arguments.out / f'seed-{seed}'}")


def read_rows(path: Path) -> Rows:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: row[key] + "" for key in ("id", "instruction", "input", "output")} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read rows from {path}: {error!r}") from None


def is_faulty(pool: Path) -> np.ndarray:
    """Whether each row of a written pool is faulty (N,). Raises: UserError where its kinds are missing."""
    kinds = read_json(pool.with_suffix(".kinds.json"))
    return np.array([kind != "clean" for kind in kinds])


def write_rows(path: Path, rows: Rows) -> None:
    with atomic_path(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# Each fault takes rows, rows of another task and a random generator, and gives as many rows with the fault.


def swapped(rows: Rows, other: Rows, rng: np.random.Generator) -> Rows:
    """Each with the response of the row that is next in length, so that length does not tell."""
    by_length = sorted(range(len(rows)), key=lambda row: (len(rows[row]["output"]), row))
    following = dict(zip(by_length, [*by_length[1:], by_length[0]], strict=True))
    # The longest gets the shortest's: pairs of neighbours at that end would need a rule of their own.
    return [row | {"output": rows[following[number]]["output"]} for number, row in enumerate(rows)]


def boilerplate(rows: Rows, other: Rows, rng: np.random.Generator) -> Rows:
    return [row | {"output": STOCK_ANSWERS[rng.integers(len(STOCK_ANSWERS))]} for row in rows]


def cut_off(rows: Rows, other: Rows, rng: np.random.Generator) -> Rows:
    """The first half of each response's words."""
    halves = [row["output"].split(" ") for row in rows]
    return [
        row | {"output": " ".join(words[: max(1, len(words) // 2)])} for row, words in zip(rows, halves, strict=True)
    ]


def copies(rows: Rows, other: Rows, rng: np.random.Generator) -> Rows:
    """The given rows again, every second one lightly changed."""
    return [row if number % 2 else lightly_changed(row) for number, row in enumerate(rows)]


def lightly_changed(row: dict[str, str]) -> dict[str, str]:
    """Other capitals and punctuation, one more word in the prompt: a near copy as scraped data have them."""
    output = row["output"].rstrip(".")
    return row | {"instruction": "Please " + row["instruction"][:1].lower() + row["instruction"][1:], "output": output}


def of_other_task(rows: Rows, other: Rows, rng: np.random.Generator) -> Rows:
    return [other[row] for row in rng.permutation(len(other))[: len(rows)]]


# Name of each pool: the fault and the share of rows that have it.
POOLS: dict[str, tuple[Callable[..., Rows] | None, float]] = {
    "clean": (None, 0.0),
    "swapped_10": (swapped, 0.1),
    "swapped_30": (swapped, 0.3),
    "boilerplate_30": (boilerplate, 0.3),
    "cut_30": (cut_off, 0.3),
    "copies_50": (copies, 0.5),
    "other_30": (of_other_task, 0.3),
}


def make_pools(rows: Rows, other: Rows, seed: int) -> dict[str, list[tuple[dict[str, str], str]]]:
    """Every pool of POOLS by name: its rows, each with its kind. The share of `rows` that has a fault is drawn at
    random; for copies it is replaced by copies of others."""
    made = {}
    for name, (fault, share) in POOLS.items():
        rng = np.random.default_rng([seed, len(rows)])
        order = rng.permutation(len(rows))
        faulty, kinds, pool = order[: round(share * len(rows))], ["clean"] * len(rows), list(rows)
        sources = order[len(order) - len(faulty) :] if fault is copies else faulty
        if fault is not None:
            for row, changed in zip(faulty, fault([rows[source] for source in sources], other, rng), strict=True):
                pool[row], kinds[row] = changed, fault.__name__
        made[name] = list(zip(pool, kinds, strict=True))
    return made


if __name__ == "__main__":
    run_stage(main)
