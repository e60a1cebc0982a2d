"""Tiny random models of many of mlx-lm's architectures: converted block by block, scored, loaded by stock, trained.

`python tests/test_architectures.py` prints the table of docs/architectures.md.
"""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import byte_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from zo_mlx.convert.sensitivity import DEFAULT_TEXT, calibration_sequences

from zo_mlx.blocks import BlockwiseModel
from zo_mlx.data import Example, Target
from zo_mlx.exact import ExactGradient
from zo_mlx.head import split_head
from zo_mlx.index import read_index
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse

# Every architecture takes what it knows of these, under whatever name it has for a thing.
COMMON: dict[str, Any] = {
    "hidden_size": 64, "n_embd": 64, "num_hidden_layers": 2, "n_layer": 2, "intermediate_size": 128, "vocab_size": 258,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "n_positions": 512, "n_ctx": 512, "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5, "rotary_pct": 0.5,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_qk_norm": False,
    "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "logits_scaling": 2.0, "logit_scale": 0.5, "attention_multiplier": 0.25, "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5, "bos_token_id": 256, "eos_token_id": 257,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
    "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 1.0,
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "Klear": {}, "apertus": {"post_norm": False, "qk_norm": True}, "cohere": {},
    "cohere2": {"num_hidden_layers": 4}, "deepseek": {},
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
                    "topk_method": "greedy"},
    "deepseek_v3": {}, "dots1": {}, "ernie4_5": {}, "exaone": {"num_layers": 2},
    "exaone4": {"sliding_window_pattern": "LG", "layer_types": ["sliding_attention", "full_attention"]},
    "falcon_h1": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 6}, "glm": {}, "glm4": {}, "glm4_moe": {}, "gpt2": {},
    "gpt_bigcode": {"n_inner": 128}, "gpt_neox": {"rotary_emb_base": 10000}, "gpt_oss": {}, "gptj": {"rotary_dim": 8},
    "granite": {}, "granitemoe": {}, "helium": {}, "hunyuan_v1_dense": {}, "internlm2": {}, "internlm3": {},
    "laguna": {}, "llama": {}, "mimo": {}, "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2},
    "ministral3": {"rope_parameters": {"rope_theta": 1e4, "type": "default", "original_max_position_embeddings": 256,
                                       "llama_4_scaling_beta": 0.1}},
    "mistral": {}, "mixtral": {}, "muse_glimmer": {}, "nanbeige": {}, "nanochat": {},
    "nemotron": {"hidden_act": "relu2"}, "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]}, "olmoe": {}, "phi": {}, "phi3": {},
    "phimoe": {}, "plamo3": {}, "qwen2": {}, "qwen2_moe": {}, "qwen3": {}, "qwen3_moe": {}, "seed_oss": {},
    "smollm3": {}, "solar_open": {}, "stablelm": {"use_qkv_bias": True}, "starcoder2": {}, "telechat3": {},
    "youtu_llm": {},
}  # fmt: skip


def write_model(name: str, path: Path) -> nn.Module:
    """Write a random model of an architecture in mlx-lm's own names of weights; return it."""
    config = {**COMMON, **OWN[name], "model_type": name}
    module = importlib.import_module(f"mlx_lm.models.{mlx_lm.utils.MODEL_REMAPPING.get(name, name)}")
    mx.random.seed(0)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    path.mkdir()
    weights = {k: 3 * w if w.ndim == 2 else w for k, w in tree_flatten(model.parameters())}
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(path)
    return model


