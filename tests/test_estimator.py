import hashlib

import mlx.core as mx
import numpy as np

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


def test_spsa_on_a_quadratic_averages_to_the_gradient() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 6))
    hessian, linear, at = a @ a.T, rng.normal(size=6), rng.normal(size=6)
    epsilon, count = 1e-2, 20000

    z = estimator.directions(0, 1, count, 6)
    branches = np.array(estimator.two_sided(mx.array(at.astype(np.float32)), z, epsilon).part(0, 6), np.float64)
    losses = 0.5 * np.einsum("pi,ij,pj->p", branches, hessian, branches) + branches @ linear
    projected = estimator.projected_gradients(mx.array(losses.astype(np.float32)), epsilon)
    estimate = np.array(estimator.gradient_estimate(projected, z))

    gradient = hessian @ at + linear
    # Every coordinate has a standard error of at most |gradient| / sqrt(count).
    assert np.abs(estimate - gradient).max() < 5 * np.linalg.norm(gradient) / np.sqrt(count)


def test_branches_lie_epsilon_to_both_sides() -> None:
    values, z = mx.array([1.0, 2.0]), mx.array([[1, -1], [-1, -1]], mx.int8)
    branches = estimator.two_sided(values, z, 0.5)
    expected = np.array([[1.5, 1.5], [0.5, 2.5], [0.5, 1.5], [1.5, 2.5]])
    assert np.array_equal(np.array(branches.part(0, 2)), expected)
    assert np.array_equal(np.array(branches[1:3].part(1, 2)), expected[1:3, 1:])
