import hashlib

import mlx.core as mx
import numpy as np
import pytest

from zo_mlx import estimator


def test_directions_are_signs_and_depend_on_seed_step_and_number() -> None:
    z = np.array(estimator.directions(seed=1, step=2, count=3, size=1000))
    assert z.shape == (3, 1000)
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean()) < 0.1
    again = np.array(estimator.directions(1, 2, 3, 1000))
    assert (z == again).all()
    others = [estimator.directions(0, 2, 1, 1000), estimator.directions(1, 3, 1, 1000), z[1:2], z[2:3]]
    for other in others:
        assert abs((np.array(other)[0] * z[0]).mean()) < 0.15  # independent, not equal or opposite


def test_directions_never_change_between_versions() -> None:
    """A journal replays only if these bits stay what they are: written out here from docs/formats.md."""
    packed = (7).to_bytes(8, "little") + (11).to_bytes(8, "little") + (1).to_bytes(8, "little")
    key = mx.random.key(int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little"))
    expected = np.where(np.array(mx.random.bernoulli(0.5, (32,), key=key)), 1.0, -1.0)
    z = np.array(estimator.directions(seed=7, step=11, count=2, size=32))[1]
    assert (z == expected).all()
    first = np.array(estimator.directions(7, 11, 1, 32))[0]
    assert "".join("+" if s > 0 else "-" for s in first) == GOLDEN, "MLX's generator changed"


GOLDEN = "+-+-++-+++++++-+----++---++++++-"


@pytest.mark.parametrize("name", ["one-sided", "two-sided"])
def test_estimates_on_a_quadratic_average_to_the_gradient(name: str) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 6))
    hessian, linear, at = a @ a.T, rng.normal(size=6), rng.normal(size=6)
    epsilon, count = 1e-2, 20000

    method = estimator.ESTIMATORS[name]
    z = estimator.directions(0, 1, count, 6)
    branches = np.array(method.branches(mx.array(at.astype(np.float32)), z, epsilon).part(0, 6), np.float64)
    losses = 0.5 * np.einsum("pi,ij,pj->p", branches, hessian, branches) + branches @ linear
    loss, slopes = method.slopes(mx.array(losses.astype(np.float32)), epsilon)
    estimate = np.array(estimator.gradient_estimate(slopes, z))

    gradient = hessian @ at + linear
    # Every coordinate has a standard error of at most |gradient| / sqrt(count); one side adds half of epsilon z H z.
    bias = 0.5 * epsilon * np.abs(hessian).sum() / np.sqrt(count) if name == "one-sided" else 0
    assert np.abs(estimate - gradient).max() < 5 * (np.linalg.norm(gradient) / np.sqrt(count) + bias)
    middle = 0.5 * at @ hessian @ at + linear @ at
    assert loss.item() == pytest.approx(middle, abs=1e-3 if name == "one-sided" else 0.01)


def test_branches_lie_epsilon_to_both_sides_or_ahead() -> None:
    values, z = mx.array([1.0, 2.0]), mx.array([[1, -1], [-1, -1]], mx.int8)
    branches = estimator.TwoSided().branches(values, z, 0.5)
    expected = np.array([[1.5, 1.5], [0.5, 2.5], [0.5, 1.5], [1.5, 2.5]])
    assert np.array_equal(np.array(branches.part(0, 2)), expected)
    assert np.array_equal(np.array(branches[1:3].part(1, 2)), expected[1:3, 1:])
    ahead = estimator.OneSided().branches(values, z, 0.5)
    assert np.array_equal(np.array(ahead.part(0, 2)), np.array([[1.0, 2.0], [1.5, 1.5], [0.5, 1.5]]))


def test_two_sides_divide_the_examples_and_one_side_shares_them() -> None:
    assert estimator.TwoSided().shares([1, 2, 3, 4], 2) == [[1, 3], [1, 3], [2, 4], [2, 4]]
    assert estimator.OneSided().shares([1, 2, 3, 4], 2) == [[1, 2, 3, 4]] * 3


def test_gaussian_directions_are_normal_and_scales_apply() -> None:
    z = np.array(estimator.directions(3, 1, 4, 20_000, "gaussian"))
    assert abs(z.mean()) < 0.02
    assert abs(z.var() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.2
    scale = mx.array(np.linspace(0, 2, 50).astype(np.float32))
    signs = np.array(estimator.directions(3, 1, 4, 50))
    assert np.array_equal(np.array(estimator.directions(3, 1, 4, 50, scale=scale)), signs * np.array(scale))


def test_the_scale_is_a_power_of_the_scores() -> None:
    scores = np.array([1e-8, 1e-6, 4e-6], np.float32)
    assert estimator.fisher_scale(mx.array(scores), 0) is None
    found = estimator.fisher_scale(mx.array(scores), 0.5)
    assert found is not None
    assert np.allclose(np.array(found), np.sqrt(scores / scores.mean()), rtol=1e-5)
    safe = estimator.fisher_scale(mx.array(np.array([0.0, 1.0], np.float32)), -0.5)
    assert safe is not None
    assert np.isfinite(np.array(safe)).all()