@pytest.mark.parametrize("name", OWN)
def test_an_architecture_converts_and_trains(name: str, choice_data: Path, tmp_path: Path) -> None:
    write_model(name, tmp_path / "hf")
    settings: dict[str, Any] = {"num_samples": 2, "sequence_length": 16, "density": 0.01, "q_group_size": 32}
    settings["scope"] = "tensor"  # so that every layer has its share
    zo_mlx.convert(str(tmp_path / "hf"), str(tmp_path / "out"), **settings, progress=False)

    dense, tokenizer = mlx_lm.load(str(tmp_path / "hf"))
    dense.set_dtype(mx.float32)
    sequences = calibration_sequences(tokenizer, DEFAULT_TEXT.read_text(), 2, 16, seed=0)

    def loss(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="mean")

    gradients = [dict(tree_flatten(nn.value_and_grad(dense, loss)(dense, mx.array(s))[1])) for s in sequences]
    index = read_index(tmp_path / "out")
    assert any(gradients[0][f"{path}.weight"].ndim == 3 for path in index.tensors) == _has_experts(dense)
    for path, tensor in index.tensors.items():
        expected = np.mean([np.array(g[f"{path}.weight"]) ** 2 for g in gradients], axis=0).ravel()
        assert np.allclose(tensor.scores, expected[tensor.indices], rtol=1e-2), path

    mlx_lm.load(str(tmp_path / "out"))
    adapter = tmp_path / "adapter"
    zo_mlx.train(
        model=str(tmp_path / "out"), data=str(choice_data), adapter_path=str(adapter), iters=2, batch_size=4,
        val_batches=0, progress=False,
    )  # fmt: skip
    records = list(Journal.read(adapter / "journal").records())
    assert len(records) == 2
    assert all(np.abs(r.projected).max() > 0 for r in records), "the sparse layers have no effect"
    _check_exact_gradient(tmp_path / "out", sequences[0].tolist())


def _check_exact_gradient(path: Path, tokens: list[int]) -> None:
    """Of a text's loss, and of two choices after a prompt, against `mx.grad` of the whole model as it is called, sparse
    layers and all."""
    sparse, _, index, _ = load_sparse(path)
    values, head = index.initial_values(), split_head(sparse.model, continuing=True)
    prompt, *choices = tokens[:10], tokens[10:12], tokens[12:15]
    text = Example([tokens[:-1]], [_targets(0, 1, tokens[1:])])
    answer = Example([prompt + c[:-1] for c in choices], [_targets(i, 10, c) for i, c in enumerate(choices)], label=1)

    def loss(values: mx.array, example: Example) -> mx.array:
        sparse.set_values(values[None])
        logits = [sparse.model(mx.array([row]))[0].astype(mx.float32) for row in example.rows]
        scores = [sum(nn.log_softmax(logits[t.row][t.position])[t.token] for t in c) for c in example.targets]
        if example.label is None:
            return -scores[0] / len(example.targets[0])
        return mx.logsumexp(mx.stack(scores)) - scores[example.label]

    gradient = ExactGradient(sparse, head, BlockwiseModel.of_chain(sparse.model))
    for example in (text, answer):
        expected_loss, expected = mx.value_and_grad(loss)(values, example)
        got_loss, got = gradient(values, [example])
        assert got_loss == pytest.approx(expected_loss.item(), rel=1e-5)
        assert mx.abs(got - expected).max() < 1e-4 * mx.abs(expected).max()


def _targets(row: int, start: int, tokens: list[int]) -> list[Target]:
    return [Target(row, start - 1 + i, token) for i, token in enumerate(tokens)]


def _has_experts(model: nn.Module) -> bool:
    return any(isinstance(m, SwitchLinear) for _, m in model.named_modules())


def table() -> str:
    """The support table: every architecture above, and how it is converted and trained."""
    import tempfile

    lines = ["| architecture | converted block by block | experts | branches |", "|---|---|---|---|"]
    for name in sorted(OWN, key=str.lower):
        with tempfile.TemporaryDirectory() as scratch:
            model = write_model(name, Path(scratch, "m"))
        with BlockwiseModel(model) as blockwise:
            chain = blockwise.is_chain()
        experts = _has_experts(model)
        lines.append(
            f"| {name} | {'yes' if chain else 'no: in memory'} | {'trained' if experts else ''} "
            f"| {'one by one' if experts else 'stacked'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
