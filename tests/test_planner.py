"""The planner's estimates against what MLX itself reports of real runs and models."""

import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import LLAMA, write_hf_llama, write_jsonl
from mlx.utils import tree_flatten
from mlx_lm.models import llama

import zo_mlx
from zo_mlx import planner, skeleton
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.cli import main
from zo_mlx.config import TrainConfig
from zo_mlx.index import SensitiveIndex, SensitiveTensor, read_index
from zo_mlx.miniature import Miniature
from zo_mlx.planner import Need, as_text, line, plan

MIB = 1 << 20


class _Enough(Exception):
    """Ends a run after its first step."""


def _peak_of_a_run(model: Path, data: Path, rows: int, **settings: Any) -> float:
    """What a run reports as its peak after one step, weights and loading included."""

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            raise _Enough(event["peak_memory"] * 1e9)

    mx.reset_peak_memory()
    with pytest.raises(_Enough) as raised:
        zo_mlx.train(
            model=str(model), data=str(data), adapter_path=str(data / "adapter"), batch_size=rows, val_batches=0,
            steps_per_report=1, report=report, progress=False, overwrite=True, **settings,
        )  # fmt: skip
    return float(raised.value.args[0])


def test_the_estimate_is_within_a_tenth_of_what_a_run_reports(shallow: Path, tmp_path: Path) -> None:
    rows, tokens = 4, 48
    text = " the" * tokens  # a token each
    texts = write_jsonl(tmp_path / "texts" / "train.jsonl", [{"text": text}] * 8 * rows).parent
    choices = [{"prompt": text, "completion": c, "choices": [" A", " B"]} for c in [" A", " B"] * 4 * rows]
    answers = write_jsonl(tmp_path / "answers" / "train.jsonl", choices).parent
    config = TrainConfig(batch_size=rows, max_seq_length=tokens)
    held = mx.get_active_memory()
    needs = plan(str(shallow), config, progress=False)["needs"]
    assert mx.get_active_memory() - held < 1000  # no model: a few numbers that are made once and kept
    zo, exact = needs["zo"], needs["exact"]
    assert zo["total"] - zo["logits"] == pytest.approx(_peak_of_a_run(shallow, answers, rows), rel=0.1)
    assert exact["total"] == pytest.approx(_peak_of_a_run(shallow, texts, rows, gradient="exact"), rel=0.1)
    last_half = [f".{number}." for number in range(3, 6)]
    counts = {path: tensor.size for path, tensor in read_index(shallow).tensors.items()}
    trained = sum(size for path, size in counts.items() if any(number in path for number in last_half))
    assert (zo["trainable"], exact["trainable"]) == (trained, sum(counts.values()))
    assert needs["lora"]["trainable"] == 6 * 81_408  # mlx-lm's own of a block: 8 (in + out) of its seven layers
    for need in (zo, exact):
        assert need["weights"] < need["least"] < need["total"] - need["logits"]
        assert need["total"] < needs["lora"]["total"]


def test_weights_are_counted_to_the_byte(smollm2: Path, tiny: Path) -> None:
    """On the CPU, what is not quantized is float32 in memory, and bfloat16 in the files of both."""
    for path in (smollm2, tiny):
        stored: dict[str, mx.array] = mx.load(str(path / "model.safetensors"))  # type: ignore[assignment]
        quantized = {name.rsplit(".", 1)[0] for name in stored if name.endswith(".scales")}
        on_cpu = mx.default_device().type == mx.cpu
        expected = sum(
            a.nbytes * (2 if on_cpu and name.rsplit(".", 1)[0] not in quantized else 1) for name, a in stored.items()
        )
        model = skeleton.skeleton(json.loads((path / "config.json").read_text()))
        assert skeleton.bytes_of(model) == expected


def test_a_source_is_planned_as_what_convert_makes_of_it(tiny_hf: Path, tiny: Path) -> None:
    source, made = (json.loads((path / "config.json").read_text()) for path in (tiny_hf, tiny))
    shapes = [
        {name: (a.shape, a.dtype) for name, a in tree_flatten(skeleton.skeleton(*arguments).parameters())}
        for arguments in ((source, 4, 32), (made,))
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0] != {
        name: (a.shape, a.dtype) for name, a in tree_flatten(skeleton.skeleton(source, 8, 32).parameters())
    }


def _numbers(model: nn.Module, blocks: list[nn.Module]) -> list[int]:
    return [i for i, block in enumerate(model.layers) if any(block is other for other in blocks)]


def test_only_the_last_block_of_each_kind_takes_memory_and_works() -> None:
    config = {**LLAMA, "vocab_size": 300, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}
    before = mx.get_active_memory()
    model = skeleton.skeleton(config)
    whole, block = skeleton.bytes_of(model), skeleton.bytes_of(model.layers[0])
    kept = skeleton.shortened(model, 2)
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert _numbers(model, kept) == [10, 11]
    assert mx.get_active_memory() - before == pytest.approx(whole - 10 * block, rel=0.02)
    x = mx.ones((1, 3, 512))
    assert mx.array_equal(model.layers[0](x, None), x)
    assert isinstance(model.layers[0], llama.TransformerBlock)


