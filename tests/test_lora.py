"""Against stock mlx-lm: its loader, its LoRA layers, its quantized layers, its command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import convert_tiny, dense_weights, tiny_experts, write_jsonl
from mlx_lm import fuse as mlx_lm_fuse
from test_serve import PROMPT, ask, running, text_of

import zo_mlx
from zo_mlx import adapter, lora
from zo_mlx.cli import main
from zo_mlx.errors import UsageError
from zo_mlx.files import locked
from zo_mlx.index import read_index
from zo_mlx.model import fingerprints
from zo_mlx.sparse import SparseModel

TOKENS = mx.array([[5, 80, 33, 101, 7, 256, 44, 90]])


@pytest.fixture(scope="module")
def trained(spread: Path, choice_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, all of whose blocks are trained."""
    path = tmp_path_factory.mktemp("trained") / "a"
    events: list[dict[str, Any]] = []
    zo_mlx.train(
        model=str(spread), data=str(choice_data), adapter_path=str(path), iters=30, learning_rate=3e-3, num_layers=-1,
        steps_per_eval=10, progress=False, report=events.append,
    )  # fmt: skip
    assert [e["path"] for e in events if e["event"] == "exported"] == [str(path), str(path / "best")]
    assert not [e for e in events if e["event"] == "warning"]
    return path


def _logits(model: nn.Module) -> np.ndarray:
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))


def _stock(model: Path, adapter_path: Path | None = None) -> np.ndarray:
    """Logits of stock mlx-lm, computed in float32."""
    return _logits(mlx_lm.load(str(model), adapter_path=adapter_path and str(adapter_path))[0])


def _dense(model: Path) -> dict[str, mx.array]:
    loaded, _ = mlx_lm.load(str(model))
    loaded.set_dtype(mx.float32)
    return dense_weights(loaded)


def _ours(model: Path, adapter_path: Path) -> np.ndarray:
    return np.array(zo_mlx.load(model, adapter_path)[0](TOKENS))


def test_stock_mlx_lm_computes_what_we_do_at_the_full_rank(spread: Path, trained: Path) -> None:
    for directory in (trained, trained / "best"):
        fit = zo_mlx.export(spread, directory, rank=10_000)
        assert fit.rank == fit.full_rank
        assert fit.kl < 1e-9 and fit.residual < 1e-5
        ours, stock, base = _ours(spread, directory), _stock(spread, directory), _stock(spread)
        assert np.abs(base - ours).max() > 0.1
        assert np.abs(stock - ours).max() < 2e-5 * np.abs(ours).max()


def test_the_full_rank_is_that_of_the_differences(spread: Path, trained: Path) -> None:
    """Found by numpy, from the dense weights and the documented files."""
    dense = _dense(spread)
    values, start, ranks = np.array(adapter.read_snapshot(trained).values), 0, []
    for path, tensor in read_index(spread).tensors.items():
        difference = np.zeros(dense[path].size)
        difference[tensor.indices] = values[start : start + tensor.size] - np.array(dense[path]).ravel()[tensor.indices]
        ranks.append(np.linalg.matrix_rank(difference.reshape(dense[path].shape), rtol=1e-6))
        start += tensor.size
    fit = zo_mlx.export(spread, trained)
    assert fit.full_rank == max(ranks)


def test_a_lower_rank_is_the_best_approximation_and_says_how_far_it_is(spread: Path, trained: Path) -> None:
    fit = zo_mlx.export(spread, trained, rank=4)
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == fit.rank == 4 and config["zo_mlx"]["kl"] == fit.kl > 1e-6
    stored = mx.load(str(trained / "adapters.safetensors"))
    dense = _dense(spread)
    values, start, left, total = np.array(adapter.read_snapshot(trained).values), 0, 0.0, 0.0
    for path, tensor in read_index(spread).tensors.items():
        d = np.zeros(dense[path].size)
        d[tensor.indices] = values[start : start + tensor.size] - np.array(dense[path]).ravel()[tensor.indices]
        start += tensor.size
        d = d.reshape(dense[path].shape)
        a, b = (stored[f"{path}.{name}"].astype(mx.float32) for name in ("lora_a", "lora_b"))
        got = np.array(a @ b).T
        error = np.square(d - got).sum()
        best = np.square(np.linalg.svd(d, compute_uv=False)[4:]).sum()
        assert error == pytest.approx(best, rel=1e-3, abs=2**-15 * np.square(d).sum())  # bfloat16
        left, total = left + error, total + np.square(d).sum()
    assert fit.residual == pytest.approx((left / total) ** 0.5, rel=1e-3)
    assert np.abs(_stock(spread, trained) - _ours(spread, trained)).max() > 1e-3


