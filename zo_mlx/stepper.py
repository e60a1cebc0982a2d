"""What takes a run's steps, and the memory that they are given."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .config import TrainConfig
from .fit import longest_batch
from .journal import Record
from .memory import is_shortage, peak_of
from .optimizer import Optimizer, State
from .prefix import Prefix
from .product import on_cpu
from .ranks import Ranks
from .setup import Report, Setup
from .split import Split
from .step import exact_step, make_loss, rows_of_step, step, tokens_of

Step = Callable[[Sequence[Any], int], tuple[mx.array, State, Record]]


class Stepper(Setup):
    """Values and the optimizer's state, and how the next step follows from them.

    Attributes:
        take: takes a step, from when it is set; see `step_function`.
        is_smaller: whether passes had to be made smaller.
    """

    take: Step

    def __init__(self, config: TrainConfig, report: Report, ranks: Ranks):
        super().__init__(config, report, ranks)
        self.values = self.trainable.initial
        self.optimizer = Optimizer(self.config, self.values)
        self.state = self.optimizer.state
        self.is_smaller = False

    def step_function(self) -> Step:
        """What takes the next step: from examples and its number, to new values, new state, and its record."""
        prefix = self.prefix(steps := self.steps_ahead())
        take = self.step_of(prefix, self.split)

        def prepared(examples: Sequence[Any], number: int) -> tuple[mx.array, State, Record]:
            if prefix:
                near = self.batches.of(number, steps)
                each = (near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size))
                prefix.prepare([e for batch in each for e in self.split.examples(batch)])
            return take(examples, number)

        return prepared

    def steps_ahead(self) -> int:
        """How many steps' examples go through the first blocks together: as many rows as a step's branches have.

        Where memory is short, a step's do.
        """
        return rows_of_step(self.config) // self.batch_size if self.config.tokens_at_once is None else 1

    def step_of(self, prefix: Prefix | None, split: Split | None) -> Step:
        """`step_function` with a prefix that is prepared already, and the work divided as given, if it is."""
        config, at_once = self.config, self.config.tokens_at_once
        gradient = self.exact_gradient(prefix) if config.gradient == "exact" else None
        loss = make_loss(self.sparse, self.head, prefix, at_once, self.judge)

        def take(examples: Sequence[Any], number: int) -> tuple[mx.array, State, Record]:
            values, state = self.values, self.state
            if gradient:
                own = split.gradient(gradient, at_once, number) if split else gradient
                return exact_step(own, self.optimizer, values, state, examples, number)
            own_loss = split.loss(loss, at_once, number) if split else loss
            return step(own_loss, self.optimizer, values, state, examples, number, config, self.trainable.scale)

        return take

    def need(self) -> int | None:
        """What MLX must hold, in bytes, in a step all of whose examples are like the longest one: measured.

        None where there is no need to know: on the CPU, which does not work far ahead; and where all ranks would have
        to take this step together.
        """
        if on_cpu() or self.split.together:
            return None
        prefix = self.prefix(1)
        take = self.step_of(prefix, None)

        def longest() -> None:
            batch = longest_batch(self.train_set.examples, self.batch_size * self.steps_ahead(), prefix)
            mx.eval(take(batch[: self.batch_size], 1)[:2])

        try:
            return peak_of(longest)
        except (RuntimeError, MemoryError) as e:
            if not is_shortage(e):
                raise
            return 0  # an operation at a time

    def longest_row(self, examples: Sequence[Any]) -> int:
        """The most tokens of an example."""
        return max(tokens_of([[e]], self.head.continues, self.judge) for e in examples)

    def make_smaller(self, examples: Sequence[Any], why: str) -> bool:
        """Let half as many tokens go through the model together from now on; False if an example at a time does.

        Blocks that are kept are given up with the first half.
        """
        row = self.longest_row(examples)
        whole = rows_of_step(self.config) * row
        before = min(self.config.tokens_at_once or whole, whole)
        if before <= row:
            return False
        self.let_through(max(row, before // 2))
        if not self.is_smaller:
            self.warn(f"{why}: going on with {self.config.tokens_at_once} tokens at once, and fewer if need be")
        self.is_smaller = True
        return True

    def let_through(self, tokens: int) -> None:
        """Take steps with so many tokens at once from now on."""
        if tokens != self.config.tokens_at_once:
            self.config.tokens_at_once, self.config.keep_blocks = tokens, 0
            self.take = self.step_function()
            mx.clear_cache()
