"""The gradients of linear layers' weights from what goes in and what comes back, one layer at a time.

For y = x @ W.T the gradient of W is dy.T @ x, so a backward pass that keeps x and dy of every layer (a few rows each)
gives all gradients without holding more than one of them. For experts, of the rows that were routed to each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Tape:
    """What went into each linear layer (rows, in) and the gradient that came back (rows, out), for every call."""

    def __init__(self) -> None:
        self._calls: dict[str, list[_Call]] = {}

    def record(self, path: str, x: mx.array, experts: mx.array | None, y: mx.array) -> mx.array:
        """Note a layer's input; return its output so that a backward pass will note the gradient of it."""
        returned: list[mx.array] = []
        self._calls.setdefault(path, []).append(_Call(x, experts, returned))

        @mx.custom_function
        def noted(y: mx.array) -> mx.array:
            return y

        @noted.vjp
        def note(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            returned.append(cotangent)
            return cotangent

        return noted(y)  # type: ignore[return-value]

    def arrays(self) -> list[mx.array]:
        """All that was noted, to be evaluated together."""
        return [a for calls in self._calls.values() for call in calls for a in (call.x, *call.returned)]

    def gradient(self, path: str, shape: tuple[int, ...]) -> mx.array:
        """The gradient of a layer's weight of (out, in) or (experts, out, in), summed over its calls."""
        total = mx.zeros(shape)
        for call in self._calls.get(path, ()):
            for dy in call.returned:
                total = total + call.product(dy, shape)
        return total


@dataclass
class _Call:
    x: mx.array
    experts: mx.array | None
    returned: list[mx.array]

    def product(self, dy: mx.array, shape: tuple[int, ...]) -> mx.array:
        if self.experts is None:
            return dy.reshape(-1, dy.shape[-1]).T @ self.x.reshape(-1, self.x.shape[-1])
        dy = dy.reshape(-1, dy.shape[-1])
        x = mx.broadcast_to(self.x, (*self.experts.shape, 1, self.x.shape[-1])).reshape(-1, self.x.shape[-1])
        routed = np.array(self.experts).reshape(-1)
        parts = []
        for expert in range(shape[0]):
            rows = mx.array(np.flatnonzero(routed == expert))
            parts.append(dy[rows].T @ x[rows] if rows.size else mx.zeros(shape[1:]))
        return mx.stack(parts)


@contextmanager
def taped(layers: dict[str, nn.Module]) -> Iterator[Tape]:
    """Let linear layers report to a tape while the block runs."""
    tape = Tape()
    originals = {path: type(layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.__class__ = _reporting(originals[path], path, tape)
    try:
        yield tape
    finally:
        for path, layer in layers.items():
            layer.__class__ = originals[path]


def _reporting(kind: type, path: str, tape: Tape) -> type:
    def call(layer: nn.Module, x: mx.array, experts: mx.array | None = None, **kwargs: bool) -> mx.array:
        routing = () if experts is None else (experts,)
        return tape.record(path, x, experts, kind.__call__(layer, x, *routing, **kwargs))  # type: ignore[operator]

    return type(kind.__name__, (kind,), {"__call__": call})
