"""Training settings: one dataclass, from which the command line and the YAML reader take names, types and defaults."""

import dataclasses
import json
import math
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from .errors import UsageError
from .estimator import ESTIMATORS, LAWS, STRUCTURES
from .metric import CROSS_ENTROPY, check_objective

T = TypeVar("T")

# Of `mlx.optimizers`; those made for matrices, like Muon, have nothing to work on in a vector of values.
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "lion": "Lion"}


# No machine has a million of them: whoever gives more has given bytes.
GB: dict[str, Any] = {"most": 10**6, "unit": " GB"}


def _setting(default: Any, help: str, least: float | None = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, "least": least, **more})


@dataclass
class TrainConfig:
    """Settings of a training run. Names are those of `mlx_lm.lora` wherever it has the setting."""

    model: str = _setting("mlx_model", "Model directory made by `zo-mlx convert`.")
    data: str = _setting("data", "Directory with {train, valid, test}.jsonl files, or hub id of a dataset.")
    hf_dataset: list[dict[str, Any]] | None = _setting(
        None, "mlx-lm's hf_dataset block or blocks, in place of data (YAML only)."
    )
    prompt_feature: str = _setting("prompt", "Name of the data's field with the prompt.")
    completion_feature: str = _setting("completion", "Name of the field with the completion.")
    chat_feature: str = _setting("messages", "Name of the field with the messages of a chat.")
    text_feature: str = _setting("text", "Name of the field with plain text.")
    adapter_path: str = _setting("adapters", "Directory for the result.")
    seed: int = _setting(0, "Decides data order and directions.", least=0)
    batch_size: int | None = _setting(
        None, "Examples per step; default: 4, or 16 for exact gradients.", least=1, most=1 << 20
    )
    num_layers: int | None = _setting(
        None,
        "Train the sensitive weights of this many last blocks, -1 for all; default: half of them, but all for exact "
        "gradients and where training fewer saves no work.",
        least=-1,
    )
    cache_prefix: float | None = _setting(
        None, "GB of the untrained first blocks' results to keep for later epochs.", least=0, **GB
    )
    memory_limit: float | None = _setting(
        None, "GB that MLX is to use at most, weights included: decides on tokens at once.", least=1e-6, **GB
    )
    tokens_at_once: int | None = _setting(
        None,
        "Tokens in a forward pass at most; default: a step's, 512 for exact gradients, or what fits the memory limit.",
        least=1,
        most=(1 << 32) - 1,
    )
    keep_blocks: int | None = _setting(
        None,
        "Exact gradients: hold what the backward pass of this many last blocks needs, -1 for all, instead of "
        "computing it again; default: as many as the memory limit has room for, none without one.",
        least=-1,
    )
    spill: bool = _setting(
        False,
        "Exact gradients: put what goes into the other blocks on the disk; on where a single example is too much for "
        "the memory limit.",
    )
    iters: int = _setting(1000, "Steps to train for.", least=0)
    gradient: str = _setting(
        "zo",
        "zo: estimated from forward passes; exact: by back-propagation, block by block, in far fewer steps. Then "
        "epsilon, estimator, directions, law, structure and precondition have no effect.",
        choices=("zo", "exact"),
    )
    objective: str = _setting(
        CROSS_ENTROPY,
        "What to train on: cross-entropy, or the score of the model's answers: accuracy, exact-match, f1, or "
        "module:function, a Python function score(prompt, output, example). Scores mask prompts in the reported loss.",
    )
    max_tokens: int | None = _setting(
        None, "Tokens of an answer that is generated to be scored; default: of the longest completion.", least=1
    )
    learning_rate: float | str = _setting(
        "auto",
        "Initial learning rate, falls by 0.1% a step; auto: from the slopes seen so far, or for exact gradients from "
        "the size of the values.",
        least=0,
        word="auto",
    )
    optimizer: str | None = _setting(
        None, "Optimizer of the trainable values; default: sgd, or adam for exact gradients.", choices=tuple(OPTIMIZERS)
    )
    optimizer_config: dict[str, Any] | None = _setting(
        None, "mlx-lm's optimizer_config block: arguments by optimizer, e.g. its momentum (YAML only)."
    )
    lr_schedule: dict[str, Any] | None = _setting(
        None, "mlx-lm's lr_schedule block, in place of learning_rate (YAML only)."
    )
    epsilon: float | str = _setting(
        "auto",
        "How far branches lie from the values along their direction; auto: from the slopes, as the learning rate is, "
        "or 1e-3 if that is given.",
        least=1e-8,
        word="auto",
    )
    estimator: str = _setting(
        "one-sided",
        "one-sided: all directions see the batch and share its loss; two-sided: the batch is divided among them; jvp: "
        "all see the batch, and slopes are derivatives by forward-mode differentiation, at twice the work.",
        choices=tuple(ESTIMATORS),
    )
    directions: int | None = _setting(
        None,
        "Directions per step; default: 7, or a divisor of the batch, half of it if even, if two-sided.",
        least=1,
        most=1 << 10,
    )
    law: str = _setting("rademacher", "Law of the directions: +-1, or standard normal.", choices=LAWS)
    structure: str = _setting(
        "free",
        "What the directions have in common: nothing, or the numbers of a layer's rows or columns, or, low-rank, of "
        "both, multiplied.",
        choices=tuple(STRUCTURES),
    )
    precondition: float = _setting(
        0.0, "Scale the directions by this power of the Fisher scores; 0 for none.", least=-1, most=1
    )
    val_batches: int = _setting(
        25, "Validation batches, -1 for the whole validation set, 0 for no validation.", least=-1
    )
    steps_per_report: int = _setting(10, "Steps between loss reports.", least=1)
    steps_per_eval: int = _setting(200, "Steps between validations.", least=1)
    patience: int | None = _setting(
        None, "Stop when this many validations in a row were no better than the best one.", least=1
    )
    save_every: int = _setting(100, "Steps between snapshots, which make resuming quick.", least=1)
    max_seq_length: int = _setting(2048, "Longest sequence in tokens.", least=2)
    mask_prompt: bool = _setting(False, "Leave the prompt out of the loss.")
    test: bool = _setting(False, "Evaluate on the test set after training.")
    test_batches: int = _setting(-1, "Test batches, -1 for the whole test set.", least=-1)
    split: str = _setting(
        "auto",
        "Several machines (mlx.launch): data: each takes some rows of the batch; directions: some branches; auto: "
        "rows, more of them the faster it is, or branches where a batch has fewer rows than there are machines; model: "
        "each takes a part of every layer, for models too large for one.",
        choices=("auto", "data", "directions", "model"),
    )
    rank_timeout: float = _setting(300.0, "Seconds to wait for the other machines before giving up.", least=1e-3)
    report_to: str | None = _setting(None, "Services that follow the run: wandb, swanlab or trackio, or several: a,b.")
    project_name: str | None = _setting(None, "The run's project there.")

    @classmethod
    def recorded(cls, settings: dict[str, Any], **changes: Any) -> "TrainConfig":
        """From the `config` of a journal, with changes. Raises UsageError for one that is not this version's."""
        if set(settings) != {f.name for f in dataclasses.fields(cls)}:
            raise UsageError("the journal is another version's of zo-mlx: its settings are not this one's")
        config = cls(**{**settings, **changes})
        config.check()
        return config

    def check(self) -> None:
        """Raise UsageError for the first setting that is of the wrong type, or out of range."""
        if self.hf_dataset is not None:
            blocks: Any = self.hf_dataset if isinstance(self.hf_dataset, list) else [self.hf_dataset]
            if not blocks or not all(isinstance(block, dict) for block in blocks):
                raise UsageError(f"hf_dataset must be a block of settings, or a list of them, not {self.hf_dataset}")
            try:
                self.hf_dataset = json.loads(json.dumps(blocks, default=str))  # as the journal will give it back
            except (TypeError, ValueError) as e:  # YAML has keys that JSON has not, and blocks within themselves
                raise UsageError(f"hf_dataset cannot be written as JSON, as journals have it: {e}") from None
        for f in dataclasses.fields(self):
            value: Any = getattr(self, f.name)
            kind: Any = value_type(f)
            least: float | None = f.metadata["least"]
            if (value is None and f.default is None) or (value is not None and value == f.metadata.get("word")):
                continue
            if type(value) is int and abs(value) > sys.float_info.max:  # Python does not even write it out
                value = math.inf if value > 0 else -math.inf
            if kind is float and type(value) is int:
                value = float(value)
                setattr(self, f.name, value)
            if kind is str and isinstance(value, os.PathLike):
                value = os.fspath(value)
                setattr(self, f.name, value)
            if type(value) is not kind:
                word = f", or {f.metadata['word']}" if "word" in f.metadata else ""
                raise UsageError(f"{f.name} must be {kind.__name__}{word}, not {value!r}")
            if value == "" and f.name in ("model", "data", "adapter_path"):
                raise UsageError(f"{f.name} must not be empty")
            if kind is str and "\0" in value:
                raise UsageError(f"{f.name} must not hold a null character")
            if least is not None:
                most = f.metadata.get("most", sys.float_info.max if kind is float else _MOST)
                check_range(f.name, value, least, most, f.metadata.get("unit", ""))
            if (choices := f.metadata.get("choices")) and value not in choices:
                raise UsageError(f"{f.name} must be one of {', '.join(choices)}, not {value}")
        check_objective(self.objective)
        own_rate = self.lr_schedule is not None or self.learning_rate != "auto"
        if self.objective != CROSS_ENTROPY and own_rate and self.epsilon == "auto":
            raise UsageError("a learning rate of your own needs an --epsilon, where the objective is a score")
        if self.estimator == "jvp" and self.objective != CROSS_ENTROPY:
            raise UsageError(f"objective {self.objective} has no derivatives: leave out --estimator jvp")
        if self.gradient == "exact":
            if self.objective != CROSS_ENTROPY:
                raise UsageError(f"objective {self.objective} has no gradient: leave out --gradient exact")
            if self.split in ("directions", "model"):
                raise UsageError(f"--split {self.split} is for random directions: leave out --gradient exact")
            if self.optimizer == "sgd" and not own_rate:
                raise UsageError("sgd with exact gradients has no automatic learning rate: give --learning-rate")
        if self.split == "model" and self.memory_limit is not None:
            raise UsageError("--memory-limit does not go with --split model: give --tokens-at-once")
        if self.num_layers == 0:
            raise UsageError("num_layers must be at least 1, or -1 for all, not 0")
        if self.lr_schedule is not None:
            try:
                self.lr_schedule = json.loads(json.dumps(self.lr_schedule))  # as the journal will give it back
                rate = build_schedule(self.lr_schedule)
                rates = [float(rate(mx.array(step))) for step in (0, self.iters // 2, self.iters)]
            except Exception as e:  # mlx-lm looks names and arguments up without checking them
                raise UsageError(f"lr_schedule is not one that mlx-lm can build: {type(e).__name__}: {e}") from None
            if not all(0 <= r < math.inf for r in rates):
                raise UsageError(f"lr_schedule gives learning rates of {rates} at the start, middle and end")
        if self.optimizer_config is not None:
            try:
                self.optimizer_config = json.loads(json.dumps(self.optimizer_config))
                for name, arguments in self.optimizer_config.items():
                    if name in OPTIMIZERS:
                        rule = getattr(optim, OPTIMIZERS[name])(1e-3, **arguments)
                        rule.apply_gradients({"values": mx.ones(2)}, {"values": mx.ones(2)})
            except Exception as e:  # mlx's optimizers take arguments without checking them
                raise UsageError(f"optimizer_config is none of mlx's optimizers': {type(e).__name__}: {e}") from None
            for name, arguments in self.optimizer_config.items():
                for key in ("momentum", "dampening"):
                    if name in OPTIMIZERS and key in arguments:
                        check_range(f"optimizer_config: {name}: {key}", arguments[key], 0, math.nextafter(1, 0))

    def check_together(self) -> None:
        """Raise UsageError for settings that have no effect beside the others; of a whole run's, not of some given."""
        batch = self.batch_size or _default_batch(self.gradient)
        if self.gradient == "zo" and self.estimator == "two-sided" and self.directions and batch % self.directions:
            raise UsageError(
                f"--directions {self.directions}: two-sided ones have a part of the batch each, of which there are "
                f"{batch}: give a divisor of --batch-size"
            )
        if self.gradient == "zo" and (self.keep_blocks or self.spill):
            raise UsageError("--keep-blocks and --spill are for --gradient exact")
        if self.max_tokens and self.objective == CROSS_ENTROPY:
            raise UsageError("--max-tokens is for answers that are scored: give --objective")


_MOST = 2**63 - 1  # seeds and step numbers are hashed and written as 64 bits


def check_range(name: str, value: float, least: float, most: float = _MOST, unit: str = "") -> None:
    """Raise UsageError for a number out of range."""
    if not value >= least:
        raise UsageError(f"{name} must be at least {least}{unit}, not {value}{unit}")
    if value > most:
        raise UsageError(f"{name} must be at most {most}{unit}, not {value}{unit}")


# Large steps pay while the loss is far from its floor; later the noise of random directions asks for smaller ones. A
# geometric fall does not depend on the number of steps, so that a run can be made longer.
RATE_FALL = 0.999

# A step with exact gradients reads the weights three times whatever the batch.
ZO_BATCH, EXACT_BATCH = 4, 16
# Nor does it need its batch at once: memory is then that of so many tokens. Batches with more take 1.2 times the time
# (docs/numbers.md).
EXACT_TOKENS = 512

# With the loss at the values, 8 branches: a direction costs a seventh more than one of infinitely many would.
ONE_SIDED_DIRECTIONS = 7


def _default_batch(gradient: str) -> int:
    return EXACT_BATCH if gradient == "exact" else ZO_BATCH


def value_type(field: dataclasses.Field[Any]) -> type:
    """The type of a setting's values other than None and a word."""
    kind: Any = field.type
    if isinstance(kind, types.UnionType):
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    return typing.get_origin(kind) or kind


def filled(value: T | None) -> T:
    """A setting that `resolved` has filled in."""
    assert value is not None, "the settings are not resolved"
    return value


def resolved(config: TrainConfig) -> TrainConfig:
    """Fill in the settings whose defaults depend on others; `config` is checked.

    Where the batch is divided, as many directions as leave two examples to each: more directions average more of their
    noise away, but a share of one example pulls towards that example's label. See docs/numbers.md.
    """
    batch = config.batch_size or _default_batch(config.gradient)
    shares = next((batch // p for p in range(2, math.isqrt(batch) + 1) if batch % p == 0), 1)
    directions = config.directions or (shares if config.estimator == "two-sided" else ONE_SIDED_DIRECTIONS)
    optimizer = config.optimizer or ("adam" if config.gradient == "exact" else "sgd")
    config = dataclasses.replace(config, batch_size=batch, directions=directions, optimizer=optimizer)
    if config.gradient == "exact" and config.memory_limit is None:
        config.tokens_at_once = config.tokens_at_once or EXACT_TOKENS
    if config.lr_schedule is None and config.learning_rate != "auto":
        config.lr_schedule = {"name": "exponential_decay", "arguments": [config.learning_rate, RATE_FALL]}
    return config


# Settings that a resumed run may change: they do not alter the sequence of updates already made.
CHANGEABLE = {
    "model", "data", "adapter_path", "iters", "val_batches", "steps_per_report", "steps_per_eval", "patience",
    "save_every", "test", "test_batches", "split", "rank_timeout", "report_to", "project_name",
}  # fmt: skip
