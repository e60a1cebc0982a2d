"""Measure a model on a data file: accuracy and macro-F1 over choices, or perplexity."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .answers import Judge, longest_completion
from .config import check_range
from .data import Dataset, Example
from .errors import UsageError
from .head import Head, split_head
from .metric import CROSS_ENTROPY, Metric
from .model import config_of, context_length, vocabulary_size
from .objective import collate, denominator, example_losses, scores
from .progress import Progress
from .ranks import Ranks
from .records import FEATURES, read_file, read_splits
from .rows import tokenized


@dataclass
class Evaluation:
    """Results on one data file.

    Attributes:
        examples: how many were evaluated.
        loss: nats; for choices the mean over examples of -log p(right choice), else the mean over target tokens.
        accuracy: for choices, the share of examples whose right choice scores highest.
        accuracy_low, accuracy_high: 95% confidence interval of the accuracy (Wilson 1927).
        macro_f1: for choices, the unweighted mean over choices of their F1.
        perplexity: for tokens, exp(loss).
        truncated: for tokens, how many texts were longer than the longest sequence and were cut.
        score: of another objective than cross-entropy, the mean over examples.
    """

    examples: int
    loss: float
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    macro_f1: float | None = None
    perplexity: float | None = None
    truncated: int | None = None
    score: float | None = None

    @property
    def objective(self) -> float:
        """What training makes smaller, the loss or minus the score."""
        return self.loss if self.score is None else -self.score

    def as_dict(self) -> dict[str, Any]:
        """The results that apply."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def __str__(self) -> str:
        score = "" if self.score is None else f"score {self.score:.3f}, "
        if self.accuracy is None:
            cut = f", {self.truncated} of them cut" if self.truncated else ""
            return f"{score}loss {self.loss:.3f}, perplexity {self.perplexity:.3f} ({self.examples} examples{cut})"
        return (
            f"{score}loss {self.loss:.3f}, accuracy {self.accuracy:.1%} (95% {self.accuracy_low:.1%} to "
            f"{self.accuracy_high:.1%}), macro-F1 {self.macro_f1:.3f} ({self.examples} examples)"
        )


def evaluate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    data: str | Path,
    *,
    batch_size: int = 16,
    num_batches: int = -1,
    max_seq_length: int = 2048,
    mask_prompt: bool = False,
    objective: str = CROSS_ENTROPY,
    max_tokens: int | None = None,
    progress: bool = True,
    **features: str,
) -> Evaluation:
    """Evaluate a loaded model on a data file.

    Args:
        model, tokenizer: from `zo_mlx.load`.
        data: a `.jsonl` file, a directory whose `test.jsonl` is taken, or the hub id of a dataset with a test split.
        batch_size: examples at a time.
        num_batches: how many batches, of examples from all over the file; -1 for all.
        max_seq_length: longest sequence in tokens; the model's context length if that is less.
        mask_prompt: leave the prompt out of the loss.
        objective: score the answers, too: accuracy, exact-match, f1, or module:function. Then prompts are left out of
            the loss.
        max_tokens: of the texts generated for that; None is as long as the longest completion.
        progress: report progress on standard error.
        **features: mlx-lm's names for the fields, as in `train`: `prompt_feature`, `completion_feature` ...

    Raises:
        UsageError: the data are missing or wrong, or the objective is.
        ZoError: the objective's function fails; data of the hub cannot be fetched.
    """
    check_range("--batch-size", batch_size, 1)
    check_range("--max-seq-length", max_seq_length, 2)
    check_range("--max-tokens", 1 if max_tokens is None else max_tokens, 1)
    if num_batches == 0 or num_batches < -1:
        raise UsageError(f"the number of batches must be at least 1, or -1 for all, not {num_batches}")
    metric = None if objective == CROSS_ENTROPY else Metric(objective)
    if unknown := features.keys() - FEATURES:
        raise UsageError(f"no such settings: {', '.join(sorted(unknown))}")
    features = {**FEATURES, **features}
    is_file = Path(data).is_file()
    records = read_file(Path(data), features) if is_file else read_splits(data, ["test"], features)["test"]
    config = config_of(model)
    longest, vocabulary = min(max_seq_length, context_length(config)), vocabulary_size(config)
    dataset = tokenized(records, tokenizer, longest, mask_prompt, metric is not None, vocabulary)
    count = -1 if num_batches == -1 else num_batches * batch_size
    judge = Judge(metric, tokenizer, dataset.kind, max_tokens or longest_completion(dataset)) if metric else None
    head = split_head(model, dataset.has_continuations or bool(judge and judge.generates))
    if judge:
        judge.check(head)
    return evaluate_dataset(head, dataset, batch_size, count, progress, judge)


