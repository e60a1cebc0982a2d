"""Fisher scores with the memory of one transformer block."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files import reporting_disk_errors
from ..product import prepare, weight_shape
from .blocks import BlockwiseModel
from .gradients import Tape, taped
from .sensitivity import scored_layers, sequence_loss

# Block inputs held in memory; more of them go to files.
INPUT_BYTES = 256 << 20


def blockwise_fisher_scores(
    open_model: Callable[[], nn.Module],
    sequences: np.ndarray,
    scratch: Path,
    memory_limit: int | None = None,
    advance: Callable[[str], None] = lambda phase: None,
) -> Iterator[tuple[str, mx.array]]:
    """The scores of `fisher_scores`, holding one block's weights and scores, one gradient, and block inputs.

    Forward block by block, keeping each block's inputs; the head; then backward block by block. Each block is computed
    forward twice, so this takes 4/3 of the arithmetic.

    Args:
        open_model: gives the model with its weights not yet read, as often as it is called. Quantized layers are scored
            like the dense ones they stand for.
        sequences: (N, T) int32 tokens.
        scratch: a directory for block inputs that memory is not to hold.
        memory_limit: bytes to aim at: fewer block inputs are held, and a block's layers are scored in groups (each
            of which costs another pass through the block). A block's own weights are the least there is.
        advance: called with `forward` and `backward` after each block and sequence.

    Yields:
        Path and float32 scores, of the weight's shape, of each of `scored_layers`, from the last block to the first.
    """

    def opened() -> BlockwiseModel:
        mx.clear_cache()
        return BlockwiseModel(prepare(open_model()))

    rows = [mx.array(row) for row in sequences]
    inputs = BlockInputs(scratch, INPUT_BYTES if memory_limit is None else memory_limit // 8)
    with opened() as model:
        blocks = len(model.blocks)
        states = [model.embed(row[None, :-1]) for row in rows]
        mx.eval(states)
    for i in range(blocks):
        with opened() as model:
            for n, row in enumerate(rows):
                inputs.put(i, n, states[n])
                states[n] = model.block(i, row[None, :-1], states[n])
                mx.eval(states[n])
                advance("forward")
    with opened() as model:
        for n, row in enumerate(rows):
            states[n] = _loss_gradient(model, row, states[n])
    for i in reversed(range(blocks)):
        with opened() as model:
            yield from _score_block(model, i, rows, inputs, states, memory_limit, advance)


def _score_block(
    model: BlockwiseModel,
    number: int,
    rows: list[mx.array],
    inputs: "BlockInputs",
    states: list[mx.array],
    memory_limit: int | None,
    advance: Callable[[str], None],
) -> Iterator[tuple[str, mx.array]]:
    """The scores of a block's layers; `states`, the gradients of its outputs, become those of its inputs."""
    inside = {id(m) for m in model.blocks[number].modules()}
    modules = dict(model.model.named_modules())
    layers = {p: modules[p] for p in scored_layers(model.model) if id(modules[p]) in inside}
    del modules
    shapes = {p: weight_shape(m) for p, m in layers.items()}
    groups = _groups({p: 4 * math.prod(shape) for p, shape in shapes.items()}, memory_limit)
    outputs = list(states)
    for group in groups:
        scores = {p: mx.zeros(shapes[p]) for p in group}
        for n, row in enumerate(rows):
            tape, states[n] = _backward(
                model, number, {p: layers[p] for p in group}, row, inputs.get(number, n), outputs[n]
            )
            for path in group:
                gradient = tape.gradient(path, shapes[path]).astype(mx.float32)
                scores[path] = scores[path] + gradient.square() / len(rows)
                mx.eval(scores[path])
            if group is groups[-1]:
                advance("backward")
        while scores:
            yield scores.popitem()
    for n in range(len(rows)):
        inputs.drop(number, n)


def _groups(sizes: dict[str, int], memory_limit: int | None) -> list[list[str]]:
    """Layers to be scored together: their scores are to fit what the weights of all of them leave of the limit."""
    room = float("inf") if memory_limit is None else memory_limit - memory_limit // 8 - sum(sizes.values())
    groups: list[list[str]] = [[]]
    used = 0
    for path, size in sizes.items():
        if groups[-1] and used + 2 * size > room:  # a gradient is made beside the scores
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += size
    return groups


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
    """What goes into each block, by block and sequence: in memory up to a limit in bytes, then in files."""

    def __init__(self, scratch: Path, limit: int):
        self._scratch, self._left = scratch, limit
        self._held: dict[tuple[int, int], mx.array] = {}

    def put(self, block: int, sequence: int, x: mx.array) -> None:
        """Keep an evaluated input until it is dropped."""
        if x.nbytes <= self._left:
            self._left -= x.nbytes
            self._held[block, sequence] = x
        else:
            with reporting_disk_errors(self._scratch):
                mx.save_safetensors(str(self._file(block, sequence)), {"x": x})

    def get(self, block: int, sequence: int) -> mx.array:
        """An input that was put and not dropped yet."""
        if (held := self._held.get((block, sequence))) is not None:
            return held
        return mx.load(str(self._file(block, sequence)))["x"]  # type: ignore[index, call-overload, return-value]

    def drop(self, block: int, sequence: int) -> None:
        """Forget an input."""
        if (held := self._held.pop((block, sequence), None)) is not None:
            self._left += held.nbytes
        else:
            self._file(block, sequence).unlink()

    def _file(self, block: int, sequence: int) -> Path:
        return self._scratch / f"input-{block}-{sequence}.safetensors"
