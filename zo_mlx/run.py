"""One run: the loaded model and data, the state after some steps, and the loop over the next ones."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import adapter, journal
from .adapter import Best
from .answers import Judge, longest_completion
from .batches import Batches
from .config import TrainConfig, filled, resolved
from .data import Dataset, tokenized
from .depth import choose_depth
from .errors import Interrupted, UsageError, ZoError
from .evaluate import Evaluation, evaluate_dataset
from .exact import ExactGradient
from .files import check_space, reporting_disk_errors, sha256
from .fit import blocks_that_fit, exact_tokens_that_fit, longest_batch, tokens_that_fit
from .head import split_head
from .interrupts import finished_first
from .lora import write_loras
from .memory import OVERRUN, is_shortage
from .metric import CROSS_ENTROPY, Metric
from .model import context_length, fingerprints, load_sparse
from .objective import layout
from .optimizer import Optimizer, State
from .prefix import Prefix
from .progress import Meter, Progress
from .records import FEATURES, SPLITS, Records, place, read_splits
from .result import TrainResult
from .step import exact_step, make_loss, rows_of_step, step, tokens_of
from .trainable import Trainable

Report = Callable[[dict[str, Any]], None]


class Run:
    """A run in progress: the loaded model and data, and the state after `done` steps."""

    def __init__(self, config: TrainConfig, report: Report, progress: bool):
        self.config, self.report, self.progress = config, report, progress
        self.directory = Path(config.adapter_path)
        model, data = Path(config.model), Path(config.data)
        self.sparse, self.tokenizer, index, model_config = load_sparse(model)
        self.metric = None if config.objective == CROSS_ENTROPY else Metric(config.objective)
        self.longest = min(config.max_seq_length, context_length(model_config))
        features = {name: getattr(config, name) for name in FEATURES}
        splits = read_splits(data, SPLITS if config.test else SPLITS[:2], features, config.hf_dataset)
        if "valid" not in splits:
            self.warn(f"{data} has no validation set (valid.jsonl): training goes on without validation")
        self.train_set = self.tokenized(splits["train"])
        self.valid_set = self.tokenized(splits["valid"]) if "valid" in splits else None
        self.test_set = self.tokenized(splits["test"]) if config.test else None
        self.config = config = resolved(config)
        self.batch_size = filled(config.batch_size)
        if len(self.train_set) < self.batch_size:
            count, wanted = len(self.train_set), self.batch_size
            raise UsageError(f"{place(splits['train'][0])}: {count} examples are fewer than --batch-size {wanted}")
        datasets = [d for d in (self.train_set, self.valid_set, self.test_set) if d is not None]
        self.judge = None
        if self.metric:
            if len({d.kind for d in datasets}) > 1:
                raise UsageError(
                    f"{data}: some of its files have choices and some have not; scores need one or the other"
                )
            config.max_tokens = config.max_tokens or longest_completion(self.train_set)
            self.judge = Judge(self.metric, self.tokenizer, self.train_set.kind, config.max_tokens)
        continuing = any(d.has_continuations for d in datasets)
        self.head = split_head(self.sparse.model, continuing or bool(self.judge and self.judge.generates))
        if self.judge:
            self.judge.check(self.head)
        self.sparse.check_branches()
        self.model_prints = fingerprints(model, index)
        self.fingerprints = {
            **self.model_prints,
            "tokenized training set": self.train_set.fingerprint(),  # tokenizer and chat template take part in it
        }
        if config.hf_dataset is None and data.is_dir():
            self.fingerprints["train.jsonl"] = sha256(data / "train.jsonl")
        if self.metric and self.metric.path:
            self.fingerprints["objective"] = sha256(self.metric.path)
        self.data_id = journal.data_id(self.fingerprints)
        self.batches = Batches(self.train_set.examples, self.batch_size, config.seed)
        everything = index.initial_values()
        self.depth = choose_depth(config, self.sparse, self.head, self.judge, self.train_set, everything, self.warn)
        self.trainable = Trainable(index, self.depth.spans, config.precondition)
        self.values = self.trainable.initial
        if config.memory_limit is not None and config.tokens_at_once is None:
            self.fit(int(config.memory_limit * 1e9))
        self.optimizer = Optimizer(config, self.values)
        self.state = self.optimizer.state
        self.done = 0
        self.is_smaller = False  # whether passes had to be made smaller
        self.best: Best | None = None

    def warn(self, message: str) -> None:
        self.report({"event": "warning", "message": message})

    def tokenized(self, records: Records) -> Dataset:
        dataset = tokenized(records, self.tokenizer, self.longest, self.config.mask_prompt, self.metric is not None)
        if cut := dataset.truncated:
            self.warn(f"{place(records[0])}: {cut} sequences are longer than {self.longest} tokens and were cut")
        return dataset

    def fit(self, limit: int) -> None:
        """Settle how many tokens go through the model together, and what is held meanwhile, within a limit in bytes."""
        config, examples, prefix = self.config, self.train_set.examples, self.prefix(1)
        room = limit - (prefix.cached_bytes if prefix else 0)
        if config.gradient == "exact":
            batch = longest_batch(examples, self.batch_size, prefix)
            gradient = self.exact_gradient(prefix)
            fit, least = exact_tokens_that_fit(room, gradient, self.values, batch)
            if least > limit and self.depth.blocks and not config.spill:
                config.spill = True
                fit, least = exact_tokens_that_fit(room, self.exact_gradient(prefix), self.values, batch)
            elif config.keep_blocks is None and self.depth.blocks and fit >= layout([batch], False)[0]:
                config.keep_blocks = blocks_that_fit(room, gradient, self.values, batch)
        else:
            fit, least = tokens_that_fit(
                room, self.sparse, self.head, self.values, examples, config, prefix, self.judge
            )
        config.tokens_at_once = fit
        if least > limit:
            self.warn(f"--memory-limit: the longest example alone takes {least / 1e9:.3f} GB")

    def exact_gradient(self, prefix: Prefix | None) -> ExactGradient:
        config, blocks = self.config, self.depth.blocks
        keep = config.keep_blocks or 0
        return ExactGradient(self.sparse, self.head, blocks, prefix, config.tokens_at_once, keep, config.spill)

    def start(self) -> None:
        """Begin a new run in the adapter directory, in place of any old one."""
        header = {"config": asdict(self.config), "fingerprints": self.fingerprints, "trained": self.depth.spans}
        check_space(self.directory, self.config.iters * journal.record_size(header))
        with reporting_disk_errors(self.directory):
            adapter.remove_run(self.directory)
        self.journal = journal.Journal.create(self.directory / journal.FILE_NAME, header)

    def prefix(self, steps: int) -> Prefix | None:
        """What runs the blocks before the trained ones, for so many steps at once."""
        if not self.depth.has_prefix:
            return None
        assert self.depth.blocks is not None
        groups = (self.batches.of(i + 1, steps) for i in range(0, self.batches.in_epoch, steps))
        size = int((self.config.cache_prefix or 0) * 1e9)
        return Prefix(self.depth.blocks, self.sparse.first_block, groups, size, self.config.tokens_at_once)

    def step_function(self) -> Callable[[list[Any], int], tuple[mx.array, State, journal.Record]]:
        """What takes the next step: from examples and its number, to new values, new state, and its record."""
        config = self.config
        # As many rows as a step's branches have go through the first blocks together; where memory is short, a step's.
        steps = rows_of_step(config) // self.batch_size if config.tokens_at_once is None else 1
        prefix = self.prefix(steps)
        gradient = self.exact_gradient(prefix)
        loss = make_loss(self.sparse, self.head, prefix, config.tokens_at_once, self.judge)

        def take(examples: list[Any], number: int) -> tuple[mx.array, State, journal.Record]:
            if prefix:
                prefix.prepare(self.batches.of(number, steps))
            if config.gradient == "exact":
                return exact_step(gradient, self.optimizer, self.values, self.state, examples, number)
            return step(loss, self.optimizer, self.values, self.state, examples, number, config, self.trainable.scale)

        return take

    def longest_row(self, examples: Sequence[Any]) -> int:
        """The most tokens of an example."""
        return max(tokens_of([[e]], self.head.continues, self.judge) for e in examples)

    def make_smaller(self, examples: Sequence[Any], why: str) -> bool:
        """Let half as many tokens go through the model together from now on; False if an example at a time does.

        Blocks that are kept are given up with the first half.
        """
        row = self.longest_row(examples)
        before = self.config.tokens_at_once or rows_of_step(self.config) * row
        if before <= row:
            return False
        self.config.tokens_at_once, self.config.keep_blocks = max(row, before // 2), 0
        if not self.is_smaller:
            self.warn(f"{why}: going on with {self.config.tokens_at_once} tokens at once, and fewer if need be")
        self.is_smaller = True
        self.take = self.step_function()
        mx.clear_cache()
        return True

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
            raise ZoError(
                f"the loss is not finite at step {number}: stopped; the state after step {self.done} "
                f"is kept in {self.directory}. Try a smaller --learning-rate"
            )
        record = replace(record, tokens_at_once=self.config.tokens_at_once or 0, data=self.data_id)
        self.journal.append(record)
        news = self.optimizer.news(self.state, state)
        self.values, self.state, self.done = values, state, number
        if news:
            self.report({**news, "iteration": number})
        if doubt := self.optimizer.doubt(record):
            self.warn(doubt)
        return record, examples

    def evaluate(self, dataset: Dataset, batches: int) -> Evaluation:
        self.sparse.set_values(self.values[None])
        count = -1 if batches == -1 else batches * self.batch_size
        while True:
            size, tokens = rows_of_step(self.config), self.config.tokens_at_once
            if tokens is not None:
                size = max(1, min(size, tokens // self.longest_row(dataset.examples)))
            try:
                return evaluate_dataset(self.head, dataset, size, count, self.progress, self.judge)
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
        except (ZoError, RuntimeError, MemoryError) as e:  # a look at the run must not be the end of it
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
        adapter.write_snapshot(self.directory, self.snapshot(), self.state)

    def export(self) -> None:
        """Write what stock mlx-lm loads, of the last and the best values; a run does not fail because that does."""
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
        weights = mx.get_active_memory()
        before = after = self.validate()
        mx.reset_peak_memory()
        self.take = self.step_function()
        meter = Meter()
        peak = 0
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
                    bar.advance()
                    if number % config.steps_per_report == 0 or number == config.iters:
                        rate = self.optimizer.learning_rate(self.state)
                        event = {"event": "train", "iteration": number, "learning_rate": rate, **meter.take()}
                        if self.judge:
                            event["train_score"] = None if meter.last_loss is None else -meter.last_loss
                        self.report(event)
                    if number % config.save_every == 0:
                        self.save()
                    peak = max(peak, mx.get_peak_memory())
                    if config.memory_limit and mx.get_peak_memory() > OVERRUN * config.memory_limit * 1e9:
                        taken = f"a step took {mx.get_peak_memory() / 1e9:.3f} GB, more than --memory-limit"
                        self.make_smaller(examples, taken)
                        mx.reset_peak_memory()
                    if number % config.steps_per_eval == 0 or number == config.iters:
                        after = self.validate()
                        mx.reset_peak_memory()
        finally:
            self.save()
        test = self.evaluate(self.test_set, config.test_batches) if self.test_set and config.test_batches else None
        if test:
            self.report({"event": "test", "iteration": self.done, **test.as_dict()})
        self.export()
        return TrainResult(
            str(self.directory), self.done, self.sparse.size, meter.last_loss, before, after, test, self.best,
            meter.seconds, weights, peak, adapter.size_bytes(self.directory),
        )  # fmt: skip
