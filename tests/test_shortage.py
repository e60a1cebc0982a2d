"""Steps and evaluations that do not fit, and evaluations that fail, are no reason to lose a run."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import _train, _values

from zo_mlx import setup, step
from zo_mlx.adapter import read_best
from zo_mlx.errors import ZoError
from zo_mlx.evaluate import Evaluation, evaluate_dataset
from zo_mlx.exact import ExactGradient
from zo_mlx.journal import Journal
from zo_mlx.objective import Batch, collate


def _warnings(train: Callable[..., Any], *args: Any, **changes: Any) -> list[str]:
    events: list[dict[str, Any]] = []
    train(*args, **{"learning_rate": 1e-3, **changes}, report=events.append)
    return [e["message"] for e in events if e["event"] == "warning"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets passes of more than 120 tokens fail as MLX does; the sizes of the others."""
    sizes: list[int] = []

    def failing(*args: Any) -> Batch:
        batch = collate(*args)
        if batch.tokens.size > 120:
            raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")
        sizes.append(batch.tokens.size)
        return batch

    monkeypatch.setattr(step, "collate", failing)
    return sizes


def test_a_step_that_does_not_fit_is_taken_in_smaller_passes_from_then_on(
    short: list[int], tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"learning_rate": 1e-3, "estimator": "one-sided", "directions": 3, "iters": 8, "val_batches": 0}
    warnings = _warnings(_train, tiny, choice_data, tmp_path / "a", **settings)
    assert len(warnings) == 1
    assert warnings[0].startswith("step 1 fails: [malloc] Unable to allocate 4096 bytes.: going on with ")
    used = [r.tokens_at_once for r in Journal.read(tmp_path / "a/journal").records()]
    assert 0 < min(used) <= max(used) <= 120
    assert max(short) <= max(used)

    monkeypatch.setattr(step, "collate", collate)  # there is memory again
    _train(tiny, choice_data, tmp_path / "whole", **settings)
    # Slopes are differences of losses: what these are rounded by counts a thousandfold.
    np.testing.assert_allclose(_values(tmp_path / "a"), _values(tmp_path / "whole"), atol=1e-4)
    assert {r.tokens_at_once for r in Journal.read(tmp_path / "whole/journal").records()} == {0}


def test_a_resumed_run_goes_on_with_as_many_tokens_as_the_last_step(
    short: list[int], tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"learning_rate": 1e-3, "estimator": "one-sided", "directions": 3, "val_batches": 0}
    _train(tiny, choice_data, tmp_path / "whole", **settings, iters=8, report=lambda e: None)
    _train(tiny, choice_data, tmp_path / "a", **settings, iters=4, report=lambda e: None)
    monkeypatch.setattr(step, "collate", collate)  # there is memory again
    _train(tiny, choice_data, tmp_path / "a", **settings, iters=8, resume=True)
    found, expected = ([*Journal.read(tmp_path / name / "journal").records()] for name in ("a", "whole"))
    assert [(r.tokens_at_once, r.loss) for r in found] == [(r.tokens_at_once, r.loss) for r in expected]
    assert (_values(tmp_path / "a") == _values(tmp_path / "whole")).all()


def test_blocks_given_up_are_not_kept_again_after_a_resume(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[int | None, int]] = []

    class Failing(ExactGradient):
        def __call__(self, *args: Any) -> Any:
            if self.keep_blocks:
                raise MemoryError("no memory")
            return super().__call__(*args)

    monkeypatch.setattr(setup, "ExactGradient", Failing)
    settings = {"gradient": "exact", "keep_blocks": 2, "batch_size": 8, "val_batches": 0}
    _train(tiny, choice_data, tmp_path / "a", **settings, iters=2, report=lambda e: None)
    monkeypatch.setattr(setup, "ExactGradient", lambda *args: kept.append(args[4:6]) or ExactGradient(*args))
    _train(tiny, choice_data, tmp_path / "a", **settings, iters=3, resume=True)
    recorded = Journal.read(tmp_path / "a/journal").last()
    assert recorded
    assert kept[-1] == (recorded.tokens_at_once, 0)


def test_what_does_not_fit_example_by_example_is_an_error(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Batch:
        raise MemoryError("no memory")

    monkeypatch.setattr(step, "collate", failing)
    with pytest.raises(MemoryError):
        _train(tiny, choice_data, tmp_path / "a", val_batches=0, report=lambda e: None)


def test_other_errors_are_not_taken_for_a_shortage(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Batch:
        calls.append(args)
        raise RuntimeError("[matmul] shapes do not fit")

    calls: list[Any] = []
    monkeypatch.setattr(step, "collate", failing)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        _train(tiny, choice_data, tmp_path / "a", val_batches=0)
    assert len(calls) == 1


def test_a_step_beyond_the_limit_makes_the_next_ones_smaller(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_mlx.run.OVERRUN", 1e-6)  # what was planned for 5 GB takes more than 5 KB
    warnings = _warnings(_train, tiny, choice_data, tmp_path / "a", memory_limit=5.0, val_batches=0)
    assert len(warnings) == 1
    assert "GB, more than --memory-limit: going on with" in warnings[0]
    used = [r.tokens_at_once for r in Journal.read(tmp_path / "a/journal").records()]
    assert used == sorted(used, reverse=True)
    assert used[0] > used[1] > used[-1] > 0


@pytest.mark.parametrize("how", ["raises", "is not finite"])
def test_a_validation_that_fails_ends_no_run_and_is_not_the_best(
    how: str, tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def failing(*args: Any) -> Evaluation:
        nonlocal calls
        calls += 1
        result = evaluate_dataset(*args)
        if calls == 2:
            if how == "raises":
                raise ZoError("it cannot be scored")
            return dataclasses.replace(result, loss=math.nan)
        return result

    monkeypatch.setattr("zo_mlx.run.evaluate_dataset", failing)
    warnings = _warnings(_train, tiny, choice_data, tmp_path / "a", steps_per_eval=2)
    why = "failed: it cannot be scored" if how == "raises" else "gives nan"
    assert warnings == [f"the validation after step 2 {why}"]
    assert len(Journal.read(tmp_path / "a/journal")) == 6
    best = read_best(tmp_path / "a", Journal.read(tmp_path / "a/journal").identity)
    assert best is not None
    assert math.isfinite(best.loss)
    assert best.iteration in (0, 4, 6)


def test_an_evaluation_that_does_not_fit_is_made_smaller(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def failing(head: Any, dataset: Any, size: int, *args: Any) -> Evaluation:
        sizes.append(size)
        if size > 2:
            raise MemoryError
        return evaluate_dataset(head, dataset, size, *args)

    monkeypatch.setattr("zo_mlx.run.evaluate_dataset", failing)
    warnings = _warnings(_train, tiny, choice_data, tmp_path / "a")
    assert len(warnings) == 1
    assert warnings[0].startswith("an evaluation fails: ")
    assert sizes[-1] in (1, 2)
