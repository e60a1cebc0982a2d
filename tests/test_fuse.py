"""Against stock mlx-lm: what it loads from a fused directory is compared with the base model and with the values."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import dense_weights, tiny_experts
from mlx.utils import tree_flatten
from zo_mlx.convert import write

import zo_mlx
from zo_mlx import adapter
from zo_mlx.cli import main
from zo_mlx.errors import UsageError
from zo_mlx.fuse import _put
from zo_mlx.index import read_index

TOKENS = mx.array([[5, 80, 33, 101, 7, 256, 44, 90]])


@pytest.fixture(scope="module")
def trained(tiny: Path, choice_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "a"
    zo_mlx.train(
        model=str(tiny), data=str(choice_data), adapter_path=str(path), iters=20, learning_rate=3e-3, num_layers=-1,
        progress=False,
    )  # fmt: skip
    return path


def _fuse(tiny: Path, trained: Path, out: Path, **more: Any) -> zo_mlx.Fused:
    return zo_mlx.fuse(tiny, trained, out, progress=False, **more)


def _dense(model: nn.Module) -> dict[str, mx.array]:
    model.set_dtype(mx.float32)  # scales, too: dequantized in bfloat16, weights are rounded several times
    return dense_weights(model)


def _expected(tiny: Path, trained: Path) -> dict[str, np.ndarray]:
    """The dense weights with the trained values in place, of the layers that have any."""
    dense, values, start, found = _dense(mlx_lm.load(str(tiny))[0]), adapter.read_snapshot(trained).values, 0, {}
    for path, tensor in read_index(tiny).tensors.items():
        weight = np.array(dense[path]).reshape(-1)
        weight[tensor.indices] = np.array(values[start : start + tensor.size])
        start += tensor.size
        found[path] = weight.reshape(dense[path].shape)
    return found


@pytest.mark.parametrize("bits", [8, 16])
def test_touched_layers_hold_the_values_and_others_are_untouched(
    bits: int, tiny: Path, trained: Path, tmp_path: Path
) -> None:
    done = _fuse(tiny, trained, tmp_path / "fused", bits=bits)
    model, tokenizer, config = mlx_lm.load(str(tmp_path / "fused"), return_config=True)
    expected, modules = _expected(tiny, trained), dict(model.named_modules())
    assert done.layers == len(expected) and done.bits == bits
    for path, got in _dense(model).items():
        layer = modules[path]
        if path not in expected:
            assert (layer.bits, layer.group_size) == (4, 32) and path not in config["quantization"]
            continue
        error = np.abs(np.array(got) - expected[path])
        rounding = np.abs(expected[path]) * 2**-8  # bfloat16
        if bits == 8:
            assert config["quantization"][path] == {"group_size": 64, "bits": 8, "mode": "affine"}
            scales = np.array(mx.abs(layer.scales.astype(mx.float32)))
            # Half a step, and what rounding the step and the offset to bfloat16 adds over 255 steps.
            rounding = rounding + np.repeat(scales, 64, axis=1) * (0.5 + 255 * 2**-8)
        else:
            assert type(layer) is nn.Linear
        assert (error <= rounding + 1e-7).all()
    model, _ = mlx_lm.load(str(tmp_path / "fused"))
    before = dict(tree_flatten(mlx_lm.load(str(tiny))[0].parameters()))
    kept = {n: w for n, w in tree_flatten(model.parameters()) if n.rpartition(".")[0] not in expected}
    assert kept and len(expected) < len([m for m in modules.values() if isinstance(m, nn.QuantizedLinear | nn.Linear)])
    assert all(mx.array_equal(w, before[n]) and w.dtype == before[n].dtype for n, w in kept.items())
    assert tokenizer.encode("apple") == zo_mlx.load(tiny)[1].encode("apple")
    assert tokenizer.has_chat_template


@pytest.mark.parametrize("more", [{}, {"bits": 16}, {"dequantize": True}])
def test_a_fused_model_computes_what_we_do(more: dict[str, Any], tiny: Path, trained: Path, tmp_path: Path) -> None:
    done = _fuse(tiny, trained, tmp_path / "fused", **more)
    ours = np.array(zo_mlx.load(tiny, trained)[0](TOKENS))
    model, _, config = mlx_lm.load(str(tmp_path / "fused"), return_config=True)
    model.set_dtype(mx.float32)
    base, _ = mlx_lm.load(str(tiny))
    base.set_dtype(mx.float32)
    effect = np.abs(np.array(base(TOKENS)) - ours).max()
    assert np.abs(np.array(model(TOKENS)) - ours).max() < 0.1 * effect
    assert done.bytes == sum(w.nbytes for w in mx.load(str(tmp_path / "fused/model.safetensors")).values())
    if "dequantize" in more:
        assert "quantization" not in config
        assert not [m for m in model.modules() if isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding)]


def test_an_unquantized_layer_stays_as_it_is(tiny_hf: Path, choice_data: Path, tmp_path: Path) -> None:
    """Of a model whose sensitive layers are partly left in 16 bits."""
    settings: dict[str, Any] = {"num_samples": 2, "sequence_length": 32, "density": 0.01, "progress": False}
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "m"), q_group_size=128, **settings)  # a width of 64 is not divisible
    zo_mlx.train(
        model=str(tmp_path / "m"), data=str(choice_data), adapter_path=str(tmp_path / "a"), iters=2, progress=False
    )
    _fuse(tmp_path / "m", tmp_path / "a", tmp_path / "fused")
    model, _ = mlx_lm.load(str(tmp_path / "fused"))
    kinds = {type(m) for path, m in model.named_modules() if path in read_index(tmp_path / "m").tensors}
    assert nn.Linear in kinds
    model.set_dtype(mx.float32)
    ours = np.array(zo_mlx.load(tmp_path / "m", tmp_path / "a")[0](TOKENS))
    assert np.abs(np.array(model(TOKENS)) - ours).max() < 0.05 * np.abs(ours).max()


@pytest.mark.parametrize("bits", [8, 16])
def test_experts_hold_the_values(bits: int) -> None:
    model, index, dense = tiny_experts()
    ((path, tensor),) = index.tensors.items()
    config: dict[str, Any] = {"quantization": {"group_size": 32, "bits": 4}}
    _put(model, config, index, tensor.values, bits)
    layer = dict(model.named_modules())[path]
    got = layer.weight
    if bits == 8:
        settings = {"group_size": 32, "bits": 8, "mode": "affine"}
        got = mx.dequantize(layer.weight, layer.scales, layer.biases, **settings)
        assert config["quantization"][path] == settings
    assert mx.abs(got - dense).max() <= (0.501 * mx.abs(layer.scales).max() if bits == 8 else 0)
    assert mx.isfinite(model(TOKENS)).all()


def test_gguf_holds_the_weights_under_llama_cpps_names(
    tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by the gguf package. The tiny tokenizer is none that mlx-lm stores rightly; that check is left out."""
    monkeypatch.setattr(sys.modules["zo_mlx.fuse"], "_check_gguf", lambda *_: None)
    done = _fuse(tiny, trained, tmp_path / "fused", dequantize=True, export_gguf=True)
    assert done.gguf == str(tmp_path / "fused/ggml-model-f16.gguf")
    tensors = {t.name: t.data for t in gguf.GGUFReader(done.gguf).tensors}
    path = next(p for p in _expected(tiny, trained) if "mlp.down_proj" in p)
    stored = tensors[f"blk.{path.split('.')[2]}.ffn_down.weight"].astype(np.float32)
    assert np.abs(stored - _expected(tiny, trained)[path]).max() < 2**-8 * np.abs(stored).max()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"save_path": "."}, "already exists"),
        ({"bits": 4}, "--bits must be 8 or 16"),
        ({"adapter_path": "nowhere"}, "no such adapter"),
        ({"export_gguf": True}, "needs --dequantize"),
        ({"export_gguf": True, "dequantize": True, "gguf_path": "../x.gguf"}, "must be a name that ends in .gguf"),
        ({"export_gguf": True, "dequantize": True, "gguf_path": "config.json"}, "must be a name that ends in .gguf"),
        ({"export_gguf": True, "dequantize": True}, "another one"),
    ],
)
def test_errors_are_clear_and_leave_nothing(
    change: dict[str, Any], problem: str, tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=problem):
        zo_mlx.fuse(**{"model": tiny, "adapter_path": trained, "save_path": "out", "progress": False, **change})
    assert not list(tmp_path.iterdir())


def test_another_models_adapter_is_refused(tiny: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(UsageError, match="belongs to another model"):
        _fuse(tmp_path / "m", trained, tmp_path / "out")


def test_the_result_is_uploaded(tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[tuple[str, str, bool]] = []
    note = lambda path, repo: uploads.append((path, repo, Path(path, "model.safetensors").exists()))  # noqa: E731
    monkeypatch.setattr(write, "upload_to_hub", note)
    _fuse(tiny, trained, tmp_path / "out", upload_repo="someone/new")
    assert uploads == [(str(tmp_path / "out"), "someone/new", True)]


def test_the_command_line(tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["fuse", "--model", str(tiny), "--adapter-path", str(trained / "best")]
    assert main([*common, "--save-path", str(tmp_path / "new/f"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == len(read_index(tiny).tensors)
    assert main([*common, "--save-path", str(tmp_path / "new/f")]) == 2
    assert "already exists" in capsys.readouterr().err
