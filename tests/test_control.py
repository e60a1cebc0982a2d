"""The automatic learning rate, against its formula in numpy."""

import math
from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from zo_mlx import control
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.estimator import directions
from zo_mlx.journal import Record
from zo_mlx.optimizer import Optimizer, State

SIZE = 20


def make_optimizer(**settings: object) -> Optimizer:
    config = resolved(TrainConfig(**{"directions": 4, **settings}))  # type: ignore[arg-type]
    return Optimizer(config, mx.zeros(SIZE))


def go(optimizer: Optimizer, records: Sequence[Record], values: mx.array, state: State) -> list[tuple[mx.array, State]]:
    """Values and state after each of some records."""
    after = []
    for record in records:
        z = directions(0, record.step, len(record.projected), SIZE)
        values, state = optimizer.apply(values, state, record, z)
        after.append((values, state))
    return after


def make_records(slopes: np.ndarray, loss: float = 1.0, first: int = 1) -> list[Record]:
    return [Record(first + i, loss, s.astype(np.float32)) for i, s in enumerate(slopes)]


@pytest.mark.parametrize(
    ("optimizer", "arguments"), [("sgd", {}), ("sgd", {"momentum": 0.9}), ("adam", {}), ("lion", {})]
)
def test_the_rate_follows_the_slopes(optimizer: str, arguments: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(10, 4)) * 30
    update = make_optimizer(optimizer=optimizer, optimizer_config={optimizer: arguments})
    after = go(update, make_records(slopes), mx.zeros(SIZE), update.state)
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
    records = make_records(np.array([rng.normal(size=7) + gradient * s for s in signs]))
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
    update = make_optimizer()
    after = go(update, make_records(np.random.default_rng(4).normal(size=(40, 4))), mx.zeros(SIZE), update.state)
    points = np.array([state["point"] for _, state in after], np.float64)
    for n, (values, _) in enumerate(after, 1):
        weights = [math.comb(i + 3, 4) for i in range(1, n + 1)]
        expected = np.average(points[:n], axis=0, weights=weights)
        np.testing.assert_allclose(np.array(values), expected, atol=1e-6 * np.abs(points).max())
    assert np.abs(points[-1] - np.array(after[-1][0])).max() > 0


def test_rates_of_the_users_own_are_followed_without_an_average() -> None:
    update = make_optimizer(learning_rate=0.1, optimizer="sgd")
    values, state = go(update, make_records(np.ones((3, 4))), mx.zeros(SIZE), update.state)[-1]
    assert "point" not in state
    assert update.point(values, state) is values


def test_a_step_does_not_depend_on_the_scale_of_the_weights() -> None:
    """Weights a hundred times as large have slopes a hundredth; they move a hundred times as far."""
    slopes = np.random.default_rng(1).normal(size=(12, 4)) * 30
    for name in ("sgd", "adam", "lion"):
        update = make_optimizer(optimizer=name)
        small = go(update, make_records(slopes), mx.zeros(SIZE), update.state)[-1][0]
        large = go(update, make_records(slopes / 100), mx.zeros(SIZE), update.state)[-1][0]
        assert np.allclose(np.array(large), 100 * np.array(small), rtol=1e-3), name


def test_an_outlier_counts_for_five_times_the_usual_slope() -> None:
    slopes = np.ones((6, 4))
    slopes[4, 0], slopes[5, 1] = -1000, np.nan
    update = make_optimizer()
    after = go(update, make_records(slopes[:5]), mx.zeros(SIZE), update.state)
    clipped = np.array([-5, 1, 1, 1])
    rate = 0.02 * 4 / ((16 + np.sum(clipped**2)) / 20) / 1.04
    z = np.array(directions(0, 5, 4, SIZE).part([*range(4)], 0, SIZE), np.float64)
    moved = np.array(after[4][1]["point"]) - np.array(after[3][1]["point"])
    assert np.allclose(moved, -rate * clipped @ z / 4, atol=1e-7)


def test_for_scores_branches_go_out_until_half_of_them_tell_something() -> None:
    update = make_optimizer(objective="accuracy")
    slopes = np.zeros((12, 4))
    slopes[1, 0] = 5.0  # one of four is not enough
    slopes[3:, :2] = [40.0, -20.0]
    after = go(update, make_records(slopes), mx.zeros(SIZE), update.state)
    # Steps 1 to 3 double epsilon; 4 to 7 measure 16 directions.
    epsilons = [update.epsilon(state) for _, state in after]
    np.testing.assert_allclose(epsilons, [2e-3, 4e-3, *[8e-3] * 10], rtol=1e-6)
    square = (40.0**2 + 20.0**2) / 4
    for n, (values, state) in enumerate(after, 1):
        expected = 0.1 * 8e-3 * math.sqrt(square) * 4 / square * 100 / (99 + n) if n >= 7 else 0
        assert update.learning_rate(state) == pytest.approx(expected, rel=1e-5)
        assert (np.array(values) == 0).all() == (n < 7)


def test_an_epsilon_of_the_users_own_stays() -> None:
    update = make_optimizer(objective="accuracy", epsilon=0.05)
    slopes = np.zeros((8, 4))
    slopes[:, 0] = 3.0
    after = go(update, make_records(slopes), mx.zeros(SIZE), update.state)
    assert all(update.epsilon(state) == pytest.approx(0.05) for _, state in after)
    square = 9.0 / 4
    expected = 0.1 * 0.05 * math.sqrt(square) * 4 / square * 100 / 107
    assert update.learning_rate(after[-1][1]) == pytest.approx(expected, rel=1e-5)


def test_slopes_that_are_all_zero_move_nothing() -> None:
    update = make_optimizer()
    values, state = go(update, make_records(np.zeros((8, 4))), mx.zeros(SIZE), update.state)[-1]
    assert (np.array(values) == 0).all()
    assert math.isfinite(update.epsilon(state))
    assert control.MEASURED == 16
    later = go(update, make_records(np.ones((1, 4)), first=9), values, state)[0][0]
    assert (np.array(later) != 0).any(), "it never gets going"
