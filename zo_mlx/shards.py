"""A model spread over ranks by mlx-lm's own `shard`: which part of its sensitive weights a rank's layers have.

mlx-lm gives each rank some rows of a layer's weight, or some columns, whose products it adds up over the ranks. Which
ones depends on the architecture. It is found out with a second model, in the place of whose numbers are their places.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers import distributed
from mlx.utils import tree_unflatten

from .errors import UsageError
from .index import SensitiveIndex, SensitiveTensor
from .product import SWITCH_LAYERS, prepare, weight_shape
from .sparse import SparseModel

# Layers that are handed whole rows, and those that add up over ranks.
_BY_ROWS = (distributed.AllToShardedLinear, distributed.QuantizedAllToShardedLinear)
_SUMMED = (distributed.ShardedToAllLinear, distributed.QuantizedShardedToAllLinear)


@dataclass(frozen=True)
class Part:
    """The part of a layer's weight that a rank has.

    Attributes:
        rows, columns: of the whole weight, in the order in which the part has them.
    """

    rows: np.ndarray
    columns: np.ndarray

    def of(self, indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of some flat positions (n,) in a whole weight with so many columns are in the part.

        Returns:
            (m,) numbers of the n, and their positions in the part, (m,) uint32, increasing.
        """
        row, column = np.divmod(indices.astype(np.int64), width)
        local_row, local_column = _places(self.rows, row), _places(self.columns, column)
        own = np.flatnonzero((local_row >= 0) & (local_column >= 0))
        local = local_row[own] * len(self.columns) + local_column[own]
        order = np.argsort(local)
        return own[order], local[order].astype(np.uint32)


def _places(own: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Where each of some numbers is in `own`; -1 if it is not there."""
    found = np.full(1 + max(own.max(), numbers.max()), -1, np.int64)
    found[own] = np.arange(len(own))
    return found[numbers]


class Summed(nn.Module):
    """A layer that has some columns of a weight; its products are added up over the ranks."""

    def __init__(self, layer: nn.Module, bias: mx.array | None):
        super().__init__()
        self.layer = layer
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self.layer(x))
        return y + self.bias if "bias" in self else y


def shard(model: nn.Module, twin: nn.Module, index: SensitiveIndex) -> SparseModel:
    """Leave a rank's part of a model, with its part of the sensitive weights.

    Args:
        model: as mlx-lm loads it lazily; changed.
        twin: the same, loaded again; of no use afterwards.
        index: of the whole model, whose values are what is to be set.

    Raises:
        UsageError: mlx-lm cannot shard this architecture, or not over so many ranks; or it has experts.
    """
    if not hasattr(model, "shard"):
        raise UsageError(f"{type(model).__module__} cannot be spread over ranks: mlx-lm has no shard for it")
    if any(isinstance(m, SWITCH_LAYERS) for _, m in model.named_modules()):
        raise UsageError("models with experts cannot be spread over ranks yet")
    widths = {}
    for path, layer in _linear(twin):
        widths[path] = weight_shape(layer)[1]
        numbered(layer)
    try:
        model.shard()
        twin.shard()
    except ValueError as e:
        raise UsageError(f"the model cannot be spread over so many ranks: {e}") from None
    places = dict(_linear(twin))
    tensors, own = {}, {}
    for path, layer in _linear(model):
        place = path
        if is_summed := isinstance(layer, _SUMMED):
            bias, place = layer.pop("bias", None), f"{path}.layer"
            model.update_modules(tree_unflatten([(path, Summed(layer, bias))]))
        if is_summed or isinstance(layer, _BY_ROWS):
            layer.__class__ = nn.QuantizedLinear if "scales" in layer else nn.Linear
        mx.eval(layer.parameters())
        if path in index.tensors:
            whole = index.tensors[path]
            which, indices = part_of(places[path], widths[path]).of(whole.indices, widths[path])
            tensors[place] = SensitiveTensor(indices, whole.values[mx.array(which)], whole.scores[which])
            own[place] = which, whole.size
    ordered = {place: tensors[place] for path in index.tensors for place in (path, f"{path}.layer") if place in tensors}
    mx.eval(model.parameters())
    return SparseModel(prepare(model, float32=True), SensitiveIndex(ordered), own)


def numbered(layer: nn.Module) -> nn.Module:
    """Put in the place of a layer's scales, or of its weight without any, the numbers of their places."""
    name = "scales" if "scales" in layer else "weight"
    layer[name] = mx.arange(layer[name].size, dtype=mx.int64).reshape(layer[name].shape)
    return layer


def part_of(layer: nn.Module, width: int) -> Part:
    """From what is left in a `numbered` layer, of so many columns, that was cut."""
    size = layer.group_size if "scales" in layer else 1  # columns that a number stands for
    numbers = np.array(layer.scales if "scales" in layer else layer.weight)
    rows, groups = numbers[:, 0] // (width // size), numbers[0] % (width // size)
    return Part(rows, (groups[:, None] * size + np.arange(size)).reshape(-1))


def _linear(model: nn.Module) -> list[tuple[str, Any]]:
    kinds = (nn.Linear, nn.QuantizedLinear, *_BY_ROWS, *_SUMMED)
    return [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]
