from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from zo_mlx import product
from zo_mlx.model import load_sparse
from zo_mlx.product import CPU_QUANTIZED_ROWS, dequantized, on_cpu, prepare


@pytest.mark.skipif(not on_cpu(), reason="on a GPU MLX's own layers are used")
@pytest.mark.parametrize("rows", [1, CPU_QUANTIZED_ROWS, CPU_QUANTIZED_ROWS + 1, 40])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_cpu_products_equal_mlx_quantized_matmul(rows: int, dtype: mx.Dtype) -> None:
    linear = nn.Linear(128, 96, bias=True)
    linear.set_dtype(dtype)
    embedding = nn.Embedding(96, 128)
    embedding.set_dtype(dtype)
    x = mx.random.normal((rows, 128))
    for layer, call in ((linear, "__call__"), (embedding, "as_linear")):
        quantized = layer.to_quantized(group_size=64, bits=4)
        holder = nn.Sequential(quantized)
        holder.set_dtype(mx.float32)
        expected = getattr(quantized, call)(x)
        prepared = prepare(holder).layers[0]
        assert type(prepared) is not type(layer)
        assert mx.abs(getattr(prepared, call)(x) - expected).max() < 1e-4


def test_experts_with_a_scale_each_are_dequantized() -> None:
    mx.random.seed(0)
    layer = SwitchLinear(64, 32, 3, bias=False)
    layer.weight = layer.weight * mx.array([1.0, 10.0, 100.0])[:, None, None]
    quantized = layer.to_quantized(16, 4, "nvfp4", global_scale=True)
    error = mx.abs(dequantized(quantized) - layer.weight).max(axis=(1, 2)) / mx.abs(layer.weight).max(axis=(1, 2))
    assert error.max().item() < 0.2  # E2M1 has nothing between 4 and 6: a sixth of the largest


@pytest.mark.skipif(not on_cpu(), reason="on a GPU there is nothing to compare with")
def test_on_a_gpu_models_compute_in_float32_or_as_they_are(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = mx.random.randint(0, 256, (2, 12), key=mx.random.key(0))
    expected = load_sparse(tiny)[0].model(tokens)
    monkeypatch.setattr(product, "on_cpu", lambda: False)
    got, own = (load_sparse(tiny, float32=float32)[0].model(tokens) for float32 in (True, False))
    assert got.dtype == mx.float32
    assert mx.abs(got - expected).max() < 1e-4 * mx.abs(expected).max()
    assert own.dtype == mx.bfloat16
