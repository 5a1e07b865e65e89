"""The baseline D2 Pruning (Maharana et al. 2023, arXiv 2310.07931): scores spread over a graph of nearest neighbours.

The released code prunes nothing before the graph, though the paper drops the hardest rows there: what is dropped is
the caller's affair, these functions see the rows that are left.
"""

import heapq
from hashlib import sha256

import numpy as np
import torch

from selection.run.errors import UserError

_EDGE_FLOOR = 1e-7  # as released: the least score that an edge carries
_LARGEST = np.float64(1e140)  # beyond it the squares in a distance leave float64's range
_SPARE_CANDIDATES = 10  # beyond k; with fewer, more rows need a second look
_COLUMNS_AT_A_TIME = 4096


def d2_order(scores: np.ndarray, features: np.ndarray, variant: str, k: int = 5, gamma: float = 0.1) -> np.ndarray:
    """All N rows in the order in which D2 Pruning takes them; a coreset of m rows is the first m.

    Args: scores (N,), the EL2N score; features (N, d), the mean last hidden state of the response tokens.
    Forward: s_i + Σ_j e^(−d_ij) · s_j over the neighbours of i, d the Euclidean distance. Then the highest is taken
    (of equal ones the earlier row) and e^(−γ d) times its value is subtracted from its neighbours, again and again.
    Variants: "published": a row's neighbours are its own k nearest; "released": also those rows whose k nearest it is
    among, and an edge of the forward pass carries a score of at least 1e-7.
    Raises: UserError for another variant, sizes that do not fit, and numbers that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if variant not in ("published", "released"):
        raise UserError(f'there is no variant {variant!r} of D2 Pruning: give "published" or "released"')
    if scores.shape != (len(features),):
        raise UserError(f"{len(features)} rows of features, but scores of shape {scores.shape}: give one score a row")
    _refuse_wild_numbers("score", scores[:, None])
    neighbours, distances = nearest_neighbours(features, k)
    rows, neighbours, distances = _edges(neighbours, distances, both_ways=variant == "released")
    carried = np.maximum(scores, _EDGE_FLOOR) if variant == "released" else scores
    spread = np.bincount(rows, weights=np.exp(-distances) * carried[neighbours], minlength=len(scores))
    return _greedy(scores + spread, rows, neighbours, np.exp(-gamma * distances))


def _edges(neighbours: np.ndarray, distances: np.ndarray, both_ways: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From (N, k) arrays: row, neighbour and distance of every edge, by row and then neighbour, none twice."""
    num_rows, k = neighbours.shape
    rows, neighbours, distances = np.repeat(np.arange(num_rows), k), neighbours.ravel(), distances.ravel()
    if both_ways:
        rows, neighbours = np.concatenate([rows, neighbours]), np.concatenate([neighbours, rows])
        distances = np.concatenate([distances, distances])
    _, edges = np.unique(rows * num_rows + neighbours, return_index=True)
    return rows[edges], neighbours[edges], distances[edges]


