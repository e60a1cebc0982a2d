"""What keeps a run with chosen learning rates sane."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_control import SIZE, go, make_optimizer, make_records
from test_exact import _train as train_exactly
from test_train import _values

import zo_mlx
from zo_mlx import guard, optimizer
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.estimator import Branches
from zo_mlx.journal import Record
from zo_mlx.optimizer import Optimizer
from zo_mlx.step import replay, step


def test_rare_penalties_are_no_explosion() -> None:
    """A score that was at its best throughout a window does not vary there."""
    update = make_optimizer(objective="accuracy", epsilon=0.05)
    losses = [0.0] * 35 + [0.0] * 24 + [1.0]
    records = [Record(n, loss, np.full(4, 2.0, np.float32)) for n, loss in enumerate(losses, 1)]
    after = go(update, records, mx.zeros(SIZE), update.state)
    assert after[-1][1]["guard"]["halvings"].item() == 0


# Means of the first ten steps, and of 25 each: the third is worse than the second, but no explosion.
LOSSES = [1.0] * 10 + [0.9] * 25 + [1.0] * 25


@pytest.mark.parametrize("bad", [1.5, math.nan])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_after_an_explosion_the_run_goes_on_from_the_best_window_at_half_the_rate(optimizer: str, bad: float) -> None:
    rng = np.random.default_rng(2)
    update = make_optimizer(optimizer=optimizer)
    losses = LOSSES + [bad] * (25 if bad == 1.5 else 20)
    records = [
        Record(n, loss, s.astype(np.float32))
        for n, (loss, s) in enumerate(zip(losses, rng.normal(size=(len(losses), 4)), strict=True), 1)
    ]
    after = go(update, records, mx.zeros(SIZE), update.state)
    news = [update.news(a, b) for (_, a), (_, b) in pairwise(after)]
    at = 85 if bad == 1.5 else 61
    assert news[at - 2] == {"event": "returned", "step": 35, "halvings": 1}
    assert [e for e in news[4 : at - 2] if e] == []
    values, state = after[at - 1]
    assert mx.array_equal(values, after[34][1]["point"])
    assert mx.array_equal(state["point"], after[34][1]["point"])
    assert not mx.array_equal(after[at - 2][1]["point"], after[34][1]["point"])
    if bad == 1.5:
        assert update.learning_rate(state) > 0  # the step's own, though it was undone
        following = go(update, make_records(rng.normal(size=(1, 4)), first=86), *after[-1])[0][1]
        assert update.learning_rate(following) == pytest.approx(update.learning_rate(state) / 2, rel=0.3)
    else:
        assert [update.can_go_on(state) for _, state in after[60:]] == [True] * 10 + [False] * 10


@pytest.mark.parametrize(("mean", "goes_back"), [(1.24, False), (1.26, True)])
def test_a_quarter_more_is_an_explosion_where_nothing_varies(mean: float, goes_back: bool) -> None:
    update = make_optimizer()
    losses = [1.0] * 10 + [mean] * 25
    records = [Record(n, loss, np.ones(4, np.float32)) for n, loss in enumerate(losses, 1)]
    after = go(update, records, mx.zeros(SIZE), update.state)
    assert after[-1][1]["guard"]["halvings"].item() == goes_back


@pytest.mark.parametrize(("errors", "goes_back"), [(5.8, False), (6.2, True)])
def test_six_standard_errors_are_an_explosion_where_losses_vary(errors: float, goes_back: bool) -> None:
    rng = np.random.default_rng(8)
    first, second = rng.normal(size=10), 2 * rng.normal(size=25)
    second += first.mean() - second.mean() + errors * math.sqrt(first.var() / 10 + second.var() / 25)
    update = make_optimizer(objective="accuracy", epsilon=0.05)  # whose losses are below 0
    assert second.mean() - first.mean() > abs(first.mean()) / 4
    records = [Record(n, loss, np.ones(4, np.float32)) for n, loss in enumerate([*first, *second], 1)]
    after = go(update, records, mx.zeros(SIZE), update.state)
    assert after[-1][1]["guard"]["halvings"].item() == goes_back


def test_noisy_losses_are_no_explosion() -> None:
    rng = np.random.default_rng(3)
    update = make_optimizer()
    records = [Record(n, float(rng.exponential(0.6)), rng.normal(size=4).astype(np.float32)) for n in range(1, 1001)]
    after = go(update, records, mx.zeros(SIZE), update.state)
    assert after[-1][1]["guard"]["halvings"].item() == 0


@pytest.mark.parametrize("share", [0.05, 0.002])
def test_rare_hard_examples_are_no_explosion(share: float) -> None:
    """Losses as of exact gradients late in a run: next to nothing, but for a few examples, which some windows lack."""
    rng = np.random.default_rng(7)
    update = Optimizer(resolved(TrainConfig(gradient="exact")), mx.ones(SIZE))
    losses = 0.01 * rng.exponential(size=(2000, 16)) + (rng.random((2000, 16)) < share) * rng.exponential(2, (2000, 16))
    values, state = mx.ones(SIZE), update.state
    for n, loss in enumerate(losses.mean(axis=1), 1):
        values, state = update.apply(values, state, Record(n, float(loss), np.zeros(SIZE, np.float32)))
    assert state["guard"]["halvings"].item() == 0


def test_a_run_that_exploded_is_replayed_bit_by_bit() -> None:
    """Replaying the records of a run whose loss rose for a while gives its values, going back included."""
    calls = 0

    def loss(branches: Branches, shares: Sequence[Sequence[object]]) -> mx.array:
        nonlocal calls
        calls += 1
        return branches.part(0, SIZE).sum(axis=1) + (100 if 60 < calls < 130 else 1)

    config = resolved(TrainConfig(directions=4))
    update = Optimizer(config, mx.zeros(SIZE))
    values, state, records = mx.zeros(SIZE), update.state, []
    for number in range(1, 301):
        values, state, record = step(loss, update, values, state, [object()] * 4, number, config)  # type: ignore[list-item]
        records.append(record)
    assert state["guard"]["halvings"].item() > 0
    replayed, state_then = replay(update, mx.zeros(SIZE), update.state, records, config)
    assert mx.array_equal(replayed, values)
    assert state_then["guard"]["halvings"].item() == state["guard"]["halvings"].item()


def _compared(gains: Sequence[float], first: int = 1) -> list[Record]:
    """Steps whose examples have a loss of 1 at the first values, and so much less where they were taken from."""
    slopes = np.random.default_rng(first).normal(size=(len(gains), 4)).astype(np.float32)
    return [Record(first + i, 1 - g, s, initial=1.0) for i, (g, s) in enumerate(zip(gains, slopes, strict=True))]


def test_what_gains_nothing_begins_anew_with_half_the_rate_and_twice_as_long_a_look() -> None:
    update, noise = make_optimizer(), np.random.default_rng(5)
    late = 0.3 * noise.normal(size=13)
    error = late.std(ddof=1) / math.sqrt(13)
    late += 0.9 * error - late.mean()
    begun = mx.zeros(SIZE)
    # What the first half of a look gains does not count.
    first = go(update, _compared([*[5.0] * 12, *late]), begun, update.state)
    values, state = first[-1]
    assert update.news(first[-2][1], state) == {"event": "restarted", "steps": 25, "halvings": 1}
    assert mx.array_equal(values, begun)
    assert mx.array_equal(state["point"], begun)
    assert not mx.array_equal(first[-2][1]["point"], begun)
    # A fifth of a standard error more is enough, in a look of 50 steps.
    late = 0.3 * noise.normal(size=25)
    late += 1.1 * late.std(ddof=1) / 5 - late.mean()
    second = go(update, _compared([*[-5.0] * 25, *late], first=26), *first[-1])
    assert all(update.compared_with(state) is not None for _, state in second[:-1])
    assert update.compared_with(second[-1][1]) is None
    assert second[-1][1]["guard"]["halvings"].item() == 1
    assert not mx.array_equal(second[-1][0], begun)
    square = np.mean(np.concatenate([r.projected for r in _compared([0] * 25) + _compared([0] * 50, 26)]) ** 2)
    assert update.learning_rate(second[-1][1]) == pytest.approx(0.02 * 4 / square * 100 / 174 / 2, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"estimator": "two-sided"}, {"objective": "accuracy"}, {"learning_rate": 1e-3}, {"gradient": "exact"}],
)
def test_only_one_sided_slopes_of_cross_entropy_are_compared(settings: dict[str, Any]) -> None:
    update = Optimizer(resolved(TrainConfig(**settings)), mx.zeros(SIZE))
    assert update.compared_with(update.state) is None


def test_a_run_that_finds_nothing_to_learn_ends_where_it_began() -> None:
    """Losses that do not depend on the values but for noise; the examples' own part is the same at the first ones."""
    rng, apart = np.random.default_rng(0), []

    def loss(branches: Branches, shares: Sequence[Sequence[object]]) -> mx.array:
        assert len(shares) == len(branches)
        away = branches.part(0, SIZE)
        apart.append(branches.apart is not None)
        if apart[-1]:
            assert mx.array_equal(away[-1], begun)
        return mx.array(rng.exponential() + 0.1 * rng.normal(size=len(away)).astype(np.float32))

    config, begun = resolved(TrainConfig(directions=4)), mx.arange(SIZE).astype(mx.float32)
    update = Optimizer(config, begun)
    values, state, records = begun, update.state, []
    for number in range(1, 176):
        values, state, record = step(loss, update, values, state, [object()] * 4, number, config)  # type: ignore[list-item]
        records.append(record)
        if number in (25, 75, 175):
            assert mx.array_equal(values, begun)
    assert all(apart)
    assert state["guard"]["halvings"].item() == 3
    replayed, _ = replay(update, begun, update.state, records, config)
    assert mx.array_equal(replayed, values)


