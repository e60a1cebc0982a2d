import numpy as np
import pytest
from zo_mlx.convert.select import Scope, Selector

from zo_mlx.errors import UsageError

RNG = np.random.default_rng(0)
SCORES = {
    "b": (RNG.normal(size=(20, 30)) ** 2).astype(np.float32),
    "a": (3 * RNG.normal(size=(10, 50)) ** 2).astype(np.float32),
}


def select(scores: dict[str, np.ndarray], density: float, scope: Scope) -> dict[str, np.ndarray]:
    """Choose with the layers added in order, and in reverse; both must give the same."""
    results = []
    for order in (list(scores), list(reversed(scores))):
        selector = Selector({path: s.size for path, s in scores.items()}, density, scope)
        for path in order:
            selector.add(path, scores[path])
        results.append(selector.result())
    for path, (indices, own) in results[0].items():
        assert np.array_equal(own, scores[path].ravel()[indices])
        assert np.array_equal(indices, results[1][path][0])
    assert list(results[0]) == list(results[1])
    return {path: indices for path, (indices, _) in results[0].items()}


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
def test_equal_scores_go_to_the_earlier_position(scope: Scope) -> None:
    scores = {"x": np.zeros((2, 5), np.float32), "y": np.zeros((2, 5), np.float32)}
    scores["x"][1, 4] = 1
    chosen = select(scores, 0.2, scope)
    expected = {"global": {"x": [0, 1, 2, 9]}, "tensor": {"x": [0, 9], "y": [0, 1]}}[scope]
    assert {p: c.tolist() for p, c in chosen.items()} == expected


def test_at_least_one_and_at_most_all() -> None:
    assert sum(map(len, select(SCORES, 1e-9, "global").values())) == 1
    assert sum(map(len, select(SCORES, 1.0, "global").values())) == 1100


@pytest.mark.parametrize(("density", "scope"), [(0, "global"), (1.1, "global"), (float("nan"), "tensor"), (0.1, "x")])
def test_arguments_out_of_range_are_refused(density: float, scope: Scope) -> None:
    with pytest.raises(UsageError):
        select(SCORES, density, scope)


def test_layers_with_more_weights_than_the_index_can_number_are_refused() -> None:
    Selector({"experts": 2**32}, 1e-3, "global")
    with pytest.raises(UsageError, match="experts has 4294967297 weights"):
        Selector({"experts": 2**32 + 1}, 1e-3, "global")


def test_nothing_is_lost_however_the_layers_come() -> None:
    """Against sorting all scores at once, with many equal ones."""
    rng = np.random.default_rng(1)
    scores = {f"l{i}": rng.integers(0, 30, (7, 1 + 3 * i)).astype(np.float32) for i in range(12)}
    flat = [(-s, i, at) for i, layer in enumerate(scores.values()) for at, s in enumerate(layer.ravel())]
    for density in (0.01, 0.1, 0.5):
        expected = sorted(sorted(flat)[: round(density * len(flat))], key=lambda c: c[1:])
        got = select(scores, density, "global")
        assert [(i, at) for _, i, at in expected] == [
            (i, at) for i, path in enumerate(scores) for at in got.get(path, np.empty(0)).tolist()
        ]
