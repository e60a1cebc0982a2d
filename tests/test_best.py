"""The best values on the validation set are kept, and a run can stop when they stay the best."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_resume import _interrupt_at
from test_train import FAST, _train, _values

import zo_mlx
from zo_mlx.adapter import BEST
from zo_mlx.errors import Interrupted, UsageError
from zo_mlx.journal import Journal

SETTINGS = {"iters": 16, "learning_rate": 1e-3, "seed": 8}


def test_the_best_values_are_an_adapter_of_their_own(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    result = _train(tiny, choice_data, tmp_path / "a", report=events.append, **SETTINGS)
    losses = {e["iteration"]: e["loss"] for e in events if e["event"] == "validation"}
    assert list(losses) == [0, 4, 8, 12, 16]
    best = min(losses, key=lambda i: losses[i])
    assert 0 < best < 16, "the loss falls and rises again"
    assert result.best is not None
    assert (result.best.iteration, result.best.loss) == (best, losses[best])
    model, tokenizer = zo_mlx.load(tiny, tmp_path / "a" / BEST)
    again = zo_mlx.evaluate(model, tokenizer, choice_data / "valid.jsonl", progress=False)
    assert again.loss == pytest.approx(losses[best], abs=1e-5)


def test_a_resumed_run_keeps_the_best_of_both_parts(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    whole = _train(tiny, choice_data, tmp_path / "whole", **SETTINGS)
    with pytest.raises(Interrupted):
        _train(tiny, choice_data, tmp_path / "a", report=_interrupt_at(10), steps_per_report=1, **SETTINGS)
    parts = _train(tiny, choice_data, tmp_path / "a", resume=True)
    assert parts.best == whole.best
    assert (_values(tmp_path / "a" / BEST) == _values(tmp_path / "whole" / BEST)).all()
    _train(tiny, choice_data, tmp_path / "a", overwrite=True, **{**SETTINGS, "val_batches": 0})
    assert not list((tmp_path / "a" / BEST).iterdir())


@pytest.mark.parametrize(("seed", "best"), [(8, 8), (4, 0)])
def test_lost_best_values_are_found_again(seed: int, best: int, tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Not only those of the validations to come, which here are worse."""
    whole = _train(tiny, choice_data, tmp_path / "a", **{**SETTINGS, "seed": seed})
    assert whole.best is not None
    assert whole.best.iteration == best
    values = _values(tmp_path / "a" / BEST)
    (tmp_path / "a" / BEST / "values.safetensors").unlink()
    again = _train(tiny, choice_data, tmp_path / "a", resume=True)
    assert again.best == whole.best
    assert (_values(tmp_path / "a" / BEST) == values).all()


def test_patience_stops_a_run_that_gets_no_better(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    settings = {"iters": 100, "learning_rate": 0.0, "patience": 2}
    assert _train(tiny, choice_data, tmp_path / "a", **settings).iterations == 8
    assert _train(tiny, choice_data, tmp_path / "a", resume=True, iters=100).iterations == 8
    assert _train(tiny, choice_data, tmp_path / "a", resume=True, iters=100, patience=3).iterations == 12
    assert len(Journal.read(tmp_path / "a/journal")) == 12


def test_seeds_are_runs_of_their_own_with_mean_and_spread(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    settings = {**FAST, "model": str(tiny), "data": str(choice_data), "adapter_path": str(tmp_path / "s"), "seed": 5}
    result = zo_mlx.train_seeds(3, report=events.append, test=True, **settings)
    assert [e["seed"] for e in events if e["event"] == "test"] == [5, 6, 7]
    losses = []
    for seed in (5, 6, 7):
        alone = _train(tiny, choice_data, tmp_path / f"{seed}", seed=seed)
        assert (_values(tmp_path / f"s/seed-{seed}") == _values(tmp_path / f"{seed}")).all()
        assert alone.after is not None
        losses.append(alone.after.loss)
    assert result.spread["val"]["loss"] == pytest.approx((np.mean(losses), np.std(losses, ddof=1)))
    assert set(result.spread) == {"val", "test"}
    with pytest.raises(UsageError, match="seed-5 already holds a run"):
        zo_mlx.train_seeds(3, **settings)
    with pytest.raises(UsageError, match="seed-5 already holds a run"):  # before the fourth one is trained
        zo_mlx.train_seeds(2, **{**settings, "seed": 4})
    assert not (tmp_path / "s/seed-4").exists()
    for wrong in ({"seed": "five"}, {"adapter_path": 5}):
        with pytest.raises(UsageError, match="must be"):
            zo_mlx.train_seeds(3, **{**settings, **wrong})
    with pytest.raises(UsageError, match="exclude each other"):  # before the fourth one is trained
        zo_mlx.train_seeds(2, resume=True, overwrite=True, **{**settings, "seed": 7})
    assert not (tmp_path / "s/seed-8").exists()
    again = zo_mlx.train_seeds(4, resume=True, **{**settings, "iters": 6})  # the fourth had not begun
    assert [run.iterations for run in again.runs] == [6] * 4
