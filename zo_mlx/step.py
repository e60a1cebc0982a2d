"""One training step: a function of values, optimizer state, examples, step number and settings."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.tuner.utils import build_schedule

from . import estimator
from .config import TrainConfig
from .data import Example
from .head import Head
from .journal import Record
from .objective import branch_losses, collate, scores
from .prefix import Prefix
from .sparse import SparseModel

State = dict[str, Any]
Loss = Callable[[mx.array, Sequence[Example]], mx.array]


def make_loss(sparse: SparseModel, head: Head, prefix: Prefix | None = None) -> Loss:
    """The losses of the branches of a step.

    Args:
        prefix: computes what the branches have in common, where there is such a thing.

    Returns:
        A function of (2q, K) values and the step's examples to (2q,) losses. The examples are dealt out to the q
        directions, so that each gets its share of every label; the two branches of a direction see the same ones.
    """

    def loss(values: mx.array, examples: Sequence[Example]) -> mx.array:
        directions = len(values) // 2
        shares = [examples[d::directions] for d in range(directions) for _ in range(2)]
        tokens = sum(len(e.targets[0]) for e in examples) / directions
        at_once = len(values) if sparse.stackable else 1
        losses = []
        for start in range(0, len(values), at_once):
            group = shares[start : start + at_once]
            batch = collate(group)
            sparse.set_values(values[start : start + at_once])
            with prefix.skipped(batch.tokens, group) if prefix else contextlib.nullcontext():
                losses.append(branch_losses(scores(head, batch), batch, tokens))
                mx.eval(losses[-1])
        return mx.concatenate(losses)

    return loss


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """The run's optimizer, with no state yet."""
    assert config.lr_schedule is not None, "the settings are not resolved"
    return {"sgd": optim.SGD, "adam": optim.Adam}[config.optimizer](build_schedule(config.lr_schedule))


def step(
    loss: Loss,
    optimizer: optim.Optimizer,
    values: mx.array,
    state: State,
    examples: Sequence[Example],
    number: int,
    config: TrainConfig,
) -> tuple[mx.array, State, Record]:
    """One step: q directions, 2q branches in one forward pass, one update.

    Args:
        loss: from `make_loss`.
        optimizer: gives the update rule; its own state is replaced.
        values: (K,) float32.
        state: the optimizer's.
        examples: B of them, a multiple of q.
        number: of the step, from 1.
        config: seed, epsilon and directions are read.

    Returns:
        The new values and state, and the record from which `update` gives them again.
    """
    assert config.directions is not None, "the settings are not resolved"
    z = estimator.directions(config.seed, number, config.directions, values.size)
    losses = loss(estimator.branches(values, z, config.epsilon), examples)
    projected = estimator.projected_gradients(losses, config.epsilon)
    record = Record(number, losses.mean().item(), np.array(projected))  # type: ignore[arg-type]
    return *update(optimizer, values, state, record, z), record


def update(
    optimizer: optim.Optimizer, values: mx.array, state: State, record: Record, z: mx.array
) -> tuple[mx.array, State]:
    """Apply a step's record: the part of a step that a replay repeats. z: (q, K), from `estimator.directions`."""
    gradient = estimator.gradient_estimate(mx.array(record.projected), z)
    optimizer.state = tree_map(lambda leaf: leaf, state)
    new = optimizer.apply_gradients({"values": gradient}, {"values": values})["values"]
    mx.eval(new, optimizer.state)
    return new, optimizer.state


def replay(
    optimizer: optim.Optimizer, values: mx.array, state: State, records: Sequence[Record], config: TrainConfig
) -> tuple[mx.array, State]:
    """Repeat the updates of some consecutive steps from their records alone."""
    for record in records:
        z = estimator.directions(config.seed, record.step, len(record.projected), values.size)
        values, state = update(optimizer, values, state, record, z)
    return values, state
