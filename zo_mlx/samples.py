"""What a run's model makes of some examples before and after it, to be looked at."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .answers import Judge, prompt_length
from .data import Dataset, Example
from .head import Head
from .objective import collate, greedy_tokens, padded, scores
from .sparse import SparseModel

# Little more than a step with SmolLM2.
CHOICE_EXAMPLES, TEXT_EXAMPLES = 6, 3
# Shown of each: the last tokens of a text, the last characters of a prompt, the likeliest choices.
TOKENS, CHARACTERS, SHOWN = 40, 500, 5

Kind = Literal["choices", "tokens", "text"]


@dataclass(frozen=True)
class Sample:
    """An example, and what the model makes of it with each of some values.

    Attributes:
        kind: choices; tokens, the last ones of a text; or text, which is generated.
        prompt: what comes before, or the end of that.
        right: the right choice or text.
        chances: of each choice or token: its probability with each of the values.
        answers: the texts with each of them; for tokens, the likeliest one at each place, after those that are there.
    """

    kind: Kind
    prompt: str
    right: str
    chances: list[tuple[str, list[float]]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def is_right(self, which: int) -> bool:
        """Whether the choice is, with one of the values."""
        return max(self.chances, key=lambda c: c[1][which])[0] == self.right

    @property
    def likeliest(self) -> list[tuple[str, list[float]]]:
        """Some choices, the right one among them, with the last values' likeliest first."""
        falling = sorted(self.chances, key=lambda c: (c[0] == self.right, c[1][-1]), reverse=True)
        return sorted(falling[:SHOWN], key=lambda c: -c[1][-1])


def samples(
    sparse: SparseModel,
    head: Head,
    tokenizer: TokenizerWrapper,
    judge: Judge | None,
    dataset: Dataset,
    values: Sequence[mx.array],
    at_once: int,
) -> list[Sample]:
    """Some examples from all over a dataset.

    Texts are generated only where they are the objective: on a CPU each of their tokens takes as long as all of this.

    Args:
        values: (K,) float32 each; the last ones stay set.
        at_once: the most examples in a forward pass.
    """
    count = min(len(dataset), CHOICE_EXAMPLES if dataset.kind == "choices" else TEXT_EXAMPLES)
    examples = [dataset.examples[i * len(dataset) // count] for i in range(count)]
    writer = judge if judge and judge.generates else None
    if dataset.kind == "tokens" and not writer:
        examples = [_by_token(e) for e in examples]
    found = list[list[list[float]]]()
    answers = list[list[str]]()
    for own in values:
        sparse.set_values(own[None])
        if writer:
            answers.append(writer.texts(head, examples))
        else:
            parts = [examples[i : i + at_once] for i in range(0, count, at_once)]
            found.append([chances for part in parts for chances in _chances(head, part)])
            if dataset.kind == "tokens":
                answers.append([tokenizer.decode(tokens) for part in parts for tokens in _likeliest(head, part)])
    kind: Kind = "choices" if dataset.kind == "choices" else "text" if writer else "tokens"
    made = list[Sample]()
    for i, example in enumerate(examples):
        names = example.choices or [tokenizer.decode([t.token for t in own]) for own in example.targets]
        chances = [(name, [own[i][c] for own in found]) for c, name in enumerate(names)] if found else []
        if example.label is not None:
            prompt, right = example.record["prompt"], example.choices[example.label]
        else:
            right = "".join(names)
            prompt = tokenizer.decode(example.rows[0][: prompt_length(example)])
        prompt = prompt if len(prompt) <= CHARACTERS else f"…{prompt[-CHARACTERS:]}"
        made.append(Sample(kind, prompt, right, chances, [own[i] for own in answers]))
    return made


def _by_token(example: Example) -> Example:
    """A text whose last tokens are scored one by one."""
    return replace(example, targets=[[target] for target in example.targets[0][-TOKENS:]])


def _likeliest(head: Head, examples: Sequence[Example]) -> list[list[int]]:
    """The likeliest token at the place of each one that is scored, of texts scored token by token."""
    states = head.hidden(mx.array(padded([[e.rows[0] for e in examples]])))
    places = [mx.array([target.position for (target,) in e.targets]) for e in examples]
    return [greedy_tokens(head, states[i, at]).tolist() for i, at in enumerate(places)]


def _chances(head: Head, examples: Sequence[Example]) -> list[list[float]]:
    """The probability of each choice among the others, or of each token."""
    scored = scores(head, collate([examples], head.continues))[0]
    if examples[0].label is not None:
        scored = scored - mx.logsumexp(scored, axis=-1, keepdims=True)
    return np.array(mx.exp(scored)).tolist()
