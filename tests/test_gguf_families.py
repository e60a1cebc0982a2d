"""Every family that can be read from GGUF: the model must compute what stock mlx-lm computes from the original."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import LLAMA, byte_tokenizer
from mlx.utils import tree_flatten
from test_gguf import TOKENS, _hf, write_gguf
from transformers import AutoTokenizer
from zo_mlx.convert.gguf import write_hf_directory

from zo_mlx.errors import UsageError

# Settings of the original that differ from a llama's; the metadata that say so in a file.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"attention_bias": True}, {}),
    ("llama", {"head_dim": 32}, {"llama__attention__key_length": 32}),
    (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
    ),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"llama__rope__scale_linear": 4.0}),
    ("qwen2", {"tie_word_embeddings": False}, {}),
    (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        {
            "qwen2__rope__scaling__type": "yarn",
            "qwen2__rope__scaling__factor": 4.0,
            "qwen2__rope__scaling__original_context_length": 128,
        },
    ),
    ("qwen3", {"head_dim": 32}, {"qwen3__attention__key_length": 32}),
    (
        "gemma3",
        {"head_dim": 32, "sliding_window": 4, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "rope_theta": 1e6},
        {"gemma3__attention__key_length": 32, "gemma3__attention__sliding_window": 4},
    ),
    (  # the 27B model's scale: width / heads
        "gemma3",
        {"head_dim": 32, "sliding_window": 4, "query_pre_attn_scalar": 16, "num_hidden_layers": 62},
        {"gemma3__attention__key_length": 32, "gemma3__attention__sliding_window": 4},
    ),
    ("phi3", {"tie_word_embeddings": False}, {}),
    ("phi3", {"partial_rotary_factor": 0.5}, {"phi3__rope__dimension_count": 8}),
    (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]},
            "original_max_position_embeddings": 128,
        },
        {
            "rope_factors_short__weight": np.ones(8, np.float32),
            "rope_factors_long__weight": np.arange(1, 9, dtype=np.float32),
            "phi3__rope__scaling__original_context_length": 128,
        },
    ),
]


def _original(family: str, path: Path, **changes: Any) -> Path:
    """A tiny random model of a family as a Hugging Face directory."""
    model_type = {"gemma3": "gemma3_text"}.get(family, family)
    config = {**LLAMA, "head_dim": 16, "model_type": model_type, "vocab_size": len(TOKENS), **changes}
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {k: mx.random.normal(w.shape) * 0.2 for k, w in tree_flatten(model.parameters())}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(("family", "changes", "metadata"), CASES)
def test_the_model_computes_what_the_original_computes(
    family: str, changes: dict[str, Any], metadata: dict[str, Any], tmp_path: Path
) -> None:
    hf = _original(family, tmp_path / "hf", **changes)
    write_gguf(hf, tmp_path / "m.gguf", family=family, **metadata)
    (tmp_path / "out").mkdir()
    write_hf_directory(tmp_path / "m.gguf", tmp_path / "out", "float32")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    expected, _ = mlx_lm.load(str(hf))
    tokens = mx.array([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]])
    logits, reference = model(tokens), expected(tokens)
    assert mx.allclose(logits, reference, rtol=1e-4, atol=1e-4 * mx.abs(reference).max().item())


def test_the_scaling_of_llama_3_is_found_from_its_factors(tmp_path: Path) -> None:
    """The factors as llama.cpp's converter writes them, from their definition in the Llama 3.1 release."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base, dims = 500000.0, 64
    hf = _original("llama", tmp_path / "hf", rope_theta=base, head_dim=dims, rope_scaling=scaling)
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * base ** (i / dims)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    assert len({*factors}) > 3, "no wavelength in between"
    metadata = {"llama__attention__key_length": dims, "rope_freqs__weight": np.array(factors, np.float32)}
    write_gguf(hf, tmp_path / "m.gguf", **metadata)
    (tmp_path / "out").mkdir()
    write_hf_directory(tmp_path / "m.gguf", tmp_path / "out", "float32")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {k: config["rope_scaling"][k] for k in scaling} == scaling
    tokens = mx.arange(40)[None]
    logits, expected = (mlx_lm.load(str(tmp_path / d))[0](tokens) for d in ("out", "hf"))
    assert mx.allclose(logits, expected, atol=1e-4 * mx.abs(expected).max().item())

    metadata["rope_freqs__weight"][3] = 5.0
    write_gguf(hf, tmp_path / "odd.gguf", **metadata)
    with pytest.raises(UsageError, match="rope_freqs.weight are not the factors"):
        write_hf_directory(tmp_path / "odd.gguf", tmp_path / "out")


def test_words_are_cut_as_the_file_says(tmp_path: Path) -> None:
    """As published with Llama 3 (words of the vocabulary are not merged) and Qwen (composed characters)."""
    tokenizers = {}
    for pre in ("llama-bpe", "qwen2"):
        metadata = {"tokenizer__ggml__pre": pre, "tokenizer__ggml__tokens": [*TOKENS[:-1], "hell"]}
        write_gguf(_hf(tmp_path / f"hf-{pre}"), tmp_path / "m.gguf", **metadata, tokenizer__ggml__merges=["h e"])
        (tmp_path / pre).mkdir()
        write_hf_directory(tmp_path / "m.gguf", tmp_path / pre)
        tokenizers[pre] = AutoTokenizer.from_pretrained(tmp_path / pre)
    llama, qwen = tokenizers.values()
    assert llama.tokenize("hell") == ["hell"]
    assert qwen.tokenize("hell") == ["he", "l", "l"]
    assert (llama.encode("a")[0], qwen.encode("a")[0]) == (256, qwen.convert_tokens_to_ids("a"))
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"
    assert llama.decode(llama.encode("e\u0301"), skip_special_tokens=True) == "e\u0301"


@pytest.mark.parametrize(
    ("family", "metadata", "problem"),
    [
        ("phi3", {"rope_factors_long__weight": np.ones(8, np.float32)}, "tensor rope_factors_short.weight is missing"),
        ("phi3", {"phi3__rope__scale_linear": 2.0}, "scaled by linear are not supported"),
        ("llama", {"llama__rope__scaling__type": "longrope"}, "scaled by longrope are not supported"),
        (
            "qwen2",
            {"qwen2__rope__scaling__type": "yarn", "qwen2__rope__scaling__attn_factor": 0.5},
            "scaled by yarn with rope.scaling.attn_factor = 0.5",
        ),
        ("llama", {"llama__rope__freq_base": -1.0}, "rope.freq_base -1.0 must be above 1"),
        ("qwen3", {"tokenizer__ggml__tokens": [f"t{i}" for i in range(300)]}, "has not a row for every token"),
    ],
)
def test_what_is_not_understood_is_refused(family: str, metadata: dict[str, Any], problem: str, tmp_path: Path) -> None:
    hf = _original(family, tmp_path / "hf", tie_word_embeddings=False)
    write_gguf(hf, tmp_path / "m.gguf", family=family, **metadata)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=problem):
        write_hf_directory(tmp_path / "m.gguf", tmp_path / "out")
