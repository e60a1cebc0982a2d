"""Isolated sensitive weights, and perplexities before and after."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import dense_weights, write_hf_llama
from mlx.utils import tree_flatten
from zo_mlx.convert.quantize import clip_sensitive

import zo_mlx
from zo_mlx.index import read_index
from zo_mlx.model import load_sparse
from zo_mlx.product import prepare

SMALL = {"num_samples": 2, "sequence_length": 16, "density": 0.02, "progress": False}


@pytest.mark.parametrize(("mode", "group"), [("affine", 32), ("mxfp4", 32), ("nvfp4", 16)])
def test_isolated_weights_do_not_stretch_their_groups(mode: str, group: int, tiny_hf: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "density": 0.2, "q_mode": mode, "q_group_size": group}
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "plain"), **settings)
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "isolated"), isolate=True, **settings)
    index = read_index(tmp_path / "isolated")
    plain, isolated = (dense_weights(mlx_lm.load(str(tmp_path / name))[0]) for name in ("plain", "isolated"))
    original = dict(tree_flatten(mlx_lm.load(str(tiny_hf))[0].parameters()))
    changed = 0
    for path, before in plain.items():
        weight = original[f"{path}.weight"]
        true = np.array(weight.astype(mx.float32))
        wanted = true.reshape(-1, group).copy()
        if path in index.tensors:
            mask = np.zeros(true.size, bool)
            mask[index.tensors[path].indices] = True
            for own, marked in zip(wanted, mask.reshape(-1, group), strict=True):
                if not marked.all():
                    own[marked] = own[marked].clip(own[~marked].min(), own[~marked].max())
            assert np.array_equal(np.array(index.tensors[path].values.astype(mx.float32)), true.ravel()[mask])
        parts = mx.quantize(mx.array(wanted.reshape(true.shape)).astype(weight.dtype), group, 4, mode=mode)
        expected = mx.dequantize(*parts, group_size=group, bits=4, mode=mode).astype(mx.float32)
        assert mx.array_equal(isolated[path], expected), path
        changed += int((isolated[path] != before).sum().item())
    assert changed > 100


def test_isolating_makes_nothing_before_its_turn(tiny_hf: Path) -> None:
    model, original = (mlx_lm.load(str(tiny_hf), lazy=True)[0] for _ in range(2))
    nn.quantize(model, 32, 4)
    chosen = {p: np.array([0, 5]) for p, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    before = mx.get_active_memory()
    clip_sensitive(model, original, chosen)
    weights = sum(w.size for w in dict(tree_flatten(original.parameters())).values())
    assert mx.get_active_memory() - before < weights / 10


def _perplexity(model: nn.Module, windows: mx.array) -> float:
    logits = model(windows[:, :-1]).astype(mx.float32)
    return math.exp(nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean").item())


def test_perplexities_are_those_of_stock_mlx_lm(tmp_path: Path) -> None:
    source = write_hf_llama(tmp_path / "hf", mx.float32)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, " * 50)
    done = zo_mlx.convert(str(source), str(tmp_path / "out"), perplexity_data=str(text), **SMALL)
    found = done.perplexity
    assert found is not None
    stock, tokenizer = mlx_lm.load(str(source))
    tokens = tokenizer.encode(text.read_text(), add_special_tokens=False)
    assert len(tokens) == 2250
    windows = mx.array(tokens[: 4 * 512]).reshape(4, 512)
    assert found["tokens"] == 4 * 512
    assert found["source"]["perplexity"] == pytest.approx(_perplexity(stock, windows), rel=1e-4)
    quantized = prepare(mlx_lm.load(str(tmp_path / "out"))[0])
    assert found["quantized"]["perplexity"] == pytest.approx(_perplexity(quantized, windows), rel=1e-4)
    sparse, _, index, _ = load_sparse(tmp_path / "out")
    sparse.set_values(index.initial_values()[None])
    assert found["with_sensitive"]["perplexity"] == pytest.approx(_perplexity(sparse.model, windows), rel=1e-4)
    assert found["with_sensitive"]["perplexity"] != pytest.approx(found["quantized"]["perplexity"], rel=1e-3)
    losses = [math.log(_perplexity(stock, windows[n : n + 1])) for n in range(4)]
    error = found["source"]["perplexity"] * np.std(losses, ddof=1) / 2
    assert found["source"]["standard_error"] == pytest.approx(error, rel=1e-2)
    assert json.loads((tmp_path / "out/convert.json").read_text())["perplexity"] == found
