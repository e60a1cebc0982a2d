"""The blocks before the first one with trainable weights: what they compute is the same for all branches of a step."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx

from .blocks import BlockwiseModel
from .data import Example
from .objective import padded

# What goes into the first trained block, (T, H) for each row of an example, by the example's identity.
States = dict[int, list[mx.array]]
# Its tokens, the identity of the example it is of, and which of that example's rows it is.
Row = tuple[list[int], int, int]

# Passes of this many tokens lose little by reading the weights again, and less by padding.
PASS_TOKENS = 512


class Prefix:
    """Runs those blocks once for examples that several branches see, or once for all epochs.

    Which examples go through them together decides the last bits of what comes out. So that a resumed run has the same,
    that is decided by the groups given here and to `prepare`, not by what happens to be there already.

    Args:
        blocks: the model; its blocks are a plain chain.
        first: the number of the first block with trainable weights.
        groups: examples that go through the blocks together and whose states are kept, as far as there is room.
        cache_bytes: how much is kept.
        tokens_at_once: the most tokens of one pass, padding included, if fewer than `PASS_TOKENS`.

    Attributes:
        cached_bytes: of them, how much will be kept.
    """

    def __init__(
        self,
        blocks: BlockwiseModel,
        first: int,
        groups: Iterable[Sequence[Example]] = (),
        cache_bytes: int = 0,
        tokens_at_once: int | None = None,
    ):
        self._blocks, self._first = blocks, first
        self._tokens_at_once = min(tokens_at_once or PASS_TOKENS, PASS_TOKENS)
        self._group: dict[int, Sequence[Example]] = {}
        self._kept: States = {}
        self._near: States = {}
        self._prepared: list[int] = []
        self.cached_bytes = 0
        token = blocks.inputs(mx.array([[0]]), first).nbytes if cache_bytes else 1
        for group in groups:
            size = token * sum(len(row) for e in group for row in e.rows)
            if self.cached_bytes + size > cache_bytes:
                break
            self.cached_bytes += size
            self._group.update({id(e): group for e in group})

    def prepare(self, examples: Sequence[Example]) -> None:
        """Run the blocks for the examples of some steps to come; of those before nothing is left but what is kept."""
        if self._prepared != (ids := [id(e) for e in examples]):
            self._near, self._prepared = {}, ids
            self._near = self._computed([e for e in examples if id(e) not in self._group])

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
        ids = [[id(e) for e in examples] for examples in branches]
        distinct = [b for b in range(len(ids)) if ids[b] not in ids[:b]]
        own = [e for b in distinct for e in branches[b]]
        if any(id(e) not in self._near and id(e) not in self._group for e in own):
            self.prepare(own)
        rows, width = tokens.shape[0] // len(branches), tokens.shape[1]
        stacked = []
        for b in distinct:
            wide = [mx.pad(x, [(0, width - len(x)), (0, 0)]) for e in branches[b] for x in self._states_of(e)]
            stacked.append(mx.stack(wide + [mx.zeros_like(wide[0])] * (rows - len(wide))))
        which = [ids[b] for b in distinct]
        states = mx.stack(stacked)[mx.array([which.index(branch) for branch in ids])]
        return states.reshape(*tokens.shape, -1)

    def _states_of(self, example: Example) -> list[mx.array]:
        if (group := self._group.get(id(example))) is None:
            return self._near[id(example)]
        if id(example) not in self._kept:
            self._kept |= self._computed(group)
        return self._kept[id(example)]

    def _computed(self, examples: Sequence[Example]) -> States:
        """In passes of rows of like lengths."""
        found: States = {id(e): [mx.zeros(0)] * len(e.rows) for e in examples}
        rows = [(row, id(e), place) for e in examples for place, row in enumerate(e.rows)]
        for some in self._passes(sorted(rows, key=lambda r: len(r[0]))):
            tokens = mx.array(padded([[row for row, _, _ in some]]))
            states = self._blocks.inputs(tokens, self._first)
            for number, (row, owner, place) in enumerate(some):
                found[owner][place] = mx.contiguous(states[number, : len(row)])
            mx.eval(found)  # type: ignore[arg-type]
        return found

    def _passes(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows in order of length, cut where there are too many tokens."""
        start = 0
        for end, row in enumerate(rows):
            if start < end and (end - start + 1) * len(row[0]) > self._tokens_at_once:
                yield rows[start:end]
                start = end
        if rows:
            yield rows[start:]
