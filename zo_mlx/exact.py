"""The exact gradient of the values, with the memory of what goes into each block, and of one block's backward pass.

Forward block by block, keeping what goes into each; the head at the target positions; then backward block by block,
each of which is computed forward once more, but for some last ones where there is room for what that saves. Weights
other than the values get no gradient. This is back-propagation with a checkpoint at every block (Chen et al. 2016,
arXiv 1604.06174). Where an example has several rows, these go on from their prompt, whose keys and values they share.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from .blocks import BlockwiseModel
from .data import Example
from .files import load_safetensors, reporting_disk_errors
from .head import Head
from .objective import Batch, at_targets, collate, denominator, layout, most_at_once, states_gradient, target_states
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

    Attributes:
        continues: whether the rows of an example may go on from its prompt.
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
        self.continues = head.continues and blocks is not None and prefix is None and blocks.continues()

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
        size, limit = len(examples), self._tokens_at_once or math.inf
        at_once = most_at_once(size, size, lambda part: layout([examples[part]], self.continues)[0] <= limit)
        self._sparse.set_values(None)
        loss, gradient = 0.0, mx.zeros(values.size)
        for start in range(0, size, at_once):
            own = examples[start : start + at_once]
            batch = collate([own], self.continues)
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
        rest = batch.continuations
        tokens = [batch.tokens] if rest is None else [batch.tokens, rest.tokens]
        width = len(tokens)

        def run(number: int, *arrays: mx.array) -> list[mx.array]:
            """A block, from what goes into it for each array of tokens, and its parts of the values."""
            layers = [layer for layer, _, _ in self._spans.get(number, ())]
            for layer, part in zip(layers, arrays[width:], strict=True):
                layer.set_values(part[None], keep=True)
            if rest is None:
                result = [blocks.block(number, batch.tokens, arrays[0])]
            else:
                result = blocks.continued(
                    number, batch.tokens, rest.lengths, rest.tokens, rest.parents, arrays[0], arrays[1]
                )
            for layer in layers:
                layer.set_values(None)  # lets go of its D
            return result

        if self._prefix:
            x = [self._prefix.states(batch.tokens, [examples])]
        else:
            x = [blocks.inputs(own, 0) for own in tokens]
            for i in range(self._first):
                x = run(i, *x)
                mx.eval(x)
        parts = {i: [values[start:end] for _, start, end in own] for i, own in self._spans.items()}
        keep = self.blocks_trained if self.keep_blocks == -1 else min(self.keep_blocks, self.blocks_trained)
        numbers = range(self._first, len(blocks.blocks) - keep)
        kept = range(len(blocks.blocks) - keep, len(blocks.blocks))

        def ending(x: list[mx.array], parts: dict[int, list[mx.array]]) -> tuple[mx.array, mx.array]:
            """What has the gradient of the loss, from what goes into the kept blocks; and the loss."""
            for i in kept:
                x = run(i, *x, *parts.get(i, ()))
            last = []
            for own, out in zip(tokens, x, strict=True):
                with blocks.ending_with(out):
                    last.append(self._head.hidden(own))
            states = at_targets(last, batch)
            loss, back = states_gradient(self._head, mx.stop_gradient(states), batch, count)
            return (mx.stop_gradient(back) * states).sum(), loss

        inputs = []
        for i in numbers:
            inputs.append(self._put_away(i, x))
            x = run(i, *x, *parts.get(i, ()))
            mx.eval(x)

        (_, loss), (dx, slopes) = mx.value_and_grad(ending, argnums=(0, 1))(x, {i: parts.get(i, []) for i in kept})
        mx.eval(loss, dx, slopes)
        for i in reversed(numbers):
            # Without the block's output, which would hold what it is made from during the next block's turn.
            back = mx.vjp(partial(run, i), [*inputs.pop()(), *parts.get(i, ())], dx)[1]
            dx, slopes[i] = back[:width], back[width:]
            mx.eval(dx, slopes[i])
            del back
        gradient = mx.zeros(values.size)
        for i, own in self._spans.items():
            for (_, start, end), slope in zip(own, slopes[i], strict=True):
                gradient[start:end] = slope
        return loss.item(), gradient  # type: ignore[return-value]

    def _put_away(self, number: int, x: list[mx.array]) -> Callable[[], list[mx.array]]:
        """Keep what goes into a block; the result gives it back."""
        if self._spill is None:
            return lambda: x
        path, names = Path(self._spill.name, f"{number}.safetensors"), [str(i) for i in range(len(x))]
        with reporting_disk_errors(path):
            mx.save_safetensors(str(path), dict(zip(names, x, strict=True)))

        def read() -> list[mx.array]:
            arrays = load_safetensors(path)[0]
            return [arrays[name] for name in names]

        return read
