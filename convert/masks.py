"""Other choices of weights than the most sensitive ones, to compare those with (Guo et al. 2024, arXiv 2406.02913)."""

from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UsageError
from ..product import dequantized
from ..progress import Progress
from .scoring import Ranking, forget, layer_sizes
from .select import Scope, Selector
from .sources import Source

Mask = Literal["sensitive", "random", "largest", "smallest", "all"]


def rank_unscored(source: Source, mask: Mask, density: float, scope: Scope, seed: int, progress: bool) -> Ranking:
    """Choose weights without their Fisher scores, reading one layer at a time.

    Args:
        mask: `random`, `largest` or `smallest` (in absolute value), or `all`, with a density of 1.
        seed: of `random`.

    Returns:
        The choice, with scores of 1.
    """
    model = source.open_model()
    modules, sizes = dict(model.named_modules()), layer_sizes(model)
    selector = Selector(sizes, density, scope)
    with Progress("Choosing weights", len(sizes), "layer", progress) as bar:
        for number, path in enumerate(sizes):
            selector.add(path, _order(mask, modules[path], path, (seed, number)))
            forget(modules[path])
            bar.advance()
    chosen = {path: (indices, np.ones_like(order)) for path, (indices, order) in selector.result().items()}
    return Ranking(chosen, sizes, {})


def _order(mask: Mask, layer: nn.Module, path: str, seed: tuple[int, int]) -> np.ndarray:
    """Numbers of which the highest belong to the weights to choose: float32, not negative."""
    magnitude = mx.abs(dequantized(layer)).reshape(-1)
    if not mx.isfinite(magnitude).all().item():
        raise UsageError(f"the model's weights are not finite in {path}: damaged?")
    if mask == "random":
        return np.random.default_rng(seed).random(magnitude.size, np.float32)
    orders = {"largest": magnitude, "smallest": 1 / magnitude, "all": mx.ones_like(magnitude)}
    return np.array(orders[mask])
