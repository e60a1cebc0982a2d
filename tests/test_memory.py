"""Steps within a memory limit: the same numbers, a smaller peak."""

import gc
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_hf_llama, write_jsonl
from test_train import _train, _values

import zo_mlx
from zo_mlx import objective
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.data import Example, Target
from zo_mlx.estimator import Branches, TwoSided, Vectors, directions
from zo_mlx.exact import ExactGradient
from zo_mlx.fit import _largest_that_fits, blocks_that_fit, exact_tokens_that_fit, tokens_that_fit
from zo_mlx.head import Head, split_head
from zo_mlx.journal import Journal
from zo_mlx.memory import GPU_AHEAD_BYTES, peak_of, with_margin
from zo_mlx.model import load_sparse
from zo_mlx.objective import layout
from zo_mlx.optimizer import Optimizer
from zo_mlx.prefix import Prefix
from zo_mlx.rows import load_dataset
from zo_mlx.step import make_loss, step


@pytest.mark.parametrize("kind", ["choices", "tokens", "long choices", "uneven choices"])
@pytest.mark.parametrize("tokens_at_once", [1, 40, 100, 250, 10_000])
def test_losses_in_parts_are_those_of_one_pass(
    tokens_at_once: int,
    kind: str,
    tiny: Path,
    choice_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Short prompts are shared, too; of the uneven ones, the longer half's alone, and those of all together.
    monkeypatch.setattr(objective, "WORTH_SHARING", 0.45 if kind == "uneven choices" else 0.8)
    sparse, tokenizer, index, _ = load_sparse(tiny)
    file = choice_data / "train.jsonl"
    if kind == "tokens":
        texts: list[dict[str, object]] = [{"text": "a text " + "of some words " * (i % 3)} for i in range(12)]
        file = write_jsonl(tmp_path / "t.jsonl", texts)
    continues = kind in ("long choices", "uneven choices")
    if continues:
        choices = [" not at all", " very much so", " it may be"]
        file = write_jsonl(
            tmp_path / "l.jsonl",
            [
                {
                    "prompt": "a text " * (i % 4 + 1 if kind == "long choices" else 6 if i < 6 else 12),
                    "completion": choices[i % 3],
                    "choices": choices,
                }
                for i in range(12)
            ],
        )
    examples = load_dataset(file, tokenizer, 100).examples[:12]
    whole = split_head(sparse.model)
    passes: list[list[int]] = [[]]  # of the tokens that go through the model

    def pass_begun(*group: Any) -> objective.Batch:
        passes.append([])
        return objective.collate(*group)

    def hidden(tokens: mx.array, **cache: object) -> mx.array:
        passes[-1].append(tokens.size)
        return whole.hidden(tokens, **cache)

    head = Head(hidden, whole.logits, len(sparse.model.layers) if continues else None)
    z = Vectors(mx.random.normal((3, index.size), key=mx.random.key(0)))
    branches = TwoSided().branches(index.initial_values(), z, 0.1)
    shares = TwoSided().shares(examples, 3)
    expected = make_loss(sparse, Head(whole.hidden, whole.logits))(branches, shares)
    passes.clear()
    monkeypatch.setattr(sys.modules["zo_mlx.step"], "collate", pass_begun)
    got = make_loss(sparse, head, tokens_at_once=tokens_at_once)(branches, shares)
    # Texts twice as long round more.
    assert mx.allclose(got, expected, rtol=1e-5, atol=1e-5 if kind == "uneven choices" else 1e-8)
    assert len({round(x, 5) for x in expected.tolist()}) == 6, "the losses do not depend on the values"
    longest = max(layout([[e]], continues)[0] for e in examples)
    assert max(map(sum, passes)) <= max(tokens_at_once, longest)
    assert kind == "uneven choices" or {len(tokens) for tokens in passes} == {2 if continues else 1}
    assert len(passes) == {1: 24, 10_000: 1}.get(tokens_at_once, len(passes))


@pytest.mark.parametrize("last", [6, 3])
def test_a_step_of_a_real_model_stays_within_the_limit(last: int, shallow: Path) -> None:
    """Against MLX's own peak. (A tiny model's depends on how far MLX's threads are ahead of each other.)"""
    sparse, _, index, _ = load_sparse(shallow)
    head, values = split_head(sparse.model), index.initial_values()
    values = mx.concatenate([values[a:b] for a, b in sparse.train_last(last, values)])
    blocks = BlockwiseModel(sparse.model)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 49_000, length).tolist() for length in (160, 256, 200, 256)]
    examples = [Example([row], [[Target(0, len(row) - 1, t)] for t in (5, 6)], 0, ("a", "b")) for row in rows]
    config = resolved(TrainConfig(batch_size=4, directions=4, estimator="two-sided"))

    def prefix(tokens_at_once: int | None) -> Prefix | None:
        return Prefix(blocks, 6 - last, tokens_at_once=tokens_at_once) if last < 6 else None

    def peak(tokens_at_once: int | None, limit: int = 0) -> int:
        first, optimizer = prefix(tokens_at_once), Optimizer(config, values)
        loss = make_loss(sparse, head, first, tokens_at_once)

        def run() -> None:
            if first:
                first.prepare(examples)
            step(loss, optimizer, values, optimizer.state, examples, 1, config)

        gc.collect()  # or the margin would be of what is held by mistake, too
        return peak_of(run, limit and with_margin(limit))

    unlimited, least = peak(None), peak(1)
    assert least < 0.95 * unlimited
    limit = (least + unlimited) // 2
    fit, alone = tokens_that_fit(limit, sparse, head, values, examples, config, prefix(None))
    assert 256 <= fit < 8 * 256
    assert peak(fit, limit) <= 1.01 * limit
    assert alone == pytest.approx(least, rel=0.1)


