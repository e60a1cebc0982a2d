"""What keeps a run sane whose learning rates are chosen, whatever they come from.

As for the rates, everything here is a function of the step records alone.
"""

import math
from typing import Any

import mlx.core as mx
import numpy as np

from .journal import Record

State = dict[str, Any]

# Losses are averaged over the first steps, and then over this many. An average above the lowest one by a quarter of
# it, and by this many standard errors of their difference, is an explosion.
FIRST, WINDOW, ERRORS = 10, 25, 6.0
# Halved this often, a rate does not move anything any more.
MOST_HALVINGS = 10
# The lowest mean, as long as there is none.
_NONE = float(np.finfo(np.float32).max)


class Guard:
    """The way back after an explosion, and from steps that gain nothing, with rates halved from then on.

    Args:
        values: (K,) float32, before the first step.
        compares: whether a step's examples are to be evaluated at the first values, too, until something is gained.

    Attributes:
        state: before the first step. `good` holds values to go back to, `good_step` when they were reached.
    """

    def __init__(self, values: mx.array, compares: bool = False):
        self.state: State = {
            "halvings": mx.array(0),
            "back_at": mx.array(0),  # the last step that went back
            "window": mx.zeros(3),  # of losses: how many, their sum, and the sum of their squares
            "lowest": mx.array([_NONE, 0.0]),  # of the windows' means, and its variance
            "good": values,
            "good_step": mx.array(0),
            "look": mx.array(WINDOW if compares else 0),  # steps after which the next look at what is gained ends
            "gains": mx.zeros(3),  # how many steps of it there were, of the last half the sum of gains, and of squares
        }

    def compares(self, state: State) -> bool:
        """Whether the next step's examples are to be evaluated at the first values, too."""
        return bool(state["look"].item())

    def halved(self, rate: float, state: State) -> float:
        """A learning rate that was chosen, after what happened so far."""
        return rate * 0.5 ** int(state["halvings"].item())

    def steps_since(self, state: State, step: int) -> int:
        """How many steps, up to this one (from 1), there are from the beginning or since the last that went back."""
        return step - int(state["back_at"].item())

    def is_exhausted(self, state: State) -> bool:
        """Whether going back once more would be of no use."""
        return int(state["halvings"].item()) > MOST_HALVINGS

    def settle(self, state: State, record: Record, values: mx.array) -> tuple[mx.array, State, bool]:
        """Judge the losses, at the end of a step and of a window: the values to go on with, and whether to go back.

        Args:
            values: (K,) after the step.
        """
        if not record.is_finite:
            return self._back(state, record)
        count, total, squares = state["window"].tolist()
        count, total, squares = count + 1, total + record.loss, squares + record.loss**2
        lowest, variance_then = state["lowest"].tolist()
        if count < (FIRST if lowest == _NONE else WINDOW):
            return self._look({**state, "window": mx.array([count, total, squares])}, record, values)
        mean = total / count
        # The lowest window may have been a lucky one, of no hard examples: what varies is to be seen in this one, too.
        variance = max(0.0, squares / count - mean * mean) / count
        if mean > lowest + max(abs(lowest) / 4, ERRORS * math.sqrt(variance_then + variance)):
            return self._back(state, record)
        new = {**state, "window": mx.zeros(3)}
        if mean < lowest:
            new |= {"lowest": mx.array([mean, variance]), "good": values, "good_step": mx.array(record.step)}
        return self._look(new, record, values)

    def _back(self, state: State, record: Record) -> tuple[mx.array, State, bool]:
        anew = {"window": mx.zeros(3), "gains": mx.zeros(3), "back_at": mx.array(record.step)}
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
        return self._back({**state, **first, "look": mx.array(2 * length)}, record)
