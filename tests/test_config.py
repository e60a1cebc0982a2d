import dataclasses
import datetime
from typing import Any

import mlx.core as mx
import pytest

import zo_mlx
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.errors import UsageError
from zo_mlx.optimizer import Optimizer

CIRCLE: dict[str, Any] = {"path": "a/b"}
CIRCLE["config"] = CIRCLE  # as YAML's anchors can make it


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"iters": -1}, "iters must be at least 0, not -1"),
        ({"iters": 1.5}, "iters must be int, not 1.5"),
        ({"batch_size": "8"}, "batch_size must be int"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be at most"),
        ({"epsilon": 0.0}, "epsilon must be at least"),
        ({"optimizer": "sgdd"}, "optimizer must be one of"),
        ({"directions": 2.0}, "directions must be int"),
        ({"mask_prompt": 1}, "mask_prompt must be bool"),
        ({"lr_schedule": {"name": "nothing", "arguments": [1]}}, "lr_schedule is not one that mlx-lm can build"),
        ({"lr_schedule": [1]}, "lr_schedule must be dict"),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": ["a", 0, 9]}}, "lr_schedule is not one that mlx-lm"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [datetime.date.today(), 9]}}, "lr_schedule is not one"),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": [1, -1, 9]}}, "lr_schedule gives learning rates of"),
        ({"optimizer_config": [1]}, "optimizer_config must be dict"),
        ({"optimizer_config": {"sgd": 5}}, "optimizer_config is none of mlx's optimizers'"),
        ({"optimizer_config": {"sgd": {"momentun": 0.9}}}, "optimizer_config is none of .* 'momentun'"),
        ({"optimizer_config": {"adam": {"betas": 3}}}, "optimizer_config is none of"),
        ({"seed": 2**64}, "seed must be at most 9223372036854775807"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"seed": 1 << 20_000}, "seed must be int, not inf"),
        ({"learning_rate": 10**400}, "learning_rate must be at most .*, not inf"),
        ({"learning_rate": -(10**400)}, "learning_rate must be at least 0, not -inf"),
        ({"memory_limit": 10**400}, "memory_limit must be at most 1000000 GB, not inf GB"),
        ({"memory_limit": 32 << 30}, "memory_limit must be at most 1000000 GB, not 34359738368.0 GB"),
        ({"cache_prefix": 1e300}, r"cache_prefix must be at most 1000000 GB, not 1e\+300 GB"),
        ({"batch_size": 2**63 - 25}, "batch_size must be at most 1048576, not 9223372036854775783"),
        ({"hf_dataset": {datetime.date.today(): 1}}, "hf_dataset cannot be written as JSON, .*: keys must be str"),
        ({"hf_dataset": CIRCLE}, "hf_dataset cannot be written as JSON, .*: Circular reference detected"),
        ({"model": "a\0b"}, "model must not hold a null character"),
        ({"learnin_rate": 1.0}, "no such settings: learnin_rate"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        zo_mlx.train(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"batch_size": 2**63 - 25}, {"memory_limit": 1e300}])
def test_a_journal_cannot_ask_for_more_either(setting: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be at most"):
        TrainConfig.recorded(dataclasses.asdict(TrainConfig()) | setting)


def test_what_would_have_no_effect_is_refused() -> None:
    TrainConfig(batch_size=16, directions=8, estimator="two-sided").check_together()
    for settings, problem in (
        ({"batch_size": 6, "directions": 4, "estimator": "two-sided"}, "--directions 4: two-sided .* give a divisor"),
        ({"directions": 8, "estimator": "two-sided"}, "of which there are 4"),
        ({"keep_blocks": 3}, "for --gradient exact"),
        ({"spill": True}, "for --gradient exact"),
        ({"max_tokens": 5}, "give --objective"),
    ):
        config = TrainConfig(**settings)  # type: ignore[arg-type]
        config.check()  # --resume may give a part of a run's settings
        with pytest.raises(UsageError, match=problem):
            config.check_together()
    with pytest.raises(UsageError, match="optimizer_config: sgd: momentum"):
        TrainConfig(optimizer_config={"sgd": {"momentum": 1.0}}).check()


@pytest.mark.parametrize(("batch", "directions"), [(16, 8), (4, 2), (2, 1), (1, 1), (7, 1), (9, 3), (30, 15)])
def test_every_direction_gets_two_examples_where_they_are_divided(batch: int, directions: int) -> None:
    config = resolved(TrainConfig(batch_size=batch, estimator="two-sided"))
    assert config.directions == directions
    assert resolved(TrainConfig(batch_size=batch)).directions == 7
    assert resolved(TrainConfig(batch_size=batch, directions=1)).directions == 1


def test_without_a_rate_both_rate_and_epsilon_follow_the_slopes() -> None:
    assert (resolved(TrainConfig()).lr_schedule, resolved(TrainConfig()).epsilon) == (None, "auto")
    given = resolved(TrainConfig(learning_rate=0.1))
    assert given.lr_schedule == {"name": "exponential_decay", "arguments": [0.1, 0.999]}
    with_rate = Optimizer(given, mx.zeros(3))
    assert with_rate.epsilon(with_rate.state) == 1e-3
    scheduled = TrainConfig(lr_schedule={"name": "cosine_decay", "arguments": [0.1, 9]}, epsilon=0.5)
    assert (resolved(scheduled).lr_schedule, resolved(scheduled).epsilon) == (scheduled.lr_schedule, 0.5)


def test_exact_gradients_go_through_in_passes_unless_a_limit_decides() -> None:
    def tokens(**settings: Any) -> int | None:
        return resolved(TrainConfig(**settings)).tokens_at_once

    assert tokens(gradient="exact") == 512
    assert tokens(gradient="exact", tokens_at_once=40) == 40
    assert tokens(gradient="exact", memory_limit=1.0) is None
    assert tokens() is None
