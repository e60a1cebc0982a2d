"""The learning rate and epsilon that nobody has to guess, and what keeps a run with them sane.

Everything here is a function of the step records alone, so that a replay of the journal repeats it bit by bit.

Where slopes come from few examples, their mean square is noise for the most part, and by the information equality the
curvature is proportional to it as well. The rate that gains most in a step of q directions, q |g|^2 / (E[s^2] tr H), is
then proportional to q / E[s^2], whatever the task and the scale of the weights. docs/numbers.md has the measurements.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .estimator import root_mean_square
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
# Losses are averaged over this many steps. An average above the lowest one by a quarter of it, and by this many
# standard errors, is an explosion.
WINDOW, ERRORS = 25, 8.0
# Halved this often, a rate does not move anything any more.
MOST_HALVINGS = 10


def sgd_rate(square: float, directions: int, step: int, nats: float = NATS) -> float:
    """SGD's learning rate in a step (from 1), from the mean square of the slopes."""
    return nats * directions / square / (1 + (step - 1) / SLOWING)


def exact_rate(origin: mx.array, share: float) -> Callable[[mx.array], mx.array]:
    """Learning rates by step (from 0) for exact gradients and an optimizer that divides by their size.

    Args:
        origin: (K,) the values before the first step; a step moves them by a share of their root mean square.
        share: how large, before the rates fall.
    """
    highest = share * root_mean_square(origin)
    return lambda step: highest * mx.minimum((step + 1) / WARMUP, 1) / (1 + step / SLOWING)


class Control:
    """Learning rate and epsilon from the slopes seen so far, outliers clipped, the way back after an explosion.

    Args:
        values: (K,) float32, before the first step.
        jumps: whether the objective is one that only changes by jumps, as scores of answers do.
        epsilon: the user's own, which stays as it is; None finds one.
        compares: whether a step's examples are to be evaluated at the first values, too, until something is gained.

    Attributes:
        state: before the first step. `good` holds values to go back to, `good_step` when they were reached.
    """

    def __init__(self, values: mx.array, jumps: bool = False, epsilon: float | None = None, compares: bool = False):
        self._jumps, self._fixed = jumps, epsilon is not None
        self.state: State = {
            "seen": mx.array(0),
            "mean_square": mx.array(0.0),
            "epsilon": mx.array(FIRST_EPSILON if epsilon is None else epsilon),
            "halvings": mx.array(0),
            "window": mx.zeros(3),  # of losses: how many, their sum, and the sum of their squares
            "lowest": mx.array([float(np.finfo(np.float32).max), 0.0]),  # of the windows: mean, and its variance
            "good": values,
            "good_step": mx.array(0),
            "look": mx.array(WINDOW if compares else 0),  # steps after which the next look at what is gained ends
            "gains": mx.zeros(3),  # how many steps of it there were, of the last half the sum of gains, and of squares
        }

    def compares(self, state: State) -> bool:
        """Whether the next step's examples are to be evaluated at the first values, too."""
        return bool(state["look"].item())

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
        return rate * 0.5 ** state["halvings"].item()

    def settle(self, state: State, record: Record, values: mx.array) -> tuple[mx.array, State, bool]:
        """Judge the losses, at the end of a step and of a window: the values to go on with, and whether to go back.

        Args:
            values: (K,) after the step.
        """
        if not record.is_finite:
            return self._back(state)
        count, total, squares = state["window"].tolist()
        count, total, squares = count + 1, total + record.loss, squares + record.loss**2
        if count < WINDOW:
            return self._look({**state, "window": mx.array([count, total, squares])}, record, values)
        mean = total / count
        variance = max(0.0, squares / count - mean * mean)
        lowest, variance_then = state["lowest"].tolist()
        # A score may have been the same throughout the lowest window: then only what it does now says how it varies.
        spread = variance_then + (variance if self._jumps else 0.0)
        if mean > lowest + max(abs(lowest) / 4, ERRORS * math.sqrt(spread / WINDOW)):
            return self._back(state)
        new = {**state, "window": mx.zeros(3)}
        if mean < lowest:
            new |= {"lowest": mx.array([mean, variance]), "good": values, "good_step": mx.array(record.step)}
        return self._look(new, record, values)

    def _back(self, state: State) -> tuple[mx.array, State, bool]:
        anew = {"window": mx.zeros(3), "gains": mx.zeros(3)}
        return state["good"], {**state, **anew, "halvings": state["halvings"] + 1}, True

    def _look(self, state: State, record: Record, values: mx.array) -> tuple[mx.array, State, bool]:
        """`settle`, as far as it goes by what is gained over the first values on the examples of these steps.

        Where there is hardly anything to be learned, steps of the usual size make a model worse. So until the gain, in
        the last half of a look, is above its standard error, the values go back to the first ones, at half the rate,
        and the next look is twice as long. The first is a window.
        """
        length = int(state["look"].item())
        if length == 0 or math.isnan(record.initial):
            return values, state, False
        steps, total, squares = state["gains"].tolist()
        steps, gain = steps + 1, record.initial - record.loss
        if steps > length // 2:
            total, squares = total + gain, squares + gain**2
        if steps < length:
            return values, {**state, "gains": mx.array([steps, total, squares])}, False
        count = length - length // 2
        mean = total / count
        error = math.sqrt(max(0.0, squares / count - mean * mean) / (count - 1))
        if mean > error:
            return values, {**state, "gains": mx.zeros(3), "look": mx.array(0)}, False
        first = {name: self.state[name] for name in ("lowest", "good", "good_step")}
        return self._back({**state, **first, "look": mx.array(2 * length)})
