"""The sparse layer of mixture-of-experts models, whose experts' weights lie in one array.

For every routed row, as in `sparse`, y = x @ Q[e].T + x[U[e]] @ D[e].T, with the columns U[e] of its expert e.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .product import dequantized


class SparseSwitchLinear(nn.Module):
    """mlx-lm's `SwitchLinear` or `QuantizedSwitchLinear` plus the difference of its sensitive weights, for one branch.

    The model sorts rows by expert before it calls this layer, so that rows of several branches cannot be told apart.

    Args:
        base: the layer, with an effective weight of (experts, out, in).
        indices: (n,) uint32, flat row-major positions of the trainable weights in (experts, out, in), increasing.
    """

    def __init__(self, base: nn.Module, indices: np.ndarray):
        super().__init__()
        self.base = base
        weight = dequantized(base)
        experts, self._out, width = weight.shape
        expert, position = np.divmod(indices, self._out * width)
        row, column = np.divmod(position, width)
        # Each expert's own columns, in order; experts with fewer than the most are padded with column 0 and D = 0.
        used, place = np.unique(expert.astype(np.uint64) * width + column, return_inverse=True)
        owner = (used // width).astype(np.int64)
        slot = np.arange(len(used)) - np.searchsorted(owner, owner)
        columns = np.zeros((experts, slot.max() + 1), np.uint32)
        columns[owner, slot] = used % width
        self._columns = mx.array(columns)
        flat = (expert.astype(np.int64) * columns.shape[1] + slot[place]) * self._out + row
        self._slots = mx.array(flat.astype(np.uint32))
        self._base_values = weight.reshape(-1)[mx.array(indices)]
        self._values: mx.array | Callable[[], mx.array] | None = None
        self._difference: mx.array | None = None
        mx.eval(self._columns, self._slots, self._base_values)

    def set_values(self, values: mx.array | Callable[[], mx.array] | None, keep: bool = False) -> None:
        """Set the trainable weights, (1, n) float32 or what makes them, as for `SparseLinear`."""
        self._values = values
        self._difference = self.difference(values[0])[1] if keep else None  # type: ignore[index]

    def difference(self, values: mx.array) -> tuple[np.ndarray, mx.array]:
        """What values (n,) add to the base weights: columns (E, C) of the experts, and each D transposed (E, C, out).

        Experts with fewer columns than the most have column 0 again, with a difference of 0.
        """
        experts, columns = self._columns.shape
        difference = mx.zeros(experts * columns * self._out)
        difference[self._slots] = values - self._base_values
        return np.array(self._columns), difference.reshape(experts, columns, self._out)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: (..., 1, in) rows and (...) experts, as mlx-lm's layer takes them -> (..., 1, out)."""
        y = self.base(x, indices, sorted_indices=sorted_indices)
        if self._values is None:
            return y
        difference = self._difference
        if difference is None:
            (own,) = self._values() if callable(self._values) else self._values
            _, difference = self.difference(own)
        columns = self._columns[indices][..., None, :]
        rows = mx.broadcast_to(x, (*columns.shape[:-1], x.shape[-1]))
        gathered = mx.take_along_axis(rows, columns, axis=-1)
        return y + mx.gather_mm(
            gathered, difference.astype(y.dtype), rhs_indices=indices, sorted_indices=sorted_indices
        )
