"""Training the last blocks only, and what the other ones compute once."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_hf_llama, write_jsonl
from test_train import _train, _values

import zo_mlx
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.config import TrainConfig
from zo_mlx.data import Example
from zo_mlx.errors import Interrupted, UsageError
from zo_mlx.estimator import TwoSided, Vectors
from zo_mlx.head import split_head
from zo_mlx.index import SensitiveIndex, SensitiveTensor, read_index
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse, load_stock_model
from zo_mlx.prefix import Prefix
from zo_mlx.ranks import Ranks
from zo_mlx.rows import load_dataset
from zo_mlx.run import Run
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
@pytest.mark.parametrize(("cache_bytes", "tokens_at_once"), [(0, None), (0, 30), (1 << 30, None), (1 << 30, 30)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_losses_are_those_of_the_whole_model(
    blocks: int,
    cache_bytes: int,
    tokens_at_once: int | None,
    stackable: bool,
    spread: Path,
    choice_data: Path,
    tmp_path: Path,
) -> None:
    sparse, _, index, _ = load_sparse(spread)
    sparse.stackable = stackable
    head = split_head(sparse.model)
    sparse.train_last(blocks, index.initial_values())
    z = Vectors(mx.random.normal((4, sparse.size), key=mx.random.key(0)))
    values = TwoSided().branches(mx.zeros(sparse.size), z, 0.1)
    examples = _examples(spread, choice_data)
    shares = TwoSided().shares(examples, 4)
    expected = make_loss(sparse, head)(values, shares)
    groups = [examples[:5], examples[5:]]
    prefix = Prefix(BlockwiseModel(sparse.model), sparse.first_block, groups, cache_bytes, tokens_at_once)
    assert sparse.first_block == 3 - blocks
    for _ in range(2):
        assert mx.allclose(make_loss(sparse, head, prefix)(values, shares), expected, rtol=1e-5)
    assert len({round(x, 5) for x in expected.tolist()}) == 8, "the losses do not depend on the values"


@pytest.mark.parametrize("stackable", [True, False])
def test_the_first_blocks_run_once_for_all_branches_and_steps_they_are_prepared_for(
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
    values = TwoSided().branches(mx.zeros(sparse.size), Vectors(mx.ones((2, sparse.size), mx.int8)), 0.1)
    head, blocks = split_head(sparse.model), BlockwiseModel(sparse.model)
    token = 4 * 64  # bytes of what goes into a block
    few = token * sum(len(row) for e in examples[:4] for row in e.rows)
    for prepared, cache_bytes, expected in (
        (0, 0, 4 + 4 + 4),
        (6, 0, 6),
        (0, 1 << 30, 4 + 2),  # two groups
        (0, few, 4 + 2 + 0),  # the first is kept; of the others only what is not there
        (0, few - 1, 4 + 4 + 4),
    ):
        prefix = Prefix(blocks, 2, [examples[:4], examples[4:6]], cache_bytes)
        loss = make_loss(sparse, head, prefix)
        rows.update({0: 0, 1: 0, 2: 0})
        prefix.prepare(examples[:prepared])
        for start in (0, 2, 0):
            loss(values, TwoSided().shares(examples[start : start + 4], 2))
        assert (rows[0], rows[1], rows[2]) == (expected, expected, 24)


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


def test_the_last_half_is_trained_unless_it_has_nothing_to_train(
    spread: Path, tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    """Two of the three blocks; of the other model, all weights are in the first."""
    of_last = [t.size for path, t in read_index(spread).tensors.items() if ".layers.0." not in path]
    assert _train(spread, choice_data, tmp_path / "a", iters=1).trainable == sum(of_last)
    exact = _train(spread, choice_data, tmp_path / "b", iters=1, gradient="exact")
    assert exact.trainable == read_index(spread).size
    assert _train(tiny, choice_data, tmp_path / "c", iters=1).trainable == read_index(tiny).size
    assert Journal.read(tmp_path / "a" / "journal").header["config"]["num_layers"] == 2


def test_long_choices_share_their_prompts_where_that_saves_more(spread: Path, tmp_path: Path) -> None:
    prompt = {"prompt": "a prompt that is long for three choices:", "choices": [" yes", " never", " maybe"]}
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{**prompt, "completion": " yes"}] * 4)
    config = TrainConfig(model=str(spread), data=str(tmp_path), batch_size=1)
    run = Run(config, lambda event: None, progress=False, ranks=Ranks())
    share = run.train_set.unshared
    # The prompt's 40 bytes and a space; of the choices what is left without their last bytes, "ye", "neve" and "mayb".
    assert share == (41 + 2 + 4 + 4) / (3 * 41 + 2 + 4 + 4)
    assert 1 / 3 < 1.5 * share < 2 / 3
    assert run.config.num_layers == -1
    assert run.prefix(1) is None
    for layers, apart in ((1, True), (2, False)):  # of three
        config.num_layers = layers
        assert (Run(config, lambda event: None, progress=False, ranks=Ranks()).prefix(1) is not None) == apart


def test_which_rows_run_together_does_not_depend_on_what_is_there(
    spread: Path, choice_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resumed run would have other last bits."""
    examples = _examples(spread, choice_data)
    blocks = BlockwiseModel(load_sparse(spread)[0].model)
    passes: list[Any] = []
    inputs = blocks.inputs
    monkeypatch.setattr(
        blocks, "inputs", lambda tokens, first: [passes.append(tokens.tolist()), inputs(tokens, first)][1]
    )
    fresh, used = Prefix(blocks, 1), Prefix(blocks, 1)
    fresh.prepare(examples[:3])
    (alone,) = passes
    used.prepare(examples)
    used.prepare(examples[:3])
    assert passes[-1] == alone
    used.prepare(examples[2::-1])
    assert len(passes) == 4


