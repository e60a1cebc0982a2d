"""Hidden states, and logits at chosen positions only.

For a completion of 3 tokens after a prompt of 200, the output head is needed at 3 positions, not 203. mlx-lm models
call an inner model and then apply their head to its result (tied or not, scaled, soft-capped). To apply just the
head, call the outer model while the inner one returns the states we hand it. `split_head` proves numerically that this
equals the full model, and falls back to full logits where it does not.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

# The outer model is called on one token that is not among those of the check: a head that looks at tokens must fail it.
_ANY_TOKEN = [[0]]
_CHECK_TOKENS = [[1, 3, 2], [2, 1, 3]]


class Head:
    """`hidden(tokens)` then `logits(states)` equals `model(tokens)`.

    Attributes:
        hidden: tokens (N, T) int32 -> states (N, T, H).
        logits: states (..., H) -> logits (..., V).
    """

    def __init__(self, hidden: Callable[[mx.array], mx.array], logits: Callable[[mx.array], mx.array]):
        self.hidden = hidden
        self.logits = logits


def split_head(model: nn.Module) -> Head:
    """Split an mlx-lm model before its output head; the head is the identity where that is not possible."""
    inner = model.get("model")
    whole = Head(model, lambda states: states)
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

    head = Head(inner, logits)
    return head if _equal(model, head) else whole


def _equal(model: nn.Module, head: Head) -> bool:
    expected = model(mx.array(_CHECK_TOKENS))[:, 1:]
    try:
        got = head.logits(head.hidden(mx.array(_CHECK_TOKENS))[:, 1:])
    except Exception:  # whatever an architecture does with states that are not its own: it is not separable
        return False
    if got.shape != expected.shape:
        return False
    tolerance = 16 * mx.finfo(expected.dtype).eps * mx.abs(expected).max()
    return bool((mx.abs(got - expected).max() <= tolerance).item())
