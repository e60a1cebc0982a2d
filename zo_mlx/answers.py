"""Answers of the branches of a model, and their scores: the objectives that need not be differentiable."""

from collections.abc import Sequence
from itertools import takewhile

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .data import Dataset, Example, Kind
from .errors import UsageError
from .head import Head
from .metric import Metric
from .objective import greedy_tokens, padded


class Judge:
    """Scores the answers to examples: the likeliest choice where there are choices, else the text generated greedily.

    Args:
        metric: gives an answer's score.
        kind: of the data.
        max_tokens: the longest text that is generated.

    Raises:
        UsageError: the metric is for choices, and the data have none.
    """

    def __init__(self, metric: Metric, tokenizer: TokenizerWrapper, kind: Kind, max_tokens: int):
        self.generates = kind == "tokens"
        if self.generates and metric.name == "accuracy":
            raise UsageError("the objective accuracy is for data with choices; for generated text, take exact-match")
        self._metric, self._tokenizer, self._max_tokens = metric, tokenizer, max_tokens

    def check(self, head: Head) -> None:
        """Raise UsageError if answers are to be generated, and the model cannot do that for many prompts at once."""
        if self.generates and not head.continues:
            raise UsageError("this model's answers cannot be generated in batches: it keeps more than keys and values")

    def tokens(self, branches: Sequence[Sequence[Example]]) -> int:
        """How many tokens a branch takes at most when texts are generated, padding included."""
        longest = max(prompt_length(e) for own in branches for e in own)
        return len(branches[0]) * (longest + self._max_tokens)

    def choice_scores(self, scored: mx.array, branches: Sequence[Sequence[Example]]) -> mx.array:
        """The scores of the likeliest choices: (P, E, C) from `objective.scores` -> (P, E) float32."""
        winners = np.array(scored.argmax(axis=-1))
        judged = [
            [self._metric(e.record, e.choices[w]) for e, w in zip(examples, own, strict=True)]
            for examples, own in zip(branches, winners, strict=True)
        ]
        return mx.array(judged)

    def text_scores(self, head: Head, branches: Sequence[Sequence[Example]]) -> mx.array:
        """The scores of what P branches of a model generate for E prompts each: (P, E) float32."""
        examples = [e for own in branches for e in own]
        texts = self.texts(head, examples)
        scores = [self._metric(e.record, text) for e, text in zip(examples, texts, strict=True)]
        return mx.array(scores).reshape(len(branches), -1)

    def texts(self, head: Head, examples: Sequence[Example]) -> list[str]:
        """What the model generates for each prompt."""
        generated = self.generate(head, [e.rows[0][: prompt_length(e)] for e in examples])
        return [self._tokenizer.decode(tokens) for tokens in generated]

    def generate(self, head: Head, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The likeliest next tokens after each prompt, one after the other, up to an end of text."""
        lengths = [len(p) for p in prompts]
        states, caches = head.begun(mx.array(padded([prompts])), lengths)
        last = states[mx.arange(len(prompts)), mx.array(lengths) - 1]
        for cache in caches:
            cache.step = self._max_tokens  # room for all that comes, at once
        made, ends = [], self._tokenizer.eos_token_ids
        finished = np.zeros(len(prompts), bool)
        while True:
            tokens = greedy_tokens(head, last)
            made.append(tokens)
            finished |= np.isin(tokens, list(ends))
            if finished.all() or len(made) == self._max_tokens:
                break
            last = head.hidden(mx.array(tokens)[:, None], cache=caches)[:, 0]
        return [list(takewhile(lambda t: t not in ends, row)) for row in np.stack(made, axis=1).tolist()]


def longest_completion(dataset: Dataset) -> int:
    """In tokens; at least 1."""
    return max([1, *(len(e.targets[0]) for e in dataset.examples)])


def prompt_length(example: Example) -> int:
    """How many tokens come before the first one that counts."""
    return example.targets[0][0].position + 1
