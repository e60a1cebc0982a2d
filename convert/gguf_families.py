"""The model families that can be read from GGUF: their tensor names and settings, as Hugging Face spells them."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from .gguf_file import GgufFile

# llama.cpp's tensor names -> Hugging Face's; those in a block follow "blk.N." and "model.layers.N.".
_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUT = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
# Tensors of rotary factors, which become settings.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Family:
    """What sets a family's files apart.

    Attributes:
        interleaved: llama.cpp reorders the rows of q and k within each head.
        norm_offset: what llama.cpp adds to the weights of norms.
        own_head_dim: whether heads may have another size than width / heads.
    """

    model_type: str
    architecture: str
    names: dict[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0
    own_head_dim: bool = True


_FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", {**_NORMS, **_QKV, **_MLP, **_OUT}, interleaved=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", {**_NORMS, **_QKV, **_MLP, **_OUT}, own_head_dim=False),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**_NORMS, **_QKV, **_QK_NORMS, **_MLP, **_OUT}),
    "gemma3": Family(
        "gemma3_text", "Gemma3ForCausalLM", {**_FOUR_NORMS, **_QKV, **_QK_NORMS, **_MLP, **_OUT}, norm_offset=1.0
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", {**_NORMS, **_FUSED, **_OUT}, own_head_dim=False),
}


def family_of(file: GgufFile) -> Family:
    """The family a file belongs to. Raises UsageError if it is none of those that can be read."""
    name = file.get("general.architecture", str)
    if name not in _FAMILIES:
        raise UsageError(f"{file.path}: architecture {name} is not supported from GGUF; {', '.join(_FAMILIES)} are")
    return _FAMILIES[name]


def hf_name(file: GgufFile, family: Family, name: str, blocks: int) -> str | None:
    """Hugging Face's name of a tensor, None if it becomes a setting. Raises UsageError for one that does not belong."""
    if name in _ROPE_TENSORS:
        return None
    if name in _ENDS:
        return _ENDS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in family.names and int(match[1]) < blocks:
        return f"model.layers.{match[1]}.{family.names[match[2]]}.{match[3]}"
    raise UsageError(f"{file.path}: tensor {name} is not part of a {file.metadata['general.architecture']} model")


def hf_tensor(file: GgufFile, family: Family, name: str, config: dict[str, Any]) -> np.ndarray:
    """A tensor's values, float32, as Hugging Face stores them."""
    weight = file.tensor(name)
    if family.norm_offset and name.endswith("norm.weight"):
        return weight - family.norm_offset
    if family.interleaved and (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)):
        return _undo_interleaving(weight, config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"])
    return weight


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The transformers config of a file. Raises UsageError if it does not fit the tensors, or asks for too much."""
    family = family_of(file)

    def number(key: str, default: int | float | None = None, kind: Any = (int, float)) -> Any:
        return file.get(f"{file.metadata['general.architecture']}.{key}", kind, default)

    if number("expert_count", 0):
        raise UsageError(f"{file.path}: mixtures of experts are not supported from GGUF")
    embedding = file.shape("token_embd.weight")
    vocabulary, width = embedding if len(embedding) == 2 else (0, 0)
    if len(file.get("tokenizer.ggml.tokens", list)) > vocabulary:
        raise UsageError(f"{file.path}: token_embd.weight of shape {embedding} has not a row for every token")
    heads, blocks = number("attention.head_count", kind=int), number("block_count", kind=int)
    if width != number("embedding_length", kind=int) or not 0 < heads <= width or not 0 < blocks <= len(file.names):
        raise UsageError(
            f"{file.path}: metadata does not fit the tensors (embedding {width}, {heads} heads, {blocks} blocks)"
        )
    head_dim = number("attention.key_length", width // heads, int)
    rotated = number("rope.dimension_count", head_dim, int)
    if rotated != head_dim and family.model_type != "phi3":
        raise UsageError(f"{file.path}: partial rotary embeddings are not supported from GGUF")
    if head_dim < 2 or (head_dim != width // heads and not family.own_head_dim):
        raise UsageError(f"{file.path}: heads of {head_dim} do not fit {heads} heads in a width of {width}")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
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
    if not config["rope_theta"] > 1:
        raise UsageError(f"{file.path}: rope.freq_base {config['rope_theta']} must be above 1")
    if scaling := _rope_scaling(file, family, number, config):
        config["rope_scaling"] = scaling
    if family.model_type == "gemma3_text":
        config |= {
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window": number("attention.sliding_window", kind=int),
            "sliding_window_pattern": number("attention.sliding_window_pattern", 6, int),
            "rope_local_base_freq": number("rope.freq_base_swa", 10000.0),
            # As llama.cpp: the file does not say it, and the 27B model, of 62 blocks, is the only one that differs.
            "query_pre_attn_scalar": width // heads if blocks == 62 else head_dim,
        }
    if family.model_type == "phi3":
        config["partial_rotary_factor"] = rotated / head_dim
        config["original_max_position_embeddings"] = number(
            "rope.scaling.original_context_length", config["max_position_embeddings"], int
        )
    return config


def _rope_scaling(file: GgufFile, family: Family, number: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.names:
        return _llama3_scaling(file, config["rope_theta"], config["head_dim"])
    is_phi3 = family.model_type == "phi3"
    if is_phi3 and "rope_factors_long.weight" in file.names:
        long, short = (file.tensor(f"rope_factors_{kind}.weight").tolist() for kind in ("long", "short"))
        return {"type": "longrope", "long_factor": long, "short_factor": short}
    # Older files have a factor only.
    old = number("rope.scale_linear", 1.0) or 1.0
    kind = number("rope.scaling.type", "none" if old == 1 else "linear", str)
    if kind == "none":
        return None
    known = {"rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
    odd = [key for key, usual in known.items() if number(key, usual) != usual]
    if is_phi3 or odd or kind not in ("linear", "yarn"):
        more = f" with {odd[0]} = {number(odd[0])}" if odd else ""
        raise UsageError(f"{file.path}: rotary embeddings scaled by {kind}{more} are not supported from GGUF")
    scaling = {
        "type": kind,
        "rope_type": kind,
        "factor": float(number("rope.scaling.factor", None if old == 1 else old)),
    }
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = number("rope.scaling.original_context_length", kind=int)
    return scaling


def _llama3_scaling(file: GgufFile, base: float, head_dim: int) -> dict[str, Any]:
    """The settings of Llama 3.1 and later from the factors they lead to, which are what a file has."""
    factors = file.tensor("rope_freqs.weight").astype(np.float64)
    factor, low, high, original = float(factors.max(initial=1.0)), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if factors.shape != smooth.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UsageError(f"{file.path}: rope_freqs.weight are not the factors of Llama 3.1")
    return {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _undo_interleaving(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of rotary pairs within each head: (out, ...) -> (out, ...).

    llama.cpp interleaves the two halves of a head (rows 0, d/2, 1, d/2 + 1, ...); transformers and MLX keep halves.
    """
    if heads <= 0 or weight.shape[0] % (2 * heads):
        raise UsageError(f"{weight.shape[0]} rows of attn_q or attn_k do not divide into {heads} heads")
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
