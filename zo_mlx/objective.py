"""What a step minimises: cross-entropy of completions or texts, or of the right choice among choices.

Shapes: P branches, N rows of T tokens, R rows of L more tokens that go on from those, M positions that targets look at,
E examples a branch, C choices, L target tokens.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from .data import Example
from .head import Head

# Logits are made this many bytes at a time: little memory for large vocabularies, yet enough rows for a fast product.
LOGIT_BYTES = 64 << 20


# Rows share their prompt if that leaves at most this share of the tokens: keys and values are copied, passes smaller.
# Measured on the CPU, 12 branches: 0.30, 0.50 and 0.64 of the tokens take 0.40, 0.74 and 0.91 of the time.
WORTH_SHARING = 0.65


@dataclass
class Continuations:
    """Rows that go on from a prompt.

    Attributes:
        tokens: (R, L) int32, padded on the right.
        parents: (R,) the number of each one's prompt.
        lengths: (N,) how many tokens each prompt has.
    """

    tokens: mx.array
    parents: list[int]
    lengths: list[int]


@dataclass
class Batch:
    """The examples of P branches as arrays; a branch's rows are consecutive, and as many as any other's.

    Attributes:
        tokens: (N, T) int32, padded on the right (causal attention keeps padding out of every target).
        continuations: what goes on from these rows, or None.
        positions: (M,) int32, flat positions in (N, T), then (R, L), that some target looks at, increasing.
        target_position: (n,) which of the M positions each target looks at, non-decreasing.
        target_token: (n,) the target tokens.
        slots: (P, E, C, L) int32, which of the n targets; n itself for padding. C is 1 except for `choices`.
        labels: (P, E) the right choices, or None.
    """

    tokens: mx.array
    continuations: Continuations | None
    positions: np.ndarray
    target_position: np.ndarray
    target_token: np.ndarray
    slots: np.ndarray
    labels: mx.array | None

    @property
    def has_one_normalizer(self) -> bool:
        """Whether an example's choices are all of one token and at one position, where only differences count."""
        at = np.append(self.target_position, -1)[self.slots]  # -1 where there is none
        return at.shape[-2] > 1 and at.shape[-1] == 1 and bool(((at == at[..., :1, :]) | (at == -1)).all())


def layout(branches: Sequence[Sequence[Example]], share: bool) -> tuple[int, bool]:
    """How many tokens, padding included, a branch takes; and whether rows share their prompts, as they may."""
    rows = max(sum(len(e.rows) for e in examples) for examples in branches)
    width = max(e.length for examples in branches for e in examples)
    prompts = max(len(examples) for examples in branches) * max(e.prompt_length for b in branches for e in b)
    shared = prompts + rows * max(e.length - e.prompt_length for b in branches for e in b)
    return (shared, True) if share and shared <= WORTH_SHARING * rows * width else (rows * width, False)


def most_at_once(size: int, most: int, fits: Callable[[slice], bool]) -> int:
    """How many of `size` things, from 1 to `most`, may go through the model together, so that all parts fit.

    A part may have more than its share of the tokens of all: what shares prompts in all need not do so in a part.
    """
    count = most
    while count > 1 and not all(fits(slice(i, i + count)) for i in range(0, size, count)):
        count -= 1
    return count


def collate(branches: Sequence[Sequence[Example]], share: bool = False) -> Batch:
    """Pack the examples of each branch, equally many and of one kind, into a batch.

    Args:
        share: rows of an example may go on from its prompt, where that is less work.
    """
    shared = layout(branches, share)[1]
    firsts = [[r for e in b for r in ([e.rows[0][: e.prompt_length]] if shared else e.rows)] for b in branches]
    rests = [[r[e.prompt_length :] for e in b for r in e.rows] if shared else [] for b in branches]
    tokens, rest_tokens = padded(firsts), padded(rests)
    width, rest_width = tokens.shape[1], rest_tokens.shape[1]
    lengths, parents = np.ones(len(tokens), int), np.zeros(len(rest_tokens), int)
    targets: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # (branch, example, choice) -> [(position, token)]
    for b, examples in enumerate(branches):
        row, rest = b * (len(tokens) // len(branches)), b * (len(rest_tokens) // len(branches))
        for i, example in enumerate(examples):
            split, rows = example.prompt_length if shared else width, len(example.rows)
            for c, choice in enumerate(example.targets):
                targets[b, i, c] = [
                    (
                        (row if shared else row + t.row) * width + t.position
                        if t.position < split
                        else tokens.size + (rest + t.row) * rest_width + t.position - split,
                        t.token,
                    )
                    for t in choice
                ]
            if shared:
                lengths[row], parents[rest : rest + rows] = split, row
            row, rest = row + (1 if shared else rows), rest + rows

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
        Continuations(mx.array(rest_tokens), parents.tolist(), lengths.tolist()) if shared else None,
        positions.astype(np.int32),
        target_position,
        np.array([token for _, token in flat]),
        slots,
        None if labels[0][0] is None else mx.array(labels),
    )


