import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from test_files import run_on_full_disk
from test_train import FAST, _train, _values

import zo_mlx
from zo_mlx import adapter
from zo_mlx.errors import Interrupted, UsageError
from zo_mlx.files import load_safetensors, locked
from zo_mlx.journal import Journal, record_size


@pytest.mark.parametrize(
    "keep", ["everything", "journal", "old optimizer", "damaged optimizer", "values of another run"]
)
@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 1e-3), ("adam", 1e-3), ("sgd", "auto")])
def test_resuming_is_bit_identical(
    optimizer: str, rate: float | str, keep: str, tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": rate, "directions": 4}
    _train(tiny, choice_data, whole, **settings)
    _train(tiny, choice_data, parts, **settings, iters=2)
    old = (parts / adapter.OPTIMIZER).read_bytes()
    _train(tiny, choice_data, parts, resume=True, **settings, iters=5)
    if keep == "journal":
        adapter.remove_run(parts)
    elif keep == "old optimizer":
        (parts / adapter.OPTIMIZER).write_bytes(old)
    elif keep == "damaged optimizer":
        arrays, metadata = load_safetensors(parts / adapter.OPTIMIZER)
        mx.save_safetensors(str(parts / adapter.OPTIMIZER), {"rule.step": arrays["rule.step"]}, metadata)
    elif keep == "values of another run":
        _train(tiny, choice_data, tmp_path / "other", **{**settings, "iters": 5, "seed": 1})
        for name in (adapter.VALUES, adapter.OPTIMIZER):
            shutil.copy(tmp_path / "other" / name, parts)
    _train(tiny, choice_data, parts, resume=True, **settings)
    assert (_values(parts) == _values(whole)).all()
    old_records, new_records = (Journal.read(d / "journal").records() for d in (whole, parts))
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
    with pytest.raises(UsageError, match="no such data"):  # found before anything is removed
        _train(tiny, tmp_path / "nowhere", out, overwrite=True)
    assert (out / "journal").read_bytes() == before
    _train(tiny, choice_data, out, seed=1, overwrite=True)
    assert (out / "journal").read_bytes() != before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / adapter.OPTIMIZER).write_text("another program's")
    with pytest.raises(UsageError, match="holds files that a run would replace, but no run of zo-mlx"):
        _train(tiny, choice_data, tmp_path / "b")
    with pytest.raises(UsageError, match="holds a model: give another --adapter-path"):
        _train(tiny, choice_data, tiny, overwrite=True)


