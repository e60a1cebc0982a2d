"""The update rule of a run: one of `mlx.optimizers`, as a pure function."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map
from mlx_lm.tuner.utils import build_schedule

from .config import OPTIMIZERS, TrainConfig

State = dict[str, Any]


class Optimizer:
    """Values, state and gradient estimate in; new values and state out.

    The rule sees how far the values are from where they began. So weight decay draws them back there, not to zero.

    Args:
        config: resolved; optimizer, its arguments and the schedule of learning rates are read.
        origin: (K,) float32, the values before the first step.

    Attributes:
        state: before the first step.
    """

    def __init__(self, config: TrainConfig, origin: mx.array):
        assert config.lr_schedule is not None, "the settings are not resolved"
        kind = getattr(optim, OPTIMIZERS[config.optimizer])
        arguments = (config.optimizer_config or {}).get(config.optimizer, {})
        self._rule: optim.Optimizer = kind(build_schedule(config.lr_schedule), **arguments)
        self._origin = origin
        self._rule.init({"values": origin})
        self.state: State = self._rule.state

    def apply(self, values: mx.array, state: State, gradient: mx.array) -> tuple[mx.array, State]:
        """One update. Of (K,) values and gradient; `state` is left as it is."""
        self._rule.state = tree_map(lambda leaf: leaf, state)
        moved = self._rule.apply_gradients({"values": gradient}, {"values": values - self._origin})["values"]
        new = self._origin + moved
        mx.eval(new, self._rule.state)
        return new, self._rule.state
