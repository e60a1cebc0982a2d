"""The blocks before the first one with trainable weights: what they compute is the same for all branches of a step."""

import contextlib
from collections.abc import Sequence

import mlx.core as mx

from .blocks import BlockwiseModel
from .data import Example


class Prefix:
    """Runs those blocks once for rows that several branches see, or once for all epochs.

    Args:
        blocks: the model; its blocks are a plain chain.
        first: the number of the first block with trainable weights.
        cache_bytes: how much of what comes before it is kept; then every example is computed by itself, so that its
            bits do not depend on the batch it is met in, nor on what is kept. None keeps nothing.
    """

    def __init__(self, blocks: BlockwiseModel, first: int, cache_bytes: int | None):
        self._blocks, self._first = blocks, first
        self._left = cache_bytes
        self._kept: dict[int, list[mx.array]] = {}
        self._last: tuple[list[list[int]], mx.array] | None = None

    def skipped(
        self, tokens: mx.array, branches: Sequence[Sequence[Example]]
    ) -> contextlib.AbstractContextManager[None]:
        """While it lasts, the model is called without these blocks.

        Args:
            tokens: (P * N, T) int32 of P branches, as `objective.collate` makes them.
            branches: their examples; objects that live as long as this one.
        """
        return self._blocks.starting_at(self._first, self.states(tokens, branches))

    def states(self, tokens: mx.array, branches: Sequence[Sequence[Example]]) -> mx.array:
        """What goes into the first trained block, (P * N, T, H); arguments are those of `skipped`."""
        seen = [[id(e) for e in examples] for examples in branches]
        distinct = [b for b, ids in enumerate(seen) if ids not in seen[:b]]
        which = [seen[b] for b in distinct]
        if self._last is None or self._last[0] != which:
            rows = tokens.reshape(len(branches), -1, tokens.shape[-1])[mx.array(distinct)]
            states = (
                self._batched(rows) if self._left is None else self._one_by_one(rows, [branches[b] for b in distinct])
            )
            mx.eval(states)
            self._last = which, states
        states = self._last[1][mx.array([which.index(ids) for ids in seen])]
        return states.reshape(*tokens.shape, -1)

    def _batched(self, rows: mx.array) -> mx.array:
        """(P, N, T) tokens -> (P, N, T, H)."""
        states = self._blocks.inputs(rows.reshape(-1, rows.shape[-1]), self._first)
        return states.reshape(*rows.shape, -1)

    def _one_by_one(self, rows: mx.array, branches: Sequence[Sequence[Example]]) -> mx.array:
        """The same, every row without padding, from what is kept where it is."""
        result = []
        for examples in branches:
            own = [state for example in examples for state in self._states_of(example)]
            width = rows.shape[-1]
            padded = [mx.pad(x, [(0, width - len(x)), (0, 0)]) for x in own]
            padded += [mx.zeros_like(padded[0])] * (rows.shape[1] - len(own))
            result.append(mx.stack(padded))
        return mx.stack(result)

    def _states_of(self, example: Example) -> list[mx.array]:
        """What goes into the first trained block, (T, H) for each row of an example."""
        assert self._left is not None
        if (kept := self._kept.get(id(example))) is not None:
            return kept
        states = [self._blocks.inputs(mx.array([row]), self._first)[0] for row in example.rows]
        mx.eval(states)
        if (size := sum(x.nbytes for x in states)) <= self._left:
            self._left -= size
            self._kept[id(example)] = states
        return states
