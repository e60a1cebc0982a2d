"""The automatic learning rate, against its formula in numpy, and what keeps a run with it sane."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from zo_mlx import control
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.estimator import Branches, directions
from zo_mlx.journal import Record
from zo_mlx.optimizer import Optimizer, State
from zo_mlx.step import replay, step

SIZE = 20


def _optimizer(**settings: object) -> Optimizer:
    config = resolved(TrainConfig(**{"directions": 4, **settings}))  # type: ignore[arg-type]
    return Optimizer(config, mx.zeros(SIZE))


def _go(
    optimizer: Optimizer, records: Sequence[Record], values: mx.array, state: State
) -> list[tuple[mx.array, State]]:
    """Values and state after each of some records."""
    after = []
    for record in records:
        z = directions(0, record.step, len(record.projected), SIZE)
        values, state = optimizer.apply(values, state, record, z)
        after.append((values, state))
    return after


def _records(slopes: np.ndarray, loss: float = 1.0, first: int = 1) -> list[Record]:
    return [Record(first + i, loss, s.astype(np.float32)) for i, s in enumerate(slopes)]


@pytest.mark.parametrize(
    ("optimizer", "arguments"), [("sgd", {}), ("sgd", {"momentum": 0.9}), ("adam", {}), ("lion", {})]
)
def test_the_rate_follows_the_slopes(optimizer: str, arguments: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(10, 4)) * 30
    update = _optimizer(optimizer=optimizer, optimizer_config={optimizer: arguments})
    after = _go(update, _records(slopes), mx.zeros(SIZE), update.state)
    for n, (values, state) in enumerate(after, 1):
        square = np.mean(slopes[:n] ** 2)
        expected = 0.02 * 4 / square if optimizer == "sgd" else 0.02 * math.sqrt(4 / square)
        expected *= 100 / (99 + n) * (1 - arguments.get("momentum", 0.0))
        if optimizer == "lion":
            expected *= math.sqrt(math.pi / 2 * (0.1**2 + 0.9**2 * 0.01 / 1.99))
        if n < 4:  # fewer than 16 directions
            assert update.learning_rate(state) == 0
            assert (np.array(values) == 0).all()
            assert update.epsilon(state) == pytest.approx(1e-3)
        else:
            assert update.learning_rate(state) == pytest.approx(expected, rel=1e-5)
            assert (np.array(values) != 0).any()
            assert update.epsilon(state) == pytest.approx(0.02 / np.sqrt(np.mean(slopes[:4] ** 2)))
    chosen = [update.news(a, b) for a, b in pairwise([update.state, *(s for _, s in after)])]
    assert [e and e["event"] for e in chosen] == [None, None, None, "chosen", *[None] * 6]


def test_rates_of_any_optimizer_lead_as_far_along_a_gradient_below_its_noise() -> None:
    """So far as SGD's do. Lion's memory is made as short as Adam's first one, since the rates fall meanwhile."""
    size, gradient = 5_000, 0.01
    rng = np.random.default_rng(0)
    taken = [directions(0, n, 7, size) for n in range(1, 201)]
    signs = [np.array(z.part([*range(7)], 0, size), np.float64).sum(1) for z in taken]
    records = _records(np.array([rng.normal(size=7) + gradient * s for s in signs]))
    far = []
    for name, arguments in [
        ("sgd", {}),
        ("sgd", {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "dampening": 0.9}),
        ("sgd", {"dampening": 0.9}),  # of which MLX's takes no notice then
        ("adam", {}),
        ("lion", {"betas": [0.9, 0.9]}),
    ]:
        config = resolved(TrainConfig(optimizer=name, optimizer_config={name: arguments}))
        update = Optimizer(config, mx.zeros(size))
        values, state = mx.zeros(size), update.state
        for record, z in zip(records, taken, strict=True):
            values, state = update.apply(values, state, record, z)
        far.append(-update.point(values, state).mean().item())
    assert far[0] > 0
    assert far == pytest.approx([far[0]] * 6, rel=0.15)


def test_the_result_is_an_average_in_which_the_last_steps_count() -> None:
    """Polynomial-decay averaging (Shamir and Zhang 2013): point i of n has a weight like i (i + 1) (i + 2) (i + 3)."""
    update = _optimizer()
    after = _go(update, _records(np.random.default_rng(4).normal(size=(40, 4))), mx.zeros(SIZE), update.state)
    points = np.array([state["point"] for _, state in after], np.float64)
    for n, (values, _) in enumerate(after, 1):
        weights = [math.comb(i + 3, 4) for i in range(1, n + 1)]
        expected = np.average(points[:n], axis=0, weights=weights)
        np.testing.assert_allclose(np.array(values), expected, atol=1e-6 * np.abs(points).max())
    assert np.abs(points[-1] - np.array(after[-1][0])).max() > 0


