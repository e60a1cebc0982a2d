"""What a step minimises: cross-entropy of completions or texts, or of the right choice among choices.

Shapes: P branches, N rows of T tokens, M positions that targets look at, E examples a branch, C choices, L target
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .data import Example
from .head import Head

# Logits are made this many bytes at a time: little memory for large vocabularies, yet enough rows for a fast product.
LOGIT_BYTES = 64 << 20


@dataclass
class Batch:
    """The examples of P branches as arrays; a branch's rows are consecutive, and as many as any other's.

    Attributes:
        tokens: (N, T) int32, padded on the right (causal attention keeps padding out of every target).
        positions: (M,) int32, flat positions in (N, T) that some target looks at, increasing.
        target_position: (n,) which of the M positions each target looks at, non-decreasing.
        target_token: (n,) the target tokens.
        slots: (P, E, C, L) int32, which of the n targets; n itself for padding. C is 1 except for `choices`.
        labels: (P, E) the right choices, or None.
    """

    tokens: mx.array
    positions: np.ndarray
    target_position: np.ndarray
    target_token: np.ndarray
    slots: np.ndarray
    labels: mx.array | None


def collate(branches: Sequence[Sequence[Example]]) -> Batch:
    """Pack the examples of each branch, equally many and of one kind, into a batch."""
    rows_per_branch = max(sum(len(e.rows) for e in examples) for examples in branches)
    width = max(e.length for examples in branches for e in examples)
    tokens = np.zeros((len(branches) * rows_per_branch, width), np.int32)
    targets: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # (branch, example, choice) -> [(position, token)]
    for b, examples in enumerate(branches):
        row = b * rows_per_branch
        for i, example in enumerate(examples):
            for c, choice in enumerate(example.targets):
                targets[b, i, c] = [((row + t.row) * width + t.position, t.token) for t in choice]
            for content in example.rows:
                tokens[row, : len(content)] = content
                row += 1

    flat = sorted({target for group in targets.values() for target in group})
    number = {target: i for i, target in enumerate(flat)}
    shape = (
        len(branches),
        len(branches[0]),
        max(c for *_, c in targets) + 1,
        max(len(group) for group in targets.values()),
    )
    slots = np.full(shape, len(flat), np.int32)
    for at, group in targets.items():
        slots[at][: len(group)] = [number[target] for target in group]
    positions, target_position = np.unique([at for at, _ in flat], return_inverse=True)
    labels = [[e.label for e in examples] for examples in branches]
    return Batch(
        mx.array(tokens),
        positions.astype(np.int32),
        target_position,
        np.array([token for _, token in flat]),
        slots,
        None if labels[0][0] is None else mx.array(labels),
    )


def scores(head: Head, batch: Batch) -> mx.array:
    """Sum of the log-probabilities of each choice's tokens.

    Returns:
        (P, E, C) float32; -inf where an example has fewer than C choices.
    """
    states = head.hidden(batch.tokens)
    states = states.reshape(-1, states.shape[-1])[mx.array(batch.positions)]
    mx.eval(states)  # frees the activations of the pass before any logits are made
    vocabulary = head.logits(states[:1]).shape[-1]
    step = max(1, LOGIT_BYTES // (4 * vocabulary))
    parts = []
    for start in range(0, len(states), step):
        first, last = np.searchsorted(batch.target_position, [start, start + step])
        logits = head.logits(states[start : start + step]).astype(mx.float32)
        at = mx.array(batch.target_position[first:last] - start)
        chosen = logits[at, mx.array(batch.target_token[first:last])]
        parts.append(chosen - mx.logsumexp(logits, axis=-1)[at])
        mx.eval(parts[-1])
    log_probabilities = mx.concatenate([*parts, mx.zeros(1)])  # padding reads the last one
    summed = log_probabilities[mx.array(batch.slots)].sum(axis=-1)
    exists = mx.array(batch.slots[..., 0] < len(batch.target_token))
    return mx.where(exists, summed, -mx.inf)


def branch_losses(scored: mx.array, batch: Batch, count: float) -> mx.array:
    """The objective of every branch: (P,) float32, in nats.

    For `choices`, the sum over examples of -log softmax(scores)[right choice], over `count`. Else the sum over target
    tokens of -log p(token), over `count`. So the losses of parts of a branch add up to the branch's.

    Args:
        scored: (P, E, C), from `scores`.
        count: of the whole branch: examples for `choices`, else the mean number of target tokens in a branch of the
            step, with which the mean of all branches is a mean over tokens.
    """
    if batch.labels is None:
        return -scored.sum(axis=(1, 2)) / count
    return example_losses(scored, batch.labels).sum(axis=-1) / count


def example_losses(scored: mx.array, labels: mx.array) -> mx.array:
    """-log softmax(scores)[right choice] of every example: (..., C) scores and (...) labels -> (...)."""
    right = mx.take_along_axis(scored, labels[..., None], axis=-1)[..., 0]
    return mx.logsumexp(scored, axis=-1) - right
