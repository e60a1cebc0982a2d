"""Fisher scores with the memory of one transformer block."""

import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..blocks import BlockwiseModel, opened, run_blocks
from ..product import weight_shape
from .checkpoint import Checkpoint
from .gradients import Tape, taped
from .sensitivity import scored_layers, sequence_loss


def blockwise_fisher_scores(
    open_model: Callable[[], nn.Module],
    sequences: np.ndarray,
    checkpoint: Checkpoint,
    memory_limit: int | None = None,
    advance: Callable[[str], None] = lambda phase: None,
) -> Iterator[tuple[str, mx.array]]:
    """The scores of `fisher_scores`, holding one block's weights and scores, one gradient, and one block's inputs.

    Forward block by block, keeping each block's inputs in files; the head; then backward block by block. Each block is
    computed forward twice, so this takes 4/3 of the arithmetic.

    Args:
        open_model: gives the model with its weights not yet read, as often as it is called. Quantized layers are scored
            like the dense ones they stand for.
        sequences: (N, T) int32 tokens.
        checkpoint: of the same model and sequences, or empty: the blocks that it has finished are not repeated. What is
            noted there between two scores becomes part of it.
        memory_limit: bytes to aim at: a block's layers are scored in groups (each of which costs another pass through
            the block). A block's own weights are the least there is.
        advance: called with `forward` and `backward` after each block and sequence.

    Yields:
        Path and float32 scores, of the weight's shape, of each of `scored_layers`, from the last block to the first.
    """
    rows = [mx.array(row) for row in sequences]
    if checkpoint.backward is None:
        _forward(open_model, rows, checkpoint, advance)
    assert checkpoint.backward is not None
    states = checkpoint.gradients(checkpoint.backward)
    for i in reversed(range(checkpoint.backward)):
        with opened(open_model) as model:
            yield from _score_block(model, i, rows, checkpoint.inputs(i), states, memory_limit, advance)
        checkpoint.finish(i, states)


def _forward(
    open_model: Callable[[], nn.Module],
    rows: list[mx.array],
    checkpoint: Checkpoint,
    advance: Callable[[str], None],
) -> None:
    """Fill a checkpoint with what goes into every block, and the gradients with respect to the last one's output."""
    first = checkpoint.forward
    known = None if first is None else checkpoint.inputs(first)
    for number, states in run_blocks(open_model, rows, known, first or 0, lambda: advance("forward")):
        checkpoint.put_inputs(number, states)
    last = checkpoint.forward
    assert last is not None
    with opened(open_model) as model:
        gradients = [_loss_gradient(model, row, x) for row, x in zip(rows, checkpoint.inputs(last), strict=True)]
    checkpoint.finish(last, gradients)


def _score_block(
    model: BlockwiseModel,
    number: int,
    rows: list[mx.array],
    inputs: list[mx.array],
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
    room = None if memory_limit is None else memory_limit - 2 * sum(x.nbytes for x in states)
    groups = _groups({p: 4 * math.prod(shape) for p, shape in shapes.items()}, room)
    outputs = list(states)
    for group in groups:
        scores = {p: mx.zeros(shapes[p]) for p in group}
        for n, row in enumerate(rows):
            tape, states[n] = _backward(model, number, {p: layers[p] for p in group}, row, inputs[n], outputs[n])
            for path in group:
                gradient = tape.gradient(path, shapes[path]).astype(mx.float32)
                scores[path] = scores[path] + gradient.square() / len(rows)
                mx.eval(scores[path])
            if group is groups[-1]:
                advance("backward")
        while scores:
            yield scores.popitem()


def _groups(sizes: dict[str, int], limit: int | None) -> list[list[str]]:
    """Layers to be scored together: their scores are to fit what the weights of all of them leave of the limit."""
    room = float("inf") if limit is None else limit - sum(sizes.values())
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
        # Without the block's output, which would hold what it is made from.
        (dx,) = mx.vjp(lambda x: model.block(number, row[None, :-1], x), [x], [dy])[1]
    mx.eval(dx, tape.arrays())
    return tape, dx