def test_kinds_are_told_by_class_and_shapes() -> None:
    """Of a DeepSeek, the first block is dense, and the others have experts."""
    from test_architectures import COMMON, OWN

    model = skeleton.skeleton(
        {**COMMON, **OWN["deepseek_v3"], "num_hidden_layers": 4, "model_type": "deepseek_v3"}, 4, 32
    )
    assert _numbers(model, skeleton.shortened(model, 1)) == [0, 3]


def test_what_is_made_up_has_the_density_and_lies_in_few_columns() -> None:
    layer = nn.Linear(500, 1000)
    made = skeleton.made_up(layer, 1e-2)
    assert made.size == 5000
    assert (np.diff(made.indices.astype(np.int64)) > 0).all()
    assert made.indices[-1] < 500_000
    assert len(np.unique(made.indices % 500)) == 11  # 2.2%


def test_an_index_of_its_own_is_taken_where_it_has_weights() -> None:
    config = {**LLAMA, "vocab_size": 300, "num_hidden_layers": 4}
    path = "model.layers.{}.mlp.up_proj"

    def miniature(blocks: tuple[int, ...], trained: int) -> Miniature:
        tensor = SensitiveTensor(np.arange(0, 640, 64, dtype=np.uint32), mx.zeros(10), np.ones(10, np.float32))
        index = SensitiveIndex({path.format(i): tensor for i in blocks})
        return Miniature(skeleton.skeleton(config), index, 0.1, TrainConfig(num_layers=trained))

    assert [miniature((1, 3), trained).trainable for trained in (-1, 3, 2)] == [20, 20, 10]
    assert miniature((1,), -1).trainable == 10, "the last block has none: what it could have is made up"


def test_what_examples_need_grows_by_the_same_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "ENOUGH", 1000)
    asked = []

    def peak(rows: int) -> int:
        asked.append(rows)
        return max(100, 60 * rows)

    need = line(peak)
    assert asked == [1, 10]
    assert (need(1), need(10), need(100)) == (100, 600, 100 + 99 * 500 // 9)
    asked.clear()
    assert line(lambda rows: peak(20 * rows))(3) == 3600
    assert asked == [20]


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    need = Need(100, 10, 1, lambda rows: 20 + 5 * rows, lambda rows: min(60, 30 * rows) + rows, 5)
    for limit in range(100, 500):
        rows = need.largest(limit)
        assert rows == 0 or need.total(rows) <= limit
        assert need.total(rows + 1) > limit
    assert need.total(1) == 110 + 31
    assert need.total(20) == 110 + 120
    assert need.largest(10_000) == planner.MOST_BATCH
    parts = {name: need.as_dict(2)[name] for name in ("weights", "trained", "activations", "logits", "total", "least")}
    assert parts == {"weights": 100, "trained": 10, "activations": 30, "logits": 32, "total": 172, "least": 115}


def _plan_of(path: object, *flags: str) -> list[str]:
    return ["memory", str(path), "--max-seq-length", "8", "--batch-size", "2", *flags]


@pytest.fixture
def only_config(tiny_hf: Path, tmp_path: Path) -> Path:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_hf / "config.json").read_text())
    return tmp_path / "bare"


