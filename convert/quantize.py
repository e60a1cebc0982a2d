"""How a model is quantized: by mlx-lm's own functions, or with the sensitive weights left out of the range."""

import contextlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

from ..errors import UsageError

__all__ = ["MODES", "QUANT_RECIPES", "Quantization", "clip_sensitive"]

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
_AFFINE_GROUP_SIZE = 64


@dataclass(frozen=True)
class Quantization:
    """Settings named and meant as in `mlx_lm.convert`; None is mlx-lm's choice for the mode.

    Raises UsageError if they do not go together.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"--q-mode must be one of {', '.join(MODES)}, not {self.mode}")
        if self.recipe is not None and self.recipe not in QUANT_RECIPES:
            raise UsageError(f"--quant-predicate must be one of {', '.join(QUANT_RECIPES)}, not {self.recipe}")
        if self.recipe and (self.mode != "affine" or self.bits):
            raise UsageError("--quant-predicate decides on the bits itself: it goes with neither --q-mode nor --q-bits")
        settings = f"--q-mode {self.mode} with --q-bits {self.bits}, --q-group-size {self.group_size}"
        if (self.group_size is not None and not 0 < self.group_size <= 1024) or not 0 < (self.bits or 1) <= 16:
            raise UsageError(f"{settings} is out of range")
        try:
            mx.quantize(mx.zeros((1, 8 * (self.group_size or 16))), self.group_size, self.bits, mode=self.mode)
        except ValueError as e:
            raise UsageError(f"{settings}: {e}") from None

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for."""
        return self == Quantization()

    def apply(self, model: nn.Module, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """Quantize a model as `mlx_lm.convert -q` does, once its weights are read; return it with its new config.

        Raises UsageError for a model that the recipe is not made for.
        """
        predicate = None
        if self.recipe:
            try:
                predicate = mixed_quant_predicate_builder(self.recipe, model, self.group_size or _AFFINE_GROUP_SIZE)
            except ValueError as e:
                raise UsageError(f"--quant-predicate {self.recipe}: {e}") from None
        with contextlib.redirect_stdout(None):  # it prints the bits per weight
            return quantize_model(
                model,
                config,
                self.group_size,
                self.bits,
                mode=self.mode,
                quant_predicate=predicate,  # type: ignore[arg-type]  # mlx-lm's two signatures disagree
            )


def clip_sensitive(quantized: nn.Module, original: nn.Module, chosen: dict[str, np.ndarray]) -> None:
    """Quantize some layers again so that their sensitive weights do not stretch the range of their groups.

    As in dense-and-sparse quantization (SqueezeLLM, Kim et al. 2023, arXiv 2306.07629), groups take their range from
    the other weights; a sensitive weight, whose own value is kept elsewhere, is stored as the end of the range that is
    nearer to it.

    Args:
        quantized: a quantized model, none of whose weights is read yet.
        original: the same before it was quantized.
        chosen: for each layer with sensitive weights, their flat positions.
    """
    layers, originals = dict(quantized.named_modules()), dict(original.named_modules())
    for path, positions in chosen.items():
        layer = layers[path]
        if "scales" not in layer:
            continue
        weight = _clipped(originals[path].weight, positions, layer.group_size)
        parts = mx.quantize(weight, layer.group_size, layer.bits, mode=layer.mode)
        layer.update(dict(zip(("weight", "scales", "biases"), parts, strict=False)))


def _clipped(weight: mx.array, positions: np.ndarray, group_size: int) -> mx.array:
    """The weight with those at some flat positions clipped to the range of the others in their group."""
    mask = mx.zeros(weight.size, mx.bool_)  # not made before the weight is read
    mask[mx.array(positions)] = True
    mask = mask.reshape(-1, group_size)
    groups = weight.reshape(-1, group_size)
    low = mx.where(mask, mx.inf, groups).min(axis=1, keepdims=True).astype(weight.dtype)
    high = mx.where(mask, -mx.inf, groups).max(axis=1, keepdims=True).astype(weight.dtype)
    clipped = mx.where(mask & (low <= high), mx.clip(groups, low, high), groups)
    return clipped.reshape(weight.shape)