@pytest.mark.parametrize("bad", ["loss", "lost", "slope"])
def test_exact_gradients_go_back_and_work_up_to_half_the_rate(bad: str) -> None:
    """Adam begins anew there (Kingma and Ba 2015, algorithm 1); the rates go on falling."""
    origin, rng = mx.arange(1.0, SIZE + 1), np.random.default_rng(6)
    update = Optimizer(resolved(TrainConfig(gradient="exact")), origin)
    losses = [*LOSSES, *([9.0] * 25 if bad == "loss" else [math.nan if bad == "lost" else 1.0]), *[1.0] * 12]
    gradients, at = rng.normal(size=(len(losses), SIZE)).astype(np.float32), len(losses) - 12
    if bad == "slope":
        gradients[at - 1, 3] = math.inf
    values, state = origin, update.state
    points, averages, rates, news = [], [], [], []
    for n, (loss, gradient) in enumerate(zip(losses, gradients, strict=True), 1):
        before = state
        values, state = update.apply(values, state, Record(n, loss, gradient))
        news.append(update.news(before, state))
        points.append(np.array(state["point"], np.float64))
        averages.append(np.array(values))
        rates.append(update.learning_rate(state))
    assert [(n, e["event"]) for n, e in enumerate(news, 1) if e] == [(1, "chosen"), (at, "returned")]
    assert news[at - 1] == {"event": "returned", "step": 35, "halvings": 1}
    assert (points[at - 1] == points[34]).all()
    assert (averages[at - 1] == points[34]).all()
    full = 0.01 * math.sqrt(np.mean(np.arange(1, SIZE + 1) ** 2))
    assert rates[at - 1] == pytest.approx(full / (1 + (at - 1) / 100), rel=1e-6)
    first = second = np.zeros(SIZE)
    for taken, n in enumerate(range(at + 1, at + 13), 1):
        rate = full / 2 * min(taken / 10, 1) / (1 + (n - 1) / 100)
        assert rates[n - 1] == pytest.approx(rate, rel=1e-6)
        g = gradients[n - 1].astype(np.float64)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        moved = -rate * (first / (1 - 0.9**taken)) / (np.sqrt(second / (1 - 0.999**taken)) + 1e-8)
        np.testing.assert_allclose(points[n - 1] - points[n - 2], moved, atol=1e-5)