def test_rates_of_the_users_own_are_followed_without_an_average() -> None:
    update = _optimizer(learning_rate=0.1, optimizer="sgd")
    values, state = _go(update, _records(np.ones((3, 4))), mx.zeros(SIZE), update.state)[-1]
    assert "point" not in state
    assert update.point(values, state) is values


def test_a_step_does_not_depend_on_the_scale_of_the_weights() -> None:
    """Weights a hundred times as large have slopes a hundredth; they move a hundred times as far."""
    slopes = np.random.default_rng(1).normal(size=(12, 4)) * 30
    for name in ("sgd", "adam", "lion"):
        update = _optimizer(optimizer=name)
        small = _go(update, _records(slopes), mx.zeros(SIZE), update.state)[-1][0]
        large = _go(update, _records(slopes / 100), mx.zeros(SIZE), update.state)[-1][0]
        assert np.allclose(np.array(large), 100 * np.array(small), rtol=1e-3), name


def test_an_outlier_counts_for_five_times_the_usual_slope() -> None:
    slopes = np.ones((6, 4))
    slopes[4, 0], slopes[5, 1] = -1000, np.nan
    update = _optimizer()
    after = _go(update, _records(slopes[:5]), mx.zeros(SIZE), update.state)
    clipped = np.array([-5, 1, 1, 1])
    rate = 0.02 * 4 / ((16 + np.sum(clipped**2)) / 20) / 1.04
    z = np.array(directions(0, 5, 4, SIZE).part([*range(4)], 0, SIZE), np.float64)
    moved = np.array(after[4][1]["point"]) - np.array(after[3][1]["point"])
    assert np.allclose(moved, -rate * clipped @ z / 4, atol=1e-7)


def test_for_scores_branches_go_out_until_half_of_them_tell_something() -> None:
    update = _optimizer(objective="accuracy")
    slopes = np.zeros((12, 4))
    slopes[1, 0] = 5.0  # one of four is not enough
    slopes[3:, :2] = [40.0, -20.0]
    after = _go(update, _records(slopes), mx.zeros(SIZE), update.state)
    # Steps 1 to 3 double epsilon; 4 to 7 measure 16 directions.
    epsilons = [update.epsilon(state) for _, state in after]
    np.testing.assert_allclose(epsilons, [2e-3, 4e-3, *[8e-3] * 10], rtol=1e-6)
    square = (40.0**2 + 20.0**2) / 4
    for n, (values, state) in enumerate(after, 1):
        expected = 0.1 * 8e-3 * math.sqrt(square) * 4 / square * 100 / (99 + n) if n >= 7 else 0
        assert update.learning_rate(state) == pytest.approx(expected, rel=1e-5)
        assert (np.array(values) == 0).all() == (n < 7)


def test_an_epsilon_of_the_users_own_stays() -> None:
    update = _optimizer(objective="accuracy", epsilon=0.05)
    slopes = np.zeros((8, 4))
    slopes[:, 0] = 3.0
    after = _go(update, _records(slopes), mx.zeros(SIZE), update.state)
    assert all(update.epsilon(state) == pytest.approx(0.05) for _, state in after)
    square = 9.0 / 4
    expected = 0.1 * 0.05 * math.sqrt(square) * 4 / square * 100 / 107
    assert update.learning_rate(after[-1][1]) == pytest.approx(expected, rel=1e-5)


def test_rare_penalties_are_no_explosion() -> None:
    """A score that was at its best throughout a window does not vary there."""
    update = _optimizer(objective="accuracy", epsilon=0.05)
    losses = [0.0] * 25 + [0.0] * 24 + [1.0]
    records = [Record(n, loss, np.full(4, 2.0, np.float32)) for n, loss in enumerate(losses, 1)]
    after = _go(update, records, mx.zeros(SIZE), update.state)
    assert after[-1][1]["control"]["halvings"].item() == 0


