"""Training and test data: records in, token rows and targets out.

Formats are mlx-lm's (`text`, `prompt`/`completion`, `messages`, the last two with `tools` or without), tokenized by
mlx-lm's own dataset classes, and one of ours: `prompt`/`completion`/`choices`, where the completion is one of the
choices, each appended to the prompt as it is.
"""

import contextlib
from collections.abc import Callable
from itertools import chain, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import create_dataset

from .data import Dataset, Example, Target, common_prefix
from .errors import UsageError
from .files import is_text
from .records import Record, Records, place, read_file

# The fields of mlx-lm's formats, in the order in which it looks for them.
_FORMS = (("prompt", "completion"), ("messages",), ("text",))


def load_dataset(
    path: Path, tokenizer: TokenizerWrapper, max_length: int, mask_prompt: bool = False, answers: bool = False
) -> Dataset:
    """Read, check and tokenize a `.jsonl` file; arguments and errors are those of `tokenized`."""
    return tokenized(read_file(path), tokenizer, max_length, mask_prompt, answers)


def check_tokens(example: Example, vocabulary: int, where: str) -> None:
    """Raise UsageError for a token that a model does not have: MLX would read whatever lies behind its embeddings."""
    tokens = [*chain(*example.rows), *(target.token for choice in example.targets for target in choice)]
    if (highest := max(tokens)) >= vocabulary:
        raise UsageError(f"{where}: the tokenizer has token {highest}, the model only {vocabulary}")


def tokenized(
    records: Records,
    tokenizer: TokenizerWrapper,
    max_length: int,
    mask_prompt: bool = False,
    answers: bool = False,
    vocabulary: int = 1 << 30,
    unusable: list[str] | None = None,
) -> Dataset:
    """Check and tokenize records, from `read_splits` or `read_file`; at least one. Those of a file are of one format.

    Args:
        tokenizer: the model's.
        max_length: the longest sequence, in tokens. Longer texts are cut.
        mask_prompt: for `prompt`/`completion` and `messages`, count only the completion's tokens (mlx-lm's flag).
        answers: the model's own answers are to be compared with the completions: what has none is refused, and prompts
            are masked.
        vocabulary: how many tokens the model has.
        unusable: gets what is wrong with records of mlx-lm's formats in which nothing is to be predicted (a prompt that
            leaves no room, an empty text), which are left out then, as long as there are others. None: they are errors.

    Raises:
        UsageError: names the record and the field that is wrong.
    """
    files = [list(group) for _, group in groupby(records, place)]
    parts = [_tokenized_file(file, tokenizer, max_length, mask_prompt, answers, unusable) for file in files]
    if len({part.kind for part in parts}) > 1:
        raise UsageError("some of the data have choices and some have not: " + ", ".join(place(f[0]) for f in files))
    examples = [example for part in parts for example in part.examples]
    if not examples and unusable:
        raise UsageError(unusable[0])
    place_of = {id(record): where for where, record in records}
    for example in examples:
        check_tokens(example, vocabulary, place_of[id(example.record)])
    return Dataset(parts[0].kind, examples, frozenset().union(*(part.left_out for part in parts)))


def _tokenized_file(
    records: Records,
    tokenizer: TokenizerWrapper,
    max_length: int,
    mask_prompt: bool,
    answers: bool,
    unusable: list[str] | None,
) -> Dataset:
    first_place, first = records[0]
    if _has_choices(first):
        for where, record in records:
            _text(record, "completion", where)
        examples = [choice_example(record, tokenizer, max_length, where) for where, record in records]
        return Dataset("choices", examples)
    form = next((form for form in _FORMS if all(field in first for field in form)), None)
    if form is None:
        raise UsageError(
            f"{first_place}: fields {sorted(first)} are none of the known formats: "
            "prompt/completion/choices, prompt/completion, messages, text; --prompt-feature, --completion-feature, "
            "--chat-feature and --text-feature say what fields are called"
        )
    mask_prompt = mask_prompt or answers
    if form == ("text",) and mask_prompt:
        raise UsageError(f"{first_place}: the text format has no prompts for --mask-prompt, or to be answered")
    for where, record in records:
        if _has_choices(record):
            raise UsageError(f"{where}: has choices, but {first_place} has none")
        if form == ("messages",):
            _check_messages(record, where, answers)
        else:
            for field in form:  # a chat template makes something of an empty text, too
                _text(record, field, where, may_be_empty=True)
    dataset = create_dataset(
        [record for _, record in records],
        tokenizer,  # type: ignore[arg-type]
        SimpleNamespace(mask_prompt=mask_prompt),
    )
    examples = []
    for where, record in records:
        try:
            # Where there is no token at all, mlx-lm's own looks for the last one.
            empty = form == ("text",) and not record["text"]
            tokens, offset = ([], 0) if empty else dataset.process(record)
        except Exception as e:  # chat templates are programs; they raise what they like
            raise UsageError(f"{where}: the tokenizer's chat template fails: {e}") from None
        try:
            examples.append(_token_example(tokens, offset, max_length, where, record))
        except UsageError as e:
            if unusable is None:
                raise
            unusable.append(str(e))
    left_out = frozenset() if form == ("text",) else _left_out([r for _, r in records], dataset.process)
    return Dataset("tokens", examples, left_out)