@pytest.mark.parametrize("curve", [0, 40_000])
def test_looking_for_the_limit_does_not_exceed_it(curve: int) -> None:
    held = mx.get_active_memory()
    for room in range(5_000_000, 60_000_000, 777_777):
        tried: list[int] = []

        def peak(rows: int, tried: list[int] = tried) -> int:
            tried.append(held + 1_000_000 + 1_000_000 * rows + curve * rows**2)
            return tried[-1]

        fit, _ = _largest_that_fits(held + room, 100, 32, peak)
        assert max(tried) <= held + room
        aim = held + 0.7 * room
        assert peak(fit // 100) <= aim
        assert fit == 3200 or peak(fit // 100 + 2) > aim, "a row less than could be"


def test_a_limit_is_recorded_and_changes_nothing_but_rounding(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path / "a")
    _train(tiny, choice_data, tmp_path / "b", memory_limit=0.001)
    _train(tiny, choice_data, tmp_path / "c", tokens_at_once=50)
    config = Journal.read(tmp_path / "b/journal").header["config"]
    assert config["tokens_at_once"] >= 1
    for name in "bc":
        assert np.allclose(_values(tmp_path / name), _values(tmp_path / "a"), rtol=1e-3, atol=1e-5)
    _train(tiny, choice_data, tmp_path / "b", resume=True, memory_limit=0.001, iters=8)


def test_where_mlx_works_ahead_it_is_held(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit() -> int:
        now = mx.set_memory_limit(1)
        mx.set_memory_limit(now)
        return int(now)

    def limits(name: str, **settings: Any) -> set[int]:
        found = set()

        def report(event: dict[str, Any]) -> None:
            if event["event"] == "train":
                found.add(limit())

        _train(tiny, choice_data, tmp_path / name, val_batches=0, report=report, **settings)
        return found

    before = limit()
    assert limits("cpu") == {before}
    monkeypatch.setattr("zo_mlx.memory.on_cpu", lambda: False)
    others = mx.get_active_memory()
    for settings, more in (({}, 0), ({"cache_prefix": 0.1}, 100_000_000)):
        (held,) = limits(f"gpu-{more}", **settings)
        assert 0 < held - others - more - GPU_AHEAD_BYTES < 5_000_000, "the model, and values"
    assert limit() == before
    assert np.array_equal(_values(tmp_path / "cpu"), _values(tmp_path / "gpu-0"))


def test_a_limit_for_exact_gradients(shallow: Path) -> None:
    sparse, _, index, _ = load_sparse(shallow)
    head, values = split_head(sparse.model), index.initial_values()
    rng = np.random.default_rng(0)
    examples = [Example([rng.integers(0, 49_000, 192).tolist()], [[Target(0, 191, 5)]])] * 4
    blocks = BlockwiseModel(sparse.model)

    def peak(**how: Any) -> int:
        gradient = ExactGradient(sparse, head, blocks, **how)
        return peak_of(lambda: mx.eval(gradient(values, examples)[1]))

    unlimited, least = peak(), peak(tokens_at_once=1)
    assert least < 0.9 * unlimited
    limit = (least + unlimited) // 2
    fit, _ = exact_tokens_that_fit(limit, ExactGradient(sparse, head, blocks), values, examples)
    assert 192 <= fit < 4 * 192
    assert peak(tokens_at_once=fit) <= 1.01 * limit


def test_exact_gradients_spill_or_hold_what_a_limit_says(tmp_path: Path) -> None:
    write_hf_llama(tmp_path / "hf", num_hidden_layers=16, hidden_size=256, intermediate_size=256)
    zo_mlx.convert(str(tmp_path / "hf"), str(tmp_path / "m"), num_samples=2, sequence_length=16, progress=False)
    sparse, _, index, _ = load_sparse(tmp_path / "m")
    head, values, blocks = split_head(sparse.model), index.initial_values(), BlockwiseModel(sparse.model)
    examples = [Example([[*range(100)]], [[Target(0, 99, 5)]])] * 8

    def peak(**how: Any) -> int:
        gradient = ExactGradient(sparse, head, blocks, **how)
        return peak_of(lambda: mx.eval(gradient(values, examples)[1]))

    plain, whole = peak(), peak(keep_blocks=-1)
    inputs = 16 * 8 * 100 * 256 * 4
    assert peak(spill=True) < plain - 0.3 * inputs
    limit = (plain + whole) // 2
    keep = blocks_that_fit(limit, ExactGradient(sparse, head, blocks), values, examples)
    assert 1 <= keep < 16
    assert plain < peak(keep_blocks=keep) <= limit


def test_branches_hold_no_values_of_their_own(tiny: Path) -> None:
    """Of K = 100,000 and 16 branches, what is held is the values and a bit for each direction and weight."""
    values = mx.zeros(100_000)
    mx.eval(values)
    before = mx.get_active_memory()
    z = directions(0, 1, 8, 100_000)
    assert mx.get_active_memory() - before < 1.1 * 100_000
    before = mx.get_active_memory()
    branches = TwoSided().branches(values, z, 1e-3)
    peak = peak_of(lambda: [mx.eval(branches.part(i, i + 1000)) for i in range(0, 100_000, 1000)])
    assert peak - before < 16 * 4 * 100_000 / 10
    assert isinstance(branches[2:4], Branches)
