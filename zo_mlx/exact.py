"""The exact gradient of the values, with the memory of what goes into each block, and of one block's backward pass.

Forward block by block, keeping what goes into each; the head at the target positions; then backward block by block,
each of which is computed forward once more. Weights other than the values get no gradient. This is back-propagation
with a checkpoint at every block (Chen et al. 2016, arXiv 1604.06174).
"""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from .blocks import BlockwiseModel
from .data import Example
from .head import Head
from .objective import Batch, collate, layout, states_gradient, target_states
from .prefix import Prefix
from .sparse import SparseModel


class ExactGradient:
    """Values and examples in, loss and gradient out.

    Args:
        sparse: the model with its trainable values.
        head: of it.
        blocks: the same model, where its blocks are a plain chain; None computes all of it at once, and holds what its
            backward pass needs.
        prefix: computes what comes before the first block with trainable values.
        tokens_at_once: the most tokens, padding included, that go through the model together; at least one example
            does. None is no limit.
    """

    def __init__(
        self,
        sparse: SparseModel,
        head: Head,
        blocks: BlockwiseModel | None,
        prefix: Prefix | None = None,
        tokens_at_once: int | None = None,
    ):
        self._sparse, self._head, self._blocks, self._prefix = sparse, head, blocks, prefix
        self._tokens_at_once = tokens_at_once
        self._spans = sparse.spans()
        self._first = sparse.first_block

    def __call__(self, values: mx.array, examples: Sequence[Example]) -> tuple[float, mx.array]:
        """The mean loss of some examples, in nats as `objective.branch_losses`, and its gradient.

        Args:
            values: (K,) float32.

        Returns:
            The loss, and (K,) float32.
        """
        count = len(examples) if examples[0].label is not None else sum(len(e.targets[0]) for e in examples)
        at_once = len(examples)
        if self._tokens_at_once is not None:
            at_once = max(1, min(at_once, int(at_once * self._tokens_at_once / layout([examples], False)[0])))
        self._sparse.set_values(None)
        loss, gradient = 0.0, mx.zeros(values.size)
        for start in range(0, len(examples), at_once):
            own = examples[start : start + at_once]
            batch = collate([own])
            if self._blocks:
                part, back = self._by_block(self._blocks, values, own, batch, count)
            else:
                part, back = self._at_once(values, batch, count)
            loss, gradient = loss + part, gradient + back
            mx.eval(gradient)
        self._sparse.set_values(None)
        return loss, gradient

    def _at_once(self, values: mx.array, batch: Batch, count: int) -> tuple[float, mx.array]:
        def states_of(values: mx.array) -> mx.array:
            self._sparse.set_values(values[None])
            return target_states(self._head, batch)

        loss, back = states_gradient(self._head, states_of(values), batch, count)
        _, (gradient,) = mx.vjp(states_of, [values], [back])
        return loss.item(), gradient  # type: ignore[return-value]

    def _by_block(
        self, blocks: BlockwiseModel, values: mx.array, examples: Sequence[Example], batch: Batch, count: int
    ) -> tuple[float, mx.array]:
        tokens = batch.tokens

        def run(number: int, x: mx.array, *parts: mx.array) -> mx.array:
            layers = [layer for layer, _, _ in self._spans.get(number, ())]
            for layer, part in zip(layers, parts, strict=True):
                layer.set_values(part[None])
            result = blocks.block(number, tokens, x)
            for layer in layers:
                layer.set_values(None)  # lets go of its D
            return result

        def states_from(x: mx.array) -> mx.array:
            with blocks.ending_with(x):
                return target_states(self._head, batch)

        x = self._prefix.states(tokens, [examples]) if self._prefix else blocks.inputs(tokens, self._first)
        parts = {i: [values[start:end] for _, start, end in own] for i, own in self._spans.items()}
        numbers = range(self._first, len(blocks.blocks))
        inputs = []
        for i in numbers:
            inputs.append(x)
            x = run(i, x, *parts.get(i, ()))
            mx.eval(x)

        loss, back = states_gradient(self._head, states_from(x), batch, count)
        _, (dx,) = mx.vjp(states_from, [x], [back])
        gradient = mx.zeros(values.size)
        for i in reversed(numbers):
            _, (dx, *slopes) = mx.vjp(partial(run, i), [inputs.pop(), *parts.get(i, ())], [dx])
            for (_, start, end), slope in zip(self._spans.get(i, ()), slopes, strict=True):
                gradient[start:end] = slope
            mx.eval(dx, gradient)
        return loss.item(), gradient  # type: ignore[return-value]
