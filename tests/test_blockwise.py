from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import write_hf_llama
from mlx_lm.models import llama
from zo_mlx.convert import blockwise
from zo_mlx.convert.blockwise import blockwise_fisher_scores
from zo_mlx.convert.checkpoint import Checkpoint
from zo_mlx.convert.sensitivity import fisher_scores

import zo_mlx
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.model import load_stock_model

SEQUENCES = np.random.default_rng(0).integers(0, 250, (3, 20)).astype(np.int32)
SMALL = {"num_samples": 2, "sequence_length": 16, "density": 0.02, "progress": False}


@pytest.mark.parametrize("limit", [None, 1, 400_000])
def test_scores_equal_those_of_the_whole_model_whatever_the_memory_limit(
    limit: int | None, tiny_hf: Path, tmp_path: Path
) -> None:
    def opened() -> nn.Module:
        return load_stock_model(tiny_hf, lazy=True)[0]

    expected = dict(fisher_scores(opened(), SEQUENCES))
    got = dict(blockwise_fisher_scores(opened, SEQUENCES, Checkpoint(tmp_path / "c"), limit))
    assert set(got) == set(expected)
    for path, scores in expected.items():
        assert np.allclose(np.array(got[path]), np.array(scores), rtol=1e-4, atol=1e-6 * float(scores.max())), path
    assert {f.name.split("-")[0] for f in (tmp_path / "c").glob("*-*")} == {"gradient"}, (
        "a block's inputs are still there"
    )


def test_a_memory_limit_splits_blocks(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    make_groups = blockwise._groups

    def spy_groups(sizes: dict[str, int], limit: int | None) -> list[list[str]]:
        parts.append(len(result := make_groups(sizes, limit)))
        return result

    monkeypatch.setattr(blockwise, "_groups", spy_groups)
    for limit, expected in ((None, [1, 1, 1]), (1, [7, 7, 7])):
        parts.clear()
        checkpoint = Checkpoint(tmp_path / str(limit))
        list(blockwise_fisher_scores(lambda: load_stock_model(tiny_hf, lazy=True)[0], SEQUENCES, checkpoint, limit))
        assert parts == expected


def test_the_same_output_whatever_the_memory_limit(tiny_hf: Path, tmp_path: Path) -> None:
    for name, limit in (("a", None), ("b", 0.001)):
        zo_mlx.convert(str(tiny_hf), str(tmp_path / name), memory_limit=limit, **SMALL)  # type: ignore[arg-type]
    for file in (tmp_path / "a").iterdir():
        if file.name == "convert.json":  # which has times in it
            continue
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_only_one_block_is_in_memory(tmp_path: Path) -> None:
    """MLX's peak above the start: the dense model alone, in float32, would take four times as much."""
    source = write_hf_llama(tmp_path / "hf", num_hidden_layers=24, hidden_size=128, intermediate_size=512)
    model_bytes = 2 * (source / "model.safetensors").stat().st_size
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    checkpoint = Checkpoint(tmp_path / "c")
    for _, scores in blockwise_fisher_scores(lambda: load_stock_model(source, lazy=True)[0], SEQUENCES[:1], checkpoint):
        del scores
    assert mx.get_peak_memory() - before < model_bytes / 4


class Skipping(llama.LlamaModel):
    """The last block also gets what the first one gave: not a plain chain."""

    def __call__(self, inputs: mx.array, *_: object) -> mx.array:
        first = self.layers[0](self.embed_tokens(inputs), "causal")
        return self.norm(self.layers[2](self.layers[1](first, "causal") + first, "causal"))


class Reordering(llama.LlamaModel):
    def __call__(self, inputs: mx.array, *_: object) -> mx.array:
        h = self.embed_tokens(inputs)
        for layer in reversed(self.layers):
            h = layer(h, "causal")
        return self.norm(h)


class Peeking(llama.LlamaModel):
    """A mask that depends on what the block before gave."""

    def __call__(self, inputs: mx.array, *_: object) -> mx.array:
        h = self.embed_tokens(inputs)
        for layer in self.layers:
            h = layer(h, mx.zeros((1, 1)) + h.mean())
        return self.norm(h)


@pytest.mark.parametrize("kind", [Skipping, Reordering, Peeking])
def test_models_that_are_not_a_plain_chain_are_told_and_scored_in_memory(
    kind: type,
    tiny_hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, _ = load_stock_model(tiny_hf)
    assert BlockwiseModel(model).is_chain()
    model, _ = load_stock_model(tiny_hf)
    model.model.__class__ = kind
    assert not BlockwiseModel(model).is_chain()

    monkeypatch.setattr(llama, "LlamaModel", kind)
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), **SMALL)  # type: ignore[arg-type]
    assert (tmp_path / "out/sensitive.safetensors").exists()
    assert "the blocks of llama are not a plain chain" in capsys.readouterr().err


def test_a_layer_called_twice_gets_the_sum_of_both_gradients(tiny_hf: Path, tmp_path: Path) -> None:
    class Twice(llama.MLP):
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(super().__call__(x))

    def opened() -> nn.Module:
        model, _ = load_stock_model(tiny_hf, lazy=True)
        for layer in model.layers:
            layer.mlp.__class__ = Twice
        return model

    expected = dict(fisher_scores(opened(), SEQUENCES))
    for path, scores in blockwise_fisher_scores(opened, SEQUENCES, Checkpoint(tmp_path / "c")):
        oracle = np.array(expected[path])
        assert np.allclose(np.array(scores), oracle, rtol=1e-3, atol=1e-5 * oracle.max()), path


def test_a_block_that_is_used_twice_is_no_chain(tiny_hf: Path) -> None:
    model, _ = load_stock_model(tiny_hf)
    model.model.layers[1] = model.model.layers[0]
    before = model(mx.array([[1, 2, 3]]))
    assert BlockwiseModel.of_chain(model) is None
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), before)
