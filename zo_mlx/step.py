"""One training step: a function of values, optimizer state, examples, step number and settings."""

import contextlib
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from . import estimator
from .config import TrainConfig
from .data import Example
from .head import Head
from .journal import Record
from .memory import peak_of, with_margin
from .objective import branch_losses, collate, layout, scores
from .optimizer import Optimizer, State
from .prefix import Prefix
from .sparse import SparseModel

Loss = Callable[[estimator.Branches, Sequence[Example]], mx.array]


def make_loss(sparse: SparseModel, head: Head, prefix: Prefix | None = None, tokens_at_once: int | None = None) -> Loss:
    """The losses of the branches of a step.

    Args:
        prefix: computes what the branches have in common, where there is such a thing.
        tokens_at_once: the most tokens, padding included, of one forward pass: branches go into passes of their own
            before a branch's examples do. At least one example is in a pass. None is no limit.

    Returns:
        A function of 2q branches and the step's examples to (2q,) losses. The examples are dealt out to the q
        directions, so that each gets its share of every label; the two branches of a direction see the same ones.
    """

    continues = head.continues and prefix is None

    def loss(branches: estimator.Branches, examples: Sequence[Example]) -> mx.array:
        q = len(branches) // 2
        shares = [examples[d::q] for d in range(q) for _ in range(2)]
        size = len(shares[0])
        by_tokens = sum(len(e.targets[0]) for e in examples) / q
        count = size if examples[0].label is not None else by_tokens
        at_once, examples_at_once = (len(branches) if sparse.stackable else 1), size
        if tokens_at_once is not None:
            fit = tokens_at_once / layout(shares, continues)[0]
            at_once = max(1, min(at_once, int(fit)))
            examples_at_once = max(1, min(size, int(fit * size)))
        losses = []
        for start in range(0, len(branches), at_once):
            sparse.set_values(branches[start : start + at_once])
            total = mx.zeros(1)
            for first in range(0, size, examples_at_once):
                group = [share[first : first + examples_at_once] for share in shares[start : start + at_once]]
                batch = collate(group, continues)
                with prefix.skipped(batch.tokens, group) if prefix else contextlib.nullcontext():
                    total = total + branch_losses(scores(head, batch), batch, count)
                    mx.eval(total)
            losses.append(total)
        return mx.concatenate(losses)

    return loss


def tokens_that_fit(
    limit: int, sparse: SparseModel, head: Head, values: mx.array, longest: Example, batch_size: int
) -> tuple[int, int]:
    """How many tokens a forward pass may have within a limit in bytes, weights included: measured.

    Passes of twice as many rows are tried until one takes too much, or the whole step fits. In between, a straight line
    is on the safe side: small passes take little more than a layer's weights, larger ones more for each token. What
    shorter examples take is less.

    Args:
        values: (K,) that are trained.
        longest: the example with the longest row.
        batch_size: examples of a step.

    Returns:
        Tokens, which may be fewer than an example's; and the bytes that a pass takes with an example at a time.
    """

    def peak(size: int, tokens_at_once: int | None = None) -> int:
        loss = make_loss(sparse, head, tokens_at_once=tokens_at_once)
        z = mx.ones((size if sparse.stackable else 1, values.size), mx.int8)
        return peak_of(lambda: mx.eval(loss(estimator.two_sided(values, z, 1e-3), [longest] * size)))

    aim, row = with_margin(limit), layout([[longest]], head.continues)[0]
    fit, taken = row, (alone := peak(1, tokens_at_once=1))
    if alone > aim:
        return 1, alone
    for size in [*(2**i for i in range(batch_size.bit_length())), batch_size]:
        tokens = row * size * (2 if sparse.stackable else 1)
        if tokens > fit:
            if (more := peak(size)) > aim:
                return int(fit + (tokens - fit) * (aim - taken) / (more - taken)), alone
            fit, taken = tokens, more
    return fit, alone


def step(
    loss: Loss,
    optimizer: Optimizer,
    values: mx.array,
    state: State,
    examples: Sequence[Example],
    number: int,
    config: TrainConfig,
) -> tuple[mx.array, State, Record]:
    """One step: q directions, 2q branches in one forward pass, one update.

    Args:
        loss: from `make_loss`.
        optimizer: gives the update rule.
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
    mx.eval(z)  # every layer reads its part of them
    losses = loss(estimator.two_sided(values, z, config.epsilon), examples)
    projected = estimator.projected_gradients(losses, config.epsilon)
    record = Record(number, losses.mean().item(), np.array(projected))  # type: ignore[arg-type]
    return *update(optimizer, values, state, record, z), record


def update(optimizer: Optimizer, values: mx.array, state: State, record: Record, z: mx.array) -> tuple[mx.array, State]:
    """Apply a step's record: the part of a step that a replay repeats. z: (q, K), from `estimator.directions`."""
    return optimizer.apply(values, state, estimator.gradient_estimate(mx.array(record.projected), z))


def replay(
    optimizer: Optimizer, values: mx.array, state: State, records: Sequence[Record], config: TrainConfig
) -> tuple[mx.array, State]:
    """Repeat the updates of some consecutive steps from their records alone."""
    for record in records:
        z = estimator.directions(config.seed, record.step, len(record.projected), values.size)
        values, state = update(optimizer, values, state, record, z)
    return values, state
