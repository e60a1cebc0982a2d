"""Training and test data: JSON lines in, token rows and targets out.

Formats are mlx-lm's (`text`, `prompt`/`completion`, `messages`), tokenized by mlx-lm's own dataset classes, and one of
ours: `prompt`/`completion`/`choices`, where the completion is one of the choices, each appended to the prompt as it is.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import create_dataset

from .errors import UsageError
from .files import is_text

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
        label: for `choices`, the index of the right choice; else None.
        choices: for `choices`, their texts.
        truncated: whether the text was longer than the longest sequence and was cut.
        record: the line itself.
    """

    rows: list[list[int]]
    targets: list[list[Target]]
    label: int | None = None
    choices: tuple[str, ...] = ()
    truncated: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max(len(row) for row in self.rows)

    @cached_property
    def prompt_length(self) -> int:
        """How many tokens all rows begin with; those of a single row are all of them."""
        return _common_prefix(self.rows)


@dataclass
class Dataset:
    """The examples of one file; all are of one kind."""

    kind: Kind
    examples: list[Example]

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


def load_dataset(
    path: Path, tokenizer: TokenizerWrapper, max_length: int, mask_prompt: bool = False, answers: bool = False
) -> Dataset:
    """Read, check and tokenize a data file.

    Args:
        path: a `.jsonl` file.
        tokenizer: the model's.
        max_length: the longest sequence, in tokens. Longer texts are cut; a prompt that leaves no room is an error.
        mask_prompt: for `prompt`/`completion` and `messages`, count only the completion's tokens (mlx-lm's flag).
        answers: the model's own answers are to be compared with the completions: what has none is refused, and prompts
            are masked.

    Raises:
        UsageError: names the file, the line and the field that is wrong.
    """
    lines = _read_lines(path)
    first = lines[0][1]
    if "choices" in first:
        examples = [_choice_example(d, tokenizer, max_length, f"{path}, line {n}") for n, d in lines]
        return Dataset("choices", examples)
    form = next((f for f in _CHECKS if f in first), None)
    if form is None:
        raise UsageError(
            f"{path}, line {lines[0][0]}: fields {sorted(first)} are none of the known formats: "
            "prompt/completion/choices, prompt/completion, messages, text"
        )
    mask_prompt = mask_prompt or answers
    if form == "text" and mask_prompt:
        raise UsageError(f"{path}: the text format has no prompts for --mask-prompt, or to be answered")
    for number, record in lines:
        if "choices" in record:
            raise UsageError(f"{path}, line {number}: has choices, but line {lines[0][0]} has none")
        _CHECKS[form](record, f"{path}, line {number}")
        if form == "messages" and answers:
            _check_answer(record["messages"][-1], f"{path}, line {number}")
    dataset = create_dataset(
        [d for _, d in lines],
        tokenizer,  # type: ignore[arg-type]
        SimpleNamespace(mask_prompt=mask_prompt),
    )
    examples = []
    for number, record in lines:
        where = f"{path}, line {number}"
        try:
            tokens, offset = dataset.process(record)
        except Exception as e:  # chat templates are programs; they raise what they like
            raise UsageError(f"{where}: the tokenizer's chat template fails: {e}") from None
        examples.append(_token_example(tokens, offset, max_length, where, record))
    return Dataset("tokens", examples)


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    lines = []
    try:
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise UsageError(f"{path}, line {number}: not JSON: {e}") from None
                if not is_text(json.dumps(record, ensure_ascii=False)):
                    raise UsageError(f"{path}, line {number}: holds half a surrogate pair, which is no character")
                if not isinstance(record, dict):
                    raise UsageError(f"{path}, line {number}: must be a JSON object, not {type(record).__name__}")
                lines.append((number, record))
    except FileNotFoundError:
        raise UsageError(f"no such data file: {path}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {e}") from None
    if not lines:
        raise UsageError(f"{path} is empty")
    return lines


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value:
        problem = "is missing" if field not in record else "must be a non-empty string"
        raise UsageError(f"{where}: field {field!r} {problem}")
    return value


def _check_messages(record: dict[str, Any], where: str) -> None:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: field 'messages' must be a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: every message must be an object with a 'role'")


def _check_answer(message: dict[str, Any], where: str) -> None:
    if message["role"] != "assistant" or not isinstance(message.get("content"), str):
        raise UsageError(f"{where}: the last message must be the assistant's, with text to compare answers with")


def _check_completion(record: dict[str, Any], where: str) -> None:
    _text(record, "prompt", where)
    _text(record, "completion", where)


_CHECKS: dict[str, Callable[[dict[str, Any], str], object]] = {
    "prompt": _check_completion,
    "messages": _check_messages,
    "text": lambda record, where: _text(record, "text", where),
}


def _token_example(tokens: list[int], offset: int, max_length: int, where: str, record: dict[str, Any]) -> Example:
    """mlx-lm's loss mask: the tokens from `offset` on are targets (the first token has nothing before it)."""
    first, length = max(offset, 1), len(tokens)
    tokens = tokens[:max_length]
    if first >= len(tokens):
        if length > max_length:
            raise UsageError(f"{where}: the prompt has {offset} tokens, more than fit a sequence of {max_length}")
        raise UsageError(f"{where}: it has no token to predict")
    targets = [Target(0, i - 1, tokens[i]) for i in range(first, len(tokens))]
    return Example([tokens[:-1]], [targets], truncated=length > max_length, record=record)


def _choice_example(record: dict[str, Any], tokenizer: TokenizerWrapper, max_length: int, where: str) -> Example:
    prompt, completion = _text(record, "prompt", where), _text(record, "completion", where)
    choices = record.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise UsageError(f"{where}: field 'choices' must be a list of non-empty strings")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UsageError(f"{where}: field 'choices' must hold at least two different choices")
    if completion not in choices:
        raise UsageError(f"{where}: completion {completion!r} is not among the choices {choices}")
    alone = tokenizer.encode(prompt)
    sequences = [tokenizer.encode(prompt + choice) for choice in choices]
    # A choice may merge with the prompt's last token: it begins where any of the texts first differ.
    start = min(_common_prefix([alone, *sequences]), *(len(s) - 1 for s in sequences))
    if start == 0:
        raise UsageError(f"{where}: the prompt has no token before the choices begin")
    if (longest := max(map(len, sequences))) > max_length:
        raise UsageError(f"{where}: prompt and choice have {longest} tokens, more than fit a sequence of {max_length}")
    rows, row_of = _covering_rows([s[:-1] for s in sequences])
    targets = [
        [Target(row, i - 1, s[i]) for i in range(start, len(s))] for row, s in zip(row_of, sequences, strict=True)
    ]
    return Example(rows, targets, choices.index(completion), tuple(choices), record=record)


def _common_prefix(sequences: Iterable[list[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _covering_rows(sequences: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The fewest rows of which every sequence is a prefix, and which row serves which sequence.

    Choices that differ only in their last token share one row.
    """
    rows: list[list[int]] = []
    row_of = [0] * len(sequences)
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        s = sequences[i]
        row_of[i] = next((n for n, row in enumerate(rows) if row[: len(s)] == s), len(rows))
        if row_of[i] == len(rows):
            rows.append(s)
    return rows, row_of
