"""Perplexity of a text before and after quantization, with the memory of one transformer block."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..blocks import opened, run_blocks
from ..errors import UsageError
from ..index import SensitiveIndex
from ..model import load_stock_model
from ..product import make_dense, prepare, with_values
from ..progress import Progress
from .sensitivity import sequence_loss, token_windows
from .sources import Source

# As in `mlx_lm.perplexity`; more windows would say little more.
_TOKENS, _WINDOWS = 512, 64
# What goes from block to block, for all windows that go together.
_STATE_BYTES = 256 << 20


@dataclass
class Perplexity:
    """exp of the mean next-token cross-entropy over sequences, and its standard error (delta method), if several."""

    perplexity: float
    standard_error: float | None


def perplexity_windows(tokenizer: TokenizerWrapper, text: str) -> np.ndarray:
    """The first windows of a text: (N, 512) int32 tokens, N at most 64. Raises UsageError if there is none."""
    windows = token_windows(tokenizer, text, _TOKENS)[:_WINDOWS]
    if not len(windows):
        raise UsageError(f"the text for perplexity has less than {_TOKENS} tokens")
    return windows


def before_and_after(
    source: Source, directory: Path, index: SensitiveIndex, windows: np.ndarray, progress: bool
) -> dict[str, Any]:
    """Perplexity of the `source`, of the model in `directory` as `quantized`, and `with_sensitive` weights in place."""

    def quantized() -> nn.Module:
        return load_stock_model(directory, lazy=True)[0]

    ways = {
        "source": source.open_model,
        "quantized": quantized,
        "with_sensitive": lambda: with_sensitive_weights(quantized(), index),
    }
    with Progress("Perplexity", len(ways) * len(windows) * len(source.open_model().layers), "block", progress) as bar:
        return {"tokens": windows.size} | {
            name: asdict(perplexity(way, windows, source.is_chain, bar.advance)) for name, way in ways.items()
        }


def perplexity(
    open_model: Callable[[], nn.Module], sequences: np.ndarray, chain: bool, advance: Callable[[], None]
) -> Perplexity:
    """Measure a model block by block; one that is not a chain of blocks, in memory.

    Args:
        open_model: gives the model with its weights not yet read, as often as it is called.
        sequences: (N, T) int32 tokens; the first token of each is not predicted.
        chain: whether the model's blocks are a plain chain.
        advance: called for each block and sequence.
    """
    rows = [mx.array(row) for row in sequences]
    losses = []
    if chain:
        with opened(open_model) as model:
            at_once = max(1, _STATE_BYTES // model.inputs(rows[0][None, :-1], 0).nbytes)
        for start in range(0, len(rows), at_once):
            group = rows[start : start + at_once]
            *_, (_, states) = run_blocks(open_model, group, None, 0, advance)
            with opened(open_model) as model:
                for row, x in zip(group, states, strict=True):
                    losses.append(sequence_loss(model.head(row[None, :-1], x), row).item())
    else:
        whole = prepare(open_model())
        for row in rows:
            losses.append(sequence_loss(whole(row[None, :-1]), row).item())
            for _ in whole.layers:
                advance()
    mean = math.exp(min(float(np.mean(losses)), 700))
    error = mean * float(np.std(losses, ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return Perplexity(mean, error)


def with_sensitive_weights(model: nn.Module, index: SensitiveIndex) -> nn.Module:
    """A quantized model, none of whose weights is read yet, with the values of its index in place.

    Layers of the index become dense ones, which compute what the sparse layers compute that train.
    """
    modules = dict(model.named_modules())
    for path, tensor in index.tensors.items():
        layer = modules[path]
        make_dense(layer, with_values(layer, tensor.indices, tensor.values).astype(tensor.values.dtype))
    return model
