"""A model whose transformer blocks run one at a time, so that only one needs to be in memory.

No architecture is spelled out here. The model itself is called, each time, and gives its blocks whatever it gives them
(masks, positions, inputs per layer); the blocks that are not wanted hand on what they get.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .head import close, prompt_cache
from .product import prepare

# block number, the block's own __call__, first argument, other arguments -> what the block returns to the model
Hook = Callable[[int, Callable[..., mx.array], mx.array, tuple[Any, ...], dict[str, Any]], mx.array]

_CHECK_TOKENS = [[1, 3, 2, 1]]


class _Done(Exception):
    """Leaves the model once a block has done what is wanted."""

    def __init__(self, result: mx.array):
        self.result = result


class BlockwiseModel:
    """Runs the embedding, each block, and the head of an mlx-lm model apart from each other.

    Used as a context manager, it lets go of the model at the end, with all that was read of it.

    Args:
        model: with `layers`; their classes are changed to ones that can be skipped.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.blocks: list[nn.Module] = list(model.layers)
        self._hook: Hook = lambda i, call, x, args, kwargs: call(x, *args, **kwargs)
        self._kinds = [type(b) for b in self.blocks]
        hooked = {kind: self._hooked(kind) for kind in set(self._kinds)}
        self._number = {id(b): i for i, b in enumerate(self.blocks)}
        for block, kind in zip(self.blocks, self._kinds, strict=True):
            block.__class__ = hooked[kind]

    @classmethod
    def of_chain(cls, model: nn.Module) -> "BlockwiseModel | None":
        """A model whose blocks are a plain chain; None for another one, which is left as it is."""
        blocks = cls(model)
        if blocks.is_chain():
            return blocks
        blocks._let_go()
        return None

    def __enter__(self) -> "BlockwiseModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        # Blocks refer to their class and that to this object: without an end to it, memory waits for the collector.
        for block, kind in zip(self.blocks, self._kinds, strict=True):
            block.__class__ = kind
        self.model, self.blocks = nn.Module(), []

    def _hooked(self, kind: type) -> type:
        def call(block: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            return self._hook(self._number[id(block)], partial(kind.__call__, block), x, args, kwargs)  # type: ignore[operator]

        return type(kind.__name__, (kind,), {"__call__": call})

    @contextlib.contextmanager
    def _hooked_by(self, hook: Hook) -> Iterator[None]:
        before, self._hook = self._hook, hook
        try:
            yield
        finally:
            self._hook = before

    def _run(self, tokens: mx.array, hook: Hook, cache: Any = None) -> mx.array:
        with self._hooked_by(hook):
            try:
                return self.model(tokens) if cache is None else self.model(tokens, cache=[cache] * len(self.blocks))
            except _Done as done:
                return done.result

    def inputs(self, tokens: mx.array, number: int) -> mx.array:
        """What goes into a block: (B, T) int32 tokens -> (B, T, H)."""

        def hook(i: int, call: Any, x: mx.array, args: Any, kwargs: Any) -> mx.array:
            if i == number:
                raise _Done(x)
            return call(x, *args, **kwargs)

        return self._run(tokens, hook)

    def starting_at(self, number: int, x: mx.array) -> contextlib.AbstractContextManager[None]:
        """The next call of the model, while it lasts, leaves out the blocks before one, which gets x (B, T, H)."""
        own = [x]  # not held any longer than that block needs it
        del x

        def hook(i: int, call: Any, passed: mx.array, args: Any, kwargs: Any) -> mx.array:
            if i < number:
                return passed
            return call(own.pop() if i == number else passed, *args, **kwargs)

        return self._hooked_by(hook)

    def block(self, number: int, tokens: mx.array, x: mx.array, cache: Any = None) -> mx.array:
        """The output of one block: its input x (B, T, H) -> (B, T, H); with a cache, it goes on from what is there."""

        def hook(i: int, call: Any, passed: mx.array, args: Any, kwargs: Any) -> mx.array:
            if i < number:
                return passed
            raise _Done(call(x, *args, **kwargs))

        return self._run(tokens, hook, cache)

    def continued(
        self,
        number: int,
        prompts: mx.array,
        lengths: list[int],
        rows: mx.array,
        parents: list[int],
        x: mx.array,
        y: mx.array,
    ) -> list[mx.array]:
        """The outputs of one block for prompts and for rows that go on from them, as `Head.continued` has them.

        Args:
            x: what goes into it for the prompts, (N, T, H).
            y: the same for the rows, (R, L, H).

        Returns:
            (N, T, H) and (R, L, H).
        """
        cache = prompt_cache(lengths, prompts.shape[1])
        x = self.block(number, prompts, x, cache)
        cache.finalize()
        cache.filter(mx.array(parents))
        return [x, self.block(number, rows, y, cache)]

    def continues(self) -> bool:
        """Whether `continued` can be used, if `Head.continues` says so: by the embedding and the first block."""
        whole, prompts, rows = (mx.array([row]) for row in ([1, 3, 2, 1], [1, 3], [2, 1]))
        try:
            expected = self.block(0, whole, self.inputs(whole, 0))
            got = self.continued(0, prompts, [2], rows, [0], self.inputs(prompts, 0), self.inputs(rows, 0))
        except Exception:  # an architecture with arguments of its own
            return False
        return close(mx.concatenate(got, axis=1), expected, least=1e-4)

    def ending_with(self, x: mx.array) -> contextlib.AbstractContextManager[None]:
        """While it lasts, calls of the model leave out the blocks: x (B, T, H) is what comes out of the last one."""
        last = len(self.blocks) - 1
        return self._hooked_by(lambda i, call, passed, args, kwargs: x if i == last else passed)

    def head(self, tokens: mx.array, x: mx.array) -> mx.array:
        """Logits (B, T, V) of the last block's output x (B, T, H)."""
        with self.ending_with(x):
            return self.model(tokens)

    def is_chain(self) -> bool:
        """Whether all that links the blocks is that each gets the one before's output as its first argument."""
        if len(self._number) < len(self.blocks):
            return False  # a block that is used twice

        def probe(fill: float) -> tuple[bool, list[Any], mx.array]:
            """Blocks return constants, the last one always the same: does any other way lead from one to another?"""
            received: list[tuple[int, mx.array]] = []
            returned: list[mx.array] = []
            others: list[Any] = []

            def hook(i: int, call: Any, x: mx.array, args: Any, kwargs: Any) -> mx.array:
                received.append((i, x))
                others.extend(leaf[1] for leaf in tree_flatten([args, kwargs]))
                returned.append(mx.full(x.shape, 1.0 if i == len(self.blocks) - 1 else fill, x.dtype))
                return returned[-1]

            logits = self._run(mx.array(_CHECK_TOKENS), hook)
            in_order = [i for i, _ in received] == list(range(len(self.blocks)))
            linked = all(x is out for (_, x), out in zip(received[1:], returned[:-1], strict=True))
            return in_order and linked, others, logits

        try:
            first, second = probe(0.0), probe(1.0)
        except Exception:  # whatever an architecture does with blocks that are not its own
            return False
        same = len(first[1]) == len(second[1]) and all(map(_equal, first[1], second[1]))
        return first[0] and second[0] and same and _equal(first[2], second[2])


def opened(open_model: Callable[[], nn.Module]) -> BlockwiseModel:
    """A model with none of its weights read, ready for the default device."""
    mx.clear_cache()
    return BlockwiseModel(prepare(open_model()))


def run_blocks(
    open_model: Callable[[], nn.Module],
    rows: list[mx.array],
    states: list[mx.array] | None,
    first: int,
    advance: Callable[[], None],
) -> Iterator[tuple[int, list[mx.array]]]:
    """Run the blocks one after the other, each over all sequences, with the memory of one.

    Args:
        open_model: gives the model with its weights not yet read, as often as it is called.
        rows: sequences of tokens (T,); the last token of each is a target only.
        states: what goes into block number `first`, (1, T - 1, H) for each sequence; None for the first block.
        advance: called after each block and sequence.

    Yields:
        A block's number, and what goes into it, for those after `first`; and for `first`, too, if `states` is None.
        The number after the last block's stands for what comes out of it.
    """
    with opened(open_model) as model:
        blocks = len(model.blocks)
        if states is None:
            states = [model.inputs(row[None, :-1], 0) for row in rows]
            mx.eval(states)
            yield first, states
    for i in range(first, blocks):
        with opened(open_model) as model:
            for n, row in enumerate(rows):
                states[n] = model.block(i, row[None, :-1], states[n])
                mx.eval(states[n])
                advance()
        yield i + 1, states


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, mx.array) and isinstance(b, mx.array):
        return bool(mx.array_equal(a, b, equal_nan=True).item())
    return type(a) is type(b) and a == b
