"""The gradients of linear layers' weights from what goes in and what comes back, one layer at a time.

For y = x @ W.T the gradient of W is dy.T @ x, so a backward pass that keeps x and dy of every layer (a few rows each)
gives all gradients without holding more than one of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


class Tape:
    """What went into each linear layer (rows, in) and the gradient that came back (rows, out), for every call."""

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[mx.array, list[mx.array]]]] = {}

    def record(self, path: str, x: mx.array, y: mx.array) -> mx.array:
        """Note a layer's input; return its output so that a backward pass will note the gradient of it."""
        returned: list[mx.array] = []
        self._calls.setdefault(path, []).append((x, returned))

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
        return [a for calls in self._calls.values() for x, returned in calls for a in (x, *returned)]

    def gradient(self, path: str) -> mx.array | None:
        """The gradient of a layer's weight, (out, in), summed over its calls; None if it was not called."""
        total = None
        for x, returned in self._calls.get(path, ()):
            for dy in returned:
                product = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
                total = product if total is None else total + product
        return total


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
    def call(layer: nn.Module, x: mx.array) -> mx.array:
        return tape.record(path, x, kind.__call__(layer, x))  # type: ignore[operator]

    return type(kind.__name__, (kind,), {"__call__": call})
