"""What steps hold of memory at most, measured on models that are not there.

`Steps` takes steps as a run does, with examples that are made up. `Miniature` and `LoraMiniature` take them on a model
of zeros, of whose blocks only the last of each kind does its work: what MLX holds at once is what one block needs,
however many there are. What every block leaves behind is added.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from .blocks import BlockwiseModel
from .config import TrainConfig, resolved
from .convert.scoring import layer_sizes
from .data import Example, Target
from .errors import UsageError
from .exact import ExactGradient
from .head import split_head
from .index import SensitiveIndex
from .memory import peak_of
from .objective import LOGIT_BYTES
from .optimizer import Optimizer
from .prefix import Prefix
from .product import on_cpu
from .skeleton import made_up, shortened
from .sparse import SparseModel
from .step import exact_step, make_loss, rows_of_step, step
from .trainable import Trainable

# mlx_lm.lora's defaults.
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
LORA_BLOCKS = 16
SOME_TOKENS = 4096


class Steps:
    """A model that takes steps with made-up examples.

    Args:
        sparse: the model with its sensitive weights; none of them is set so far.
        index: they are its.
        config: checked; gradient, directions and the number of trained blocks are read.

    Attributes:
        trained: how many blocks are.

    Raises:
        UsageError: the model's blocks are not a plain chain.
    """

    def __init__(self, sparse: SparseModel, index: SensitiveIndex, config: TrainConfig):
        blocks, count = BlockwiseModel.of_chain(sparse.model), len(sparse.model.layers)
        if blocks is None:
            raise UsageError(f"{type(sparse.model).__module__}: its blocks are no plain chain, and not planned for")
        self.blocks, self.head, self._sparse, self._config = blocks, split_head(sparse.model), sparse, config
        last = config.num_layers or (-1 if config.gradient == "exact" else sparse.last_half())
        self.trained = count if last == -1 else min(last, count)
        self._trainable = Trainable(index, sparse.train_last(self.trained, index.initial_values()), config)
        self._optimizer = Optimizer(resolved(config), self._trainable.initial)
        self._at_once = resolved(replace(config, memory_limit=None)).tokens_at_once
        mx.eval(self._trainable.initial, self._optimizer.state)

    def together(self, rows: int, tokens: int) -> int:
        """How many of so many examples go through the model at once."""
        return rows if self._at_once is None else max(1, min(rows, self._at_once // tokens))

    def peak(self, rows: int, tokens: int, texts: bool = False, least: bool = False) -> int:
        """The most that MLX holds during a `step`, in bytes, above what it held before."""
        # On a GPU MLX works ahead, from which runs are held back.
        return _above(self.step(rows, tokens, texts, least), 0 if least or not on_cpu() else None)

    def step(self, rows: int, tokens: int, texts: bool = False, least: bool = False) -> Callable[[], None]:
        """What takes a step.

        Args:
            rows: examples of the step.
            tokens: of each.
            texts: all tokens are targets; else the examples have two choices of one token.
            least: an example at a time, in as little memory as possible.
        """
        directions = 1 if least else self._config.directions  # branches come after each other then
        config = resolved(replace(self._config, batch_size=rows, directions=directions))
        values, optimizer = self._trainable.initial, self._optimizer
        at_once = 1 if least else self._at_once
        has_prefix = self.trained < len(self.blocks.blocks)
        steps = rows_of_step(config) // rows if has_prefix and not least else 1
        examples = [_example(tokens, texts) for _ in range(steps * rows)]

        def run() -> None:
            prefix = None
            if has_prefix:
                prefix = Prefix(self.blocks, self._sparse.first_block, tokens_at_once=at_once)
                prefix.prepare(examples)
            if config.gradient == "exact":
                gradient = ExactGradient(self._sparse, self.head, self.blocks, prefix, at_once, spill=least)
                taken = exact_step(gradient, optimizer, values, optimizer.state, examples[:rows], 1)
            else:
                loss = make_loss(self._sparse, self.head, prefix, at_once)
                taken = step(loss, optimizer, values, optimizer.state, examples[:rows], 1, config)
            mx.eval(taken[:2])

        return run


class Miniature:
    """Steps of a model of zeros.

    Args:
        model: from `skeleton`; it is used up.
        index: of the model; None makes one up.
        density: the share of its weights that are trained, where one is made up.
        config: as for `Steps`.

    Attributes:
        trainable: how many sensitive weights are trained.
        trained_bytes: what those of all blocks take, with the optimizer's state.
        together: as that of `Steps`.
    """

    def __init__(self, model: nn.Module, index: SensitiveIndex | None, density: float, config: TrainConfig):
        counts = _counts(model, index, density)
        kept = shortened(model, 1)
        own = _of_blocks(model, kept, index, density)
        before = mx.get_active_memory()
        self._steps = Steps(SparseModel(model, own), own, config)
        self.trained_bytes = (mx.get_active_memory() - before) * sum(counts) // own.size
        self.trainable = sum(counts[-self._steps.trained :])
        state = self._steps.blocks.inputs(mx.array([[0]]), 0)
        self._passes = rows_of_step(resolved(replace(config, batch_size=1)))
        # Of a token: what the blocks that are not there leave behind; what else is held while logits are made.
        self._left = state.nbytes * (self._steps.trained - len(kept) if config.gradient == "exact" else 0)
        self._held = state.nbytes * 2 * self._passes
        # Tokens of an example with which logits fill three times what is made of them at once, in float32; with small
        # vocabularies, which have few, some.
        filling = 3 * LOGIT_BYTES // 4 // self._steps.head.logits(state).shape[-1]
        self._filling = max(1, min(filling, SOME_TOKENS) // self._passes)
        self._prefix = 0 if config.gradient == "exact" else state.nbytes
        self.together, self._peak = self._steps.together, cache(self._steps.peak)

    def activations(self, rows: int, tokens: int) -> int:
        """What a step takes above weights and `trained_bytes` where few tokens are targets."""
        rows = self.together(rows, tokens)
        return self._peak(rows, tokens) + self._left * rows * tokens

    def texts(self, rows: int, tokens: int) -> int:
        """The same while the logits of all tokens are made, of no more tokens than fill what is made at a time."""
        rows = self.together(rows, tokens)
        some, length = max(1, min(rows, self._filling // tokens)), min(tokens, self._filling)
        others = rows * tokens - some * length
        return self._peak(some, length, texts=True) + self._left * rows * tokens + self._held * others

    def least(self, rows: int, tokens: int) -> int:
        """The least: an example at a time, and with exact gradients what goes into blocks on the disk."""
        return self._peak(1, tokens, least=True) + self._prefix * (rows - 1) * tokens


class LoraMiniature:
    """Steps of mlx-lm's LoRA on a model of zeros, with its defaults.

    Args:
        make: gives the model, from `skeleton`.
        blocks: how many last ones get adapters, -1 for all; None is mlx-lm's default.

    Attributes:
        trainable: how many weights the adapters have.
        trained_bytes: what they take, with the optimizer's state.
    """

    def __init__(self, make: Callable[[], nn.Module], blocks: int | None):
        self._one, self._two = _Lora(make(), 1, blocks or LORA_BLOCKS), _Lora(make(), 2, blocks or LORA_BLOCKS)
        self.trained_bytes = self._one.bytes * self._one.trained // self._one.working
        self.trainable = self._one.weights * self._one.trained // self._one.working
        self._of_block = cache(self._kept_by_block)

    def activations(self, rows: int, tokens: int) -> int:
        """What a step takes above weights and `trained_bytes`.

        Of long examples with large vocabularies, a part is measured, and the rest taken to be like it: the logits of
        all their tokens could be too much for the machine.
        """
        length = min(tokens, LOGIT_BYTES // self._one.vocabulary)
        others = (self._one.trained - self._one.working) * self._of_block(length)
        return (self._one.peak(rows, length) + rows * others) * tokens // length

    def _kept_by_block(self, tokens: int) -> int:
        """What a block keeps of an example for its backward pass, and its adapters' gradient."""
        # An operation at a time: else it depends on how far MLX's threads are ahead of each other.
        more = self._two.peak(1, tokens, 0) - self._one.peak(1, tokens, 0)
        return max(0, more) // max(1, self._two.working - self._one.working)