def test_rates_are_said_even_if_the_first_exact_step_fails() -> None:
    update = Optimizer(resolved(TrainConfig(gradient="exact")), mx.zeros(SIZE))
    _, state = update.apply(mx.zeros(SIZE), update.state, Record(1, math.nan, np.ones(SIZE, np.float32)))
    said = update.news(update.state, state)
    assert said == {"event": "chosen", "learning_rate": 0.0, "share": pytest.approx(0.01 / 1.09), "warmup": 10}


def test_a_run_that_goes_back_is_resumed_and_replayed_bit_by_bit(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Explosions wherever three losses have a mean a quarter above the lowest one, from sums of several passes."""
    for name, value in {"FIRST": 3, "WINDOW": 3, "ERRORS": 0.0}.items():
        monkeypatch.setattr(guard, name, value)
    monkeypatch.setattr(optimizer, "EXACT_SHARE", 0.3)
    events: list[dict[str, Any]] = []
    train_exactly(tiny, choice_data, tmp_path / "a", tokens_at_once=1, iters=24, report=events.append)
    assert "returned" in [e["event"] for e in events if e["iteration"] < 20]
    train_exactly(tiny, choice_data, tmp_path / "b", tokens_at_once=1, iters=20)
    (tmp_path / "b/optimizer.safetensors").unlink()
    train_exactly(tiny, choice_data, tmp_path / "b", tokens_at_once=1, iters=24, resume=True)
    for name in ("values", "optimizer"):
        a, b = (mx.load(str(tmp_path / f"{run}/{name}.safetensors")) for run in "ab")
        assert a.keys() == b.keys()
        assert all(mx.array_equal(a[key], b[key]) for key in a)
    zo_mlx.replay(tiny, tmp_path / "b", tmp_path / "again")
    assert (_values(tmp_path / "again") == _values(tmp_path / "a")).all()
