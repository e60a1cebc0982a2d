"""Hidden states, and logits at chosen positions only.

For a completion of 3 tokens after a prompt of 200, the output head is needed at 3 positions, not 203. mlx-lm models
call an inner model and then apply their head to its result (tied or not, scaled, soft-capped). To apply just the
head, call the outer model while the inner one returns the states we hand it. `split_head` proves numerically that this
equals the full model, and falls back to full logits where it does not. Where only some tokens of the vocabulary are of
interest, the layer with a row for each is left with theirs meanwhile, if that is found to give the same. Rows that go
on from the same prompt can share its keys and values, in mlx-lm's own caches, where that is found to be exact.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from .product import weight_shape

# The outer model is called on one token that is not among those of the check: a head that looks at tokens must fail it.
_ANY_TOKEN = [[0]]
_CHECK_TOKENS = [[1, 3, 2], [2, 1, 3]]
_CHECK_COLUMNS = [4, 1]
# Of a layer, what has a row for each of its outputs.
_BY_ROW = ("weight", "scales", "biases", "bias")


class Head:
    """`hidden(tokens)` then `logits(states)` equals `model(tokens)`.

    Attributes:
        hidden: tokens (N, T) int32, and maybe a `cache` -> states (N, T, H).
        logits: states (..., H) -> logits (..., V).
        vocabulary: the layer that has a row for each token of the vocabulary, if it can do with some of them.
        continues: whether `continued` and `begun` can be used, if that was asked.
    """

    def __init__(
        self,
        hidden: Callable[..., mx.array],
        logits: Callable[[mx.array], mx.array],
        blocks: int | None = None,
        vocabulary: nn.Module | None = None,
    ):
        self.hidden = hidden
        self.logits = logits
        self.vocabulary = vocabulary
        self._blocks = blocks
        self.continues = blocks is not None and _continues(self)

    @contextlib.contextmanager
    def narrowed(self, tokens: mx.array) -> Iterator[None]:
        """While it lasts, `logits` are those of some tokens (n,) only: (..., n). The model cannot be called."""
        assert self.vocabulary is not None
        whole = {name: self.vocabulary[name] for name in _BY_ROW if name in self.vocabulary}
        self.vocabulary.update({name: array[tokens] for name, array in whole.items()})
        try:
            yield
        finally:
            self.vocabulary.update(whole)

    def continued(
        self, prompts: mx.array, lengths: list[int], rows: mx.array, parents: list[int]
    ) -> tuple[mx.array, mx.array]:
        """The states of prompts, and of rows that go on from them.

        Args:
            prompts: (N, T) int32, padded on the right.
            lengths: how many tokens each of them has.
            rows: (R, L) int32, padded on the right.
            parents: the number of each row's prompt.

        Returns:
            (N, T, H) and (R, L, H).
        """
        first, caches = self.begun(prompts, lengths)
        for cache in caches:
            cache.filter(mx.array(parents))
        return first, self.hidden(rows, cache=caches)

    def begun(self, prompts: mx.array, lengths: list[int]) -> tuple[mx.array, list[Any]]:
        """The states of prompts, as in `continued`, and the caches with which `hidden` goes on from them."""
        caches = [prompt_cache(lengths, prompts.shape[1]) for _ in range(self._blocks or 0)]
        first = self.hidden(prompts, cache=caches)
        mx.eval(first, [(cache.keys, cache.values) for cache in caches])
        for cache in caches:
            cache.finalize()
        return first, caches


def prompt_cache(lengths: list[int], width: int) -> BatchKVCache:
    """A block's cache for prompts of so many tokens, padded on the right to `width`; `finalize` when it has them."""
    cache = BatchKVCache([0] * len(lengths))
    cache.step = 1  # room for no more than what comes
    cache.prepare(right_padding=[width - n for n in lengths])
    return cache


