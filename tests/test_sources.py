import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import convert_tiny, dense_weights, write_hf_llama
from mlx.utils import tree_unflatten
from test_convert import SMALL
from zo_mlx.convert import sources, write
from zo_mlx.convert.sensitivity import calibration_sequences, fisher_scores

import zo_mlx
from zo_mlx.errors import UsageError, ZoError
from zo_mlx.index import read_index
from zo_mlx.model import fingerprint


def test_a_hub_id_is_fetched_at_its_revision(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(hub_id: str, revision: str | None) -> Path:
        asked.append((hub_id, revision))
        return tiny_hf

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "_download", download)
    zo_mlx.convert("someone/tiny", str(tmp_path / "out"), revision="v2", **SMALL)
    assert asked == [("someone/tiny", "v2")]
    report = json.loads((tmp_path / "out/convert.json").read_text())
    assert (report["source"], report["revision"]) == ("someone/tiny", "v2")


def test_the_result_is_uploaded(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[tuple[str, str, bool]] = []

    def upload(path: str, repo: str) -> None:
        uploads.append((path, repo, Path(path, "sensitive.safetensors").exists()))
        if repo == "someone/closed":
            raise PermissionError("403 Forbidden: not yours")

    monkeypatch.setattr(write, "upload_to_hub", upload)
    out = str(tmp_path / "out")
    zo_mlx.convert(str(tiny_hf), out, upload_repo="someone/new", **SMALL)
    assert uploads == [(out, "someone/new", True)]
    with pytest.raises(ZoError, match="is made, but cannot be uploaded to someone/closed: 403 Forbidden"):
        zo_mlx.convert(out, str(tmp_path / "again"), upload_repo="someone/closed", **SMALL)
    assert (tmp_path / "again/README.md").exists()


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _truncated(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def _missing_tensor(path: Path) -> None:
    arrays = mx.load(str(path / "model.safetensors"))
    arrays.pop("model.norm.weight")
    mx.save_safetensors(str(path / "model.safetensors"), arrays)


def _not_finite(path: Path) -> None:
    arrays = mx.load(str(path / "model.safetensors"))
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(path / "model.safetensors"), arrays)


def _no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def _config(**changes: object) -> object:
    def change(path: Path) -> None:
        config = {**json.loads((path / "config.json").read_text()), **changes}
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def _weight_map(content: object) -> object:
    def change(path: Path) -> None:
        (path / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (shutil.rmtree, "no such model"),
        (_no_config, "config.json is missing"),
        (_no_weights, "has no model"),
        (_truncated, "truncated or not a safetensors file"),
        (_missing_tensor, "cannot be loaded"),
        (_not_finite, "gradients are not finite"),
        (_no_tokenizer, "the tokenizer cannot be loaded"),
        (_config(model_type=None), "has no model_type"),
        (_config(model_type="nothing"), "nothing not supported"),
        (_config(hidden_size=None), "cannot be loaded"),
        (_config(hidden_size="wide"), "cannot be loaded"),
        (_config(model_file="evil.py"), "needs custom code"),
        (_config(rope_theta="wide"), "the model cannot be computed: TypeError"),
        (_config(vocab_size=4), "vocab_size is 4, and must be at least 5"),
        (_config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000 for"),
        (_config(quantization={"bits": 4}), "cannot be loaded"),
        (
            _weight_map({"weight_map": {"a": "../x.safetensors"}}),
            "weight_map puts a into '../x.safetensors', which is not",
        ),
        (_weight_map({"weight_map": {"a": "/etc/passwd"}}), "which is not a file of the directory"),
        (_weight_map({"weight_map": {"a": 1}}), "which is not a file of the directory"),
        (_weight_map([]), "must hold a JSON object"),
        (_weight_map({}), "has no weight_map"),
        (_config(quantization_config={"quant_method": "gptq"}), "is quantized, but not by MLX"),
    ],
)
def test_bad_sources_are_one_clear_line_and_leave_nothing(damage: object, problem: str, tmp_path: Path) -> None:
    source = write_hf_llama(tmp_path / "hf")
    damage(source)
    with pytest.raises(UsageError, match=problem) as e:
        zo_mlx.convert(str(source), str(tmp_path / "out"), **SMALL)
    assert "\n" not in str(e.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"hf"}


@pytest.mark.parametrize(
    "quantization",
    [
        *({"q_bits": bits} for bits in (2, 3, 4, 5, 6)),
        {"q_bits": 8, "q_group_size": 32},
        {"q_mode": "mxfp4"},
        {"q_mode": "mxfp8"},
        {"q_mode": "nvfp4"},
        {"quant_predicate": "mixed_3_6", "q_group_size": 64},
    ],
)
def test_a_model_that_is_already_quantized_gets_its_index(
    quantization: dict[str, Any], choice_data: Path, tmp_path: Path
) -> None:
    """Scores are those of the dense model with the dequantized weights; the weights stay as they are."""
    stock, source = tmp_path / "stock", write_hf_llama(tmp_path / "hf", mx.float32)
    mlx_lm.convert(str(source), str(stock), quantize=True, **quantization)
    zo_mlx.convert(str(stock), str(tmp_path / "out"), density=0.02, **SMALL)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()

    dense, tokenizer = mlx_lm.load(str(source))
    quantized, _ = mlx_lm.load(str(stock))
    weights = dense_weights(quantized)
    embedding = quantized.model.embed_tokens
    weights["model.embed_tokens"] = mx.dequantize(
        embedding.weight,
        embedding.scales,
        embedding.get("biases"),
        embedding.group_size,
        embedding.bits,
        embedding.mode,
    )
    dense.set_dtype(mx.float32)
    dense.update(tree_unflatten([(f"{p}.weight", w.astype(mx.float32)) for p, w in weights.items()]))
    text = (Path(zo_mlx.__file__).parents[1] / "convert" / "calibration.txt").read_text()
    expected = dict(fisher_scores(dense, calibration_sequences(tokenizer, text, 2, 16, seed=0)))
    index = read_index(tmp_path / "out")
    for path, tensor in index.tensors.items():
        assert np.allclose(tensor.scores, np.array(expected[path]).ravel()[tensor.indices], rtol=1e-3)
        assert np.allclose(np.array(tensor.values), np.array(weights[path]).ravel()[tensor.indices])
    assert index.metadata["base_model"] == fingerprint(stock)
    zo_mlx.train(
        model=str(tmp_path / "out"), data=str(choice_data), adapter_path=str(tmp_path / "a"), iters=2, batch_size=4,
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_null_is_not_quantized(key: str, tiny_hf: Path, tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_hf, tmp_path / "hf"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: None}))
    out = convert_tiny(source, tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (tiny / name).read_bytes()


def test_only_what_a_model_needs_is_copied(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "mlx"))
    (tmp_path / "secret").write_text("mine")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    for name in ("pytorch_model.bin", "x.gguf", "evil.py", "train.jsonl", ".env", "LICENSE.md", "merges.txt"):
        (source / name).write_text("x")
    (source / "vocab.txt").symlink_to("merges.txt")
    zo_mlx.convert(str(source), str(tmp_path / "out"), **SMALL)
    names = {path.name for path in tiny.iterdir()} | {"LICENSE.md", "merges.txt", "vocab.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_links_are_followed_within_a_model_only(tiny: Path, tmp_path: Path) -> None:
    """A snapshot of the hub's cache is nothing but links to what the cache has of the same model."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/c"
    shutil.copytree(tiny, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    zo_mlx.convert(str(snapshot), str(tmp_path / "out"), **SMALL)
    assert fingerprint(tmp_path / "out") == fingerprint(tiny)

    (tmp_path / "secret").write_text("{}")
    for source in (snapshot, Path(shutil.copytree(tiny, tmp_path / "mlx"))):
        (source / "extra.json").symlink_to(tmp_path / "secret")
        with pytest.raises(UsageError, match="is a link that leads out of the directory"):
            zo_mlx.convert(str(source), str(tmp_path / "again"), **SMALL)
    assert not (tmp_path / "again").exists()
