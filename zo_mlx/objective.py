"""What a step minimises: cross-entropy of completions or texts, or of the right choice among choices.

Shapes: P branches, N rows of T tokens, M positions that targets look at, E examples, C choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .data import Example, Kind
from .head import Head

# Logits of this many bytes at a time: bounds memory for large vocabularies, and is large enough for a fast product.
LOGIT_BYTES = 64 << 20


@dataclass
class Batch:
    """Examples as arrays.

    Attributes:
        tokens: (N, T) int32, padded on the right (causal attention keeps padding out of every target).
        positions: (M,) flat positions in (N, T) that some target looks at.
        position_of: for `choices` (E, C, L), else (L,): which of the M positions each target looks at.
        token_of: as `position_of`: the target tokens.
        counts: as `position_of`, float32: 1 for a target, 0 for padding.
        labels: for `choices` (E,) the right choices; else None.
        num_tokens: tokens in the rows, without padding.
    """

    tokens: mx.array
    positions: mx.array
    position_of: mx.array
    token_of: mx.array
    counts: mx.array
    labels: mx.array | None
    num_tokens: int


def collate(examples: Sequence[Example], kind: Kind) -> Batch:
    """Pack examples of one kind into a batch."""
    rows = [row for e in examples for row in e.rows]
    width = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    groups = []  # one list of (flat position, token) per choice, or per example
    first_row = 0
    for e in examples:
        groups += [[((first_row + t.row) * width + t.position, t.token) for t in targets] for targets in e.targets]
        first_row += len(e.rows)
    positions = sorted({at for group in groups for at, _ in group})
    number = {at: i for i, at in enumerate(positions)}

    if kind == "tokens":
        targets = [t for group in groups for t in group]
        shape: tuple[int, ...] = (len(targets),)
        flat = [(number[at], token, 1.0) for at, token in targets]
        labels = None
    else:
        most = max(len(e.targets) for e in examples)
        longest = max(len(group) for group in groups)
        shape = (len(examples), most, longest)
        flat = []
        rest = iter(groups)
        for e in examples:
            for _ in e.targets:
                group = next(rest)
                flat += [(number[at], token, 1.0) for at, token in group]
                flat += [(0, 0, 0.0)] * (longest - len(group))
            flat += [(0, 0, 0.0)] * (longest * (most - len(e.targets)))
        labels = mx.array([e.label for e in examples])
    position_of, token_of, counts = (np.array(column).reshape(shape) for column in zip(*flat, strict=True))
    return Batch(
        mx.array(tokens),
        mx.array(positions),
        mx.array(position_of),
        mx.array(token_of),
        mx.array(counts.astype(np.float32)),
        labels,
        sum(len(row) for row in rows),
    )


def log_probabilities(head: Head, batch: Batch, branches: int = 1) -> mx.array:
    """Log-probability of every target, for every branch.

    Returns:
        (P, *batch.position_of.shape) float32.
    """
    states = head.hidden(mx.tile(batch.tokens, (branches, 1)) if branches > 1 else batch.tokens)
    states = states.reshape(branches, -1, states.shape[-1])[:, batch.positions]
    mx.eval(states)  # frees the activations of the whole pass before the logits are made
    vocabulary = head.logits(states[:1, :1]).shape[-1]
    count = max(1, LOGIT_BYTES // (4 * vocabulary * branches))
    position_of = np.array(batch.position_of).reshape(-1)
    token_of = np.array(batch.token_of).reshape(-1)
    order = np.argsort(position_of, kind="stable")
    parts = []
    for start in range(0, states.shape[1], count):
        inside = order[(position_of[order] >= start) & (position_of[order] < start + count)]
        logits = head.logits(states[:, start : start + count]).astype(mx.float32)
        normalizer = mx.logsumexp(logits, axis=-1)
        at, token = mx.array(position_of[inside] - start), mx.array(token_of[inside])
        parts.append(logits[:, at, token] - normalizer[:, at])
        mx.eval(parts[-1])
    flat = mx.concatenate(parts, axis=1)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return flat[:, mx.array(inverse)].reshape(branches, *batch.position_of.shape)


def choice_scores(head: Head, batch: Batch, branches: int = 1) -> mx.array:
    """Sum of the log-probabilities of each choice's tokens: (P, E, C) float32, -inf where an example has fewer choices."""
    summed = (log_probabilities(head, batch, branches) * batch.counts).sum(axis=-1)
    return mx.where(batch.counts.max(axis=-1) > 0, summed, -mx.inf)


def losses(head: Head, batch: Batch, branches: int = 1) -> mx.array:
    """The objective of every branch: (P,) float32, in nats.

    For `choices`, the mean over examples of -log softmax(choice scores)[right choice]; else the mean over target tokens
    of -log p(token).
    """
    if batch.labels is None:
        return -log_probabilities(head, batch, branches).mean(axis=-1)
    scores = choice_scores(head, batch, branches)
    right = mx.take_along_axis(scores, batch.labels[None, :, None], axis=-1)[..., 0]
    return (mx.logsumexp(scores, axis=-1) - right).mean(axis=-1)