def test_a_run_that_is_complete_says_so(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    for iters in (6, 3):
        _train(tiny, choice_data, tmp_path / "a", iters=iters, resume=iters == 3, report=events.append)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert [w.partition(" ")[2] for w in warnings if "larger" in w] == [
        "has all of its 6 steps already; a larger --iters goes on"
    ]
    assert sum("only measure slopes" in w for w in warnings) == 2  # 12 directions are fewer than 16


def test_a_directory_in_use_is_refused(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path / "a")
    before = (tmp_path / "a/journal").read_bytes()
    with locked(tmp_path / "a"):
        for how in ("resume", "overwrite"):
            with pytest.raises(UsageError, match="is in use by another process"):
                _train(tiny, choice_data, tmp_path / "a", iters=9, **{how: True})
    assert (tmp_path / "a/journal").read_bytes() == before
    assert _train(tiny, choice_data, tmp_path / "a", iters=9, resume=True).iterations == 9


def test_resuming_with_other_settings_is_refused(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    _train(tiny, choice_data, out)
    with pytest.raises(UsageError, match=r"keeps its settings: learning_rate was"):
        _train(tiny, choice_data, out, resume=True, learning_rate=0.5)
    with pytest.raises(UsageError, match=r"keeps its settings: objective was cross-entropy"):
        _train(tiny, choice_data, out, resume=True, objective="accuracy")
    with pytest.raises(UsageError, match="holds no training run"):
        _train(tiny, choice_data, tmp_path / "none", resume=True)


def test_data_that_moved_is_not_looked_for_on_the_hub(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(choice_data, "some/data")
    _train(tiny, Path("some/data"), tmp_path / "a")
    Path("some").rename("other")
    with pytest.raises(UsageError, match="the run's data are no longer in some/data: say with --data"):
        zo_mlx.train(adapter_path=tmp_path / "a", resume=True, iters=8)
    assert zo_mlx.train(adapter_path=tmp_path / "a", resume=True, iters=8, data=Path("other/data")).iterations == 8


def test_what_is_left_to_be_chosen_may_be_left_again(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "epsilon": "auto"}
    _train(tiny, choice_data, tmp_path / "a", **settings)
    assert _train(tiny, choice_data, tmp_path / "a", **settings, iters=9, resume=True).iterations == 9


def test_a_run_that_replaces_another_leaves_none_of_its_ranks_journals(
    tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    """They would be of the same run, and longer."""
    _train(tiny, choice_data, tmp_path / "a")
    (tmp_path / "a/rank-1").mkdir()
    shutil.copy(tmp_path / "a/journal", tmp_path / "a/rank-1")
    _train(tiny, choice_data, tmp_path / "a", iters=2, overwrite=True)
    _train(tiny, choice_data, tmp_path / "a", iters=2, resume=True)
    assert len(Journal.read(tmp_path / "a/journal")) == 2


@pytest.mark.parametrize("name", ["best/adapters.safetensors", "best/values.safetensors", "rank-1/journal"])
def test_files_below_the_directory_are_not_removed_unasked(
    name: str, tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a" / name
    file.parent.mkdir(parents=True)
    file.write_text("somebody's own")
    with pytest.raises(UsageError, match="a holds files that a run would replace"):
        _train(tiny, choice_data, tmp_path / "a")
    assert file.read_text() == "somebody's own"
    assert [p for p in (tmp_path / "a").rglob("*") if p.is_file()] == [file]


def test_values_that_the_journal_does_not_lead_to_are_not_gone_on_from(
    tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    """The journal has lost records of which there is a snapshot; and then other data lead elsewhere."""
    rates = {"learning_rate": 1e-2, "val_batches": 0}
    settings: dict[str, Any] = {**FAST, **rates, "model": str(tiny), "adapter_path": str(tmp_path / "a")}
    zo_mlx.train(**settings, data=str(choice_data))
    journal = Journal.read(tmp_path / "a/journal")
    os.truncate(journal.path, journal.size_bytes - 2 * record_size(journal.header))
    other = shutil.copytree(choice_data, tmp_path / "other")
    lines = (other / "train.jsonl").read_text().splitlines(keepends=True)
    (other / "train.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "write_snapshot", lambda *_: None)  # as if it had been killed
        changed = {**settings, "data": str(other), "steps_per_report": 1}
        zo_mlx.train(**changed, resume=True, changed_data=True, report=_interrupt_at(settings["iters"]))
    zo_mlx.train(**{**settings, "iters": settings["iters"] + 1}, data=str(other), resume=True)
    zo_mlx.replay(tiny, tmp_path / "a/journal", tmp_path / "again", progress=False)
    assert (_values(tmp_path / "a") == _values(tmp_path / "again")).all()


def test_directions_fit_the_batch_of_either_gradient(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(tiny), "data": str(choice_data), "adapter_path": str(tmp_path / "a"), "gradient": "exact",
        "estimator": "two-sided", "directions": 8, "val_batches": 0, "progress": False,
    }  # fmt: skip
    zo_mlx.train(**settings, iters=1)
    assert zo_mlx.train(**settings, iters=2, resume=True).iterations == 2


def test_settings_may_be_given_again_when_resuming(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Also those that depend on others: directions are fitted to the recorded batch size, not to the default one."""
    schedule = {"name": "linear_schedule", "arguments": (1e-3, 1e-4, 10)}
    _train(tiny, choice_data, tmp_path / "a", batch_size=12, directions=6, lr_schedule=schedule)
    settings = {"model": str(tiny), "data": str(choice_data), "adapter_path": str(tmp_path / "a"), "progress": False}
    result = zo_mlx.train(resume=True, directions=6, lr_schedule=schedule, iters=7, **settings)
    assert result.iterations == 7
    with pytest.raises(UsageError, match="a resumed run keeps its settings: directions was 6"):
        zo_mlx.train(resume=True, directions=3, iters=8, **settings)


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