def _has_choices(record: Record) -> bool:
    """Whether a record is of our format; hub datasets have other things that are called choices."""
    choices = record.get("choices")
    return choices is not None and not isinstance(choices, dict) and "prompt" in record


def _left_out(records: list[Record], process: Callable[[Record], Any]) -> frozenset[str]:
    """The fields about tools that make no difference to the tokens of the first record that has them."""

    def without(name: str, part: Record) -> Record:
        return {k: v for k, v in part.items() if k != name}

    found = set()
    for name in ("tools", "tool_calls"):
        with contextlib.suppress(Exception):  # a template that fails without them reads them
            first = next(r for r in records if any(part.get(name) for part in (r, *r.get("messages", []))))
            other = without(name, first)
            if "messages" in first:
                other["messages"] = [without(name, m) for m in first["messages"]]
            if process(first) == process(other):
                found.add(name)
    return frozenset(found)


def _text(record: Record, field: str, where: str, may_be_empty: bool = False) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not (value or may_be_empty):
        kind = "a string" if may_be_empty else "a non-empty string"
        problem = "is missing" if field not in record else f"must be {kind}"
        raise UsageError(f"{where}: field {field!r} {problem}")
    return value


def _check_messages(record: Record, where: str, answers: bool) -> None:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: field 'messages' must be a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: every message must be an object with a 'role'")
    last = messages[-1]
    if answers and (last["role"] != "assistant" or not isinstance(last.get("content"), str)):
        raise UsageError(f"{where}: the last message must be the assistant's, with text to compare answers with")


def _token_example(tokens: list[int], offset: int, max_length: int, where: str, record: Record) -> Example:
    """mlx-lm's loss mask: the tokens from `offset` on are targets (the first token has nothing before it)."""
    first, length = max(offset, 1), len(tokens)
    tokens = tokens[:max_length]
    if first >= len(tokens):
        if length > max_length:
            raise UsageError(f"{where}: the prompt has {offset} tokens, more than fit a sequence of {max_length}")
        raise UsageError(f"{where}: it has no token to predict")
    targets = [Target(0, i - 1, tokens[i]) for i in range(first, len(tokens))]
    return Example([tokens[:-1]], [targets], truncated=length > max_length, record=record)


def choice_example(record: Record, tokenizer: TokenizerWrapper, max_length: int, where: str) -> Example:
    """Of a record with choices; without a completion it has no label. Raises UsageError, as `tokenized` does."""
    prompt, completion = _text(record, "prompt", where), record.get("completion")
    choices = record.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise UsageError(f"{where}: field 'choices' must be a list of non-empty strings")
    if not is_text("".join([prompt, *choices])):
        raise UsageError(f"{where}: prompt and choices are not valid UTF-8 text")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UsageError(f"{where}: field 'choices' must hold at least two choices, all different")
    if completion not in (None, *choices):
        raise UsageError(f"{where}: completion {completion!r} is not among the choices {choices}")
    alone = tokenizer.encode(prompt)
    sequences = [tokenizer.encode(prompt + choice) for choice in choices]
    if len({*map(tuple, sequences)}) < len(choices):
        raise UsageError(f"{where}: two of the choices {choices} are the same tokens to the model")
    # A choice may merge with the prompt's last token: it begins where any of the texts first differ.
    start = min(common_prefix([alone, *sequences]), *(len(s) - 1 for s in sequences))
    if start == 0:
        raise UsageError(f"{where}: the prompt has no token before the choices begin")
    if (longest := max(map(len, sequences))) > max_length:
        raise UsageError(f"{where}: prompt and choice have {longest} tokens, more than fit a sequence of {max_length}")
    rows, row_of = _covering_rows([s[:-1] for s in sequences])
    targets = [
        [Target(row, i - 1, s[i]) for i in range(start, len(s))] for row, s in zip(row_of, sequences, strict=True)
    ]
    label = None if completion is None else choices.index(completion)
    return Example(rows, targets, label, tuple(choices), record=record)


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
