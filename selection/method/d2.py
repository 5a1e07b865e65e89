"""D2 Pruning (Maharana et al. 2023, arXiv 2310.07931): scores spread over a graph of nearest neighbours."""

import heapq

import numpy as np

_EDGE_FLOOR = 1e-7  # as released: the least score that an edge carries
_LARGEST = np.float64(1e140)  # beyond it the squares in a distance leave float64's range


def d2_order(scores: np.ndarray, features: np.ndarray, variant: str, k: int = 5, gamma: float = 0.1) -> np.ndarray:
    """All N rows in the order in which D2 Pruning takes them; a coreset of m rows is the first m.

    Args: scores (N,), the EL2N score; features (N, d), the mean last hidden state of the response tokens.
    Forward: s_i + Σ_j e^(−d_ij) · s_j over the neighbours of i, d the Euclidean distance. Then the highest is taken (of
    equal ones the earlier row) and e^(−γ d) times its value subtracted from its neighbours, again and again.
    "published": a row's neighbours are its own k nearest; "released": also the rows whose k nearest it is among, and an
    edge of the forward pass carries a score of at least 1e-7.
    Raises: ValueError for sizes that do not fit, and numbers that are not finite or beyond 1e140."""
    scores = np.asarray(scores, dtype=np.float64)
    if features.ndim != 2 or scores.shape != (len(features),):
        raise ValueError(f"scores of shape {scores.shape} and features of shape {features.shape}: give (N,) and (N, d)")
    for what, table in (("score", scores[:, None]), ("features", features)):
        if len(wild := np.flatnonzero(~(np.abs(table) < _LARGEST).all(axis=1))):
            raise ValueError(f"{what} of row {wild[0]} not finite, or beyond {_LARGEST:g}: score the data again")
    near, distances = nearest_neighbours(features, k)
    rows, near, distances = np.repeat(np.arange(len(scores)), near.shape[1]), near.ravel(), distances.ravel()
    if variant == "released":
        rows, near, distances = np.append(rows, near), np.append(near, rows), np.append(distances, distances)
    _, edges = np.unique(rows * len(scores) + near, return_index=True)  # by row, then neighbour, none twice
    rows, near, distances = rows[edges], near[edges], distances[edges]
    carried = np.maximum(scores, _EDGE_FLOOR) if variant == "released" else scores
    spread = np.bincount(rows, weights=np.exp(-distances) * carried[near], minlength=len(scores))
    return _greedy(scores + spread, rows, near, np.exp(-gamma * distances))


def _greedy(values: np.ndarray, rows: np.ndarray, neighbours: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Take the highest, subtract weight · (its value) from its neighbours; a value below 0 raises them."""
    starts = np.searchsorted(rows, np.arange(len(values) + 1)).tolist()
    values, neighbours, weights = values.tolist(), neighbours.tolist(), weights.tolist()
    heap = [(-value, row) for row, value in enumerate(values)]  # every value that a row ever had
    heapq.heapify(heap)
    taken, order = [False] * len(values), []
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
    """The min(k, N − 1) nearest other rows of each row: numbers (N, k) and Euclidean distances (N, k), float64."""
    from sklearn.neighbors import NearestNeighbors  # heavy, and only D2 needs it

    num_rows, k = len(features), max(min(k, len(features) - 1), 0)
    if k == 0:
        return np.empty((num_rows, 0), dtype=np.int64), np.empty((num_rows, 0))
    features = np.ascontiguousarray(features, dtype=np.float32 if features.dtype == np.float32 else np.float64)
    near = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(features).kneighbors(return_distance=False)
    distances = np.empty((num_rows, k))
    for start in range(0, num_rows, block_rows):
        block = slice(start, start + block_rows)
        differences = features[block, None].astype(np.float64) - features[near[block]]
        distances[block] = np.sqrt(np.square(differences).sum(axis=-1))
    return near, distances