def test_the_lowest_rank_is_taken_that_keeps_the_distributions(
    spread: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kls = {rank: zo_mlx.export(spread, trained, rank=rank).kl for rank in (2, 4, 6)}
    assert kls[2] > kls[4] > kls[6]
    monkeypatch.setattr(lora, "RANKS", (2, 4, 6))
    for rank in (2, 4, 6):
        monkeypatch.setattr(lora, "MOST_KL", kls[rank] * 1.001)
        assert zo_mlx.export(spread, trained).rank == rank


STOCK_SERVER = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
sys.argv.remove("server")
from mlx_lm.server import main
main()
"""


def test_stock_commands_say_what_we_do(tiny_hf: Path, choice_data: Path, tmp_path: Path) -> None:
    """`mlx_lm.generate` and `mlx_lm.server`, with a model in float32, as zo-mlx computes on a CPU."""
    model, trained = convert_tiny(tiny_hf, tmp_path / "model", dtype="float32"), tmp_path / "a"
    zo_mlx.train(
        model=str(model), data=str(choice_data), adapter_path=str(trained), iters=3, learning_rate=0.1, epsilon=1e-3,
        val_batches=0, progress=False,
    )  # fmt: skip
    zo_mlx.export(model, trained, rank=10_000)
    texts = [zo_mlx.generate(*zo_mlx.load(model, path), PROMPT, max_tokens=8) for path in (None, trained)]
    assert texts[0] != texts[1]
    words = ["--model", str(model), "--adapter-path", str(trained)]
    more = ["--prompt", PROMPT, "--ignore-chat-template", "--max-tokens", "8", "--temp", "0", "--verbose", "F"]
    command = [sys.executable, "-m", "mlx_lm", "generate", *words, *more]
    got = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr
    assert got.stdout.removesuffix("\n") == texts[1]
    with running(words, STOCK_SERVER) as (address, _):
        assert text_of(ask(address)) == texts[1]


def test_stock_fuse_takes_the_adapter(
    spread: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zo_mlx.export(spread, trained, rank=10_000)
    arguments = ["--model", str(spread), "--adapter-path", str(trained), "--save-path", str(tmp_path / "f")]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.fuse", *arguments, "--dequantize"])
    mlx_lm_fuse.main()
    base, fused, errors, differences, start = _dense(spread), _dense(tmp_path / "f"), [], [], 0
    values = adapter.read_snapshot(trained).values
    for path, tensor in read_index(spread).tensors.items():
        own, positions = values[start : (start := start + tensor.size)], mx.array(tensor.indices)
        errors.append(mx.abs(fused[path].reshape(-1)[positions] - own))
        differences.append(mx.abs(base[path].reshape(-1)[positions] - own))
    assert mx.concatenate(errors).mean() < 0.1 * mx.concatenate(differences).mean()  # it rounds to bfloat16


def test_what_is_exported_is_of_the_last_step_or_not_there(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": str(spread), "data": str(choice_data), "adapter_path": str(tmp_path / "a")}
    zo_mlx.train(**settings, iters=2, progress=False)
    step = lambda: json.loads((tmp_path / "a/adapter_config.json").read_text())["zo_mlx"]["step"]  # noqa: E731
    assert step() == 2

    def die(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            raise KeyboardInterrupt

    with pytest.raises(zo_mlx.ZoError, match="--resume"):
        zo_mlx.train(**settings, iters=4, steps_per_report=1, resume=True, progress=False, report=die)
    left = {f.name for f in (tmp_path / "a").rglob("*")}
    assert not left & {"adapters.safetensors", "adapter_config.json"}
    zo_mlx.train(**settings, iters=4, resume=True, progress=False)
    assert step() == 4


def test_a_run_that_goes_on_is_not_exported(trained: Path, spread: Path) -> None:
    """Nor its best values, which it may be about to replace."""
    for directory in (trained, trained / "best"):
        with locked(trained), pytest.raises(UsageError, match="is in use by another process"):
            zo_mlx.export(spread, directory)


def test_a_test_that_fails_takes_no_adapter_with_it(spread: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": c, "choices": ["x", "y"]} for c in "xy" * 8]
    for split, more in (("train", []), ("test", [{"prompt": "bad", "completion": "x", "choices": ["x", "y"]}])):
        write_jsonl(tmp_path / f"{split}.jsonl", [*lines, *more])
    (tmp_path / "picky.py").write_text(
        "def score(prompt, output, example):\n    return 1 / (prompt != 'bad') * (output == example['completion'])\n"
    )
    words = ["--model", str(spread), "--data", str(tmp_path), "--adapter-path", str(tmp_path / "a"), "--iters", "2"]
    command = [sys.executable, "-c", "from zo_mlx.cli import main; raise SystemExit(main())", "train", *words]
    failed = subprocess.run([*command, "--objective", "picky:score", "--test"], cwd=tmp_path, stderr=subprocess.PIPE)
    assert (failed.returncode, b"ZeroDivisionError" in failed.stderr) == (1, True), failed.stderr
    assert (tmp_path / "a/adapters.safetensors").exists()


def test_without_any_difference_there_is_an_adapter_that_adds_nothing(
    spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    """The values of a model that was quantized already are those of its weights."""
    zo_mlx.convert(str(spread), str(tmp_path / "m"), num_samples=2, sequence_length=32, progress=False)
    settings: dict[str, Any] = {"model": str(tmp_path / "m"), "adapter_path": str(tmp_path / "a"), "iters": 0}
    events: list[dict[str, Any]] = []
    zo_mlx.train(**settings, data=str(choice_data), progress=False, report=events.append)
    assert not [e for e in events if e["event"] == "warning"]
    assert np.array_equal(_stock(tmp_path / "m", tmp_path / "a"), _stock(tmp_path / "m"))


def test_a_lora_adapter_of_the_users_is_not_replaced_unasked(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="holds files that a run would replace"):
        zo_mlx.train(model=str(spread), data=str(choice_data), adapter_path=str(tmp_path), iters=1, progress=False)
    assert (tmp_path / "adapters.safetensors").read_bytes() == b"mine"


def test_a_run_does_not_fail_where_no_adapter_can_be_made(
    spread: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MOST_COLUMNS", 3)
    events: list[dict[str, Any]] = []
    zo_mlx.train(
        model=str(spread), data=str(choice_data), adapter_path=str(tmp_path / "a"), iters=1, progress=False,
        report=events.append,
    )  # fmt: skip
    _, warning = [e["message"] for e in events if e["event"] == "warning"]  # the first is that it is short
    assert "too many for a LoRA adapter" in warning and "zo-mlx fuse" in warning
    assert not (tmp_path / "a/adapter_config.json").exists() and adapter.read_snapshot(tmp_path / "a").step == 1


def test_experts_get_a_difference_each() -> None:
    """mlx-lm's LoRASwitchLinear in a mixture of experts, against dense weights."""
    model, index, dense = tiny_experts()
    ((path, tensor),) = index.tensors.items()
    layer = dict(model.named_modules())[path]
    weight = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=4)

    class Bytes:
        def encode(self, text: str, **_: object) -> list[int]:
            return list(text.encode())

    SparseModel(model, index)
    made = lora.lora_adapter(model, index, tensor.values, Bytes(), rank=100)  # type: ignore[arg-type]
    assert made.fit.kl < 1e-9 and made.fit.rank == made.fit.full_rank
    a, b = made.tensors[f"{path}.lora_a"], made.tensors[f"{path}.lora_b"]
    assert mx.abs(weight + b @ a - dense).max() < 1e-5


