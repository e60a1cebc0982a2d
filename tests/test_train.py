import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_jsonl
from test_files import run_on_full_disk

import zo_mlx
from zo_mlx import adapter, estimator
from zo_mlx.errors import Interrupted, UsageError, ZoError
from zo_mlx.files import load_safetensors
from zo_mlx.index import FILE_NAME, read_index
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse
from zo_mlx.step import step

FAST = {"iters": 6, "batch_size": 4, "directions": 2, "save_every": 3, "steps_per_eval": 4, "progress": False}


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
    assert [r.step for r in journal.records] == [1, 2, 3, 4, 5, 6]
    values = np.array(read_index(tiny).initial_values(), np.float64)
    for record in journal.records:
        z = np.array(estimator.directions(9, record.step, 2, len(values)), np.float64)
        values -= 1e-3 * 0.999 ** (record.step - 1) * (record.projected[:, None] * z).mean(axis=0)
    assert np.abs(values - _values(tmp_path / "a")).max() < 1e-6


@pytest.mark.parametrize(
    "keep", ["everything", "journal", "old optimizer", "damaged optimizer", "values of another run"]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resuming_is_bit_identical(optimizer: str, keep: str, tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"optimizer": optimizer, "learning_rate": 1e-3}
    _train(tiny, choice_data, whole, **settings)
    _train(tiny, choice_data, parts, **settings, iters=2)
    old = (parts / adapter.OPTIMIZER).read_bytes()
    _train(tiny, choice_data, parts, resume=True, iters=5)
    if keep == "journal":
        adapter.remove_run(parts)
    elif keep == "old optimizer":
        (parts / adapter.OPTIMIZER).write_bytes(old)
    elif keep == "damaged optimizer":
        arrays, metadata = load_safetensors(parts / adapter.OPTIMIZER)
        mx.save_safetensors(str(parts / adapter.OPTIMIZER), {"step": arrays["step"]}, metadata)
    elif keep == "values of another run":
        _train(tiny, choice_data, tmp_path / "other", **settings, iters=5, seed=1)
        for name in (adapter.VALUES, adapter.OPTIMIZER):
            shutil.copy(tmp_path / "other" / name, parts)
    _train(tiny, choice_data, parts, resume=True, iters=6)
    assert (_values(parts) == _values(whole)).all()
    old_records, new_records = (Journal.read(d / "journal").records for d in (whole, parts))
    assert [(r.step, r.loss, r.projected.tolist()) for r in old_records] == [
        (r.step, r.loss, r.projected.tolist()) for r in new_records
    ]


def test_a_run_is_not_overwritten_unasked(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    _train(tiny, choice_data, out)
    before = (out / "journal").read_bytes()
    with pytest.raises(UsageError, match="already holds a run; give --resume .* or --overwrite"):
        _train(tiny, choice_data, out, seed=1)
    assert (out / "journal").read_bytes() == before
    with pytest.raises(UsageError, match="no such data file"):  # found before anything is removed
        _train(tiny, tmp_path / "nowhere", out, overwrite=True)
    assert (out / "journal").read_bytes() == before
    _train(tiny, choice_data, out, seed=1, overwrite=True)
    assert (out / "journal").read_bytes() != before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / adapter.OPTIMIZER).write_text("another program's")
    with pytest.raises(UsageError, match="already holds a run"):
        _train(tiny, choice_data, tmp_path / "b")


def test_a_directory_in_use_is_refused(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path / "a")
    before = (tmp_path / "a/journal").read_bytes()
    with adapter.locked(tmp_path / "a"):
        for how in ("resume", "overwrite"):
            with pytest.raises(UsageError, match="is in use: another process is training there"):
                _train(tiny, choice_data, tmp_path / "a", iters=9, **{how: True})
    assert (tmp_path / "a/journal").read_bytes() == before
    assert _train(tiny, choice_data, tmp_path / "a", iters=9, resume=True).iterations == 9


def test_resuming_with_other_settings_or_files_is_refused(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    _train(tiny, choice_data, out)
    with pytest.raises(UsageError, match=r"keeps its settings: learning_rate was"):
        _train(tiny, choice_data, out, resume=True, learning_rate=0.5)
    data = tmp_path / "data"
    shutil.copytree(choice_data, data)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(UsageError, match=r"tokenized training set and train\.jsonl changed since it began"):
        _train(tiny, data, out, resume=True)
    with pytest.raises(UsageError, match="belongs to another run: tokenized training set changed"):
        _train(_with_other_tokenizer(tiny, tmp_path / "m"), choice_data, out, resume=True)
    with pytest.raises(UsageError, match="holds no training run"):
        _train(tiny, choice_data, tmp_path / "none", resume=True)


def _with_other_tokenizer(model: Path, copy: Path) -> Path:
    shutil.copytree(model, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


def test_settings_may_be_given_again_when_resuming(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Also those that depend on others: directions are fitted to the recorded batch size, not to the default one."""
    schedule = {"name": "linear_schedule", "arguments": (1e-3, 1e-4, 10)}
    _train(tiny, choice_data, tmp_path / "a", batch_size=12, directions=6, lr_schedule=schedule)
    settings = {"model": str(tiny), "data": str(choice_data), "adapter_path": str(tmp_path / "a"), "progress": False}
    result = zo_mlx.train(resume=True, directions=6, lr_schedule=schedule, iters=7, **settings)
    assert result.iterations == 7
    with pytest.raises(UsageError, match="a resumed run keeps its settings: directions was 6"):
        zo_mlx.train(resume=True, directions=3, iters=8, **settings)


def test_an_index_or_adapter_of_another_model_is_refused(
    tiny: Path, tiny_hf: Path, choice_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    settings = {"density": 0.01, "q_group_size": 32, "num_samples": 4, "sequence_length": 32, "progress": False}
    zo_mlx.convert(str(tiny_hf), str(other), **{**settings, "q_bits": 8})
    _train(tiny, choice_data, tmp_path / "a")
    with pytest.raises(UsageError, match="was trained on another model: base_model and index differs"):
        zo_mlx.load(other, tmp_path / "a")
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
    assert snapshot.step == len(Journal.read(out / "journal").records)
    assert np.isfinite(np.array(snapshot.values)).all()


def _interrupt_at(step: int) -> Callable[[dict[str, Any]], None]:
    def report(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["iteration"] == step:
            raise KeyboardInterrupt

    return report


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after step 2; go on with the same command and --resume"):
        _train(tiny, choice_data, tmp_path / "a", report=_interrupt_at(2), steps_per_report=1)
    _train(tiny, choice_data, tmp_path / "a", resume=True)
    assert (_values(tmp_path / "a") == _values(tmp_path / "whole")).all()


KILLED = """
import zo_mlx, os, signal, sys
from zo_mlx.cli import main
from zo_mlx.journal import Journal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
append, step, how = Journal.append, int(sys.argv[1]), getattr(signal, sys.argv[2])
def killing_append(journal, record):
    if record.step == step:
        os.kill(os.getpid(), how)
    append(journal, record)
Journal.append = killing_append
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("how", "code"), [("SIGKILL", -9), ("SIGTERM", 130), ("SIGINT", 130)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    how: str, code: int, tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    _train(tiny, choice_data, tmp_path / "whole")
    flags = {k: v for k, v in FAST.items() if k != "progress"} | {"model": tiny, "data": choice_data}
    words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    command = [sys.executable, "-c", KILLED, "5", how, "train", *words, "--adapter-path", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert code == -9 or "go on with the same command and --resume" in done.stderr
    assert len(Journal.read(tmp_path / "a/journal").records) == 4
    _train(tiny, choice_data, tmp_path / "a", resume=True)
    assert (_values(tmp_path / "a") == _values(tmp_path / "whole")).all()


def test_a_full_disk_stops_the_run_and_resuming_works(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path / "whole", iters=40)
    arguments = {**FAST, "model": str(tiny), "data": str(choice_data), "adapter_path": str(tmp_path / "a"), "iters": 40}
    code = f"""
try:
    zo_mlx.train(**{arguments!r})
except ZoError as e:
    print("ZoError", e)
"""
    # The values (larger) never fit; then the journal stops fitting.
    size = (tmp_path / "whole/journal").stat().st_size
    assert run_on_full_disk(code, size - 100).startswith("ZoError cannot write")
    _train(tiny, choice_data, tmp_path / "a", iters=40, resume=True)
    assert (_values(tmp_path / "a") == _values(tmp_path / "whole")).all()


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
    kinds = [(e["event"], e.get("iteration")) for e in events]
    assert kinds == [
        ("validation", 0), ("train", 3), ("validation", 4), ("train", 6), ("validation", 6), ("test", 6),
    ]  # fmt: skip
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
    assert "valid.jsonl is missing" in events[0]["message"]


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
    base, _ = zo_mlx.load(tiny)
    probe = mx.array([tokens])
    assert mx.abs(base(probe) - model(probe)).max() > 1e-3


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


def test_every_epoch_sees_every_example_once_in_another_order(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, ...]]] = []

    def spy(loss: Any, optimizer: Any, values: Any, state: Any, examples: Any, number: int, config: Any) -> Any:
        seen.append([tuple(e.rows[0]) for e in examples])
        return step(loss, optimizer, values, state, examples, number, config)

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
