"""GGUF files written out as Hugging Face directories, which mlx-lm reads."""

import json
import math
from pathlib import Path

import mlx.core as mx

from ..files import check_space
from .gguf_families import family_of, hf_config, hf_name, hf_tensor
from .gguf_file import GgufFile
from .gguf_tokenizer import build_tokenizer

# What is held in memory, besides a tensor in float32.
SHARD_BYTES = 64 << 20


def write_hf_directory(path: Path, out: Path, dtype: str | None = None) -> None:
    """Write a GGUF file as a Hugging Face directory: config.json, tokenizer files, safetensors shards.

    Args:
        path: the .gguf file, of the llama, qwen2, qwen3, gemma3 or phi3 family.
        out: an existing empty directory.
        dtype: float16, bfloat16 or float32; by default the file's own where it is not quantized, else bfloat16.

    Raises:
        UsageError: damaged file, unsupported architecture, tokenizer or tensor type.
    """
    file = GgufFile(path)
    family, config = family_of(file), hf_config(file)
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
        if (target := hf_name(file, family, name, config["num_hidden_layers"])) is None:
            continue
        shard[target] = mx.array(hf_tensor(file, family, name, config)).astype(kind)
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
