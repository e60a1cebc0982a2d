from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from zo_mlx import estimator
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.data import Dataset, Example
from zo_mlx.evaluate import evaluate_dataset
from zo_mlx.head import split_head
from zo_mlx.model import load_sparse
from zo_mlx.optimizer import Optimizer
from zo_mlx.rows import load_dataset
from zo_mlx.step import make_loss, replay, step

RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(8, 50))
EXAMPLES = [Example([[i]], [[]]) for i in range(8)]
START = RNG.normal(size=50).astype(np.float32)


def _losses_of(values: np.ndarray, shares: Sequence[Sequence[Example]]) -> np.ndarray:
    """Squared errors."""
    rows = [[e.rows[0][0] for e in share] for share in shares]
    return np.array([np.mean((MATRIX[r] @ v - 1) ** 2) for v, r in zip(values, rows, strict=True)])


def _loss(branches: estimator.Branches, shares: Sequence[Sequence[Example]]) -> mx.array:
    return mx.array(_losses_of(np.array(branches.part(0, 50), np.float64), shares).astype(np.float32))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_three_steps_equal_the_same_steps_in_numpy(optimizer: str) -> None:
    arguments = {"momentum": 0.9, "weight_decay": 0.5} if optimizer == "momentum" else {}
    kind = "adam" if optimizer == "adam" else "sgd"
    config = resolved(
        TrainConfig(
            optimizer=kind,
            optimizer_config={kind: arguments},
            learning_rate=1e-3,
            epsilon=1e-2,
            estimator="two-sided",
            directions=2,
            batch_size=8,
            seed=5,
        )
    )
    values = mx.array(START)
    update = Optimizer(config, values)
    state = update.state

    expected, first, second = START.astype(np.float64), np.zeros(50), np.zeros(50)
    for number in (1, 2, 3):
        values, state, record = step(_loss, update, values, state, EXAMPLES, number, config)

        rate = 1e-3 * 0.999 ** (number - 1)
        z = np.array(estimator.directions(5, number, 2, 50).part((0, 1), 0, 50), np.float64)
        shares = [EXAMPLES[0::2], EXAMPLES[1::2]]
        plus, minus = _losses_of(expected + 1e-2 * z, shares), _losses_of(expected - 1e-2 * z, shares)
        projected = (plus - minus) / 2e-2
        gradient = (projected[:, None] * z).mean(axis=0)
        if optimizer == "sgd":
            expected = expected - rate * gradient
        elif optimizer == "momentum":  # weights decay to what they were at the start
            first = 0.9 * first + gradient + 0.5 * (expected - START)
            expected = expected - rate * first
        else:  # Kingma & Ba 2014, without bias correction, as mlx.optimizers does by default
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            expected = expected - rate * first / (np.sqrt(second) + 1e-8)

        assert record.step == number
        assert np.allclose(record.projected, projected, rtol=1e-3)
        assert np.allclose(np.array(values), expected, atol=1e-5)


@pytest.mark.parametrize("rate", ["auto", 1e-3])
@pytest.mark.parametrize("schedule", [None, {"name": "cosine_decay", "arguments": [1e-3, 5], "warmup": 2}])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lion"])
def test_replay_repeats_steps_bit_by_bit(optimizer: str, schedule: dict[str, object] | None, rate: float | str) -> None:
    config = resolved(TrainConfig(optimizer=optimizer, learning_rate=rate, directions=4, lr_schedule=schedule))
    start = mx.array(START)
    update = Optimizer(config, start)
    values, state, records = start, update.state, []
    initial = dict(state["rule"])
    for number in range(1, 7):
        values, state, record = step(_loss, update, values, state, EXAMPLES, number, config)
        records.append(record)

    again = Optimizer(config, start)
    replayed, replayed_state = replay(again, start, again.state, records, config)
    assert mx.array_equal(replayed, values)
    assert again.learning_rate(replayed_state) == update.learning_rate(state) > 0
    assert not mx.array_equal(values, start)
    assert initial["step"].item() == 0, "a step changed the state it was given"


def test_each_direction_gets_its_share_of_the_batch_and_both_its_branches_the_same(
    tiny: Path, choice_data: Path
) -> None:
    """The losses of a stacked step equal those of a single branch on the documented share of the examples."""
    sparse, tokenizer, index, _ = load_sparse(tiny)
    head = split_head(sparse.model)
    examples = load_dataset(choice_data / "train.jsonl", tokenizer, 100).examples[:12]
    z = estimator.Vectors(mx.random.normal((3, index.size), key=mx.random.key(0)))
    branches = estimator.TwoSided().branches(index.initial_values(), z, 0.1)
    losses = make_loss(sparse, head)(branches, estimator.TwoSided().shares(examples, 3))
    values = branches.part(0, index.size)
    for p in range(6):
        sparse.set_values(values[p : p + 1])
        share = Dataset("choices", examples[p // 2 :: 3])
        assert abs(evaluate_dataset(head, share, 4, progress=False).loss - losses[p].item()) < 1e-5
