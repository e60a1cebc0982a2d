import hashlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import write_hf_llama
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama
from zo_mlx.convert.sensitivity import calibration_sequences, fisher_scores, scored_layers

import zo_mlx
from zo_mlx.errors import UsageError, ZoError
from zo_mlx.index import read_index
from zo_mlx.model import fingerprint

SMALL = {"num_samples": 2, "sequence_length": 16, "progress": False}


def _random_model(vocabulary: int = 40) -> llama.Model:
    mx.random.seed(1)
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
    }
    return llama.Model(llama.ModelArgs.from_dict(config))


def _float64_loss(model: llama.Model, path: str, weight: np.ndarray, tokens: np.ndarray) -> float:
    model.update(tree_unflatten([(f"{path}.weight", mx.array(weight))]))
    logits = np.array(model(mx.array(tokens[None, :-1])), np.float64)[0]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]].mean()


def test_scores_equal_squared_gradients_of_the_dense_model() -> None:
    """Against MLX's gradient of the plain model, and finite differences of a loss computed in numpy."""
    model = _random_model()
    sequences = np.random.default_rng(0).integers(0, 40, (3, 12)).astype(np.int32)
    before = dict(tree_flatten(model.parameters()))
    scores = dict(fisher_scores(model, sequences))
    assert all(mx.array_equal(w, before[k]) for k, w in tree_flatten(model.parameters())), "the model was changed"
    assert set(scores) == {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in p}

    def loss(model: llama.Model, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="mean")

    gradients = [dict(tree_flatten(nn.value_and_grad(model, loss)(model, mx.array(s))[1])) for s in sequences]
    for path, score in scores.items():
        expected = np.mean([np.array(g[f"{path}.weight"], np.float64) ** 2 for g in gradients], axis=0)
        assert np.allclose(np.array(score), expected, rtol=1e-3, atol=1e-4 * expected.max())

    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = np.array(before[f"{path}.weight"])
        at = np.unravel_index(np.array(scores[path]).argmax(), weight.shape)
        squares = []
        for tokens in sequences:
            sides = []
            for h in (1e-2, -1e-2):
                moved = weight.copy()
                moved[at] += h
                sides.append(_float64_loss(model, path, moved, tokens))
            squares.append(((sides[0] - sides[1]) / 2e-2) ** 2)
        model.update(tree_unflatten([(f"{path}.weight", mx.array(weight))]))
        assert scores[path][at].item() == pytest.approx(np.mean(squares), rel=0.02)