def test_a_real_model_keeps_its_distributions(smollm2: Path, tmp_path: Path) -> None:
    """Of a prompt that the rank was not chosen by; values as far from the 4-bit ones as training puts them."""
    index = read_index(smollm2)
    values = index.initial_values()
    values = values + 0.05 * mx.abs(values).mean() * mx.random.normal(values.shape, key=mx.random.key(0))
    prints = fingerprints(smollm2, index)
    adapter.write_snapshot(tmp_path, adapter.Snapshot(1, "0", prints, values), {})
    fit = zo_mlx.export(smollm2, tmp_path)
    assert fit.kl <= 2e-3 and fit.rank <= 128
    stock, tokenizer = mlx_lm.load(str(smollm2), adapter_path=str(tmp_path))
    stock.set_dtype(mx.float32)  # CPU products in bfloat16 are very slow
    tokens = mx.array([tokenizer.encode("The film is a delight from start to end. It was")])
    p, q = (nn.log_softmax(m(tokens)[0], axis=-1) for m in (zo_mlx.load(smollm2, tmp_path)[0], stock))
    base = nn.log_softmax(zo_mlx.load(smollm2)[0](tokens)[0], axis=-1)
    kl, effect = ((mx.exp(p) * (p - other)).sum(axis=-1).mean().item() for other in (q, base))
    assert kl < 0.01 < effect


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"adapter_path": "nowhere"}, "no such adapter"),
        ({"rank": 0}, "--rank must be at least 1"),
    ],
)
def test_errors_are_one_clear_line(spread: Path, trained: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        zo_mlx.export(**{"model": spread, "adapter_path": trained, **change})


def test_the_command_reports_the_fit(spread: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--model", str(spread), "--adapter-path", str(trained)]
    assert main([*arguments, "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)
    assert fit["rank"] <= fit["full_rank"]
    assert main([*arguments, "--rank", "2"]) == 0
    assert "LoRA of rank 2 in 21 layers (KL" in capsys.readouterr().out
