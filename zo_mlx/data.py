"""Examples: token rows, and what is to be read from them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from .records import Record

Kind = Literal["choices", "tokens"]


@dataclass(frozen=True)
class Target:
    """A token whose log-probability counts: the one that follows position `position` of row `row`."""

    row: int
    position: int
    token: int


@dataclass(frozen=True)
class Example:
    """One line of a data file, as the rows of tokens to evaluate and what to read from them.

    Attributes:
        rows: token sequences, each without the last token of the text (nothing is predicted from it).
        targets: for `choices`, one list of targets per choice; else a single list.
        label: for `choices`, the index of the right choice, where it is known; else None.
        choices: for `choices`, their texts.
        truncated: whether the text was longer than the longest sequence and was cut.
        record: the line itself.
    """

    rows: list[list[int]]
    targets: list[list[Target]]
    label: int | None = None
    choices: tuple[str, ...] = ()
    truncated: bool = False
    record: Record = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max(len(row) for row in self.rows)

    @cached_property
    def prompt_length(self) -> int:
        """How many tokens all rows begin with; those of a single row are all of them."""
        return common_prefix(self.rows)


@dataclass
class Dataset:
    """The examples of one file; all are of one kind.

    `left_out` names the fields about tools of which the chat template makes nothing.
    """

    kind: Kind
    examples: list[Example]
    left_out: frozenset[str] = frozenset()

    @property
    def truncated(self) -> int:
        """How many texts were cut to the longest length."""
        return sum(e.truncated for e in self.examples)

    @property
    def has_continuations(self) -> bool:
        """Whether any examples have several rows, which go on from the same prompt."""
        return any(len(e.rows) > 1 for e in self.examples)

    @property
    def unshared(self) -> float:
        """The share of tokens that is left where an example's rows go on from its prompt."""
        left = sum(sum(map(len, e.rows)) - (len(e.rows) - 1) * e.prompt_length for e in self.examples)
        return left / sum(len(row) for e in self.examples for row in e.rows)

    def __len__(self) -> int:
        return len(self.examples)

    def fingerprint(self) -> str:
        """SHA-256 of the tokens, targets and labels of all examples, in hexadecimal."""
        digest = hashlib.sha256()
        for e in self.examples:
            ends = [(len(choice), choice[0], choice[-1]) for choice in e.targets]
            digest.update(repr((e.rows, ends, e.label)).encode())
        return digest.hexdigest()


def common_prefix(sequences: Iterable[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
