"""Choose among answers, as a model that was trained on choices does."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .config import check_range
from .errors import UsageError
from .head import split_head
from .model import config_of, context_length, vocabulary_size
from .objective import collate, scores
from .progress import Progress
from .records import Record, Records, read_file
from .rows import check_tokens, choice_example


def classify(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    data: str | Path | Sequence[Record],
    choices: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    max_seq_length: int = 2048,
    progress: bool = True,
) -> list[dict[str, float]]:
    """How likely each choice is, for prompts whose right one is not known.

    Args:
        model, tokenizer: from `zo_mlx.load`.
        data: a `.jsonl` file, or its records: `{"prompt": ..., "choices": [...]}`, as for training. A completion is not
            looked at.
        choices: of records that have none of their own.
        batch_size: prompts at a time.
        max_seq_length: longest sequence in tokens; the model's context length if that is less.
        progress: report progress on standard error.

    Returns:
        For each record its choices, in their order, and their probabilities: the softmax over the choices of the sum of
        the log-probabilities of a choice's tokens, of which the loss of training is made.

    Raises:
        UsageError: a record is wrong, or too long.
    """
    if isinstance(data, str | Path):
        records = read_file(Path(data))
    else:
        records = [(f"record {n}", record) for n, record in enumerate(data, 1)]
    return classify_records(model, tokenizer, records, choices, batch_size, max_seq_length, progress)


def classify_records(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    records: Records,
    choices: Sequence[str] | None,
    batch_size: int,
    max_seq_length: int,
    progress: bool,
) -> list[dict[str, float]]:
    """As `classify`, for records that have names, by which errors call them."""
    check_range("--batch-size", batch_size, 1)
    check_range("--max-seq-length", max_seq_length, 2)
    config = config_of(model)
    longest, vocabulary = min(max_seq_length, context_length(config)), vocabulary_size(config)
    examples = []
    for where, record in records:
        own = record["choices"] if record.get("choices") is not None else choices
        if own is None:
            raise UsageError(f"{where}: field 'choices' is missing; --choices gives those of lines that have none")
        own = list(own) if isinstance(own, tuple) else own
        record = {**{k: v for k, v in record.items() if k == "prompt"}, "choices": own}
        examples.append(choice_example(record, tokenizer, longest, where))
        check_tokens(examples[-1], vocabulary, where)
    head = split_head(model, any(len(e.rows) > 1 for e in examples))
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)  # like lengths have the least padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: list[dict[str, float]] = [{}] * len(examples)
    with Progress("Classifying", len(batches), "batch", enabled=progress) as bar:
        for part in batches:
            batch = collate([[examples[i] for i in part]], head.continues)
            shares = np.array(mx.softmax(scores(head, batch)[0], axis=-1))
            for i, row in zip(part, shares, strict=True):
                choices_of = examples[i].choices  # may be fewer than another's
                found[i] = dict(zip(choices_of, row.tolist(), strict=False))
            mx.clear_cache()
            bar.advance()
    return found