def test_calibration_sequences_are_distinct_windows_of_the_text(tiny_hf: Path) -> None:
    _, tokenizer = mlx_lm.load(str(tiny_hf))
    text = "".join(chr(97 + i % 26) + chr(97 + i // 26) for i in range(200))
    all_tokens = tokenizer.encode(text)
    sequences = calibration_sequences(tokenizer, text, 5, 40, seed=1)
    assert sequences.shape == (5, 40)
    starts = [next(i for i in range(0, 400, 40) if all_tokens[i : i + 40] == s.tolist()) for s in sequences]
    assert len(set(starts)) == 5
    assert (sequences == calibration_sequences(tokenizer, text, 5, 40, seed=1)).all()
    assert (sequences != calibration_sequences(tokenizer, text, 5, 40, seed=2)).any()
    with pytest.raises(UsageError, match="has 10 times 40 tokens, not 11 times"):
        calibration_sequences(tokenizer, text, 11, 40, seed=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q_bits": 8, "q_group_size": 32},
        {"dtype": "float16"},
        {"q_mode": "mxfp4"},
        {"q_mode": "nvfp4"},
        {"q_mode": "mxfp8"},
        {"quant_predicate": "mixed_3_6", "q_group_size": 32},
        {"quant_predicate": "mixed_4_6"},
    ],
)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_tensors_are_bit_identical_to_mlx_lm_convert(
    settings: dict[str, object], dtype: mx.Dtype, tmp_path: Path
) -> None:
    source = write_hf_llama(tmp_path / "hf", dtype, tie_word_embeddings=False)
    zo_mlx.convert(str(source), str(tmp_path / "ours"), **SMALL, **settings)
    mlx_lm.convert(str(source), str(tmp_path / "stock"), quantize=True, **settings)
    ours, stock = (mx.load(str(tmp_path / d / "model.safetensors")) for d in ("ours", "stock"))
    assert set(ours) == set(stock)
    for name, expected in stock.items():
        assert ours[name].dtype == expected.dtype
        assert mx.array_equal(ours[name], expected), name
    # With a recipe and no group size, mlx-lm leaves null in the config, which means 64.
    ours, stock = ((tmp_path / d / "config.json").read_text() for d in ("ours", "stock"))
    assert json.loads(ours) == json.loads(stock.replace('"group_size": null', '"group_size": 64'))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_index_holds_the_weights_with_the_highest_scores(scope: str, tiny_hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = zo_mlx.convert(str(tiny_hf), str(out), density=0.02, scope=scope, **SMALL)
    index = read_index(out)
    model, tokenizer = mlx_lm.load(str(tiny_hf))
    text = (Path(zo_mlx.__file__).parents[1] / "convert" / "calibration.txt").read_text()
    scores = dict(fisher_scores(model, calibration_sequences(tokenizer, text, 2, 16, seed=0)))
    weights = dict(tree_flatten(model.parameters()))
    total = sum(s.size for s in scores.values())
    assert done.candidates == total
    assert index.size == done.trainable == pytest.approx(0.02 * total, abs=len(scores))
    lowest_in, highest_out = [], []
    for path, tensor in index.tensors.items():
        flat = np.array(scores[path]).ravel()
        # All at once and block by block: products that one BLAS rounds alike, and another does not.
        np.testing.assert_allclose(flat[tensor.indices], tensor.scores, rtol=1e-5)
        assert mx.array_equal(weights[f"{path}.weight"].reshape(-1)[mx.array(tensor.indices)], tensor.values)
        lowest_in.append(flat[tensor.indices].min())
        highest_out.append(np.delete(flat, tensor.indices).max())
    if scope == "global":
        assert min(lowest_in) >= max(highest_out) * (1 - 1e-5)
    else:
        assert list(index.tensors) == scored_layers(model)
        assert all(i >= o * (1 - 1e-5) for i, o in zip(lowest_in, highest_out, strict=True))
    covered = sum(float(t.scores.sum(dtype=np.float64)) for t in index.tensors.values())
    assert done.coverage == pytest.approx(covered / sum(float(s.sum()) for s in scores.values()), rel=1e-4)
    assert index.metadata["coverage"] == done.coverage
    assert index.metadata["scope"] == scope
    assert index.metadata["base_model"] == fingerprint(out)


def test_the_report_says_what_was_done(tiny_hf: Path, tmp_path: Path) -> None:
    done = zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), density=0.02, memory_limit=2, **SMALL)
    report = json.loads((tmp_path / "out/convert.json").read_text())
    index = read_index(tmp_path / "out")
    weights = hashlib.sha256((tiny_hf / "model.safetensors").read_bytes()).hexdigest()
    assert report["files"]["model.safetensors"] == weights
    assert (report["source"], report["density"], report["memory_limit"]) == (tiny_hf.name, 0.02, 2)
    assert report["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert report["base_model"] == index.metadata["base_model"]
    assert set(report["phases"]) == {"forward", "backward", "select", "quantize", "write"}
    assert sum(report["phases"].values()) <= done.seconds
    layers = report["layers"]
    assert {p: n for p, layer in layers.items() if (n := layer["trainable"])} == {
        p: t.size for p, t in index.tensors.items()
    }
    assert all(0 <= layer["coverage"] <= 1 for layer in layers.values())


def test_stock_mlx_lm_loads_and_generates(tiny: Path) -> None:
    model, tokenizer = mlx_lm.load(str(tiny))
    assert isinstance(mlx_lm.generate(model, tokenizer, "hello", max_tokens=4), str)


def test_the_same_inputs_give_the_same_index(tiny_hf: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        zo_mlx.convert(str(tiny_hf), str(tmp_path / name), density=0.02, **SMALL)
    assert (tmp_path / "a/sensitive.safetensors").read_bytes() == (tmp_path / "b/sensitive.safetensors").read_bytes()


def test_existing_output_is_not_touched(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), **SMALL)
    with pytest.raises(UsageError, match=r"\. already exists"):
        zo_mlx.convert(str(tiny_hf), ".", **SMALL)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"density": 0.0}, "--density"),
        ({"num_samples": 0}, "--num-samples"),
        ({"memory_limit": 0}, "--memory-limit must be at least"),
        ({"memory_limit": 32 << 30}, "--memory-limit must be at most 1000000 GB"),
        ({"sequence_length": 1}, "--sequence-length"),
        ({"sequence_length": 513}, "was made for at most 512 tokens: give a smaller --sequence-length"),
        ({"dtype": "int4"}, "--dtype"),
        ({"calibration_data": "/nowhere.txt"}, "cannot be read"),
        ({"q_bits": 7}, "bits"),
        ({"q_group_size": 48}, "group"),
        ({"q_mode": "int4"}, "--q-mode must be one of affine, mxfp4"),
        ({"q_mode": "mxfp4", "q_bits": 8}, "mxfp4 quantization requires bits to be 4"),
        ({"quant_predicate": "mixed_9_9"}, "--quant-predicate must be one of mixed_2_6"),
        ({"quant_predicate": "mixed_2_6", "q_mode": "mxfp4"}, "goes with neither --q-mode nor --q-bits"),
        ({"perplexity_data": "/nowhere.txt"}, "cannot be read"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], problem: str, tiny_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ZoError, match=problem):
        zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), **{**SMALL, **settings})
    assert list(tmp_path.iterdir()) == []