def _greedy(values: np.ndarray, rows: np.ndarray, neighbours: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Take the highest, subtract weight · (its value) from its neighbours; a value below 0 raises them.

    The heap holds every value that a row ever had; those that it no longer has are passed over.
    """
    starts = np.searchsorted(rows, np.arange(len(values) + 1)).tolist()
    values, neighbours, weights = values.tolist(), neighbours.tolist(), weights.tolist()
    heap = [(-value, row) for row, value in enumerate(values)]
    heapq.heapify(heap)
    taken = [False] * len(values)
    order = []
    while heap:
        negative, row = heapq.heappop(heap)
        if taken[row] or -negative != values[row]:
            continue
        taken[row] = True
        order.append(row)
        for edge in range(starts[row], starts[row + 1]):
            neighbour = neighbours[edge]
            if not taken[neighbour]:
                values[neighbour] -= weights[edge] * values[row]
                heapq.heappush(heap, (-values[neighbour], neighbour))
    return np.array(order, dtype=np.int64)


def nearest_neighbours(features: np.ndarray, k: int, block_rows: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each row, exactly: numbers (N, k) and Euclidean distances (N, k), float64, nearest first.

    Args: features (N, d), any number type. A row is not its own neighbour, of equal distances the earlier row comes
    first, k is cut to N − 1. Distances are square roots of the float64 sum of squared differences, nothing less exact.
    Memory: block_rows · N floats, and a few copies of the features.
    Raises: UserError for features that are no table or not finite, and k below 1.
    """
    features = np.ascontiguousarray(features)
    if features.ndim != 2:
        raise UserError(f"features of shape {features.shape}: give (N, d), one row a sample")
    _refuse_wild_numbers("features", features)
    if k < 1:
        raise UserError(f"k is {k}: give 1 neighbour or more")
    k = max(min(k, len(features) - 1), 0)
    # Equal rows are looked at once: many of them would be no closer to each other than float32 can tell.
    groups: dict[bytes, list[int]] = {}
    for row, values in enumerate(features):
        groups.setdefault(sha256(values.tobytes()).digest(), []).append(row)
    members = list(groups.values())
    distinct = features if len(members) == len(features) else features[[rows[0] for rows in members]]
    near, distances = _nearest_distinct(distinct, max(min(k, len(members) - 1), 0), block_rows)
    if len(members) == len(features):
        return near, distances
    return _with_equal_rows(members, near, distances, k, len(features))


def _refuse_wild_numbers(what: str, table: np.ndarray) -> None:
    fine = (np.abs(table) < _LARGEST).all(axis=1)
    if not fine.all():
        row = np.flatnonzero(~fine)[0]
        raise UserError(f"{what} of row {row} not finite, or beyond {_LARGEST:g}: score the data again")


def _with_equal_rows(members: list[list[int]], near: np.ndarray, distances: np.ndarray, k: int, num_rows: int):
    """From the k nearest groups of equal rows to the k nearest rows.

    Groups come in the order of their first rows, so each of the k nearest groups holds a row that comes before all
    rows of any other group: the k nearest rows are among them and the row's own group.
    """
    all_near = np.empty((num_rows, k), dtype=np.int64)
    all_distances = np.empty((num_rows, k))
    for rows, near_groups, to_groups in zip(members, near.tolist(), distances.tolist(), strict=True):
        pool = [(0.0, row) for row in rows[: k + 1]]
        for group, distance in zip(near_groups, to_groups, strict=True):
            pool += [(distance, row) for row in members[group][:k]]
        pool.sort()
        for row in rows:
            nearest = [entry for entry in pool if entry[1] != row][:k]
            all_distances[row] = [distance for distance, _ in nearest]
            all_near[row] = [other for _, other in nearest]
    return all_near, all_distances


def _nearest_distinct(features: np.ndarray, k: int, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest_neighbours`, slow where many rows are closer to each other than float32 can tell.

    A float32 matrix product gives a lower bound on the distance to every column (see `_float32_table`). The columns
    with the least bounds get their float64 distance. Where the largest of these bounds is above the k-th distance,
    no other column can come before it; where it is not, every column whose bound is not above gets its distance.
    """
    num_rows = len(features)
    near = np.empty((num_rows, k), dtype=np.int64)
    distances = np.empty((num_rows, k))
    if k == 0:
        return near, distances
    num_candidates = min(k + _SPARE_CANDIDATES, num_rows - 1)
    table, own_part, unit = _float32_table(features)
    for start in range(0, num_rows, block_rows):
        block = np.arange(start, min(start + block_rows, num_rows))
        left = -2 * table[block]
        left[:, -1] = 1
        bounds = left @ table.T
        bounds[block - start, block] = np.inf
        # numpy's own partition runs on one core
        least = torch.from_numpy(bounds).topk(num_candidates, largest=False, sorted=False)
        near[block], distances[block] = _nearest_of(features, block, least.indices.numpy(), k)
        limit = (distances[block, -1] / unit) ** 2 - own_part[block]  # on a row's bounds, for the k-th distance
        proved = least.values.numpy().max(axis=1) > limit
        if num_candidates == num_rows - 1:
            continue
        for i in np.flatnonzero(~proved):
            row = start + i
            columns = np.flatnonzero(bounds[i] <= limit[i])
            near[row], distances[row] = _nearest_of_many(features, row, columns[columns != row], k)
    return near, distances


def _float32_table(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Table T (N, d + 1), own part p (N,) and unit u of the lower bound on squared distances, in units of u²:
    p_i + (−2 T_i without its last, 1) · T_j.

    With x the centred features in units of u, a power of two that brings them into [−1, 1], rounded to float32
    (relative error ε = 2^-24), the float32 product of d + 1 terms is off by at most γ (|x_j|² + 2 |x_i| |x_j|) with
    γ = (d + 1) ε / (1 − (d + 1) ε), in whatever order it sums; rounding x and |x_j|² adds at most 5 ε (|x_i|² + |x_j|²)
    and the higher orders. All that is below c (|x_i|² + |x_j|²) with c = 2 γ of d + 8 terms, with 9 ε to spare: more
    than float64 distances can be off by. The last term of p is for numbers that vanish below float32's range.
    """
    num_rows, dimension = features.shape
    table = np.zeros((num_rows, dimension + 1), dtype=np.float32)
    centred = features - features.mean(axis=0, dtype=np.float64)
    largest = max(centred.max(), -centred.min())
    if largest < 1 / _LARGEST:  # squares vanish in float64 itself: no bound at all
        return table, np.full(num_rows, -np.inf), 1.0
    unit = float(np.ldexp(1.0, np.frexp(largest)[1]))
    centred /= unit
    table[:, :-1] = centred
    del centred
    terms = (dimension + 8) * 2.0**-24
    c = 2 * terms / (1 - terms)
    lengths = (1 - c) * np.einsum("ij,ij->i", table[:, :-1], table[:, :-1], dtype=np.float64)
    table[:, -1] = lengths
    return table, lengths - dimension * 2.0**-120, unit


def _nearest_of(features: np.ndarray, rows: np.ndarray, candidates: np.ndarray, k: int):
    """The k nearest of each row's candidates (B, C), by distance and then number, and their distances."""
    candidates = np.sort(candidates, axis=1)
    differences = features[candidates].astype(np.float64, copy=False)
    differences -= features[rows].astype(np.float64, copy=False)[:, None]
    distances = np.sqrt(np.square(differences, out=differences).sum(axis=-1))
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(candidates, nearest, axis=1), np.take_along_axis(distances, nearest, axis=1)


def _nearest_of_many(features: np.ndarray, row: int, columns: np.ndarray, k: int):
    """The same for one row, a few columns at a time."""
    near, distances = columns[:0], np.empty(0)
    for start in range(0, len(columns), _COLUMNS_AT_A_TIME):
        some = columns[None, start : start + _COLUMNS_AT_A_TIME]
        found, lengths = _nearest_of(features, np.array([row]), some, k)
        near, distances = np.concatenate([near, found[0]]), np.concatenate([distances, lengths[0]])
    nearest = np.argsort(distances, kind="stable")[:k]  # numbers ascend within equal distances
    return near[nearest], distances[nearest]
