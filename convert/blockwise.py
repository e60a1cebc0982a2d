"""Fisher scores with the memory of one transformer block."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files import reporting_disk_errors
from ..product import on_cpu
from .blocks import BlockwiseModel
from .gradients import Tape, taped
from .sensitivity import scored_layers, sequence_loss

# Block inputs held in memory; more of them go to files.
INPUT_BYTES = 256 << 20


def blockwise_fisher_scores(
    open_model: Callable[[], nn.Module],
    sequences: np.ndarray,
    scratch: Path,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, mx.array]]:
    """The scores of `fisher_scores`, holding one block's weights and scores, one gradient, and block inputs.

    Forward block by block, keeping each block's inputs; the head; then backward block by block. Each block is computed
    forward twice, so this takes 4/3 of the arithmetic.

    Args:
        open_model: gives the model with its weights not yet read, as often as it is called.
        sequences: (N, T) int32 tokens.
        scratch: a directory for block inputs that memory is not to hold.
        advance: called after each block and sequence, forward and backward.

    Yields:
        The path and (out, in) float32 scores of each layer of `scored_layers`, from the last block to the first.
    """

    def opened() -> BlockwiseModel:
        mx.clear_cache()
        model = open_model()
        if on_cpu():
            model.set_dtype(mx.float32)
        return BlockwiseModel(model)

    rows = [mx.array(row) for row in sequences]
    inputs = BlockInputs(scratch)
    model = opened()
    paths = scored_layers(model.model)
    blocks = len(model.blocks)
    states = [model.embed(row[None, :-1]) for row in rows]
    mx.eval(states)
    for i in range(blocks):
        model = opened()  # which lets go of the block before
        for n, row in enumerate(rows):
            inputs.put(i, n, states[n])
            states[n] = model.block(i, row[None, :-1], states[n])
            mx.eval(states[n])
            advance()

    model = opened()
    for n, row in enumerate(rows):
        states[n] = _loss_gradient(model, row, states[n])

    for i in reversed(range(blocks)):
        model = opened()
        inside = {id(m) for m in model.blocks[i].modules()}
        modules = dict(model.model.named_modules())
        layers = {p: modules[p] for p in paths if id(modules[p]) in inside}
        scores = {p: mx.zeros(m.weight.shape) for p, m in layers.items()}
        for n, row in enumerate(rows):
            tape, states[n] = _backward(model, i, layers, row, inputs.take(i, n), states[n])
            for path in layers:
                if (gradient := tape.gradient(path)) is not None:
                    scores[path] = scores[path] + gradient.astype(mx.float32).square() / len(rows)
                    mx.eval(scores[path])
            advance()
        del model, modules, layers
        while scores:
            yield scores.popitem()


def _loss_gradient(model: BlockwiseModel, row: mx.array, x: mx.array) -> mx.array:
    """The gradient of a sequence's loss with respect to the last block's output x."""

    def loss(x: mx.array) -> mx.array:
        return sequence_loss(model.head(row[None, :-1], x), row)

    gradient = mx.grad(loss)(x)
    mx.eval(gradient)
    return gradient


def _backward(
    model: BlockwiseModel, number: int, layers: dict[str, nn.Module], row: mx.array, x: mx.array, dy: mx.array
) -> tuple[Tape, mx.array]:
    """What a block's layers saw, and the gradient with respect to its input x, given that of its output."""
    with taped(layers) as tape:
        _, (dx,) = mx.vjp(lambda x: model.block(number, row[None, :-1], x), [x], [dy])
    mx.eval(dx, tape.arrays())
    return tape, dx


class BlockInputs:
    """What goes into each block, by block and sequence: in memory up to a limit, then in files."""

    def __init__(self, scratch: Path, limit: int | None = None):
        self._scratch = scratch
        self._left = INPUT_BYTES if limit is None else limit
        self._held: dict[tuple[int, int], mx.array] = {}

    def put(self, block: int, sequence: int, x: mx.array) -> None:
        """Keep an evaluated input until it is taken."""
        if x.nbytes <= self._left:
            self._left -= x.nbytes
            self._held[block, sequence] = x
        else:
            with reporting_disk_errors(self._scratch):
                mx.save_safetensors(str(self._file(block, sequence)), {"x": x})

    def take(self, block: int, sequence: int) -> mx.array:
        """Give an input back and forget it."""
        if (held := self._held.pop((block, sequence), None)) is not None:
            self._left += held.nbytes
            return held
        file = self._file(block, sequence)
        x: mx.array = mx.load(str(file))["x"]  # type: ignore[index, call-overload, assignment]
        mx.eval(x)
        file.unlink()
        return x

    def _file(self, block: int, sequence: int) -> Path:
        return self._scratch / f"input-{block}-{sequence}.safetensors"