def test_a_config_is_enough(only_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--q-group-size", "32", "--memory-limit", "0.0005", "--plot", str(tmp_path / "plan.png")]
    assert main([*_plan_of(only_config, *flags), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (found["blocks"], found["max_seq_length"], found["index"]) == (3, 8, "made up")
    for need in found["needs"].values():
        parts = [need[part] or 0 for part in ("weights", "trained", "activations", "logits")]
        assert sum(parts) == need["total"]
        assert need["batch_size"] == 2
    assert [limit["name"] for limit in found["limits"]][:4] == ["8 GB Mac", "16 GB Mac", "24 GB Mac", "32 GB Mac"]
    assert [limit["bytes"] // MIB for limit in found["limits"]][:2] == [5461, 10922]  # as llama.cpp prints them
    assert found["limits"][-1]["name"] == "--memory-limit"
    assert found["limits"][-1]["bytes"] == 500_000
    text = as_text(found)
    assert "iogpu.wired_limit_mb" in text
    assert "one is made up" in text
    assert "256 or more" in text
    said = ["runs held up to twice as much" in as_text({**found, "device": device}) for device in ("cpu", "gpu")]
    assert said == [False, True]


def test_more_of_anything_takes_more() -> None:
    def miniature(gradient: str, **settings: Any) -> Miniature:
        sizes = {"vocab_size": 20_000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 64}
        config = {**LLAMA, **sizes}
        return Miniature(skeleton.skeleton(config), None, 1e-2, TrainConfig(gradient=gradient, **settings))

    zo = miniature("zo")
    plain = zo.activations(2, 64)
    assert zo.activations(2, 192) > 2 * plain
    assert zo.activations(6, 64) > 2 * plain
    assert zo.texts(2, 64) > 1.5 * plain > 1.5 * zo.least(2, 64)
    assert miniature("zo", directions=31).activations(2, 64) > 3 * plain
    # With exact gradients what goes into each trained block stays, 256 float32 a token, of 512 tokens. Of so many
    # blocks, because what MLX's threads hold at once differs by some MB from one measurement to the next.
    few, most = (miniature("exact", num_layers=n).activations(32, 64) for n in (3, 63))
    assert most - few == pytest.approx(60 * 512 * 256 * 4, rel=0.2)


def test_this_mac_is_asked_for_its_own_limit(
    only_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planner.mx, "device_info", lambda: {"max_recommended_working_set_size": 20_000_000_000})
    assert main(_plan_of(only_config, "--q-group-size", "32")) == 0
    assert "this Mac, 20.00 GB" in capsys.readouterr().out


def test_a_step_of_the_model_itself_is_compared(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_plan_of(tiny, "--measure", "--json")) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["peak"] > skeleton.bytes_of(skeleton.skeleton(json.loads((tiny / "config.json").read_text())))
    assert measured["error"] == pytest.approx(measured["estimate"] / measured["peak"] - 1)
    assert main(_plan_of(tiny, "--measure", "exact")) == 0
    assert "measured, exact gradients: " in capsys.readouterr().out


def test_of_a_hub_id_the_config_alone_is_fetched(
    only_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = []

    def fetch(repo: str, name: str) -> str:
        fetched.append((repo, name))
        return str(only_config / name)

    monkeypatch.setattr(skeleton, "hf_hub_download", fetch)
    assert main(_plan_of("name/model", "--q-group-size", "32", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "name/model"
    assert fetched == [("name/model", "config.json")]


def test_without_a_network_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(_plan_of("nobody/nothing-here")) == 1
    error = capsys.readouterr().err
    assert "the hub does not give the config of nobody/nothing-here" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "no_such_thing"}, "mlx-lm cannot make a model of this config"),
        ({}, "mlx-lm cannot make a model of this config"),
        ({"model_file": "evil.py"}, "code that comes with the model"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_hidden_layers": 0}, "mlx-lm cannot make a model of this config"),
        ({"vocab_size": 4}, "vocab_size is 4, and must be at least 5"),  # or MLX would read and write beyond it
        ({"text_config": {"vocab_size": 1}}, "vocab_size is 1, and must be at least 5"),
        ({"num_key_value_heads": 3}, "a model of this config cannot be computed: "),
        ({"hidden_size": "many"}, "mlx-lm cannot make a model of this config"),
        ({"quantization": 4}, "mlx-lm cannot make a model of this config"),
        ({"quantization": {"bits": 77, "group_size": 32}}, "mlx-lm cannot make a model of this config"),
    ],
)
def test_configs_that_are_none(
    config: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {**LLAMA, "vocab_size": 300, **config} if config else {}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert main(_plan_of(tmp_path, "--q-group-size", "32")) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_what_is_asked_for_wrongly(
    only_config: Path, tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.png").write_text("mine")
    for command, problem in (
        (_plan_of(tmp_path / "nowhere"), "neither a directory nor a hub id"),
        (_plan_of(tmp_path), "config.json is missing"),
        (_plan_of(only_config, "--density", "0"), "density must be at least"),
        (_plan_of(only_config, "--batch-size", "0"), "batch_size must be at least 1"),
        (_plan_of(only_config, "--num-layers", "0"), "num_layers must be at least 1"),
        (_plan_of(only_config, "--plot", str(tmp_path / "there.png")), "already exists"),
        (_plan_of(only_config, "--plot", "plan.txt"), "must end with one of .png"),
        (_plan_of(only_config, "--plot", str(tmp_path / "no/plan.png")), "no such directory"),
        (_plan_of(only_config, "--q-group-size", "32", "--measure"), "is not a model directory"),
        (_plan_of(tiny_hf, "--q-group-size", "32", "--measure"), "has no sensitive index"),
    ):
        assert main(command) == 2, command
        assert problem in capsys.readouterr().err
    assert (tmp_path / "there.png").read_text() == "mine"


def test_blocks_that_are_no_chain_are_not_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf_llama(tmp_path / "hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockwiseModel, "is_chain", lambda self: False)
        assert main(_plan_of(tmp_path / "hf", "--q-group-size", "32")) == 2
    assert "no plain chain" in capsys.readouterr().err
