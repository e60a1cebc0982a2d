"""Choose the most sensitive weights from Fisher scores that come one layer at a time."""

from typing import Any, Literal, get_args

import numpy as np

from ..errors import UsageError

Scope = Literal["global", "tensor"]

_POSITIONS = 2**32


def check_choice(density: float, scope: str) -> None:
    """Raise UsageError for a density that is not in (0, 1] or a scope that there is not."""
    if not 0 < density <= 1:
        raise UsageError(f"--density must be above 0 and at most 1, not {density}")
    check_option("--scope", scope, Scope)


def check_option(flag: str, value: str, options: Any) -> None:
    """Raise UsageError for a value that is not among those of a Literal."""
    if value not in get_args(options):
        raise UsageError(f"{flag} must be one of {', '.join(get_args(options))}, not {value}")


class Selector:
    """Keeps the highest scores of those seen so far; exact, whatever the order in which the layers come.

    Args:
        sizes: for each layer, how many weights it has; equal scores are resolved in favour of the earlier layer here.
        density: the fraction of all weights to choose, in (0, 1]; at least one weight is chosen.
        scope: `global` ranks all layers' weights together; `tensor` takes the same fraction of each layer.

    Raises:
        UsageError: density or scope out of range; a layer with more weights than 32 bits can number.
    """

    def __init__(self, sizes: dict[str, int], density: float, scope: Scope):
        check_choice(density, scope)
        if too_large := [path for path, size in sizes.items() if size > _POSITIONS]:
            raise UsageError(f"{too_large[0]} has {sizes[too_large[0]]} weights, more than the index can number (2^32)")
        self._paths = list(sizes)
        self._scope = scope
        self._counts = {path: max(1, round(density * size)) for path, size in sizes.items()}
        self._total = max(1, round(density * sum(sizes.values())))
        self._chosen: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # with scope tensor
        self._layers = np.empty(0, np.int32)  # with scope global: candidates in order of layer and position
        self._positions = np.empty(0, np.uint32)
        self._scores = np.empty(0, np.float32)
        self._threshold = 0.0  # no score below it can be among the highest any more

    def add(self, path: str, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the scores of a layer's weights, float32 of any shape, into account.

        Returns:
            Flat positions and scores of the weights that may be among the highest; `restore` takes them, too.
        """
        flat = scores.reshape(-1)
        if self._scope == "tensor":
            best = _highest(flat, self._counts[path])
        elif self._threshold:
            best = np.flatnonzero(flat >= self._threshold)
        else:
            best = _highest(flat, self._total)
        self.restore(path, best, flat[best])
        return best, flat[best]

    def restore(self, path: str, positions: np.ndarray, scores: np.ndarray) -> None:
        """Take what `add` returned for a layer into account in its place."""
        if self._scope == "tensor":
            self._chosen[path] = positions.astype(np.uint32), scores
            return
        number = self._paths.index(path)
        at = int(np.searchsorted(self._layers, number))
        self._layers = np.insert(self._layers, at, np.full(len(positions), number))
        self._positions = np.insert(self._positions, at, positions)
        self._scores = np.insert(self._scores, at, scores)
        if len(self._scores) > 2 * self._total:
            self._prune()

    def _prune(self) -> None:
        keep = _highest(self._scores, self._total)
        self._layers, self._positions, self._scores = self._layers[keep], self._positions[keep], self._scores[keep]
        if len(keep) == self._total:
            self._threshold = float(self._scores.min())

    def result(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each layer with chosen weights, their (n,) uint32 flat positions, increasing, and (n,) float32 scores."""
        if self._scope == "tensor":
            return {path: self._chosen[path] for path in self._paths}
        self._prune()
        edges = np.searchsorted(self._layers, np.arange(len(self._paths) + 1))
        return {
            path: (self._positions[start:end], self._scores[start:end])
            for path, start, end in zip(self._paths, edges[:-1], edges[1:], strict=True)
            if end > start
        }


def _highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Increasing positions of the `count` highest scores, the earlier ones where scores are equal."""
    if count >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))
