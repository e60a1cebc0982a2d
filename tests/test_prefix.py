"""Training the last blocks only, and what the other ones compute once."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_hf_llama
from test_train import _train, _values

import zo_mlx
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.config import TrainConfig
from zo_mlx.data import Example, load_dataset
from zo_mlx.errors import Interrupted, UsageError
from zo_mlx.estimator import TwoSided
from zo_mlx.head import split_head
from zo_mlx.index import SensitiveIndex, SensitiveTensor, read_index
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse, load_stock_model
from zo_mlx.prefix import Prefix
from zo_mlx.sparse import SparseModel
from zo_mlx.step import make_loss


def _examples(spread: Path, data: Path) -> list[Example]:
    """Rows of different lengths, and one example more whose choices take two rows."""
    _, tokenizer, _, _ = load_sparse(spread)
    examples = load_dataset(data / "train.jsonl", tokenizer, 100).examples[:7]
    long = data.parent / "long.jsonl"
    long.write_text('{"prompt": "a much longer prompt:", "completion": " yes", "choices": [" yes", " never"]}')
    return [*examples, *load_dataset(long, tokenizer, 100).examples]


@pytest.mark.parametrize("stackable", [True, False])
@pytest.mark.parametrize("cache_bytes", [None, 0, 1 << 30])
@pytest.mark.parametrize("blocks", [1, 2])
def test_losses_are_those_of_the_whole_model(
    blocks: int, cache_bytes: int | None, stackable: bool, spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    sparse, _, index, _ = load_sparse(spread)
    sparse.stackable = stackable
    head = split_head(sparse.model)
    sparse.train_last(blocks, index.initial_values())
    z = mx.random.normal((4, sparse.size), key=mx.random.key(0))
    values = TwoSided().branches(mx.zeros(sparse.size), z, 0.1)
    shares = TwoSided().shares(_examples(spread, choice_data), 4)
    expected = make_loss(sparse, head)(values, shares)
    prefix = Prefix(BlockwiseModel(sparse.model), sparse.first_block, cache_bytes)
    assert sparse.first_block == 3 - blocks
    for _ in range(2):
        assert mx.allclose(make_loss(sparse, head, prefix)(values, shares), expected, rtol=1e-5)
    assert len({round(x, 5) for x in expected.tolist()}) == 8, "the losses do not depend on the values"


@pytest.mark.parametrize("stackable", [True, False])
def test_the_first_blocks_run_once_for_each_pair_of_branches_or_once_for_all(
    stackable: bool, spread: Path, choice_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, _, index, _ = load_sparse(spread)
    sparse.stackable = stackable
    sparse.train_last(1, index.initial_values())
    rows: dict[int, int] = {0: 0, 1: 0, 2: 0}
    numbers = {id(block): i for i, block in enumerate(sparse.model.layers)}
    kind = type(sparse.model.layers[0])
    call = kind.__call__

    def spy(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        rows[numbers[id(self)]] += len(x)
        return call(self, x, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", spy)
    examples = _examples(spread, choice_data)
    values = TwoSided().branches(mx.zeros(sparse.size), mx.ones((2, sparse.size), mx.int8), 0.1)
    head, blocks = split_head(sparse.model), BlockwiseModel(sparse.model)
    for cache_bytes, expected in ((None, (12, 24)), (1 << 30, (6, 24)), (0, (12, 24))):
        loss = make_loss(sparse, head, Prefix(blocks, 2, cache_bytes))
        rows.update({0: 0, 1: 0, 2: 0})
        for start in (0, 2, 0):
            loss(values, TwoSided().shares(examples[start : start + 4], 2))
        assert (rows[0], rows[2]) == expected
        assert rows[1] == rows[0]


def test_only_the_last_blocks_change(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    result = _train(spread, choice_data, tmp_path / "a", num_layers=1, learning_rate=1e-2)
    index = read_index(spread)
    last = np.concatenate([np.full(t.size, ".layers.2." in path) for path, t in index.tensors.items()])
    assert result.trainable == last.sum()
    changed = _values(tmp_path / "a") != np.array(index.initial_values())
    assert not changed[~last].any()
    assert changed[last].mean() > 0.9
    loaded = zo_mlx.evaluate(*zo_mlx.load(spread, tmp_path / "a"), choice_data / "valid.jsonl", progress=False)
    assert result.after is not None
    assert loaded.loss == pytest.approx(result.after.loss, rel=1e-5)


def test_more_blocks_than_there_are_is_all(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    for name, blocks in (("a", -1), ("b", 3), ("c", 99)):
        _train(spread, choice_data, tmp_path / name, num_layers=blocks)
    assert np.array_equal(_values(tmp_path / "a"), _values(tmp_path / "b"))
    assert np.array_equal(_values(tmp_path / "a"), _values(tmp_path / "c"))


@pytest.mark.parametrize("cache", [None, 0.0, 1.0])
def test_a_resumed_run_has_the_same_bits(
    cache: float | None, spread: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one epoch of 7 batches, so that what is kept is used; a resumed run has nothing to start with."""
    settings = {"num_layers": 1, "cache_prefix": cache, "iters": 12}
    _train(spread, choice_data, tmp_path / "a", **settings)
    append, count = Journal.append, 0

    def stop(self: Journal, record: Any) -> None:
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(Journal, "append", stop)
    with pytest.raises(Interrupted):
        _train(spread, choice_data, tmp_path / "b", **settings)
    monkeypatch.setattr(Journal, "append", append)
    _train(spread, choice_data, tmp_path / "b", resume=True, **settings)
    assert np.array_equal(_values(tmp_path / "a"), _values(tmp_path / "b"))
    if cache is not None:  # how much is kept does not matter, either
        _train(spread, choice_data, tmp_path / "c", **{**settings, "cache_prefix": 1e-6})
        assert np.array_equal(_values(tmp_path / "a"), _values(tmp_path / "c"))


def test_blocks_without_sensitive_weights_are_refused(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Those of the shared tiny model all lie in its first block."""
    with pytest.raises(UsageError, match="--num-layers 2: the last 2 blocks have no sensitive weights"):
        _train(tiny, choice_data, tmp_path / "a", num_layers=2)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="num_layers must be at least 1, or -1"):
        TrainConfig(num_layers=0).check()


def test_a_layer_outside_the_blocks_counts_as_after_the_last(tmp_path: Path) -> None:
    """No converter chooses such a weight, but an index is a file from a stranger."""
    model, _ = load_stock_model(write_hf_llama(tmp_path / "hf", tie_word_embeddings=False))
    tensor = SensitiveTensor(np.array([3], np.uint32), mx.zeros(1), np.ones(1, np.float32))
    sparse = SparseModel(model, SensitiveIndex({"lm_head": tensor}))
    assert sparse.train_last(1, mx.zeros(1)).tolist() == [0]
    assert sparse.first_block == 3
