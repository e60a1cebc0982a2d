"""Linear layers whose sensitive weights can differ from branch to branch of one forward pass.

For a base weight Q, trainable positions (r, c) and U = the sorted unique columns c, a branch with values v computes

    y = x @ Q.T + x[..., U] @ D.T        D: (out, |U|), D[r, pos(c)] = v - Q[r, c]

which is exactly x @ W.T with W = Q except W[r, c] = v. Sensitive weights cluster in few columns, so D is small. The P
branches of a step are stacked along the batch axis (P * B rows): Q is read once for all of them.
"""

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .errors import UsageError
from .estimator import Branches
from .index import SensitiveIndex
from .product import LINEAR_LAYERS, SWITCH_LAYERS, dequantized, linear, weight_shape
from .switch import SparseSwitchLinear

# The branches' D is made in parts of this size, some rows of the layer after the others.
DIFFERENCE_BYTES = 8 << 20

_CHECK_TOKENS = [[1, 3, 2], [2, 1, 3]]


class SparseLinear(nn.Module):
    """A linear layer plus the difference of its sensitive weights, one difference per branch.

    Args:
        base: `nn.Linear` or `nn.QuantizedLinear` with an effective weight of (out, in).
        indices: (n,) uint32, flat row-major positions of the trainable weights in (out, in).
        own: (n,) which of the values that are set these are, if others are not in this layer.
    """

    def __init__(self, base: nn.Module, indices: np.ndarray, own: np.ndarray | None = None):
        super().__init__()
        self.base = base
        weight = dequantized(base)
        self._out, self._width = weight.shape
        self._indices, self._used = indices, np.unique(indices % self._width)
        # A leading underscore keeps these out of the module's parameters.
        self._columns = mx.array(self._used.astype(np.uint32))
        self._base_values = weight.reshape(-1)[mx.array(indices)]
        self._slots: dict[tuple[int, int], tuple[slice, mx.array]] = {}
        self._own = None if own is None else mx.array(own.astype(np.uint32))
        self._values: mx.array | Callable[[], mx.array] | None = None
        self._difference: mx.array | None = None
        mx.eval(self._columns, self._base_values)

    def set_values(self, values: mx.array | Callable[[], mx.array] | None, keep: bool = False) -> None:
        """Set the trainable weights of every branch.

        Args:
            values: (P, n) float32, or what makes them when the layer is called, or None to compute with the base
                weights alone.
            keep: make D once, of values that are there, and hold it; else it is made where it is used, and MLX frees it
                after the layer.
        """
        self._values = values
        self._difference = self._make_difference(self._own_values(), slice(0, self._out)) if keep else None

    def _own_values(self) -> mx.array:
        values: mx.array = self._values() if callable(self._values) else self._values  # type: ignore[assignment]
        return values if self._own is None else values[:, self._own]

    def difference(self, values: mx.array) -> tuple[np.ndarray, mx.array]:
        """What values (n,) add to the base weights: columns (1, |U|), and D transposed (1, |U|, out)."""
        return self._used[None], self._make_difference(values[None], slice(0, self._out))

    def _make_difference(self, values: mx.array, rows: slice, after: mx.array | None = None) -> mx.array:
        """Some rows of D for every branch, transposed: (P, |U|, rows). Not begun before `after` is made."""
        own, slots = self._part(rows)
        base, height = self._base_values[own], rows.stop - rows.start
        if after is not None:
            (base,) = mx.depends([base], [mx.stop_gradient(after)])
        zeros = mx.zeros((len(values), self._columns.size * height))
        # Four times as fast on the CPU as an assignment to difference[:, slots].
        slots = mx.broadcast_to(slots, (len(values), slots.size))
        difference = mx.put_along_axis(zeros, slots, values[:, own] - base, axis=1)
        return difference.reshape(-1, self._columns.size, height)

    def _part(self, rows: slice) -> tuple[slice, mx.array]:
        """Which of the trainable weights lie in some rows, and their places in those rows of D; found once."""
        if (found := self._slots.get((rows.start, rows.stop))) is None:
            ends = rows.start * self._width, rows.stop * self._width
            own = slice(*np.searchsorted(self._indices, ends).tolist())
            row, column = np.divmod(self._indices[own].astype(np.int64), self._width)
            place = np.searchsorted(self._used, column) * (rows.stop - rows.start) + row - rows.start
            found = self._slots[rows.start, rows.stop] = own, mx.array(place.astype(np.uint32))
        return found

    def __call__(self, x: mx.array) -> mx.array:
        """x: (P * B, ..., in) -> (P * B, ..., out); the rows of a branch are consecutive."""
        if self._values is None or not self._indices.size:
            return self.base(x)
        values = self._own_values()
        count = len(values)
        # Four to eighteen times as fast on the CPU as x[..., columns].
        columns = mx.broadcast_to(self._columns, (*x.shape[:-1], self._columns.size))
        gathered = mx.take_along_axis(x, columns, axis=-1).reshape(count, -1, self._columns.size)

        def add(y: mx.array, difference: mx.array) -> mx.array:
            stacked = y.reshape(count, -1, y.shape[-1])
            return mx.addmm(stacked, gathered, difference.astype(y.dtype)).reshape(y.shape)

        if self._difference is not None:
            return add(self.base(x), self._difference)
        # To each part of the product while it is in the processor's cache.
        parts = -(-4 * count * self._columns.size * self._out // DIFFERENCE_BYTES)
        return linear(self.base, x, parts, lambda y, rows: add(y, self._make_difference(values, rows, after=y)))


class SparseModel:
    """A model with its sensitive weights attached: `values` (P, K) in, P branches of the model out.

    Args:
        model: an mlx-lm model; its layers named in `index` are replaced by `SparseLinear`.
        index: the model's sensitive index.
        own: of a model that is spread over ranks: for each tensor of the index, which of the whole one's weights it
            has, and how many these are.

    Attributes:
        stackable: whether P > 1 branches can be set; else they are to be computed one by one. True until shown
            otherwise, by a layer that handles one branch only or by `check_branches`.

    Raises:
        UsageError: the index names layers or positions that the model does not have.
    """

    def __init__(self, model: nn.Module, index: SensitiveIndex, own: dict[str, tuple[np.ndarray, int]] | None = None):
        self.model = model
        self.stackable = True
        # With where their values begin and end.
        self._layers: list[tuple[SparseLinear | SparseSwitchLinear, int, int]] = []
        modules = dict(model.named_modules())
        wrong = [
            f"{path} ({problem})"
            for path, tensor in index.tensors.items()
            if (problem := _mismatch(modules.get(path), int(tensor.indices.max(initial=0))))
        ]
        if wrong:
            raise UsageError(f"the sensitive index belongs to another model: {', '.join(wrong[:5])}")
        end = 0
        for path, tensor in index.tensors.items():
            module = modules[path]
            layer: SparseLinear | SparseSwitchLinear
            if isinstance(module, SWITCH_LAYERS):
                layer = SparseSwitchLinear(module, tensor.indices)
                self.stackable = False
            else:
                layer = SparseLinear(module, tensor.indices, own[path][0] if own else None)
            model.update_modules(tree_unflatten([(path, layer)]))
            start, end = end, end + (own[path][1] if own else tensor.size)
            self._layers.append((layer, start, end))

    @property
    def size(self) -> int:
        """K, the number of trainable weights."""
        return self._layers[-1][2]

    def train_last(self, blocks: int, values: mx.array) -> list[tuple[int, int]]:
        """Let only the last blocks be trained from now on; the others' sensitive weights are set for good.

        Args:
            blocks: how many of the last blocks; those that are not there do not matter.
            values: (K,) float32 of all layers.

        Returns:
            Where in `values` those are that are still to be set, from start to end: the new `size` of them.

        Raises:
            UsageError: none of the blocks has any trainable weights.
        """
        kept = []
        for number, (layer, start, end) in zip(self._block_numbers(), self._layers, strict=True):
            if number >= len(self.model.layers) - blocks:
                kept.append((layer, start, end))
            else:
                layer.set_values(values[None, start:end])
        if not kept:
            raise UsageError(f"--num-layers {blocks}: the last {blocks} blocks have no sensitive weights")
        self._layers, size = [], 0
        spans: list[tuple[int, int]] = []
        for layer, start, end in kept:
            self._layers.append((layer, size, size := size + end - start))
            joined = spans.pop()[0] if spans and spans[-1][1] == start else start
            spans.append((joined, end))
        return spans

    def last_half(self) -> int:
        """How many blocks are the last half of all, or -1 if these have less than a tenth of the trainable weights."""
        half = -(-len(self.model.layers) // 2)
        sizes = np.array([end - start for _, start, end in self._layers])
        late = np.array(self._block_numbers()) >= len(self.model.layers) - half
        return half if 10 * sizes[late].sum() >= self.size else -1

    def spans(self) -> dict[int, list[tuple[SparseLinear | SparseSwitchLinear, int, int]]]:
        """By block: its layers, and where their values begin and end."""
        found: dict[int, list[tuple[SparseLinear | SparseSwitchLinear, int, int]]] = {}
        for number, span in zip(self._block_numbers(), self._layers, strict=True):
            found.setdefault(number, []).append(span)
        return found

    @property
    def first_block(self) -> int:
        """The number of the first block with trainable weights."""
        return min(self._block_numbers())

    def _block_numbers(self) -> list[int]:
        """For each layer, the block it is in; what is in none counts as after the last."""
        blocks = self.model.layers
        numbers = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
        return [numbers.get(id(layer), len(blocks)) for layer, _, _ in self._layers]

    def set_values(self, values: mx.array | Branches | None, keep: bool = False) -> None:
        """Set the values of P branches.

        Args:
            values: (P, K) float32; None computes with the base model alone.
            keep: hold every layer's D: worth its memory where text is generated token by token.
        """
        for layer, start, end in self._layers:
            if isinstance(values, Branches):
                layer.set_values(partial(values.part, start, end))
            elif values is None:
                layer.set_values(None)
            else:
                layer.set_values(values[:, start:end], keep)

    def check_branches(self, values: mx.array) -> None:
        """Find out whether branches stacked in one pass are computed apart, by comparing with passes of their own.

        Args:
            values: (K,) of one of them.

        Raises:
            UsageError: the model cannot be computed with sparse layers at all.
        """
        tokens = mx.array(_CHECK_TOKENS)
        branches = mx.stack([values, values + 4 * mx.abs(values).mean()])
        try:
            apart = []
            for values in branches:
                self.set_values(values[None])
                apart.append(self.model(tokens))
            mx.eval(apart)
            if self.stackable:
                self.set_values(branches)
                stacked = self.model(mx.concatenate([tokens, tokens]))
                error = float(mx.abs(stacked - mx.concatenate(apart)).max())
                effect = float(mx.abs(apart[1] - apart[0]).max())
                self.stackable = error <= 0.05 * effect
        except Exception as e:  # whatever an architecture does with layers that are not its own
            raise UsageError(f"{type(self.model).__module__} cannot be trained: {type(e).__name__}: {e}") from None
        finally:
            self.set_values(None)

    def check_derivative(self, values: mx.array) -> None:
        """Raise UsageError for a model that cannot be differentiated in forward mode, with values (K,)."""

        def at(values: mx.array) -> mx.array:
            self.set_values(values[None])
            return self.model(mx.array(_CHECK_TOKENS))

        try:
            mx.eval(mx.jvp(at, [values], [mx.ones_like(values)]))
        except Exception as e:  # of operations that have none
            raise UsageError(
                f"--estimator jvp: {type(self.model).__module__} has no forward-mode derivative: {e}"
            ) from None
        finally:
            self.set_values(None)


def _mismatch(module: nn.Module | None, last: int) -> str | None:
    if module is None:
        return "no such layer"
    if not isinstance(module, LINEAR_LAYERS):
        return f"a {type(module).__name__}, not a linear layer"
    size = math.prod(weight_shape(module))
    return f"position {last} outside its {size} weights" if last >= size else None