@pytest.mark.parametrize("bad", ["rising", "nan"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_after_an_explosion_the_run_goes_on_from_the_best_window_at_half_the_rate(optimizer: str, bad: str) -> None:
    rng = np.random.default_rng(2)
    update = _optimizer(optimizer=optimizer)
    good = _records(rng.normal(size=(30, 4)))
    last = _records(rng.normal(size=(20, 4)), loss=1.5 if bad == "rising" else math.nan, first=31)
    after = _go(update, [*good, *last], mx.zeros(SIZE), update.state)
    news = [update.news(a, b) for (_, a), (_, b) in pairwise(after)]
    at = 50 if bad == "rising" else 31  # the first window ends with step 25, the second with step 50
    assert news[at - 2] == {"event": "returned", "step": 25, "halvings": 1}
    assert [e for e in news[4 : at - 2] if e] == []
    values, state = after[at - 1]
    assert mx.array_equal(values, after[24][1]["point"])
    assert mx.array_equal(state["point"], after[24][1]["point"])
    assert not mx.array_equal(after[at - 2][1]["point"], after[24][1]["point"])
    before, then = (update.learning_rate(after[i][1]) for i in (28, -1))
    halvings = after[-1][1]["control"]["halvings"].item()
    if bad == "rising":
        following = _go(update, _records(rng.normal(size=(1, 4)), first=51), *after[-1])[0][1]
        assert update.learning_rate(following) == pytest.approx(before / 2, rel=0.3)
    else:
        assert halvings == 20
        assert not update.can_go_on(after[-1][1])
        assert update.can_go_on(after[31][1])
    assert then >= 0


def test_noisy_losses_are_no_explosion() -> None:
    rng = np.random.default_rng(3)
    update = _optimizer()
    records = [Record(n, float(rng.exponential(0.6)), rng.normal(size=4).astype(np.float32)) for n in range(1, 1001)]
    after = _go(update, records, mx.zeros(SIZE), update.state)
    assert after[-1][1]["control"]["halvings"].item() == 0


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
    assert state["control"]["halvings"].item() > 0
    replayed, state_then = replay(update, mx.zeros(SIZE), update.state, records, config)
    assert mx.array_equal(replayed, values)
    assert state_then["control"]["halvings"].item() == state["control"]["halvings"].item()


def test_slopes_that_are_all_zero_move_nothing() -> None:
    update = _optimizer()
    values, state = _go(update, _records(np.zeros((8, 4))), mx.zeros(SIZE), update.state)[-1]
    assert (np.array(values) == 0).all()
    assert math.isfinite(update.epsilon(state))
    assert control.MEASURED == 16
    later = _go(update, _records(np.ones((1, 4)), first=9), values, state)[0][0]
    assert (np.array(later) != 0).any(), "it never gets going"


def _compared(gains: Sequence[float], first: int = 1) -> list[Record]:
    """Steps whose examples have a loss of 1 at the first values, and so much less where they were taken from."""
    slopes = np.random.default_rng(first).normal(size=(len(gains), 4)).astype(np.float32)
    return [Record(first + i, 1 - g, s, initial=1.0) for i, (g, s) in enumerate(zip(gains, slopes, strict=True))]


def test_what_gains_nothing_begins_anew_with_half_the_rate_and_twice_as_long_a_look() -> None:
    update, noise = _optimizer(), np.random.default_rng(5)
    late = 0.3 * noise.normal(size=13)
    error = late.std(ddof=1) / math.sqrt(13)
    late += 0.9 * error - late.mean()
    begun = mx.zeros(SIZE)
    # What the first half of a look gains does not count.
    first = _go(update, _compared([*[5.0] * 12, *late]), begun, update.state)
    values, state = first[-1]
    assert update.news(first[-2][1], state) == {"event": "restarted", "steps": 25, "halvings": 1}
    assert mx.array_equal(values, begun)
    assert mx.array_equal(state["point"], begun)
    assert not mx.array_equal(first[-2][1]["point"], begun)
    # A fifth of a standard error more is enough, in a look of 50 steps.
    late = 0.3 * noise.normal(size=25)
    late += 1.1 * late.std(ddof=1) / 5 - late.mean()
    second = _go(update, _compared([*[-5.0] * 25, *late], first=26), *first[-1])
    assert all(update.compared_with(state) is not None for _, state in second[:-1])
    assert update.compared_with(second[-1][1]) is None
    assert second[-1][1]["control"]["halvings"].item() == 1
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
    assert state["control"]["halvings"].item() == 3
    replayed, _ = replay(update, begun, update.state, records, config)
    assert mx.array_equal(replayed, values)
