import gc
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_jsonl

import zo_mlx
from zo_mlx import adapter, estimator
from zo_mlx.data import Example
from zo_mlx.errors import UsageError, ZoError
from zo_mlx.index import FILE_NAME, read_index
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse
from zo_mlx.progress import Meter
from zo_mlx.sparse import SparseModel
from zo_mlx.step import step

FAST = {
    "iters": 6, "batch_size": 4, "directions": 2, "estimator": "two-sided", "save_every": 3, "steps_per_eval": 4,
    "progress": False,
}  # fmt: skip


def _train(tiny: Path, data: Path, out: Path, **changes: Any) -> zo_mlx.TrainResult:
    return zo_mlx.train(**{**FAST, "model": str(tiny), "data": str(data), "adapter_path": str(out), **changes})


def _values(out: Path) -> np.ndarray:
    return np.array(adapter.read_snapshot(out).values)


def test_training_lowers_the_loss(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    before = zo_mlx.evaluate(*zo_mlx.load(tiny), choice_data / "train.jsonl", progress=False)
    result = _train(tiny, choice_data, tmp_path / "a", iters=100, batch_size=16, directions=8, learning_rate=1e-3)
    trained = zo_mlx.load(tiny, tmp_path / "a")
    after = zo_mlx.evaluate(*trained, choice_data / "train.jsonl", progress=False)
    assert after.loss < 0.6 * before.loss  # 0.30 to 0.41 with five seeds
    assert result.after is not None
    again = zo_mlx.evaluate(*trained, choice_data / "valid.jsonl", progress=False)
    assert again.loss == pytest.approx(result.after.loss, abs=1e-5)


def test_the_journal_alone_gives_the_values(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Replayed in numpy from the file: v - lr * mean(g z), with z from the documented key and lr falling by 0.1%."""
    _train(tiny, choice_data, tmp_path / "a", learning_rate=1e-3, seed=9)
    journal = Journal.read(tmp_path / "a/journal")
    assert [r.step for r in journal.records()] == [1, 2, 3, 4, 5, 6]
    values = np.array(read_index(tiny).initial_values(), np.float64)
    for record in journal.records():
        z = np.array(estimator.directions(9, record.step, 2, len(values)).part((0, 1), 0, len(values)), np.float64)
        values -= 1e-3 * 0.999 ** (record.step - 1) * (record.projected[:, None] * z).mean(axis=0)
    assert np.abs(values - _values(tmp_path / "a")).max() < 1e-6


def test_an_index_of_another_model_is_refused(tiny: Path, tiny_hf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    settings = {"density": 0.01, "q_group_size": 32, "num_samples": 4, "sequence_length": 32, "progress": False}
    zo_mlx.convert(str(tiny_hf), str(other), **{**settings, "q_bits": 8})
    shutil.copy(tiny / FILE_NAME, other)
    with pytest.raises(UsageError, match="belongs to another model"):
        load_sparse(other)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    with pytest.raises(ZoError, match=r"the loss is not finite at step \d+: stopped; the state after step (\d+)"):
        _train(tiny, choice_data, out, iters=50, learning_rate=1e30)
    snapshot = adapter.read_snapshot(out)
    assert snapshot.step == len(Journal.read(out / "journal"))
    assert np.isfinite(np.array(snapshot.values)).all()


@pytest.mark.parametrize("field", ["text", "completion", "messages"])
def test_mlx_lms_formats_train_and_give_perplexity(field: str, tiny: Path, tmp_path: Path) -> None:
    texts = [f"the {w} is red" for w in ["cat", "dog", "hen", "cow", "ant", "bee", "owl", "fox"]]
    records: list[dict[str, object]] = {
        "text": [{"text": t} for t in texts],
        "completion": [{"prompt": t, "completion": "ok"} for t in texts],
        "messages": [
            {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "ok"}]} for t in texts
        ],
    }[field]
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", records)
    result = _train(tiny, tmp_path / "data", tmp_path / "a", iters=30, learning_rate=1e-3, mask_prompt=field != "text")
    assert result.before is not None
    assert result.after is not None
    assert result.after.perplexity is not None
    assert result.after.loss < result.before.loss


def test_events_carry_mlx_lms_names(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    _train(tiny, choice_data, tmp_path / "a", report=events.append, steps_per_report=3, test=True)
    kinds = [(e["event"], e.get("iteration")) for e in events if e["event"] != "warning"]  # that it is short
    best = kinds.pop(-2)
    assert kinds == [
        ("validation", 0), ("train", 3), ("validation", 4), ("train", 6), ("validation", 6), ("exported", 6),
        ("test", 6),
    ]  # fmt: skip
    assert best[0] == "exported"
    assert {"train_loss", "learning_rate", "iterations_per_second", "tokens_per_second", "peak_memory"} < set(events[1])
    json.dumps(events)


def test_without_validation_there_is_none(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    result = _train(tiny, choice_data, tmp_path / "a", val_batches=0)
    assert (result.before, result.after) == (None, None)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(choice_data / "train.jsonl", data)
    events: list[dict[str, Any]] = []
    assert _train(tiny, data, tmp_path / "b", report=events.append).after is None
    assert "valid.jsonl" in events[0]["message"]


def test_generate_uses_the_adapter(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Greedy decoding with key-value caches equals greedy decoding by full passes, with the trained values."""
    _train(tiny, choice_data, tmp_path / "a", learning_rate=0.05)
    model, tokenizer = zo_mlx.load(tiny, tmp_path / "a")
    tokens = tokenizer.encode("stone ->")
    expected = []
    for _ in range(5):
        expected.append(int(model(mx.array([tokens + expected]))[0, -1].argmax()))
    text = zo_mlx.generate(model, tokenizer, "stone ->", max_tokens=5)
    assert text == tokenizer.decode(expected)
    sampled = zo_mlx.generate(model, tokenizer, "stone ->", max_tokens=5, sampler=lambda p: mx.argmin(p, axis=-1))
    assert sampled != text
    base, _ = zo_mlx.load(tiny)
    probe = mx.array([tokens])
    assert mx.abs(base(probe) - model(probe)).max() > 1e-3


def test_one_machine_has_all_of_a_model_that_is_split(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    for out, split in ((tmp_path / "a", "auto"), (tmp_path / "b", "model")):
        _train(tiny, choice_data, out, split=split, learning_rate=0.05)
        assert (out / adapter.LORA_TENSORS).exists()
    assert (_values(tmp_path / "a") == _values(tmp_path / "b")).all()


def test_prompts_longer_than_the_models_context_are_refused(tiny: Path, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"prompt": "a" * 600, "completion": "b", "choices": ["b", "c"]}] * 16
    write_jsonl(tmp_path / "data/train.jsonl", records)  # the tiny model's context is 512 tokens
    with pytest.raises(
        UsageError, match=r"train\.jsonl, line 1: prompt and choice have 601 tokens, more than fit .* 512"
    ):
        _train(tiny, tmp_path / "data", tmp_path / "a")


def test_validation_takes_as_many_batches_as_asked_for(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    for batches, examples in ((1, 4), (-1, 8), (25, 8)):
        result = _train(tiny, choice_data, tmp_path / str(batches), val_batches=batches, iters=0)
        assert result.before is not None
        assert result.before.examples == examples


def test_warnings_reach_those_who_do_not_listen(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(choice_data / "train.jsonl", tmp_path / "data")
    with pytest.warns(UserWarning, match="training goes on without validation"):
        _train(tiny, tmp_path / "data", tmp_path / "a", iters=1)


def test_a_run_leaves_no_model_behind(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Its parts refer to each other, and would wait for Python's collector beside the next run's model."""
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(thing, SparseModel) for thing in gc.get_objects())
        _train(tiny, choice_data, tmp_path / "a")
        assert sum(isinstance(thing, SparseModel) for thing in gc.get_objects()) == before
    finally:
        gc.enable()


def test_every_epoch_sees_every_example_once_in_another_order(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, ...]]] = []

    def spy(loss: Any, optimizer: Any, values: Any, state: Any, examples: Any, *more: Any) -> Any:
        seen.append([tuple(e.rows[0]) for e in examples])
        return step(loss, optimizer, values, state, examples, *more)

    monkeypatch.setattr("zo_mlx.run.step", spy)
    _train(tiny, choice_data, tmp_path / "a", iters=10)
    _train(tiny, choice_data, tmp_path / "a", iters=14, resume=True)
    epochs = [[row for batch in seen[i : i + 7] for row in batch] for i in (0, 7)]  # 28 examples, 4 a step
    assert len(set(epochs[0])) == 28
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_the_mask_reaches_the_loss(tiny: Path, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"prompt": f"the {i} is", "completion": "red"} for i in range(8)]
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", records)
    losses = []
    for mask in (False, True):
        out, settings = tmp_path / str(mask), {"mask_prompt": mask, "batch_size": 8, "epsilon": 1e-6}
        _train(tiny, tmp_path / "data", out, iters=0, **settings)
        untrained = zo_mlx.load(tiny, out)
        expected = zo_mlx.evaluate(*untrained, tmp_path / "data/valid.jsonl", mask_prompt=mask, progress=False).loss
        result = _train(tiny, tmp_path / "data", out, iters=1, resume=True, **settings)
        assert result.before is not None
        assert result.before.loss == pytest.approx(expected, abs=1e-4)
        assert result.train_loss == pytest.approx(expected, abs=1e-3)
        losses.append(expected)
    assert abs(losses[0] - losses[1]) > 0.1


def test_the_share_of_padding_is_reported() -> None:
    meter = Meter()
    meter.add(2.0, 0.5, [Example([[1] * 3], [[]]), Example([[1] * 5], [[]])])
    found = meter.take()
    assert (found["padding"], found["tokens_per_second"]) == (pytest.approx(0.2), 4.0)
