"""The learning rate and epsilon that nobody has to guess.

Everything here is a function of the step records alone, so that a replay of the journal repeats it bit by bit.

Where slopes come from few examples, their mean square is noise for the most part, and by the information equality the
curvature is proportional to it as well. The rate that gains most in a step of q directions, q |g|^2 / (E[s^2] tr H), is
then proportional to q / E[s^2], whatever the task and the scale of the weights. docs/numbers.md has the measurements.
"""

import math
from typing import Any

import mlx.core as mx
import numpy as np

from .journal import Record

State = dict[str, Any]

# The learning rate of SGD is this many nats, times the directions, over the mean square of the slopes so far. It falls
# as 1 / (1 + step / SLOWING): the gradient falls faster than its noise, and so does the rate that gains most.
NATS, SLOWING = 0.02, 100
# Values stay where they are until this many directions have been measured: the mean of fewer squares is no guide.
MEASURED = 16
# Until then branches lie this far from the values; from then on so far that a slope makes this difference in nats.
FIRST_EPSILON, DIFFERENCE = 1e-3, 0.02
# A score jumps: near the values it mostly is what it is there. Branches go out twice as far, step by step, until at
# least half of a step's slopes are not 0, but no further than this.
FARTHEST = 0.5
# Of what such branches change, this share is a score's counterpart to NATS: how far out they lie is no longer small.
SCORE_SHARE = 0.1
# With exact gradients, a step moves each value by about this share of their root mean square, which the first steps
# work up to: gradients are largest then, and agree, and Adam's estimates are of a few of them. The loss depends less on
# weights chosen at random, which bear a larger share, and learn little with the other.
EXACT_SHARE, RANDOM_SHARE, WARMUP = 0.01, 0.05, 10
# Slopes count for at most this many times the root of the mean square of those before.
OUTLIER = 5.0


def sgd_rate(square: float, directions: int, step: int, nats: float = NATS) -> float:
    """SGD's learning rate in a step (from 1), from the mean square of the slopes."""
    return nats * directions / square / (1 + (step - 1) / SLOWING)


def exact_rate(full: float, step: int, since: int) -> float:
    """Of a step (from 1) with exact gradients, for an optimizer that divides by their size.

    Args:
        full: the rate before it falls, where nothing has to be worked up to.
        since: of how many steps, with this one, the optimizer's estimates are.
    """
    return full * min(since / WARMUP, 1) / (1 + (step - 1) / SLOWING)


class Control:
    """Learning rate and epsilon from the slopes seen so far, outliers clipped.

    Args:
        jumps: whether the objective is one that only changes by jumps, as scores of answers do.
        epsilon: the user's own, which stays as it is; None finds one.

    Attributes:
        state: before the first step.
    """

    def __init__(self, jumps: bool = False, epsilon: float | None = None):
        self._jumps, self._fixed = jumps, epsilon is not None
        self.state: State = {
            "seen": mx.array(0),
            "mean_square": mx.array(0.0),
            "epsilon": mx.array(FIRST_EPSILON if epsilon is None else epsilon),
        }

    def observe(self, state: State, record: Record) -> tuple[np.ndarray, State]:
        """Take a step's slopes in: (q,) float32 slopes, clipped, and the new state."""
        slopes, seen, square = record.projected, int(state["seen"].item()), state["mean_square"].item()
        if seen >= MEASURED and square > 0:
            limit = np.float32(OUTLIER * math.sqrt(square))
            slopes = np.clip(slopes, -limit, limit)
        if not np.isfinite(slopes).all():
            return np.zeros_like(slopes), state
        epsilon = state["epsilon"].item()
        farther = self._jumps and not self._fixed and seen < MEASURED and epsilon < FARTHEST
        if farther and 2 * np.count_nonzero(slopes) < len(slopes):
            anew = {"epsilon": mx.array(min(2 * epsilon, FARTHEST)), "seen": mx.array(0), "mean_square": mx.array(0.0)}
            return np.zeros_like(slopes), {**state, **anew}
        count = seen + len(slopes)
        # Exact sums, which do not depend on an order.
        square += (math.fsum(s * s for s in slopes.tolist()) / len(slopes) - square) * len(slopes) / count
        new = {**state, "seen": mx.array(count), "mean_square": mx.array(square)}
        if seen < MEASURED <= count and square > 0 and not (self._jumps or self._fixed):
            new["epsilon"] = mx.array(DIFFERENCE / math.sqrt(square))
        return slopes, new

    def learning_rate(self, state: State, record: Record, scale_free: bool) -> float:
        """Of a step whose record was observed.

        Args:
            scale_free: whether the optimizer divides by the size of the gradient (Adam, Lion), which is the root of
                the mean square over q.
        """
        square = state["mean_square"].item()
        if state["seen"].item() < MEASURED or square == 0:
            return 0.0
        nats = SCORE_SHARE * state["epsilon"].item() * math.sqrt(square) if self._jumps else NATS
        rate = sgd_rate(square, len(record.projected), record.step, nats)
        if scale_free:
            rate *= math.sqrt(square / len(record.projected))
        return rate
