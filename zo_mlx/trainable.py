"""Which of an index's weights a run trains, what they are before it, and what their directions look like."""

import math
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from .config import TrainConfig
from .errors import UsageError
from .estimator import STRUCTURES, Form, fisher_scale
from .index import SensitiveIndex


class Trainable:
    """The weights of an index that are trained, K of them.

    Args:
        index: of the model.
        spans: where they are among all its weights: pairs of start and end.
        config: precondition and structure of the directions are read.
        shapes: gives the shapes of the index's layers, where their directions have a structure.

    Attributes:
        everything: float32, the values of all weights of the index before any training.
        initial: (K,) of them, those of the trained ones.
        form: of the directions.
        at_random: whether the weights of the index were chosen at random.

    Raises:
        UsageError: there are no such layers.
    """

    def __init__(
        self,
        index: SensitiveIndex,
        spans: Sequence[tuple[int, int]],
        config: TrainConfig,
        shapes: Callable[[], Mapping[str, tuple[int, ...]]] = dict,
    ):
        self._positions = mx.array(np.concatenate([np.arange(*span, dtype=np.uint32) for span in spans]))
        self.everything = index.initial_values()
        self.initial = self.of(self.everything)
        scores = mx.array(np.concatenate([tensor.scores for tensor in index.tensors.values()]))
        kinds = STRUCTURES[config.structure]
        places = _places(index, shapes()) if kinds else {}
        groups = [np.unique(places[kind][self._positions], return_inverse=True)[1] for kind in kinds]
        scale = fisher_scale(self.of(scores), config.precondition)
        self.form = Form(scale, tuple(mx.array(own.astype(np.uint32)) for own in groups))
        self.at_random = index.mask == "random"

    def of(self, values: mx.array) -> mx.array:
        """From the values of all weights of the index, those of the trained ones: (K,)."""
        return values[self._positions]

    def among_all(self, values: mx.array) -> mx.array:
        """The values of all weights of the index, where the trained ones have `values`, (K,)."""
        return mx.put_along_axis(self.everything, self._positions, values, axis=0)


def _places(index: SensitiveIndex, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Numbers of the rows and columns that the weights of an index are in: (n,) int64, apart for all matrices."""
    rows, columns, first_row, first_column = [], [], 0, 0
    for path, tensor in index.tensors.items():
        if len(shapes.get(path, ())) < 2:
            raise UsageError(f"the sensitive index belongs to another model: it has no layer {path}")
        *experts, height, width = shapes[path]
        row, column = np.divmod(tensor.indices.astype(np.int64), width)
        rows.append(first_row + row)
        columns.append(first_column + row // height * width + column)
        first_row, first_column = first_row + math.prod(experts) * height, first_column + math.prod(experts) * width
    return {"row": np.concatenate(rows), "column": np.concatenate(columns)}