def split_head(model: nn.Module, continuing: bool = False) -> Head:
    """Split an mlx-lm model before its output head; the head is the identity where that is not possible.

    Args:
        continuing: find out whether rows can go on from a prompt, which takes three short passes.
    """
    hidden, logits = _halves(model)
    vocabulary = None if hidden is model else _vocabulary(model, logits)
    return Head(hidden, logits, _plain_caches(model) if continuing else None, vocabulary)


def _vocabulary(model: nn.Module, logits: Callable[[mx.array], mx.array]) -> nn.Module | None:
    """The layer of which `logits` takes all rows, one for each token, and could take some."""
    columns = mx.array(_CHECK_COLUMNS)
    for layer in (model.get("lm_head"), model.model.get("embed_tokens")):
        if isinstance(layer, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)):
            states = mx.random.normal((3, weight_shape(layer)[1]), key=mx.random.key(0))
            try:
                expected = logits(states)[:, columns]
                with Head(model.model, logits, vocabulary=layer).narrowed(columns):
                    got = logits(states)
                if got.shape == expected.shape and close(got, expected):
                    return layer
            except Exception:  # whatever an architecture does with a vocabulary that is not its own
                continue
    return None


def _halves(model: nn.Module) -> tuple[Callable[..., mx.array], Callable[[mx.array], mx.array]]:
    """`hidden` and `logits` of a model's head."""
    inner = model.get("model")
    whole = model, lambda states: states
    if not isinstance(inner, nn.Module):
        return whole
    original = type(inner)

    def replay(self: nn.Module, *args: object, **kwargs: object) -> mx.array:
        return self._states

    # A subclass, so that whatever else the outer model reads from the inner one is still there.
    stub = type(original.__name__, (original,), {"__call__": replay})

    def logits(states: mx.array) -> mx.array:
        inner._states = states.reshape(1, -1, states.shape[-1])
        inner.__class__ = stub
        try:
            out = model(mx.array(_ANY_TOKEN))
        finally:
            inner.__class__ = original
            del inner._states
        return out.reshape(*states.shape[:-1], -1)

    return (inner, logits) if _equal(model, Head(inner, logits)) else whole


def _equal(model: nn.Module, head: Head) -> bool:
    expected = model(mx.array(_CHECK_TOKENS))[:, 1:]
    mx.eval(expected)  # a pass at a time: of a large model, the graph alone takes 100 MB
    try:
        got = head.logits(head.hidden(mx.array(_CHECK_TOKENS))[:, 1:])
    except Exception:  # whatever an architecture does with states that are not its own: it is not separable
        return False
    if got.shape != expected.shape:
        return False
    return close(got, expected)


def _plain_caches(model: nn.Module) -> int | None:
    """How many caches of keys and values a model takes, if it takes no others."""
    try:
        caches = make_prompt_cache(model)
    except Exception:  # architectures make what they like
        return None
    return len(caches) if all(type(c) is KVCache for c in caches) else None


def _continues(head: Head) -> bool:
    """Whether three rows that go on from two prompts of different lengths have the states of the whole rows."""
    prompts, lengths, parents = mx.array([[1, 3], [2, 0]]), [2, 1], [1, 0, 1]
    try:
        whole = head.hidden(mx.array([[2, 1, 3, 0], [1, 3, 2, 1], [2, 3, 2, 0]]))
        expected = mx.stack([whole[0, 1:3], whole[1, 2:4], whole[2, 1:3]])
        mx.eval(expected)
        _, got = head.continued(prompts, lengths, mx.array([[1, 3], [2, 1], [3, 2]]), parents)
    except Exception:  # an architecture with arguments of its own, or that knows no positions for each row
        return False
    # SmolLM2's 30 blocks round to 2e-6 of the largest state, and to half of that if a row is only padded.
    return got.shape == expected.shape and close(got, expected, least=1e-4)


def close(got: mx.array, expected: mx.array, least: float = 0.0) -> bool:
    """Whether two arrays are equal to 16 units of rounding of the largest number, or to this share of it."""
    tolerance = max(16 * mx.finfo(expected.dtype).eps, least) * mx.abs(expected).max()
    return bool((mx.abs(got - expected).max() <= tolerance).item())
