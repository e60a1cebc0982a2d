"""GGUF files: metadata and tensors, written out as a Hugging Face directory that mlx-lm reads.

Read with the pure-Python `gguf` package: checked offsets, no C parser. Format: docs/gguf.md of ggml.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UsageError
from ..files import check_space
from .gguf_tokenizer import build_tokenizer

SHARD_BYTES = 1 << 30

# llama.cpp's tensor names -> Hugging Face's, for the llama family. "{}" is the block number.
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufFile:
    """A GGUF file's metadata, by key, and its tensors. Raises UsageError where the file is damaged."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise UsageError("reading GGUF needs the gguf package: pip install 'zo-mlx[gguf]'") from None
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        except Exception as e:  # the reader has no errors of its own: damage surfaces as whatever numpy raises
            raise UsageError(f"{path} is truncated or not a GGUF file ({type(e).__name__}: {e})") from None
        self._dequantize = gguf.quants.dequantize
        self._tensors = {t.name: t for t in reader.tensors}

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of the given Python type. Raises UsageError if it is missing (and no default) or another."""
        value = self.metadata.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            problem = "is missing" if value is None else f"is {value!r:.60}"
            raise UsageError(f"{self.path}: metadata {key} {problem}")
        return value

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, outermost dimension first. Raises UsageError if there is no such tensor."""
        if name not in self._tensors:
            raise UsageError(f"{self.path}: tensor {name} is missing")
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def type_names(self) -> list[str]:
        """The storage type of every tensor with two dimensions, e.g. Q4_1."""
        return [t.tensor_type.name for t in self._tensors.values() if len(t.shape) > 1]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor dequantized to float32. Raises UsageError for a storage type the gguf package cannot decode."""
        raw = self._tensors[name]
        try:
            return self._dequantize(raw.data, raw.tensor_type).reshape(self.shape(name))
        except (NotImplementedError, KeyError, ValueError) as e:
            raise UsageError(
                f"{self.path}: tensor {name} of type {raw.tensor_type.name} cannot be decoded: {e}"
            ) from None


def write_hf_directory(path: Path, out: Path, dtype: str | None = None) -> None:
    """Write a GGUF file as a Hugging Face directory: config.json, tokenizer files, safetensors shards.

    Args:
        path: the .gguf file; architecture `llama`.
        out: an existing empty directory.
        dtype: float16, bfloat16 or float32; by default the file's own where it is not quantized, else bfloat16.

    Raises:
        UsageError: damaged file, unsupported architecture, tokenizer or tensor type.
    """
    file = GgufFile(path)
    config = _llama_config(file)
    config["torch_dtype"] = dtype or _native_dtype(file)
    tokenizer = build_tokenizer(file)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[key] = getattr(tokenizer, key)
    kind: mx.Dtype = getattr(mx, config["torch_dtype"])
    check_space(out, sum(math.prod(file.shape(name)) for name in file.names) * kind.size)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(out)

    shard: dict[str, mx.array] = {}
    written = 0

    def flush() -> None:
        nonlocal written, shard
        written += 1
        mx.save_safetensors(str(out / f"model-{written:05d}.safetensors"), shard, {"format": "mlx"})
        shard = {}

    for name in file.names:
        target = _hf_name(file, name, config)
        weight = file.tensor(name)
        if match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            weight = _undo_permutation(weight, heads)
        shard[target] = mx.array(weight).astype(kind)
        mx.eval(shard[target])
        if sum(w.nbytes for w in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()


def _native_dtype(file: GgufFile) -> str:
    types = set(file.type_names())
    for name, dtype in (("F16", "float16"), ("F32", "float32")):
        if types == {name}:
            return dtype
    return "bfloat16"


def _llama_config(file: GgufFile) -> dict[str, Any]:
    """The transformers config of a llama-family file."""
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise UsageError(f"{file.path}: architecture {architecture} is not supported from GGUF; only llama is")

    def number(key: str, default: int | float | None = None, kind: Any = (int, float)) -> Any:
        return file.get(f"llama.{key}", kind, default)

    if number("expert_count", 0) or "rope_freqs.weight" in file.names or "llama.rope.scaling.type" in file.metadata:
        raise UsageError(f"{file.path}: mixtures of experts and scaled rotary embeddings are not supported from GGUF")
    vocabulary, width = file.shape("token_embd.weight")
    heads, blocks = number("attention.head_count", kind=int), number("block_count", kind=int)
    if width != number("embedding_length", kind=int) or not 0 < heads <= width or not 0 < blocks <= len(file.names):
        raise UsageError(
            f"{file.path}: metadata does not fit the tensors (embedding {width}, {heads} heads, {blocks} blocks)"
        )
    head_dim = number("attention.key_length", width // heads, int)
    if number("rope.dimension_count", head_dim) != head_dim:
        raise UsageError(f"{file.path}: partial rotary embeddings are not supported from GGUF")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length", kind=int),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads, int),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length", kind=int),
        # Stored as float32: 9.99999975e-06 was 1e-5.
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{number('rope.freq_base', 10000.0):.8g}"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in file.names,
        "attention_bias": "blk.0.attn_q.bias" in file.names,
        "mlp_bias": "blk.0.ffn_up.bias" in file.names,
        "hidden_act": "silu",
    }


def _hf_name(file: GgufFile, name: str, config: dict[str, Any]) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _BLOCK_NAMES and int(match[1]) < config["num_hidden_layers"]:
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    raise UsageError(f"{file.path}: tensor {name} is not part of a llama model")


def _undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of rotary pairs within each head: (out, ...) -> (out, ...).

    llama.cpp interleaves the two halves of a head (rows 0, d/2, 1, d/2 + 1, ...); transformers and MLX keep halves.
    """
    if heads <= 0 or weight.shape[0] % (2 * heads):
        raise UsageError(f"{weight.shape[0]} rows of attn_q or attn_k do not divide into {heads} heads")
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
