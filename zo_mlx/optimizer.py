"""The update rule of a run: one of `mlx.optimizers`, as a pure function."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.tuner.utils import build_schedule

from .config import OPTIMIZERS, TrainConfig, filled
from .control import EXACT_SHARE, MEASURED, RANDOM_SHARE, WARMUP, Control, exact_rate
from .estimator import Directions, root_mean_square
from .guard import Guard
from .journal import Record
from .metric import CROSS_ENTROPY

State = dict[str, Any]

# These divide by the size of the gradient, and their learning rates are what values move by.
SCALE_FREE = {"adam", "adamw", "lion"}

# The weight of what a step leads to, in the average that is the result: (1 + ETA) / (step + ETA), so that the last
# part of the steps, one in 1 + ETA of them, counts (Shamir and Zhang 2013, arXiv 1212.1824, section 4).
ETA = 4

# Where the learning rate is given, epsilon is what the field uses with such rates (Malladi et al. 2023).
GIVEN_EPSILON = 1e-3

# Rates of the user's own that are so many times lower than those that would be chosen are taken for a mistake.
TOO_LOW = 10


def _share(name: str, arguments: dict[str, Any]) -> float:
    """How large a rate is to be beside that of SGD, or Adam, so that both go equally far along a small gradient.

    Momentum adds gradients up, dampening makes them less. Lion takes the sign of c = b1 m + (1 - b1) g, whose mean,
    where all but nothing of c is noise of a standard deviation d, is that of c times sqrt(2 / pi) / d.
    """
    if name == "lion":
        b1, b2 = arguments.get("betas", (0.9, 0.99))
        return math.sqrt(math.pi / 2 * ((1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)))
    momentum = arguments.get("momentum", 0.0)
    return (1 - momentum) / (1 - arguments.get("dampening", 0.0)) if momentum else 1.0


class Optimizer:
    """Values, state, and a step's record and directions in; new values and state out.

    The rule sees how far the values are from where they began. So weight decay draws them back there, not to zero.
    Where the learning rates are chosen, they stay high enough for the values to wander: the result is an average over
    the last steps then, and the next step is taken from elsewhere, at `point`.

    Args:
        config: resolved; optimizer, its arguments, epsilon and the schedule of learning rates are read. Without a
            schedule, `Control` chooses the rates, or for exact gradients `exact_rate`, and a `Guard` watches over them.
        origin: (K,) float32, the values before the first step.
        at_random: whether they are of weights chosen at random.

    Attributes:
        state: before the first step.
    """

    def __init__(self, config: TrainConfig, origin: mx.array, at_random: bool = False):
        name = filled(config.optimizer)
        arguments = (config.optimizer_config or {}).get(name, {})
        self._share = _share(name, arguments)
        schedule = None if config.lr_schedule is None else build_schedule(config.lr_schedule)
        if name in ("adam", "adamw") and (config.gradient == "exact" or schedule is None):
            # Without it their first steps are longer than the rates say: three times the very first, and more after it.
            arguments = {"bias_correction": True, **arguments}
        is_exact, is_chosen = config.gradient == "exact", schedule is None
        # With exact gradients, what a step moves the values by, as a share of their root mean square.
        self._moves = self._share * (RANDOM_SHARE if at_random else EXACT_SHARE)
        self._size = root_mean_square(origin) if is_exact else 0.0
        # The highest of the rates that would be in place of the user's own.
        doubts = is_exact and not is_chosen and name in SCALE_FREE
        self._would_be = exact_rate(self._moves * self._size, WARMUP, WARMUP) if doubts else 0.0
        self._rule: optim.Optimizer = getattr(optim, OPTIMIZERS[name])(schedule or 0.0, **arguments)
        self._rule.init({"values": origin})
        self._origin = origin
        own = None if config.epsilon == "auto" else float(config.epsilon)
        jumps = config.objective != CROSS_ENTROPY
        compares = config.estimator != "two-sided" and not jumps and not is_exact
        self._control = Control(jumps, own) if is_chosen and not is_exact else None
        self._guard = Guard(origin, compares) if is_chosen else None
        self._scale_free = name in SCALE_FREE
        self._epsilon = GIVEN_EPSILON if own is None and self._control is None else own
        # Only to see what it would choose in place of the user's own rates.
        watching = not (is_chosen or is_exact or jumps)
        self._watch = Control() if watching else None
        self._watched = self._watch.state if self._watch else {}
        steps = mx.array(np.linspace(0, config.iters, 101, dtype=int))
        self._highest = max(float(schedule(step)) for step in steps) if schedule else 0.0
        self.state: State = {"rule": self._rule.state}
        if self._control:
            self.state["control"] = self._control.state
        if self._guard:
            self.state |= {"guard": self._guard.state, "point": origin}

    def learning_rate(self, state: State) -> float:
        """Of the last step."""
        return float(state["rule"]["learning_rate"].item())

    def point(self, values: mx.array, state: State) -> mx.array:
        """(K,) from where the next step is to be taken: the values themselves unless these are an average."""
        return state.get("point", values)

    def compared_with(self, state: State) -> mx.array | None:
        """(K,) where the next step's examples are to be evaluated as well, to see what has been gained on them."""
        return self._origin if self._guard and self._guard.compares(state["guard"]) else None

    def epsilon(self, state: State) -> float:
        """How far the next step's branches are to lie from the values."""
        return float(state["control"]["epsilon"].item()) if self._epsilon is None else self._epsilon

    def can_go_on(self, state: State) -> bool:
        """Whether a step whose losses are not finite is no reason to stop: it led back to earlier values."""
        return self._guard is not None and not self._guard.is_exhausted(state["guard"])

    def news(self, before: State, after: State) -> dict[str, Any] | None:
        """What a step decided for the steps to come, for the log: as an event, or None."""
        if self._guard is None:
            return None
        if self._control is None and before["guard"]["back_at"].item() == before["rule"]["step"].item() == 0:
            share = exact_rate(self._moves, WARMUP, WARMUP)
            return {"event": "chosen", "learning_rate": share * self._size, "share": share, "warmup": WARMUP}
        old, new = before["guard"], after["guard"]
        halvings = new["halvings"].item()
        if new["look"].item() > old["look"].item():
            return {"event": "restarted", "steps": old["look"].item(), "halvings": halvings}
        if halvings > old["halvings"].item():
            return {"event": "returned", "step": new["good_step"].item(), "halvings": halvings}
        if self._control and before["control"]["seen"].item() < MEASURED <= after["control"]["seen"].item():
            control = after["control"]
            return {
                "event": "chosen",
                "learning_rate": self.learning_rate(after),
                "epsilon": self.epsilon(after),
                "slope": math.sqrt(control["mean_square"].item()),
                "directions": control["seen"].item(),
            }
        return None

    def doubt(self, record: Record) -> str | None:
        """What is to be said, once, after the steps that show it: learning rates of the user's own are far too low."""
        rate = self._would_be
        if self._watch:
            _, self._watched = self._watch.observe(self._watched, record)
            rate = self._share * self._watch.learning_rate(self._watched, record, self._scale_free)
        if rate == 0:
            return None
        self._watch, self._would_be = None, 0.0
        if TOO_LOW * self._highest >= rate:
            return None
        return (
            f"the learning rate, {self._highest:.1e}, is far below the {rate:.1e} that would be chosen: the run will "
            "hardly learn. Leave --learning-rate and lr_schedule out to have it chosen"
        )

    def apply(
        self, values: mx.array, state: State, record: Record, directions: Directions | None = None
    ) -> tuple[mx.array, State]:
        """One step's update of (K,) values, which are the result so far. `state` is left as it is.

        Args:
            directions: the record's; None if its slopes are those along each of the K values.
        """
        slopes, new = record.projected, {}
        self._rule.state = tree_map(lambda leaf: leaf, state["rule"])
        if self._guard:
            if self._control:
                slopes, new["control"] = self._control.observe(state["control"], record)
                rate = self._share * self._control.learning_rate(new["control"], record, self._scale_free)
            else:
                since = self._guard.steps_since(state["guard"], record.step)
                rate = exact_rate(self._moves * self._size, record.step, since)
            self._rule.state["learning_rate"] = mx.array(self._guard.halved(rate, state["guard"]))
        gradient = mx.array(slopes) if directions is None else directions.mean(slopes)
        away = self.point(values, state) - self._origin
        point = self._origin + self._rule.apply_gradients({"values": gradient}, {"values": away})["values"]
        if self._guard:
            point, new["guard"], back = self._guard.settle(state["guard"], record, point)
            if back:  # what was gathered on the way to an explosion is of no use
                last = self._rule.state["learning_rate"]
                self._rule.state, values = {**self.state["rule"], "learning_rate": last}, point
        if "point" in state:
            new["point"] = point
            values = values + (1 + ETA) / (record.step + ETA) * (point - values)
        else:
            values = point
        new["rule"] = self._rule.state
        mx.async_eval(values, new)  # what is next to be waited for, waits for this as well
        return values, new