class _Lora:
    """Steps of mlx-lm's LoRA where only some last blocks of each kind do their work.

    Attributes:
        trained: how many blocks would have adapters.
        working: how many have them.
        weights: of these.
        bytes: what they take.
        vocabulary: how many logits a token has.
    """

    def __init__(self, model: nn.Module, count: int, blocks: int):
        kept = {id(block) for block in shortened(model, count)}
        self.trained = len(model.layers) if blocks == -1 else min(blocks, len(model.layers))
        self.working = sum(id(block) in kept for block in model.layers[-self.trained :])
        before = mx.get_active_memory()
        model.freeze()
        linear_to_lora_layers(model, self.trained, LORA)
        for block in model.layers:
            if id(block) not in kept:
                block.freeze()
        self.weights = sum(array.size for array in dict(tree_flatten(model.trainable_parameters())).values())
        self._model, self._optimizer = model.train(), optim.Adam(1e-5)
        self._optimizer.init(model.trainable_parameters())
        mx.eval(model.trainable_parameters(), self._optimizer.state)
        self.bytes = mx.get_active_memory() - before
        self.vocabulary = model(mx.array([[0]])).shape[-1]

    def peak(self, rows: int, tokens: int, aim: int | None = None) -> int:
        """As `Steps.peak`; `aim` as for `peak_of`."""
        batch, lengths = mx.zeros((rows, tokens + 1), mx.int32), mx.array([[0, tokens]] * rows)

        def run() -> None:
            (loss, _), gradients = nn.value_and_grad(self._model, default_loss)(self._model, batch, lengths)
            self._optimizer.update(self._model, gradients)
            mx.eval(self._model.trainable_parameters(), self._optimizer.state, loss)

        return _above(run, aim)


