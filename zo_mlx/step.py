"""One training step: a function of values, optimizer state, examples, step number and settings."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from . import estimator
from .answers import Judge
from .config import TrainConfig, filled
from .data import Example
from .head import Head
from .journal import Record
from .objective import branch_losses, collate, denominator, layout, most_at_once, scores
from .optimizer import Optimizer, State
from .prefix import Prefix
from .sparse import SparseModel

# Values and examples, and what their losses are divided by, to the loss and its gradient: an `exact.ExactGradient`.
Gradient = Callable[..., tuple[float, mx.array]]


class BranchLosses(Protocol):
    """An `estimator.Loss` of which other processes may take a part."""

    def __call__(
        self, branches: estimator.Branches, shares: Sequence[Sequence[Example]], count: float | None = None
    ) -> mx.array:
        """As `estimator.Loss`: sums over the examples, divided by `count`, or by `objective.denominator`."""


def make_loss(
    sparse: SparseModel,
    head: Head,
    prefix: Prefix | None = None,
    tokens_at_once: int | None = None,
    judge: Judge | None = None,
) -> BranchLosses:
    """The losses of the branches of a step.

    Args:
        prefix: computes what the branches have in common, where there is such a thing.
        tokens_at_once: the most tokens, padding included, of one forward pass: branches go into passes of their own
            before a branch's examples do. At least one example is in a pass. None is no limit.
        judge: the loss is minus the mean of its scores; None is cross-entropy.

    Returns:
        A function of P branches, and of the examples that each is evaluated on, as `estimator.Loss` is.
    """

    continues = head.continues and prefix is None

    def part(group: Sequence[Sequence[Example]], count: float, traced: bool = False) -> mx.array:
        if judge and judge.generates:
            return -judge.text_scores(head, group).sum(axis=-1) / count
        batch = collate(group, continues)
        with prefix.skipped(batch.tokens, group) if prefix else contextlib.nullcontext():
            scored = scores(head, batch, traced)
        if judge:
            return -judge.choice_scores(scored, group).sum(axis=-1) / count
        return branch_losses(scored, batch, count)

    def derived(branches: estimator.Branches, group: Sequence[Sequence[Example]], count: float) -> mx.array:
        def at(distances: mx.array) -> mx.array:
            sparse.set_values(replace(branches, distances=distances))
            return part(group, count, traced=True)

        along = mx.zeros(len(branches.offsets))
        (losses,), (slopes,) = mx.jvp(at, [along], [mx.ones_like(along)])
        return mx.stack([losses, slopes], axis=1)

    def loss(branches: estimator.Branches, shares: Sequence[Sequence[Example]], count: float | None = None) -> mx.array:
        size, count = len(shares[0]), count or denominator(shares, judge is not None)
        # What lies apart goes after the others: it is to take no memory beside them.
        at_once, own = max(1, len(branches.offsets) if sparse.stackable else 1), size
        if tokens_at_once is not None:

            def fits(some: slice, part: slice) -> bool:
                group = [share[part] for share in shares[some]]
                return len(group) * tokens_of(group, continues, judge) <= tokens_at_once

            at_once = most_at_once(len(shares), at_once, lambda some: fits(some, slice(size)))
            if at_once == 1:
                each = range(len(shares))
                own = most_at_once(size, size, lambda part: all(fits(slice(i, i + 1), part) for i in each))
        losses = []
        for start in range(0, len(branches), at_once):
            some = branches[start : start + at_once]
            sparse.set_values(some)
            total = mx.zeros(1)
            for first in range(0, size, own):
                group = [share[first : first + own] for share in shares[start : start + at_once]]
                total = total + (derived(some, group, count) if some.derived else part(group, count))
                mx.eval(total)
            losses.append(total)
        return mx.concatenate(losses)

    return loss


def rows_of_step(config: TrainConfig) -> int:
    """How many examples a step evaluates, each branch's counted."""
    if config.gradient == "exact":
        return filled(config.batch_size)
    shares = estimator.ESTIMATORS[config.estimator].shares(range(filled(config.batch_size)), filled(config.directions))
    return sum(map(len, shares))


def tokens_of(shares: Sequence[Sequence[Example]], continues: bool, judge: Judge | None) -> int:
    """How many tokens a branch takes, padding included."""
    return judge.tokens(shares) if judge and judge.generates else layout(shares, continues)[0]


def step(
    loss: estimator.Loss,
    optimizer: Optimizer,
    values: mx.array,
    state: State,
    examples: Sequence[Example],
    number: int,
    config: TrainConfig,
    form: estimator.Form = estimator.FREE,
) -> tuple[mx.array, State, Record]:
    """One step: q directions, their branches in one forward pass, one update.

    Args:
        loss: from `make_loss`.
        optimizer: gives the update rule.
        values: (K,) float32, the result of the steps before; the step is taken from the optimizer's `point`.
        state: the optimizer's.
        examples: B of them; a multiple of q where the estimator divides them among the directions.
        number: of the step, from 1.
        config: resolved; seed, estimator, directions and their law are read.
        form: of the directions.

    Returns:
        The new values and state, and the record from which `replay` gives them again.
    """
    directions = estimator.directions(config.seed, number, filled(config.directions), values.size, config.law, form)
    method, epsilon = estimator.ESTIMATORS[config.estimator], optimizer.epsilon(state)
    branches = method.branches(optimizer.point(values, state), directions, epsilon)
    shares = method.shares(examples, len(directions))
    if (origin := optimizer.compared_with(state)) is not None:
        branches, shares = replace(branches, apart=origin), [*shares, examples]
    losses = loss(branches, shares)
    mean, slopes = method.slopes(losses[: len(branches.offsets)], epsilon)
    initial = math.nan if origin is None else losses[-1].reshape(-1)[0].item()
    record = Record(number, mean.item(), np.array(slopes), initial=initial)  # type: ignore[arg-type]
    return *optimizer.apply(values, state, record, directions), record


def exact_step(
    gradient: Gradient,
    optimizer: Optimizer,
    values: mx.array,
    state: State,
    examples: Sequence[Example],
    number: int,
) -> tuple[mx.array, State, Record]:
    """`step` with the exact gradient, rounded to bfloat16 as the loss is to float32: the record holds what it uses."""
    loss, exact = gradient(optimizer.point(values, state), examples)
    rounded = exact.astype(mx.bfloat16).astype(mx.float32)
    record = Record(number, float(np.float32(loss)), np.array(rounded))
    return *optimizer.apply(values, state, record), record


def replay(
    optimizer: Optimizer,
    values: mx.array,
    state: State,
    records: Iterable[Record],
    config: TrainConfig,
    form: estimator.Form = estimator.FREE,
) -> tuple[mx.array, State]:
    """Repeat the updates of some consecutive steps from their records alone."""
    for record in records:
        if config.gradient == "exact":
            directions = None
        else:
            directions = estimator.directions(
                config.seed, record.step, len(record.projected), values.size, config.law, form
            )
        values, state = optimizer.apply(values, state, record, directions)
    return values, state
