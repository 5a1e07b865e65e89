"""Exact copies: rows of which LLaMA-Factory makes the same conversation, whatever their other columns hold."""

from collections.abc import Iterable

import numpy as np

from selection.rows.conversation import convert_row
from selection.rows.read import as_json
from selection.run.products import digest


def text_hashes(rows: Iterable[dict], entry: dict) -> np.ndarray:
    """A 64-bit hash (N,) of all that is trained on of each row; `entry`: the data set's in `dataset_info.json`."""
    texts = (as_json(convert_row(row, entry), sort_keys=True) for row in rows)
    return np.array([int(digest(text.encode())[:16], 16) for text in texts], dtype=np.uint64)