def evaluate_dataset(
    head: Head,
    dataset: Dataset,
    batch_size: int,
    count: int = -1,
    progress: bool = True,
    judge: Judge | None = None,
    ranks: Ranks | None = None,
    together: bool = False,
) -> Evaluation:
    """As `evaluate`, for a model split at its head and tokenized data: `count` examples, always the same; -1 for all.

    Args:
        ranks: each of them evaluates its part of the examples, and all have the result.
        together: each of them has a part of the model instead, and all evaluate all examples.
    """
    examples = dataset.examples
    if 0 <= count < len(examples):  # not the first ones: files may be in the order of their labels
        examples = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:count]]
    # Batches of equal lengths have the least padding.
    examples = sorted(examples, key=lambda e: e.length)
    if ranks is None or together:
        guard = ranks.waiting if ranks else contextlib.nullcontext
        found = _measured(head, examples, batch_size, progress, judge, guard)
    else:
        found, own = np.zeros((len(examples), 3), np.float32), slice(ranks.rank, None, ranks.count)
        found[own] = _measured(head, examples[own], batch_size, progress, judge)
        found = ranks.gather(found).sum(axis=0)
    losses, winners, judged = found.T
    loss = float(losses.sum(dtype=float)) / denominator([examples], dataset.kind != "tokens")
    score = float(judged.mean(dtype=float)) if judge else None
    if dataset.kind == "tokens":
        cut = sum(e.truncated for e in examples)
        return Evaluation(len(examples), loss, perplexity=math.exp(min(loss, 700)), truncated=cut, score=score)
    predicted = [e.choices[int(w)] for e, w in zip(examples, winners, strict=True)]
    right = [e.choices[e.label] for e in examples if e.label is not None]
    correct = sum(p == r for p, r in zip(predicted, right, strict=True))
    low, high = wilson_interval(correct, len(examples))
    f1 = macro_f1(predicted, right)
    return Evaluation(len(examples), loss, correct / len(examples), low, high, f1, score=score)


def _measured(
    head: Head,
    examples: Sequence[Example],
    batch_size: int,
    progress: bool,
    judge: Judge | None,
    guard: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> np.ndarray:
    """Of each example the sum of its losses in nats, the number of the choice that wins, and its score: (n, 3)."""
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    found = [np.zeros((0, 3), np.float32)]
    with Progress("Evaluating", len(batches), "batch", enabled=progress) as bar:
        for part in batches:
            with guard():
                batch = collate([part], head.continues)
                scored = scores(head, batch)[0]
                losses, winners = -scored.sum(axis=-1), mx.zeros(len(part))
                if batch.labels is not None:
                    losses, winners = example_losses(scored, batch.labels[0]), scored.argmax(axis=-1)
                judged = mx.zeros(len(part))
                if judge and judge.generates:
                    judged = judge.text_scores(head, [part])[0]
                elif judge:
                    judged = judge.choice_scores(scored[None], [part])[0]
                found.append(np.array(mx.stack([losses, winners, judged], axis=-1)))
            mx.clear_cache()
            bar.advance()
    return np.concatenate(found)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def macro_f1(predicted: Sequence[str], right: Sequence[str]) -> float:
    """Unweighted mean of the F1 of every class that occurs among the right or the predicted ones.

    A class that is only predicted counts with an F1 of 0 (as in scikit-learn's `f1_score`).
    """
    scores_of = []
    for name in {*right, *predicted}:
        both = sum(p == r == name for p, r in zip(predicted, right, strict=True))
        scores_of.append(2 * both / (predicted.count(name) + right.count(name)))  # type: ignore[attr-defined]
    return sum(scores_of) / len(scores_of)
