"""One run: its state after some steps, and the loop over the next ones."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import adapter, journal
from .adapter import Best
from .config import TrainConfig
from .data import Dataset
from .errors import Interrupted, ZoError
from .evaluate import Evaluation, evaluate_dataset
from .events import EventLog
from .files import check_space, reporting_disk_errors
from .interrupts import finished_first
from .lora import write_loras
from .memory import OVERRUN, is_shortage
from .optimizer import Optimizer, State
from .progress import Meter, Progress
from .ranks import Ranks
from .report import Report as Page
from .result import TrainResult
from .setup import Report, Setup
from .step import exact_step, make_loss, rows_of_step, step, tokens_of


class Run(Setup):
    """A run in progress: its state after `done` steps."""

    def __init__(self, config: TrainConfig, report: Report, progress: bool, ranks: Ranks):
        super().__init__(config, report if ranks.is_first else lambda event: None, ranks)
        self.progress, self.directory = progress and ranks.is_first, ranks.directory(Path(config.adapter_path))
        self.values = self.trainable.initial
        self.optimizer = Optimizer(self.config, self.values, self.trainable.at_random)
        self.state = self.optimizer.state
        self.done = 0
        self.is_smaller = False  # whether passes had to be made smaller
        self.best: Best | None = None
        self.weights = self.peak = 0  # bytes MLX held before this process's first step, and at most in a step

    def start(self, given: dict[str, Any]) -> None:
        """Begin a new run in the adapter directory, in place of any old one; `given` are the settings asked for."""
        header = {"config": asdict(self.config), "fingerprints": self.fingerprints, "trained": self.depth.spans}
        check_space(self.directory, self.config.iters * journal.record_size(header))
        with reporting_disk_errors(self.directory):
            adapter.remove_run(self.directory, self.ranks.count)
        self.follow(journal.Journal.create(self.directory / journal.FILE_NAME, header), settings=given)

    def follow(self, own: journal.Journal, **how: Any) -> None:
        """Go on after a journal's last step. What happens from here on is kept for the report, and how it began."""
        self.journal = own
        if not self.ranks.is_first:
            return
        self.report = log = EventLog(self.directory, own.identity, len(own), self.report)
        log.begin(len(own), self.warnings, **how)
        self.page = Page(self, self.directory, own, log)

    def step_function(self) -> Callable[[list[Any], int], tuple[mx.array, State, journal.Record]]:
        """What takes the next step: from examples and its number, to new values, new state, and its record."""
        config = self.config
        # As many rows as a step's branches have go through the first blocks together; where memory is short, a step's.
        steps = rows_of_step(config) // self.batch_size if config.tokens_at_once is None else 1
        prefix = self.prefix(steps)
        gradient = self.exact_gradient(prefix) if config.gradient == "exact" else None
        loss = make_loss(self.sparse, self.head, prefix, config.tokens_at_once, self.judge)

        def take(examples: list[Any], number: int) -> tuple[mx.array, State, journal.Record]:
            if prefix:
                near = self.batches.of(number, steps)
                each = (near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size))
                prefix.prepare([e for batch in each for e in self.split.examples(batch)])
            values, state, at_once = self.values, self.state, config.tokens_at_once
            if gradient:
                own = self.split.gradient(gradient, at_once, number)
                return exact_step(own, self.optimizer, values, state, examples, number)
            own_loss = self.split.loss(loss, at_once, number)
            return step(own_loss, self.optimizer, values, state, examples, number, config, self.trainable.form)

        return take

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

    def advance(self, number: int) -> tuple[journal.Record, list[Any]]:
        """Take a step and write it to the journal, from when on it counts. Returns its record and its examples."""
        examples = self.batches.of(number)
        while True:
            try:
                values, state, record = self.take(examples, number)
                mx.eval(values, state)
                break
            except (RuntimeError, MemoryError) as e:
                if not (is_shortage(e) and self.make_smaller(examples, f"step {number} fails: {e}")):
                    raise
        if not (mx.isfinite(values).all() and (record.is_finite or self.optimizer.can_go_on(state))):
            advice = (
                "Try a smaller --learning-rate" if self.config.lr_schedule else "Halving the learning rate was no use"
            )
            raise ZoError(
                f"the loss is not finite at step {number}: stopped; the state after step {self.done} "
                f"is kept in {self.directory}. {advice}"
            )
        if self.split.tokens_at_once:  # another rank may have had to make its passes smaller
            self.let_through(self.split.tokens_at_once)
        record = replace(record, tokens_at_once=self.config.tokens_at_once or 0, data=self.data_id)
        self.journal.append(record)
        news = self.optimizer.news(self.state, state)
        self.values, self.state, self.done = values, state, number
        if news:
            self.report({**news, "iteration": number})
        if doubt := self.optimizer.doubt(record):
            self.warn(doubt)
        return record, examples

    def at_once(self, dataset: Dataset) -> int:
        """How many examples are evaluated in a forward pass."""
        size, tokens = rows_of_step(self.config), self.config.tokens_at_once
        return size if tokens is None else max(1, min(size, tokens // self.longest_row(dataset.examples)))

    def evaluate(self, dataset: Dataset, batches: int) -> Evaluation:
        self.sparse.set_values(self.values[None])
        count = -1 if batches == -1 else batches * self.batch_size
        while True:
            try:
                how = self.progress, self.judge, self.ranks, self.split.together
                return evaluate_dataset(self.head, dataset, self.at_once(dataset), count, *how)
            except (RuntimeError, MemoryError) as e:
                if not (is_shortage(e) and self.make_smaller(dataset.examples, f"an evaluation fails: {e}")):
                    raise

    @property
    def validates(self) -> bool:
        """Whether there is something to validate on, and that is asked for."""
        return self.valid_set is not None and self.config.val_batches != 0

    def validate(self) -> Evaluation | None:
        """Evaluate on the validation set, and keep the values if they are the best so far."""
        if not self.validates:
            return None
        assert self.valid_set is not None
        try:
            result = self.evaluate(self.valid_set, self.config.val_batches)
        except (ZoError, RuntimeError, MemoryError) as e:
            if self.ranks.count > 1:  # the others wait for this one's part
                raise
            # A look at the run must not be the end of it.
            self.warn(f"the validation after step {self.done} failed: {e}")
            return None
        if not math.isfinite(result.objective):
            self.warn(f"the validation after step {self.done} gives {result.objective}")
            return None
        config, is_best = self.config, False
        # What a resumed run begins with is no validation that an uninterrupted one would have made.
        if self.done % config.steps_per_eval == 0 or self.done >= config.iters:
            is_best = result.objective < (self.best.loss if self.best else math.inf)
        if is_best:
            self.best = Best(self.done, result.objective)
            if self.ranks.is_first:
                adapter.write_best(self.directory, self.snapshot(result.objective))
        self.report({"event": "validation", "iteration": self.done, "best": is_best, **result.as_dict()})
        return result

    def out_of_patience(self) -> bool:
        """Whether the last `patience` validations were no better than the best one."""
        patience, best = self.config.patience, self.best
        return bool(patience and best and self.done >= best.iteration + patience * self.config.steps_per_eval)

    def snapshot(self, validation_loss: float | None = None) -> adapter.Snapshot:
        values = self.trainable.among_all(self.values)
        return adapter.Snapshot(self.done, self.journal.identity, self.model_prints, values, validation_loss)

    def save(self) -> None:
        if self.ranks.is_first:
            adapter.write_snapshot(self.directory, self.snapshot(), self.state)
            self.write_report()

    def write_report(self) -> None:
        self.page.write(self.values, self.best.iteration if self.best else None, self.weights, self.peak)

    def export(self) -> None:
        """Write what stock mlx-lm loads, of the last and the best values; a run does not fail because that does."""
        if self.split.together:
            self.warn("no adapter for stock mlx-lm is written of a model spread over ranks; zo-mlx export makes it")
            return
        directories = [self.directory, *([self.directory / adapter.BEST] if self.best else [])]
        try:
            for found in write_loras(directories, self.sparse.model, Path(self.config.model), self.tokenizer):
                self.report({"event": "exported", **found})
        except Exception as e:  # whatever an architecture does with mlx-lm's LoRA layers
            self.warn(f"no adapter for stock mlx-lm is written: {str(e) or type(e).__name__}")

    def go(self) -> TrainResult:
        """Train to the last step; save, evaluate and report on the way."""
        try:
            return self.steps()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped after step {self.done}; go on with the same command and --resume") from None

    def steps(self) -> TrainResult:
        """`go`, where nobody interrupts it."""
        config = self.config
        if self.done and self.done >= config.iters:
            self.warn(f"{self.directory} has all of its {self.done} steps already; a larger --iters goes on")
        self.weights = mx.get_active_memory()
        before = after = self.validate()
        mx.reset_peak_memory()
        self.take = self.step_function()
        meter = Meter()
        try:
            with Progress("Training", config.iters, "step", self.progress, initial=self.done) as bar:
                for number in range(self.done + 1, config.iters + 1):
                    if self.out_of_patience():
                        self.report({"event": "stopped", "iteration": self.done, "patience": config.patience})
                        break
                    started = time.perf_counter()
                    with finished_first():
                        record, examples = self.advance(number)
                    meter.add(time.perf_counter() - started, record.loss, examples)
                    bar.advance(meter.recent(bool(self.judge), after.accuracy if after else None))
                    self.peak = max(self.peak, mx.get_peak_memory())
                    if number % config.steps_per_report == 0 or number == config.iters:
                        rate = self.optimizer.learning_rate(self.state)
                        event = {"event": "train", "iteration": number, "learning_rate": rate, **meter.take()}
                        if self.judge:
                            event["train_score"] = None if meter.last_loss is None else -meter.last_loss
                        self.report(event)
                    if number % config.save_every == 0:
                        self.save()
                    if config.memory_limit and mx.get_peak_memory() > OVERRUN * config.memory_limit * 1e9:
                        taken = f"a step took {mx.get_peak_memory() / 1e9:.3f} GB, more than --memory-limit"
                        self.make_smaller(examples, taken)
                        mx.reset_peak_memory()
                    if number % config.steps_per_eval == 0 or number == config.iters:
                        after = self.validate()
                        mx.reset_peak_memory()
        finally:
            self.save()
        if self.done and mx.array_equal(self.values, self.trainable.initial):
            self.warn(
                f"after {self.done} steps the values are what they were: the first ones only measure slopes, and steps "
                "that gain nothing are taken back, if no --learning-rate is given"
            )
        if self.ranks.is_first:
            self.export()  # before the test, which may fail where an objective does
        test = self.evaluate(self.test_set, config.test_batches) if self.test_set and config.test_batches else None
        if test:
            self.report({"event": "test", "iteration": self.done, **test.as_dict()})
        if self.ranks.is_first:
            if not self.split.together:  # which would take all ranks
                self.page.show_samples(self.values, self.at_once(self.page.shown[1]))
            self.write_report()
        return TrainResult(
            str(self.directory), self.done, self.sparse.size, meter.last_loss, before, after, test, self.best,
            meter.seconds, self.weights, self.peak, adapter.size_bytes(self.directory),
        )  # fmt: skip