def _above(run: Callable[[], object], aim: int | None) -> int:
    gc.collect()
    before = mx.get_active_memory()
    return peak_of(run, aim) - before


def _counts(model: nn.Module, index: SensitiveIndex | None, density: float) -> list[int]:
    """How many sensitive weights each block has, or as many as it could have."""
    sizes = {path: tensor.size for path, tensor in index.tensors.items()} if index else layer_sizes(model)
    paths = {id(module): path for path, module in model.named_modules()}
    counts = [sum(sizes.get(paths[id(m)], 0) for m in block.modules()) for block in model.layers]
    counts[-1] += sum(sizes.values()) - sum(counts)  # what is in none counts as after the last
    return counts if index else [round(density * count) for count in counts]


def _of_blocks(model: nn.Module, kept: list[nn.Module], index: SensitiveIndex | None, density: float) -> SensitiveIndex:
    """What an index has in some blocks, or, for a block where it has nothing, what could be there."""
    paths = {id(module): path for path, module in model.named_modules()}
    sizes, tensors = layer_sizes(model), {}
    for block in kept:
        layers = {path: module for module in block.modules() if (path := paths[id(module)]) in sizes}
        own = {path: index.tensors[path] for path in layers if index and path in index.tensors}
        tensors.update(own or {path: made_up(layer, density) for path, layer in layers.items()})
    return SensitiveIndex(tensors)


def _example(tokens: int, texts: bool) -> Example:
    if texts:
        return Example([[0] * tokens], [[Target(0, at, 1) for at in range(tokens)]])
    return Example([[0] * tokens], [[Target(0, tokens - 1, token)] for token in (0, 1)], 0, ("a", "b"))
