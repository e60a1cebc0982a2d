"""How much goes into a limit of memory: found out by doing it, with the longest example there is."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from . import estimator
from .answers import Judge
from .config import TrainConfig, filled
from .data import Example
from .exact import ExactGradient
from .head import Head
from .memory import peak_of, with_margin
from .objective import layout
from .prefix import Prefix
from .sparse import SparseModel
from .step import make_loss, tokens_of


def tokens_that_fit(
    limit: int,
    sparse: SparseModel,
    head: Head,
    values: mx.array,
    examples: Sequence[Example],
    config: TrainConfig,
    prefix: Prefix | None = None,
    judge: Judge | None = None,
) -> tuple[int, int]:
    """How many tokens a forward pass of `make_loss` may have within a limit in bytes, weights included: measured.

    What the prefix is yet to keep is not in it.

    Args:
        values: (K,) that are trained.
        examples: whose longest one is taken.
        config: resolved; estimator, directions and batch size are read.
        prefix: as for `make_loss`, and judge as well.

    Returns:
        As `_largest_that_fits`.
    """
    method = estimator.ESTIMATORS[config.estimator]
    directions = estimator.directions(config.seed, 1, filled(config.directions), values.size, config.law)
    branches = method.branches(values, directions, 1e-3)
    batch_size = filled(config.batch_size)
    size = len(method.shares(range(batch_size), len(directions))[0])

    def peak(rows: int) -> int:
        loss = make_loss(sparse, head, prefix, judge=judge)
        count = min(rows, len(branches)) if sparse.stackable else 1
        own = -(-rows // count)
        batch = longest_batch(examples, max(batch_size, own), prefix)
        return peak_of(lambda: mx.eval(loss(branches[:count], [batch[:own]] * count)))

    most = size * (len(branches) if sparse.stackable else 1)
    row = tokens_of([longest_batch(examples, 1, None)], head.continues and prefix is None, judge)
    return _largest_that_fits(limit, row, most, peak)


def exact_tokens_that_fit(
    limit: int, gradient: ExactGradient, values: mx.array, batch: Sequence[Example]
) -> tuple[int, int]:
    """`tokens_that_fit` for `exact_step`.

    Args:
        gradient: without a limit of its own.
        batch: as many of the longest example as a step has, and what its prefix holds is prepared.
    """
    row = layout([batch[:1]], gradient.continues)[0]
    return _largest_that_fits(limit, row, len(batch), lambda rows: _exact_peak(gradient, values, batch[:rows]))


def blocks_that_fit(limit: int, gradient: ExactGradient, values: mx.array, batch: Sequence[Example]) -> int:
    """For how many last blocks there is room for what `gradient.keep_blocks` holds, in a step of the whole batch."""

    def peak(keep: int) -> int:
        gradient.keep_blocks = keep - 1
        return _exact_peak(gradient, values, batch)

    return _largest_that_fits(limit, 1, gradient.blocks_trained + 1, peak)[0] - 1


def _exact_peak(gradient: ExactGradient, values: mx.array, examples: Sequence[Example]) -> int:
    return peak_of(lambda: mx.eval(gradient(values, examples)[1]))


def longest_batch(examples: Sequence[Example], size: int, prefix: Prefix | None) -> list[Example]:
    """As many of the longest example, with what a step holds of a prefix for them."""
    longest = max(examples, key=lambda e: e.length)
    batch = [replace(longest) for _ in range(size)]
    if prefix:
        prefix.prepare(batch)
    return batch


def _largest_that_fits(limit: int, row: int, most: int, peak: Callable[[int], int]) -> tuple[int, int]:
    """How many tokens may go through the model together.

    Passes of twice as many rows are tried until one takes too much, or the whole step fits; but of no more than would
    take too much if each row took as many bytes as the last ones did, so that looking for the limit does not exceed
    it. In between, a straight line is on the safe side: small passes take little more than a layer's weights, larger
    ones more for each token. What shorter examples take is less.

    Args:
        limit: in bytes.
        row: tokens of the longest example.
        most: examples in a step.
        peak: of so many of the longest example, in bytes.

    Returns:
        Tokens, which may be fewer than an example's; and the bytes that a pass takes with an example at a time.
    """
    aim = with_margin(limit)
    rows, taken = 1, (alone := peak(1))
    if alone > aim:
        return 1, alone
    more = min(2, most)
    while more > rows:
        found = peak(more)
        each = (found - taken) / (more - rows)
        if found > aim:
            return int(row * (rows + (aim - taken) / each)), alone
        rows, taken, more = more, found, min(2 * more, most)
        if each > 0:
            more = min(more, rows + int((aim - taken) / each))
    return row * rows, alone
