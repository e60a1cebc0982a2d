"""What a run is made of, before its first step."""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import journal
from .answers import Judge, longest_completion
from .batches import Batches
from .config import TrainConfig, filled, resolved
from .data import Dataset
from .depth import choose_depth
from .errors import UsageError
from .exact import ExactGradient
from .files import sha256
from .fit import blocks_that_fit, exact_tokens_that_fit, longest_batch, tokens_that_fit
from .head import split_head
from .metric import CROSS_ENTROPY, Metric
from .model import context_length, fingerprints, load_sparse, vocabulary_size, weight_shapes
from .objective import layout
from .prefix import Prefix
from .ranks import Ranks
from .records import FEATURES, SPLITS, Records, place, read_splits
from .rows import tokenized
from .split import Split
from .trainable import Trainable

Report = Callable[[dict[str, Any]], None]


class Setup:
    """The loaded model and data, and what follows from them and the settings.

    Attributes:
        config: resolved, with all that was settled filled in.
        ranks, split: the processes that train together, and who does what of a step.
        judge: of the model's answers, if these are the objective.
        sizes: of the index, by layer.
        fingerprints: of all that a run with the same journal must find unchanged; `data_id` stands for the data's.
        depth: which blocks are trained.
        trainable: which weights, and what they are before.
        warnings: the events of those given so far.
    """

    def __init__(self, config: TrainConfig, report: Report, ranks: Ranks):
        config.check_together()
        self.config, self.report, self.ranks = config, report, ranks
        self.warnings: list[dict[str, Any]] = []
        model, data = Path(config.model), Path(config.data)
        self.sparse, self.tokenizer, index, model_config = load_sparse(
            model, spread=ranks.count > 1 and config.split == "model", float32=config.gradient == "zo"
        )
        self.sizes = {path: tensor.size for path, tensor in index.tensors.items()}
        self.metric = None if config.objective == CROSS_ENTROPY else Metric(config.objective)
        self.longest = min(config.max_seq_length, context_length(model_config))
        self.vocabulary = vocabulary_size(model_config)
        features = {name: getattr(config, name) for name in FEATURES}
        splits = read_splits(config.data, SPLITS if config.test else SPLITS[:2], features, config.hf_dataset)
        if "valid" not in splits:
            self.warn(f"{data} has no validation set (valid.jsonl): training goes on without validation")
        if config.patience and (config.val_batches == 0 or "valid" not in splits):
            self.warn("--patience has no effect without validations")
        self.train_set = self.tokenized(splits["train"])
        self.valid_set = self.tokenized(splits["valid"]) if "valid" in splits else None
        self.test_set = self.tokenized(splits["test"]) if config.test else None
        self.config = config = resolved(config)
        self.batch_size = filled(config.batch_size)
        self.split = Split(ranks, config)
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
        self.sparse.check_branches(index.initial_values())
        if config.estimator == "jvp" and config.gradient == "zo":
            self.sparse.check_derivative(index.initial_values())
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
        self._compare_ranks()
        self.batches = Batches(self.train_set.examples, self.batch_size, config.seed)
        everything = index.initial_values()
        self.depth = choose_depth(config, self.sparse, self.head, self.judge, self.train_set, everything, self.warn)
        if config.precondition and index.mask != "sensitive":
            why = f"the model's index has no Fisher scores: its weights are those of --mask {index.mask}"
            raise UsageError(f"--precondition {config.precondition:g}: {why}")
        self.trainable = Trainable(index, self.depth.spans, config, lambda: weight_shapes(model))
        if config.memory_limit is not None and config.tokens_at_once is None:
            self.fit(int(config.memory_limit * 1e9))
            self._agree()

    def warn(self, message: str) -> None:
        self.warnings.append({"event": "warning", "message": message})
        self.report(self.warnings[-1])

    def _compare_ranks(self) -> None:
        """Raise UsageError if a rank has other settings, data or model than the first one."""
        versions = {"journal version": journal.VERSION, "MLX's version": importlib.metadata.version("mlx")}
        texts = self.ranks.gather_texts(json.dumps({**versions, **asdict(self.config), **self.fingerprints}))
        first, *others = map(json.loads, texts)
        for rank, other in enumerate(others, 1):
            if different := sorted(name for name in first if first[name] != other.get(name)):
                raise UsageError(f"rank {rank} differs from rank 0: {', '.join(different)}")

    def tokenized(self, records: Records) -> Dataset:
        mask, scored = self.config.mask_prompt, self.metric is not None
        unusable = list[str]()
        dataset = tokenized(records, self.tokenizer, self.longest, mask, scored, self.vocabulary, unusable)
        if unusable:
            self.warn(f"{len(unusable)} of {len(records)} examples are left out: {unusable[0]}")
        if cut := dataset.truncated:
            self.warn(f"{place(records[0])}: {cut} sequences are longer than {self.longest} tokens and were cut")
        for name in sorted(dataset.left_out):
            self.warn(f"{place(records[0])}: the model's chat template leaves out {name!r}: nothing is learned of them")
        return dataset

    def fit(self, limit: int) -> None:
        """Settle how many tokens go through the model together, and what is held meanwhile, within a limit in bytes."""
        config, examples, prefix = self.config, self.train_set.examples, self.prefix(1)
        room = limit - (prefix.cached_bytes if prefix else 0)
        if config.gradient == "exact":
            batch = longest_batch(examples, self.batch_size, prefix)
            gradient = self.exact_gradient(prefix)
            fit, least = exact_tokens_that_fit(room, gradient, self.trainable.initial, batch)
            if least > limit and self.depth.blocks and not config.spill:
                config.spill = True
                fit, least = exact_tokens_that_fit(room, self.exact_gradient(prefix), self.trainable.initial, batch)
            elif config.keep_blocks is None and self.depth.blocks and fit >= layout([batch], gradient.continues)[0]:
                config.keep_blocks = blocks_that_fit(room, gradient, self.trainable.initial, batch)
        else:
            fit, least = tokens_that_fit(
                room, self.sparse, self.head, self.trainable.initial, examples, config, prefix, self.judge
            )
        config.tokens_at_once = fit
        if room < least <= limit:
            raise UsageError(
                f"--cache-prefix: {(limit - room) / 1e9:.3f} GB would be kept, but a step of the longest example alone "
                f"leaves {(limit - least) / 1e9:.3f} of --memory-limit: give no more than that"
            )
        if least > limit:
            self.warn(f"--memory-limit: the longest example alone takes {least / 1e9:.3f} GB")

    def _agree(self) -> None:
        """Take what fits all ranks."""
        config = self.config
        own = np.array([config.tokens_at_once, config.keep_blocks or 0, not config.spill])
        config.tokens_at_once, config.keep_blocks, does_not_spill = self.ranks.gather(own).min(axis=0).tolist()
        config.spill = not does_not_spill

    def exact_gradient(self, prefix: Prefix | None) -> ExactGradient:
        config, blocks = self.config, self.depth.blocks
        keep = config.keep_blocks or 0
        return ExactGradient(self.sparse, self.head, blocks, prefix, config.tokens_at_once, keep, config.spill)

    @property
    def cache_bytes(self) -> int:
        """How much may be kept of what the blocks before the trained ones compute."""
        return int((self.config.cache_prefix or 0) * 1e9)

    def prefix(self, steps: int) -> Prefix | None:
        """What runs the blocks before the trained ones, for so many steps at once."""
        if not self.depth.has_prefix:
            return None
        assert self.depth.blocks is not None
        groups = (self.batches.of(i + 1, steps) for i in range(0, self.batches.in_epoch, steps))
        return Prefix(self.depth.blocks, self.sparse.first_block, groups, self.cache_bytes, self.config.tokens_at_once)
