"""One place decides how x @ W.T is computed for a quantized W.

On a GPU `mx.quantized_matmul` is the fast kernel. On the CPU backend it is 20 to 170 times slower than dequantizing
and multiplying in float32, except for a row or two, and 16-bit products are slow too: there, activations are float32.
So they are on a GPU for random directions, which compare losses whose weights hardly differ, and learn less in
bfloat16 (docs/numbers.md).
"""

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

SWITCH_LAYERS = (SwitchLinear, QuantizedSwitchLinear)
LINEAR_LAYERS = (nn.Linear, nn.QuantizedLinear, *SWITCH_LAYERS)

# Measured on x86-64 with 2 cores and OpenBLAS, 576 x 576 to 4096 x 4096: quantized_matmul takes 0.3 to 0.9 times the
# time of dequantizing and multiplying for 1 row, and 1.3 times and more from 4 rows.
CPU_QUANTIZED_ROWS = 2
# Larger weights are dequantized and multiplied a part at a time, which takes 0.8 to 1.0 times the time and a third of
# the memory: MLX's CPU backend holds what some ten operations need, and dequantizing is half a dozen. In no more parts
# than these, because operations take memory, too: 4 kB each.
CPU_SLICE_BYTES = 2 << 20
CPU_SLICES = 16


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return mx.default_device().type == mx.cpu


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight as it would be without quantization: (out, in), or (experts, out, in)."""
    *rows, width = layer.weight.shape
    return (*rows, width * 32 // layer.bits if "scales" in layer else width)


def stored_dtype(layer: nn.Module) -> mx.Dtype:
    """The dtype in which a layer computes, as far as it shows: of its scales, or of its weight without any."""
    dtype = (layer.scales if "scales" in layer else layer.weight).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16  # scales that are exponents


def dequantized(layer: nn.Module, rows: Any = slice(None), after: mx.array | None = None) -> mx.array:
    """The weight that a linear layer effectively multiplies by.

    Args:
        layer: `nn.Linear` or `nn.QuantizedLinear` (or an embedding or a `SwitchLinear` of the same two kinds).
        rows: some of its rows, as an index.
        after: MLX is not to begin before this is made; it knows no better than to make weights long before their turn,
            and holds them until then.

    Returns:
        Array of `weight_shape`, float32.
    """
    if "scales" not in layer:
        return layer.weight[rows].astype(mx.float32)
    scales, biases = _scales(layer, rows)
    settings = {**_settings(layer), "dtype": mx.float32}
    if (own := layer.get("global_scale")) is not None:  # experts in nvfp4 may have another scale each
        parts = zip(layer.weight[rows], scales, own[rows], strict=True)
        return mx.stack([mx.dequantize(w, s, global_scale=g, **settings) for w, s, g in parts])
    packed = layer.weight[rows]
    if after is not None:
        (packed,) = mx.depends([packed], [mx.stop_gradient(after)])
    return mx.dequantize(packed, scales, biases, **settings)


def with_values(layer: nn.Module, indices: np.ndarray, values: mx.array) -> mx.array:
    """`dequantized`, with other values (n,) at some flat positions (n,) of the weight."""
    flat = dequantized(layer).reshape(-1)
    flat[mx.array(indices)] = values.astype(mx.float32)
    return flat.reshape(weight_shape(layer))


def make_dense(layer: nn.Module, weight: mx.array) -> None:
    """Give a linear layer a dense weight, whether it was quantized or not."""
    layer.weight = weight
    for name in ("scales", "biases", "global_scale"):
        layer.pop(name, None)
    layer.__class__ = SwitchLinear if isinstance(layer, SWITCH_LAYERS) else nn.Linear


def _scales(layer: nn.Module, rows: Any = slice(None), cast: bool = True) -> tuple[mx.array, mx.array | None]:
    """Scales and biases; `cast` to float32 but for modes whose scales are exponents and no numbers to be cast.

    They are kept as they are stored: in float32 they would be an eighth of a model's size.
    """
    scales, biases = layer.scales[rows], layer.get("biases")
    biases = None if biases is None else biases[rows]
    if cast and mx.issubdtype(scales.dtype, mx.floating):
        scales, biases = scales.astype(mx.float32), None if biases is None else biases.astype(mx.float32)
    return scales, biases


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def product(layer: nn.Module, x: mx.array, rows: slice, after: mx.array, back: list[mx.array]) -> mx.array:
    """x @ W[rows].T + bias[rows]: (..., in) -> (..., rows).

    Args:
        after: weights are not dequantized before this is made.
        back: the parts of a backward pass so far, which come after each other as well.
    """
    if "scales" not in layer:
        y = x @ layer.weight[rows].T
    elif on_cpu() and x.size // x.shape[-1] > CPU_QUANTIZED_ROWS:
        y = _dequantized_product(layer, x, rows, after, back)
    else:
        scales, biases = _scales(layer, rows, cast=x.dtype == mx.float32)
        y = mx.quantized_matmul(x, layer.weight[rows], scales, biases, transpose=True, **_settings(layer))
    return y + layer.bias[rows] if "bias" in layer else y


def _dequantized_product(layer: nn.Module, x: mx.array, rows: slice, after: mx.array, back: list[mx.array]) -> mx.array:
    """x @ dequantized(layer, rows).T; for derivatives the rows are dequantized again, not held until then."""
    layer = copy.copy(layer)  # that is after `Head.narrowed` has put back what it took away

    @mx.custom_function
    def multiplied(x: mx.array) -> mx.array:
        return x @ dequantized(layer, rows, after).T

    @multiplied.vjp
    def gradient(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        back.append(cotangent @ dequantized(layer, rows, after=(back or [cotangent])[-1]))
        return back[-1]

    return multiplied(x)  # type: ignore[return-value]


def linear(
    layer: nn.Module, x: mx.array, least: int = 1, then: Callable[[mx.array, slice], mx.array] | None = None
) -> mx.array:
    """x @ W.T + bias, part by part: (..., in) -> (..., out)

    Args:
        least: make at least this many parts.
        then: is applied to each part, with the rows of W that it comes from.
    """
    out, width = weight_shape(layer)
    step = -(-out // least)
    if on_cpu() and "scales" in layer and x.size // width > CPU_QUANTIZED_ROWS:
        own = max(1, CPU_SLICE_BYTES // (4 * width), -(-out // CPU_SLICES))
        step = min(step, own if out > 2 * own else out)
    made, back = [x], list[mx.array]()  # each part after the one before
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        part = product(layer, x, rows, made[-1], back)
        made.append(then(part, rows) if then else part)
    return made[1] if len(made) == 2 else mx.concatenate(made[1:], axis=-1)


class Float32QuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` that multiplies in float32, whatever the dtype of its scales."""

    def __call__(self, x: mx.array) -> mx.array:
        return linear(self, x)


class Float32QuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        return dequantized(self, x)

    def as_linear(self, x: mx.array) -> mx.array:
        return linear(self, x)


_FLOAT32_CLASSES: dict[type, type] = {
    nn.QuantizedLinear: Float32QuantizedLinear,
    nn.QuantizedEmbedding: Float32QuantizedEmbedding,
}


def prepare(model: nn.Module, float32: bool = False) -> nn.Module:
    """Make a loaded model fast on the default device: unchanged on a GPU, unless activations are to be `float32`."""
    if float32 or on_cpu():
        for _, module in model.named_modules():
            # The class changes, not the module: parameters keep their places and their paths.
            if (replacement := _FLOAT32_CLASSES.get(type(module))) is not None:
                module.__class__ = replacement
        model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, _to_be_float32)
    return model


def _to_be_float32(module: nn.Module, name: str, value: Any) -> bool:
    kept = isinstance(module, tuple(_FLOAT32_CLASSES.values())) and name in ("scales", "biases")
    return not kept and nn.Module.valid_parameter_filter(module, name, value)
