"""Models of well-known shapes with random weights, for benchmarks of time and memory."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from zo_mlx.index import SensitiveIndex, SensitiveTensor, write_index
from zo_mlx.model import fingerprint

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import byte_tokenizer

# hidden size, inner size, blocks, attention heads, key-value heads, vocabulary
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "tinyllama": (2048, 5632, 22, 32, 4, 32000),
    "tinyllama-2-blocks": (2048, 5632, 2, 32, 4, 32000),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama2-7b-2-blocks": (4096, 11008, 2, 32, 32, 32000),
}
DENSITY = 1e-3
# SmolLM2's sensitive weights lie in this share of the input columns.
COLUMNS = 0.022
_GROUP, _BITS = 64, 4


def _write(path: Path, shape: str, matrix: Callable[[str, int, int], dict[str, mx.array]], **settings: Any) -> None:
    """Write a llama whose matrices are made one by one, a block to a file."""
    hidden, inner, blocks, heads, kv_heads, vocabulary = SHAPES[shape]
    path.mkdir()
    byte_tokenizer().save_pretrained(path)
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": blocks, "max_position_embeddings": 2048,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        **settings,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    for i in range(blocks):
        tensors = {}
        for name, size in _block(shape, i):
            tensors.update(matrix(name, *size))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = mx.ones(hidden, mx.bfloat16)
        mx.save_safetensors(str(path / f"model-{i:05d}.safetensors"), tensors, {"format": "mlx"})
    ends = {"model.norm.weight": mx.ones(hidden, mx.bfloat16)}
    for name in ("model.embed_tokens", "lm_head"):
        ends.update(matrix(name, vocabulary, hidden))
    mx.save_safetensors(str(path / "model-99999.safetensors"), ends, {"format": "mlx"})


def _block(shape: str, number: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The matrices of a block: path and (out, in)."""
    hidden, inner, _, heads, kv_heads, _ = SHAPES[shape]
    kv = hidden // heads * kv_heads
    for name, size in {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }.items():  # fmt: skip
        yield f"model.layers.{number}.{name}", size


def make_model(path: Path, shape: str) -> None:
    """Write a Hugging Face directory of random bfloat16 weights."""
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> dict[str, mx.array]:
        weight = rng.standard_normal((rows, columns), np.float32) / columns**0.5
        return {f"{name}.weight": mx.array(weight).astype(mx.bfloat16)}

    _write(path, shape, matrix)


@contextlib.contextmanager
def model_directory(name: str) -> Iterator[Path]:
    """A directory of that name, or one with random 4-bit weights, for a while, if it is the name of a shape."""
    if name not in SHAPES:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_quantized_model(Path(scratch, name), name)
        yield Path(scratch, name)


def make_quantized_model(path: Path, shape: str) -> None:
    """Write an MLX directory of random 4-bit weights, drawn as packed integers, with a random sensitive index."""
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> dict[str, mx.array]:
        scales = np.full((rows, columns // _GROUP), 1 / (4 * columns**0.5), np.float32)
        return {
            f"{name}.weight": mx.array(rng.integers(0, 2**32, (rows, columns * _BITS // 32), np.uint32)),
            f"{name}.scales": mx.array(scales).astype(mx.bfloat16),
            f"{name}.biases": mx.array(-7.5 * scales).astype(mx.bfloat16),
        }

    quantization = {"group_size": _GROUP, "bits": _BITS, "mode": "affine"}
    _write(path, shape, matrix, quantization=quantization)
    tensors = {}
    for i in range(SHAPES[shape][2]):
        for name, (rows, columns) in _block(shape, i):
            used = rng.choice(columns, max(1, round(COLUMNS * columns)), replace=False)
            area = (np.arange(rows)[:, None] * columns + used).ravel()
            chosen = np.sort(rng.choice(area, round(DENSITY * rows * columns), replace=False)).astype(np.uint32)
            values = mx.array(rng.standard_normal(len(chosen), np.float32) / columns**0.5)
            tensors[name] = SensitiveTensor(chosen, values, np.ones(len(chosen), np.float32))
    index = SensitiveIndex(tensors)
    candidates = sum(rows * columns for i in range(SHAPES[shape][2]) for _, (rows, columns) in _block(shape, i))
    index.metadata = {"size": index.size, "candidates": candidates, "base_model": fingerprint(path)}
    write_index(index, path)