def padded(rows: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """The rows of each branch, padded with zeros to the longest, and to as many as the branch with the most has."""
    count, width = max(map(len, rows)), max((len(r) for branch in rows for r in branch), default=0)
    tokens = np.zeros((len(rows), count, width), np.int32)
    for b, branch in enumerate(rows):
        for i, content in enumerate(branch):
            tokens[b, i, : len(content)] = content
    return tokens.reshape(len(rows) * count, width)


def scores(head: Head, batch: Batch, traced: bool = False) -> mx.array:
    """Sum of the log-probabilities of each choice's tokens, but for what an example's choices have in common.

    Args:
        traced: whether this is to be differentiated, for which MLX would hold all that is computed meanwhile.

    Returns:
        (P, E, C) float32; -inf where an example has fewer than C choices.
    """
    states = target_states(head, batch)
    if not traced:
        mx.eval(states)  # frees the activations of the pass before any logits are made
    with _columns(head, batch) as (columns, whole):
        return _summed(_of_pieces(states, _pieces(head, states, batch.target_position, columns, whole)), batch)


def states_gradient(head: Head, states: mx.array, batch: Batch, count: float) -> tuple[mx.array, mx.array]:
    """The loss of one branch, and its gradient with respect to the states at the targets; nothing is computed yet.

    Args:
        states: (M, H), from `target_states`.
        count: as for `branch_losses`.

    Returns:
        The loss, (), and (M, H).
    """
    with _columns(head, batch) as (columns, whole):
        pieces = list(_pieces(head, states, batch.target_position, columns, whole))
        found = _of_pieces(states, pieces)
        loss, back = mx.value_and_grad(lambda found: branch_losses(_summed(found, batch), batch, count).sum())(found)
        gradients, done = [back], 0
        for target_scores, rows in pieces:
            size = target_scores.keywords["at"].size
            own = mx.depends([states[rows]], gradients[-1:])
            _, (gradient,) = mx.vjp(target_scores, own, [back[done : done + size]])
            gradients.append(gradient)
            done += size
    return loss, mx.concatenate(gradients[1:])


def target_states(head: Head, batch: Batch) -> mx.array:
    """The states that targets look at: (M, H)."""
    if (rest := batch.continuations) is None:
        states = [head.hidden(batch.tokens)]
    else:
        states = list(head.continued(batch.tokens, rest.lengths, rest.tokens, rest.parents))
    return at_targets(states, batch)


def at_targets(states: Sequence[mx.array], batch: Batch) -> mx.array:
    """(M, H), from all states: (N, T, H), then (R, L, H) if there are continuations."""
    return mx.concatenate([x.reshape(-1, x.shape[-1]) for x in states])[mx.array(batch.positions)]


@contextlib.contextmanager
def _columns(head: Head, batch: Batch) -> Iterator[tuple[np.ndarray, bool]]:
    """While it lasts, the head makes no more logits than are needed.

    Yields:
        (n,) which of them the targets' are; and whether they are those of the whole vocabulary.
    """
    if head.vocabulary is None or not batch.has_one_normalizer:
        yield batch.target_token, True
        return
    tokens, columns = np.unique(batch.target_token, return_inverse=True)
    with head.narrowed(mx.array(tokens)):
        yield columns, False


def _pieces(
    head: Head, states: mx.array, positions: np.ndarray, columns: np.ndarray, whole: bool
) -> Iterator[tuple[partial[mx.array], slice]]:
    """Some rows of the states after the others, and what makes the scores of their targets from them."""
    step = _rows_at_once(head, states)
    for start in range(0, len(states), step):
        first, last = np.searchsorted(positions, [start, start + step])
        at, own = mx.array(positions[first:last] - start), mx.array(columns[first:last])
        yield partial(_target_scores, head=head, at=at, columns=own, whole=whole), slice(start, start + step)


def _of_pieces(states: mx.array, pieces: Iterable[tuple[partial[mx.array], slice]]) -> mx.array:
    """The scores of all targets, (n,), with the logits of one piece at a time in memory."""
    parts = list[mx.array]()
    for target_scores, rows in pieces:
        which: slice | mx.array = rows
        if parts:  # it is the indices that wait: what depends on other arrays has no forward-mode derivative
            (which,) = mx.depends([mx.arange(*rows.indices(len(states)))], [mx.stop_gradient(parts[-1])])
        parts.append(target_scores(states[which]))
    return mx.concatenate(parts)


def _target_scores(states: mx.array, head: Head, at: mx.array, columns: mx.array, whole: bool) -> mx.array:
    """Log-probabilities, or logits where these are not of the whole vocabulary."""
    logits = head.logits(states).astype(mx.float32)
    found = logits[at, columns]
    return found - mx.logsumexp(logits, axis=-1)[at] if whole else found


def _summed(target_scores: mx.array, batch: Batch) -> mx.array:
    """(n,) of the targets -> (P, E, C) of the choices."""
    padded = mx.concatenate([target_scores, mx.zeros(1)])  # padding reads the last one
    exists = mx.array(batch.slots[..., 0] < len(batch.target_token))
    return mx.where(exists, padded[mx.array(batch.slots)].sum(axis=-1), -mx.inf)


def greedy_tokens(head: Head, states: mx.array) -> np.ndarray:
    """The likeliest token at each state: (n, H) -> (n,)."""
    step = _rows_at_once(head, states)
    parts = [np.array(head.logits(states[i : i + step]).argmax(axis=-1)) for i in range(0, len(states), step)]
    return np.concatenate(parts)


def _rows_at_once(head: Head, states: mx.array) -> int:
    """For how many states logits are made at once."""
    return max(1, LOGIT_BYTES // (4 * head.logits(states[:1]).shape[-1]))


def denominator(shares: Sequence[Sequence[Example]], is_scored: bool) -> float:
    """What a branch's sum is divided by: its examples if they have choices or a score, else its target tokens.

    These are the mean over branches.
    """
    if is_scored or shares[0][0].label is not None:
        return len(shares[0])
    return sum(len(e.targets[0]) for share in shares for e in share) / len(shares)


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
