"""What a training step is measured against: the classic MeZO loop, and mlx-lm's LoRA step, on dense float32 weights."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

from zo_mlx.data import Example
from zo_mlx.head import Head
from zo_mlx.index import SensitiveIndex
from zo_mlx.model import load_stock_model
from zo_mlx.objective import branch_losses, collate, scores
from zo_mlx.product import dequantized


def dense_model(path: Path) -> nn.Module:
    """A quantized model with its weights dequantized to float32, once."""
    model, _ = load_stock_model(path, lazy=True)
    for _, module in model.named_modules():
        if "scales" in module:
            module.weight = dequantized(module)
            module.pop("scales"), module.pop("biases", None)
            module.__class__ = nn.Embedding if isinstance(module, nn.QuantizedEmbedding) else nn.Linear
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


class Mezo:
    """The loop of Malladi et al. 2023 (arXiv 2305.17333, algorithm 1): weights are perturbed in place and restored.

    Args:
        model: changed by every step.
        head: of it.
        index: perturb its weights only (as Guo et al. 2024 do); None perturbs all.
    """

    def __init__(self, model: nn.Module, head: Head, index: SensitiveIndex | None):
        self.model, self.head = model, head
        self.positions: dict[str, mx.array] | None = None
        if index is not None:
            self.positions = {f"{path}.weight": mx.array(t.indices) for path, t in index.tensors.items()}

    def _move(self, seed: int, scale: float) -> None:
        parameters = dict(tree_flatten(self.model.parameters()))
        for n, name in enumerate(list(parameters)):
            weight = parameters.pop(name)
            self.model.update(tree_unflatten([(name, mx.zeros(1))]))  # so that MLX may write in place
            key = mx.random.key(seed * 100_000 + n)
            if self.positions is None:
                weight = weight + scale * mx.random.normal(weight.shape, key=key)
            elif name in self.positions:
                z = mx.random.normal(self.positions[name].shape, key=key)
                flat = weight.reshape(-1)
                shape = weight.shape
                del weight
                weight = flat.at[self.positions[name]].add(scale * z).reshape(shape)
                del flat
            mx.eval(weight)
            self.model.update(tree_unflatten([(name, weight)]))

    def step(self, examples: Sequence[Example], seed: int, epsilon: float = 1e-3, rate: float = 1e-6) -> None:
        """One step with one direction, two-sided."""
        batch = collate([examples])
        losses = []
        for scale in (epsilon, -2 * epsilon):
            self._move(seed, scale)
            losses.append(branch_losses(scores(self.head, batch), batch, len(examples)).item())
        self._move(seed, epsilon)
        self._move(seed, -rate * (losses[0] - losses[1]) / (2 * epsilon))


def lora_step(model: nn.Module) -> Callable[[Sequence[Example]], None]:
    """mlx-lm's training step on all layers, rank 8, Adam; `model` gets the adapters."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.0})
    model.train()
    optimizer = optim.Adam(1e-4)
    gradient = nn.value_and_grad(model, default_loss)

    def step(examples: Sequence[Example]) -> None:
        (loss, _), gradients = gradient(model, *_lora_batch(examples))
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state, loss)

    return step


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """With mlx-lm's gradient checkpointing, which changes the class of the model's blocks."""
    kind = type(model.layers[0])
    before = kind.__call__
    grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        kind.__call__ = before


def _lora_batch(examples: Sequence[Example]) -> tuple[mx.array, mx.array]:
    """The same rows with their right answers, as mlx-lm takes them: tokens, and where the answers begin and end."""
    rows, lengths = [], []
    for example in examples:
        targets = example.targets[example.label or 0]
        rows.append([*example.rows[targets[0].row][: targets[-1].position + 1], targets[-1].token])
        lengths.append((targets[0].position + 1, targets[-1].position + 1))
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return mx.array(tokens), mx.array(lengths)