def test_more_blocks_than_there_are_is_all(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    for name, blocks in (("a", -1), ("b", 3), ("c", 99)):
        _train(spread, choice_data, tmp_path / name, num_layers=blocks)
    assert np.array_equal(_values(tmp_path / "a"), _values(tmp_path / "b"))
    assert np.array_equal(_values(tmp_path / "a"), _values(tmp_path / "c"))


@pytest.mark.parametrize("cache", [None, 5e-5, 1.0])  # room for nothing, two of four groups, all
def test_a_resumed_run_has_the_same_bits(
    cache: float | None, spread: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one epoch of 7 batches, so that what is kept is used; a resumed run has nothing to start with."""
    settings = {"num_layers": 1, "cache_prefix": cache, "iters": 12}
    _train(spread, choice_data, tmp_path / "a", **settings)
    config = TrainConfig(**Journal.read(tmp_path / "a/journal").header["config"])
    kept = Run(config, print, progress=False, ranks=Ranks()).prefix(2)
    assert kept is not None
    assert (kept.cached_bytes > 0, kept.cached_bytes > 60_000) == (cache is not None, cache == 1)
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


def test_what_is_kept_leaves_room_for_a_step(spread: Path, tmp_path: Path) -> None:
    long: list[dict[str, object]] = [{"text": f"{i} long " * 60} for i in range(60)]
    write_jsonl(tmp_path / "long/train.jsonl", long)
    settings = {"num_layers": 1, "memory_limit": 0.008, "val_batches": 0}
    message = r"--cache-prefix: 0.00\d GB would be kept, .* leaves 0.00\d of --memory-limit"
    with pytest.raises(UsageError, match=message):
        _train(spread, tmp_path / "long", tmp_path / "a", cache_prefix=1.0, **settings)
    assert _train(spread, tmp_path / "long", tmp_path / "a", **settings).peak_memory < 8e6


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
    assert sparse.train_last(1, mx.zeros(1)) == [(0, 1)]
    assert sparse.first_block == 3
