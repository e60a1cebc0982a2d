"""Fisher scores: how strongly the pre-training loss depends on each weight of the linear layers.

Score of a weight w = mean over calibration sequences of (d loss / d w)^2, loss = mean next-token cross-entropy of one
sequence (the empirical Fisher diagonal; Guo et al. 2024, arXiv 2406.02913, section 3).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError
from ..product import LINEAR_LAYERS, prepare

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")


def calibration_sequences(
    tokenizer: TokenizerWrapper, text: str, num_samples: int, sequence_length: int, seed: int
) -> np.ndarray:
    """Cut a text into equal windows of tokens and draw some of them without repetition.

    Args:
        tokenizer: the model's.
        text: calibration text.
        num_samples: N, how many windows.
        sequence_length: T, tokens in a window.
        seed: decides which windows; the same seed gives the same ones.

    Returns:
        (N, T) int32 tokens.

    Raises:
        UsageError: the text has fewer than N * T tokens.
    """
    windows = token_windows(tokenizer, text, sequence_length)
    if len(windows) < num_samples:
        raise UsageError(
            f"the calibration text has {len(windows)} times {sequence_length} tokens, not {num_samples} times; give a "
            "longer text, or lower --num-samples or --sequence-length"
        )
    return windows[np.random.default_rng(seed).permutation(len(windows))[:num_samples]]


def token_windows(tokenizer: TokenizerWrapper, text: str, length: int) -> np.ndarray:
    """Cut a text into windows of tokens: (N, length) int32; what is left of it is dropped."""
    # Not verbose: a text longer than the model's context is no mistake here.
    try:
        encoded = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    except Exception as e:  # a tokenizer that loads may still have settings of the wrong type
        raise UsageError(f"{tokenizer.name_or_path}: the tokenizer fails: {type(e).__name__}: {e}") from None
    tokens = np.array(encoded, dtype=np.int32)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def scored_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers whose weights can be sensitive: all in the transformer blocks, experts included."""
    blocks = {id(m) for block in model.layers for m in block.modules()}
    return sorted(p for p, m in model.named_modules() if isinstance(m, LINEAR_LAYERS) and id(m) in blocks)


def sequence_loss(logits: mx.array, tokens: mx.array) -> mx.array:
    """Mean next-token cross-entropy: logits (1, T - 1, V) of tokens (T,) but for the last."""
    return nn.losses.cross_entropy(logits[0].astype(mx.float32), tokens[1:], reduction="mean")


def fisher_scores(
    model: nn.Module, sequences: np.ndarray, advance: Callable[[str], None] = lambda phase: None
) -> Iterator[tuple[str, mx.array]]:
    """Fisher scores of all weights of a dense model's linear layers, by one backward pass per sequence.

    Holds all gradients in memory. On the CPU backend the pass is in float32; the model is changed to that.

    Args:
        model: a dense mlx-lm model.
        sequences: (N, T) int32 tokens.
        advance: called with `backward` after each sequence.

    Yields:
        For each path of `scored_layers`, the path and float32 scores, of the weight's shape.
    """
    paths = scored_layers(model)
    prepare(model)
    modules = dict(model.named_modules())
    weights = {p: modules[p].weight for p in paths}

    def loss(weights: dict[str, mx.array], tokens: mx.array) -> mx.array:
        model.update(tree_unflatten([(f"{p}.weight", w) for p, w in weights.items()]))
        return sequence_loss(model(tokens[None, :-1]), tokens)

    gradient = mx.grad(loss)
    scores = {p: mx.zeros(w.shape) for p, w in weights.items()}
    for row in sequences:
        for path, g in gradient(weights, mx.array(row)).items():
            scores[path] = scores[path] + g.astype(mx.float32).square() / len(sequences)
        mx.eval(scores)
        advance("backward")
    model.update(tree_unflatten([(f"{p}.weight", w) for p, w in weights.items()]))
    yield from scores.items()
