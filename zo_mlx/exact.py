"""The exact gradient of the values, with the memory of what goes into each block, and of one block's backward pass.

Forward block by block, keeping what goes into each; the head at the target positions; then backward block by block,
each of which is computed forward once more, but for some last ones where there is room for what that saves. Weights
other than the values get no gradient. This is back-propagation with a checkpoint at every block (Chen et al. 2016,
arXiv 1604.06174).
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from .blocks import BlockwiseModel
from .data import Example
from .files import load_safetensors, reporting_disk_errors
from .head import Head
from .objective import Batch, collate, denominator, layout, states_gradient, target_states
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
        keep_blocks: of so many last blocks, what the backward pass needs is held until then, and not computed again.
        spill: what goes into the other blocks is put on the disk, into the system's temporary directory.
    """

    def __init__(
        self,
        sparse: SparseModel,
        head: Head,
        blocks: BlockwiseModel | None,
        prefix: Prefix | None = None,
        tokens_at_once: int | None = None,
        keep_blocks: int = 0,
        spill: bool = False,
    ):
        self._sparse, self._head, self._blocks, self._prefix = sparse, head, blocks, prefix
        self._tokens_at_once, self.keep_blocks = tokens_at_once, keep_blocks
        self._spill = tempfile.TemporaryDirectory(prefix="zo-mlx-") if spill else None
        self._spans = sparse.spans()
        self._first = sparse.first_block
        self.blocks_trained = len(sparse.model.layers) - self._first

    def __call__(
        self, values: mx.array, examples: Sequence[Example], count: float | None = None
    ) -> tuple[float, mx.array]:
        """The mean loss of some examples, in nats as `objective.branch_losses`, and its gradient.

        Args:
            values: (K,) float32.
            count: what the sum of their losses is divided by, if not by as many as they are.

        Returns:
            The loss, and (K,) float32.
        """
        count = count or denominator([examples], False)
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

    def _at_once(self, values: mx.array, batch: Batch, count: float) -> tuple[float, mx.array]:
        def states_of(values: mx.array) -> mx.array:
            self._sparse.set_values(values[None])
            return target_states(self._head, batch)

        loss, back = states_gradient(self._head, states_of(values), batch, count)
        _, (gradient,) = mx.vjp(states_of, [values], [back])
        return loss.item(), gradient  # type: ignore[return-value]

    def _by_block(
        self, blocks: BlockwiseModel, values: mx.array, examples: Sequence[Example], batch: Batch, count: float
    ) -> tuple[float, mx.array]:
        tokens = batch.tokens

        def run(number: int, x: mx.array, *parts: mx.array) -> mx.array:
            layers = [layer for layer, _, _ in self._spans.get(number, ())]
            for layer, part in zip(layers, parts, strict=True):
                layer.set_values(part[None], keep=True)
            result = blocks.block(number, tokens, x)
            for layer in layers:
                layer.set_values(None)  # lets go of its D
            return result

        x = self._prefix.states(tokens, [examples]) if self._prefix else blocks.inputs(tokens, self._first)
        parts = {i: [values[start:end] for _, start, end in own] for i, own in self._spans.items()}
        keep = self.blocks_trained if self.keep_blocks == -1 else min(self.keep_blocks, self.blocks_trained)
        numbers = range(self._first, len(blocks.blocks) - keep)
        kept = range(len(blocks.blocks) - keep, len(blocks.blocks))

        def rest(x: mx.array, parts: dict[int, list[mx.array]]) -> tuple[mx.array, mx.array]:
            """What has the gradient of the loss, from what goes into the kept blocks; and the loss."""
            for i in kept:
                x = run(i, x, *parts.get(i, ()))
            with blocks.ending_with(x):
                states = target_states(self._head, batch)
            loss, back = states_gradient(self._head, mx.stop_gradient(states), batch, count)
            return (mx.stop_gradient(back) * states).sum(), loss

        inputs = []
        for i in numbers:
            inputs.append(self._put_away(i, x))
            x = run(i, x, *parts.get(i, ()))
            mx.eval(x)

        (_, loss), (dx, slopes) = mx.value_and_grad(rest, argnums=(0, 1))(x, {i: parts.get(i, []) for i in kept})
        mx.eval(loss, dx, slopes)
        for i in reversed(numbers):
            # Without the block's output, which would hold what it is made from during the next block's turn.
            dx, *slopes[i] = mx.vjp(partial(run, i), [inputs.pop()(), *parts.get(i, ())], [dx])[1]
            mx.eval(dx, slopes[i])
        gradient = mx.zeros(values.size)
        for i, own in self._spans.items():
            for (_, start, end), slope in zip(own, slopes[i], strict=True):
                gradient[start:end] = slope
        return loss.item(), gradient  # type: ignore[return-value]

    def _put_away(self, number: int, x: mx.array) -> Callable[[], mx.array]:
        """Keep what goes into a block; the result gives it back."""
        if self._spill is None:
            return lambda: x
        path = Path(self._spill.name, f"{number}.safetensors")
        with reporting_disk_errors(path):
            mx.save_safetensors(str(path), {"x": x})
        return lambda: load_safetensors(path)[0]["x"]
