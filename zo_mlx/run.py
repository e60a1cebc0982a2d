"""One run: the loaded model and data, the state after some steps, and the loop over the next ones."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import adapter, journal
from .adapter import Best
from .answers import Judge, longest_completion
from .batches import Batches
from .blocks import BlockwiseModel
from .config import TrainConfig, filled, resolved
from .data import Dataset, load_dataset
from .errors import Interrupted, UsageError, ZoError
from .estimator import fisher_scale
from .evaluate import Evaluation, evaluate_dataset
from .exact import ExactGradient
from .files import check_space, reporting_disk_errors, sha256
from .head import split_head
from .index import FILE_NAME as INDEX
from .lora import write_loras
from .metric import CROSS_ENTROPY, Metric
from .model import context_length, load_sparse
from .optimizer import Optimizer, State
from .prefix import Prefix
from .progress import Meter, Progress
from .result import TrainResult
from .step import (
    exact_step,
    exact_tokens_that_fit,
    make_loss,
    replay,
    rows_of_step,
    step,
    tokens_of,
    tokens_that_fit,
)  # fmt: skip

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
        self.train_set = self.load_data(data / "train.jsonl")
        self.valid_set = self.load_data(data / "valid.jsonl") if (data / "valid.jsonl").exists() else None
        if self.valid_set is None:
            self.warn(f"{data / 'valid.jsonl'} is missing: training goes on without validation")
        self.test_set = self.load_data(data / "test.jsonl") if config.test else None
        self.config = config = resolved(config)
        self.batch_size = filled(config.batch_size)
        if len(self.train_set) < self.batch_size:
            raise UsageError(
                f"{data / 'train.jsonl'} has {len(self.train_set)} examples, fewer than --batch-size {self.batch_size}"
            )
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
        self.model_prints = {"base_model": index.metadata["base_model"], "index": sha256(model / INDEX)}
        self.prints = {
            **self.model_prints,
            "train.jsonl": sha256(data / "train.jsonl"),
            "tokenized training set": self.train_set.fingerprint(),  # tokenizer and chat template take part in it
        }
        if self.metric and self.metric.path:
            self.prints["objective"] = sha256(self.metric.path)
        self.batches = Batches(self.train_set.examples, self.batch_size, config.seed)
        self.all_values = index.initial_values()
        self.choose_blocks()
        self.values = self.all_values[self.trained]
        if config.memory_limit is not None and config.tokens_at_once is None:
            config.tokens_at_once = self.tokens_that_fit(int(config.memory_limit * 1e9))
        scores = np.concatenate([tensor.scores for tensor in index.tensors.values()])
        self.scale = fisher_scale(mx.array(scores)[self.trained], config.precondition)
        self.optimizer = Optimizer(config, self.values)
        self.state = self.optimizer.state
        self.done = 0
        self.best: Best | None = None

    def warn(self, message: str) -> None:
        self.report({"event": "warning", "message": message})

    def load_data(self, path: Path) -> Dataset:
        answers = self.metric is not None
        dataset = load_dataset(path, self.tokenizer, self.longest, self.config.mask_prompt, answers)
        if dataset.truncated:
            self.warn(f"{path}: {dataset.truncated} sequences are longer than {self.longest} tokens and were cut")
        return dataset

    def choose_blocks(self) -> None:
        """Decide which blocks are trained, and whether those before are run apart (`has_prefix`)."""
        config, count, exact = self.config, len(self.sparse.model.layers), self.config.gradient == "exact"
        self.blocks = None
        if (exact or config.num_layers != -1 or self.sparse.first_block > 0) and max(self.sparse.spans()) < count:
            self.blocks = BlockwiseModel.of_chain(self.sparse.model)
        last = config.num_layers
        if last is None:  # as many as learn as much in a step; but fewer only where that saves work
            last = self.sparse.last_half()
            last = -1 if exact or not self.saves(last / count) else last
        config.num_layers = last
        self.trained = mx.array(self.sparse.train_last(count if last == -1 else last, self.all_values))
        first = self.sparse.first_block
        if self.blocks is None and (exact or 0 < first < count):
            self.warn("the model's blocks are not a plain chain: a step computes, and holds, all of them at once")
        self.has_prefix = 0 < first < count and self.saves(1 - first / count)
        if config.cache_prefix and not self.has_prefix:
            self.warn("--cache-prefix has no effect: nothing is computed before what is trained that could be kept")

    def saves(self, trained: float) -> bool:
        """Whether a step takes less work if the blocks before the trained ones are run apart.

        Else answers are generated, or the choices' rows go on from their prompts through all blocks, which for a share
        u of the tokens takes about 1.5 u of the time.

        Args:
            trained: the share of the blocks that are trained.
        """
        if self.blocks is None or (self.judge and self.judge.generates):
            return False
        return self.config.gradient == "exact" or not self.head.continues or trained <= 1.5 * self.train_set.unshared

    def tokens_that_fit(self, limit: int) -> int:
        """How many tokens may go through the model together within a limit in bytes."""
        config, longest = self.config, max(self.train_set.examples, key=lambda e: e.length)
        prefix = self.prefix(1)
        room = limit - (prefix.cached_bytes if prefix else 0)
        if config.gradient == "exact":
            gradient = ExactGradient(self.sparse, self.head, self.blocks, prefix)
            fit, least = exact_tokens_that_fit(room, gradient, self.values, longest, self.batch_size, prefix)
        else:
            fit, least = tokens_that_fit(room, self.sparse, self.head, self.values, longest, config, prefix, self.judge)
        if least > limit:
            self.warn(f"--memory-limit: the longest example alone takes {least / 1e9:.3f} GB")
        return fit

    def start(self) -> None:
        """Begin a new run in the adapter directory, in place of any old one."""
        header = {"config": asdict(self.config), "fingerprints": self.prints, "trained": self.values.size}
        check_space(self.directory, self.config.iters * journal.record_size(header))
        with reporting_disk_errors(self.directory):
            adapter.remove_run(self.directory)
        self.journal = journal.Journal.create(self.directory / journal.FILE_NAME, header)

    def resume(self, past: journal.Journal) -> None:
        """Restore the state after a journal's last record: from a snapshot if there is one, and by replay."""
        recorded = past.header["fingerprints"]
        if changed := [k for k in recorded.keys() | self.prints.keys() if recorded.get(k) != self.prints.get(k)]:
            raise UsageError(
                f"{past.path} belongs to another run: {' and '.join(sorted(changed))} changed since it began"
            )
        if past.header.get("trained") != self.values.size:
            raise UsageError(f"{past.path} is of {past.header.get('trained')} trained weights, not {self.values.size}")
        check_space(self.directory, (self.config.iters - len(past)) * journal.record_size(past.header))
        with reporting_disk_errors(self.directory):
            adapter.remove_lora(self.directory)
        self.journal = past
        try:
            snapshot = adapter.read_snapshot(self.directory)
        except UsageError:
            snapshot = None  # the journal alone suffices
        if snapshot and snapshot.journal == past.identity and snapshot.step <= len(past):
            state = adapter.read_optimizer_state(self.directory, snapshot, like=self.state)
            if state is not None and snapshot.values.shape == self.all_values.shape:
                self.values, self.state, self.done = snapshot.values[self.trained], state, snapshot.step
        self.values, self.state = replay(
            self.optimizer, self.values, self.state, past.records(self.done), self.config, self.scale
        )
        self.done = len(past)
        best = adapter.read_best(self.directory, past.identity)
        self.best = best if best and best.iteration <= self.done else None

    def prefix(self, steps: int) -> Prefix | None:
        """What runs the blocks before the trained ones, for so many steps at once."""
        if not self.has_prefix:
            return None
        assert self.blocks is not None
        groups = (self.batches.of(i + 1, steps) for i in range(0, self.batches.in_epoch, steps))
        size = int((self.config.cache_prefix or 0) * 1e9)
        return Prefix(self.blocks, self.sparse.first_block, groups, size, self.config.tokens_at_once)

    def step_function(self) -> Callable[[list[Any], int], tuple[mx.array, State, journal.Record]]:
        """What takes the next step: from examples and its number, to new values, new state, and its record."""
        config = self.config
        # As many rows as a step's branches have go through the first blocks together; where memory is short, a step's.
        steps = rows_of_step(config) // self.batch_size if config.tokens_at_once is None else 1
        prefix = self.prefix(steps)
        gradient = ExactGradient(self.sparse, self.head, self.blocks, prefix, config.tokens_at_once)
        loss = make_loss(self.sparse, self.head, prefix, config.tokens_at_once, self.judge)

        def take(examples: list[Any], number: int) -> tuple[mx.array, State, journal.Record]:
            if prefix:
                prefix.prepare(self.batches.of(number, steps))
            if config.gradient == "exact":
                return exact_step(gradient, self.optimizer, self.values, self.state, examples, number)
            return step(loss, self.optimizer, self.values, self.state, examples, number, config, self.scale)

        return take

    def evaluate(self, dataset: Dataset, batches: int) -> Evaluation:
        self.sparse.set_values(self.values[None])
        size, tokens = rows_of_step(self.config), self.config.tokens_at_once
        if tokens is not None:
            longest = max(tokens_of([[e]], self.head.continues, self.judge) for e in dataset.examples)
            size = max(1, min(size, tokens // longest))
        count = -1 if batches == -1 else batches * self.batch_size
        return evaluate_dataset(self.head, dataset, size, count, self.progress, self.judge)

    def validate(self) -> Evaluation | None:
        """Evaluate on the validation set, and keep the values if they are the best so far."""
        if self.valid_set is None or self.config.val_batches == 0:
            return None
        result = self.evaluate(self.valid_set, self.config.val_batches)
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
        values = mx.put_along_axis(self.all_values, self.trained, self.values, axis=0)
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
        config = self.config
        weights = mx.get_active_memory()
        before = after = self.validate()
        mx.reset_peak_memory()
        take = self.step_function()
        meter = Meter()
        peak = 0
        try:
            with Progress("Training", config.iters, "step", self.progress, initial=self.done) as bar:
                for number in range(self.done + 1, config.iters + 1):
                    if self.out_of_patience():
                        self.report({"event": "stopped", "iteration": self.done, "patience": config.patience})
                        break
                    started = time.perf_counter()
                    examples = self.batches.of(number)
                    values, state, record = take(examples, number)
                    if not (mx.isfinite(values).all() and (record.is_finite or self.optimizer.can_go_on(state))):
                        raise ZoError(
                            f"the loss is not finite at step {number}: stopped; the state after step {self.done} "
                            f"is kept in {self.directory}. Try a smaller --learning-rate"
                        )
                    self.journal.append(record)
                    news = self.optimizer.news(self.state, state)
                    self.values, self.state, self.done = values, state, number
                    if news:
                        self.report({**news, "iteration": number})
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
                    if number % config.steps_per_eval == 0 or number == config.iters:
                        peak = max(peak, mx.get_peak_memory())
                        after = self.validate()
                        mx.reset_peak_memory()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped after step {self.done}; go on with the same command and --resume") from None
        finally:
            self.save()
        peak = max(peak, mx.get_peak_memory())
        test = self.evaluate(self.test_set, config.test_batches) if self.test_set and config.test_batches else None
        if test:
            self.report({"event": "test", "iteration": self.done, **test.as_dict()})
        self.export()
        return TrainResult(
            str(self.directory), self.done, self.sparse.size, meter.last_loss, before, after, test, self.best,
            meter.seconds, weights, peak, adapter.size_bytes(self.directory),
        )  # fmt: skip
