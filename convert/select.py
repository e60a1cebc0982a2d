"""Choose the most sensitive weights from their Fisher scores."""

from typing import Literal, get_args

import numpy as np

from ..errors import UsageError

Scope = Literal["global", "tensor"]


def select(scores: dict[str, np.ndarray], density: float, scope: Scope) -> dict[str, np.ndarray]:
    """Positions of the weights with the highest scores.

    Args:
        scores: for each layer, (out, in) float32 scores.
        density: the fraction of all weights to choose, in (0, 1]; at least one weight is chosen.
        scope: `global` ranks all layers' weights together; `tensor` takes the same fraction of each layer.

    Returns:
        For each layer with chosen weights, (n,) uint32 flat row-major positions, strictly increasing. Equal scores are
        resolved in favour of the earlier layer and position.

    Raises:
        UsageError: density or scope out of range.
    """
    if not 0 < density <= 1:
        raise UsageError(f"--density must be above 0 and at most 1, not {density}")
    if scope not in get_args(Scope):
        raise UsageError(f"--scope must be one of {', '.join(get_args(Scope))}, not {scope}")
    flat = {path: s.reshape(-1) for path, s in scores.items()}
    if scope == "tensor":
        return {path: _top(s, density) for path, s in flat.items()}
    chosen = _top(np.concatenate(list(flat.values())), density)
    ends = np.cumsum([len(s) for s in flat.values()])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    starts = ends - [len(s) for s in flat.values()]
    return {
        path: (part - start).astype(np.uint32)
        for path, part, start in zip(flat, parts, starts, strict=True)
        if len(part)
    }


def _top(scores: np.ndarray, density: float) -> np.ndarray:
    """Sorted positions of the top `density` of a vector, the earlier one where scores are equal."""
    count = max(1, round(density * len(scores)))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal])).astype(np.uint32 if len(scores) < 2**32 else np.uint64)
