import numpy as np
import pytest
from zo_mlx.convert.select import select

from zo_mlx.errors import UsageError

RNG = np.random.default_rng(0)
SCORES = {
    "b": (RNG.normal(size=(20, 30)) ** 2).astype(np.float32),
    "a": (3 * RNG.normal(size=(10, 50)) ** 2).astype(np.float32),
}


def test_global_scope_takes_the_highest_of_all() -> None:
    chosen = select(SCORES, 0.05, "global")
    everything = np.concatenate([s.ravel() for s in SCORES.values()])
    threshold = np.sort(everything)[-55]
    for path, scores in SCORES.items():
        assert chosen[path].tolist() == np.flatnonzero(scores.ravel() >= threshold).tolist()
        assert chosen[path].dtype == np.uint32


def test_tensor_scope_takes_the_same_fraction_of_each() -> None:
    chosen = select(SCORES, 0.05, "tensor")
    assert {path: len(c) for path, c in chosen.items()} == {"b": 30, "a": 25}
    for path, scores in SCORES.items():
        assert set(chosen[path].tolist()) == set(np.argsort(scores.ravel())[-len(chosen[path]) :].tolist())


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_equal_scores_go_to_the_earlier_position(scope: str) -> None:
    scores = {"x": np.zeros((2, 5), np.float32), "y": np.zeros((2, 5), np.float32)}
    scores["x"][1, 4] = 1
    chosen = select(scores, 0.2, scope)
    expected = {"global": {"x": [0, 1, 2, 9]}, "tensor": {"x": [0, 9], "y": [0, 1]}}[scope]
    assert {p: c.tolist() for p, c in chosen.items()} == expected


def test_at_least_one_and_at_most_all() -> None:
    assert sum(map(len, select(SCORES, 1e-9, "global").values())) == 1
    assert sum(map(len, select(SCORES, 1.0, "global").values())) == 1100


@pytest.mark.parametrize(("density", "scope"), [(0, "global"), (1.1, "global"), (float("nan"), "tensor"), (0.1, "x")])
def test_arguments_out_of_range_are_refused(density: float, scope: str) -> None:
    with pytest.raises(UsageError):
        select(SCORES, density, scope)
