"""Which of an index's weights a run trains, and what they are before it."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .estimator import fisher_scale
from .index import SensitiveIndex


class Trainable:
    """The weights of an index that are trained, K of them.

    Args:
        index: of the model.
        spans: where they are among all its weights: pairs of start and end.
        power: of their Fisher scores, which scales their directions.

    Attributes:
        everything: float32, the values of all weights of the index before any training.
        initial: (K,) of them, those of the trained ones.
        scale: (K,) float32 of the directions, or None.
        at_random: whether the weights of the index were chosen at random.
    """

    def __init__(self, index: SensitiveIndex, spans: Sequence[tuple[int, int]], power: float):
        self._positions = mx.array(np.concatenate([np.arange(*span, dtype=np.uint32) for span in spans]))
        self.everything = index.initial_values()
        self.initial = self.of(self.everything)
        scores = mx.array(np.concatenate([tensor.scores for tensor in index.tensors.values()]))
        self.scale = fisher_scale(self.of(scores), power)
        self.at_random = index.mask == "random"

    def of(self, values: mx.array) -> mx.array:
        """From the values of all weights of the index, those of the trained ones: (K,)."""
        return values[self._positions]

    def among_all(self, values: mx.array) -> mx.array:
        """The values of all weights of the index, where the trained ones have `values`, (K,)."""
        return mx.put_along_axis(self.everything, self._positions, values, axis=0)
