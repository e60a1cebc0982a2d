import hashlib
import math

import mlx.core as mx
import numpy as np
import pytest

from zo_mlx import estimator
from zo_mlx.estimator import Form


def _vectors(found: estimator.Directions, size: int) -> np.ndarray:
    return np.array(found.part([*range(len(found))], 0, size)).astype(np.float32)


def _signs(seed: int, step: int, count: int, size: int) -> np.ndarray:
    return _vectors(estimator.directions(seed, step, count, size), size)


def test_directions_are_signs_and_depend_on_seed_step_and_number() -> None:
    z = _signs(1, 2, 19, 1000)
    assert z.shape == (19, 1000)
    assert set(np.unique(z)) == {-1, 1}
    products = z @ z.T / 1000 - np.eye(19)
    assert np.abs(products).max() < 0.15  # independent, not equal or opposite
    assert np.abs(z.mean(axis=1)).max() < 0.15
    assert np.abs(z.mean(axis=0)).max() < 1
    assert (z == _signs(1, 2, 19, 1000)).all()
    for other in (_signs(0, 2, 1, 1000), _signs(1, 3, 1, 1000)):
        assert abs((other[0] * z[0]).mean()) < 0.15


def test_parts_are_parts_of_the_whole() -> None:
    found = estimator.directions(1, 2, 11, 100)
    assert np.array_equal(np.array(found.part((9, 0, 9), 30, 50)), _signs(1, 2, 11, 100)[[9, 0, 9], 30:50])


def threefry(key: int, counters: np.ndarray) -> np.ndarray:
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011), here to need no MLX: (2, n) uint32 to as many random words."""
    halves = np.array([key >> 32, key & 0xFFFFFFFF], np.uint32)
    schedule = [*halves, halves[0] ^ halves[1] ^ np.uint32(0x1BD11BDA)]
    a, b = counters + halves[:, None]
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            a = a + b
            b = (b << np.uint32(turn) | b >> np.uint32(32 - turn)) ^ a
        a, b = a + schedule[(block + 1) % 3], b + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return np.stack([a, b])


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 1001), (8, 64), (20, 333)])
def test_directions_never_change_between_versions(count: int, size: int) -> None:
    """A journal replays only if these bits stay what they are: written out here from docs/journal.md."""
    packed = (7).to_bytes(8, "little") + (11).to_bytes(8, "little")
    key = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
    rows = -(-count // 8)
    n = -(-rows * size // 8)
    words = threefry(key, np.arange(2 * n, dtype=np.uint32).reshape(2, n))
    content = np.frombuffer(words.astype("<u4").tobytes(), np.uint8)[: rows * size].reshape(rows, size)
    expected = [[1 if content[d // 8, k] >> d % 8 & 1 else -1 for k in range(size)] for d in range(count)]
    assert np.array_equal(_signs(7, 11, count, size), expected)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_mean_of_signs_is_that_of_slopes_times_signs_bit_by_bit(count: int, scaled: bool) -> None:
    rng = np.random.default_rng(count)
    slopes = (rng.normal(size=count) * 10.0 ** rng.integers(-3, 3, count)).astype(np.float32)
    scale = rng.random(500).astype(np.float32)
    z = _signs(3, 5, count, 500)
    rows = []
    for first in range(0, count, 8):
        total = np.zeros(500, np.float32)
        for d in range(first, min(first + 8, count)):
            total = total + slopes[d] * z[d]
        rows.append(total / np.float32(count))
    expected = rows[0]
    for row in rows[1:]:
        expected = expected + row
    found = estimator.directions(3, 5, count, 500, form=Form(mx.array(scale) if scaled else None))
    assert np.array_equal(np.array(found.mean(slopes)), expected * scale if scaled else expected)
    exact = (slopes.astype(np.float64)[:, None] * _vectors(found, 500)).mean(axis=0)
    assert np.allclose(np.array(found.mean(slopes)), exact, rtol=1e-5, atol=1e-5 * np.abs(slopes).max())
    same = estimator.Vectors(mx.array(_vectors(found, 500))).mean(slopes)
    assert np.allclose(np.array(same), exact, rtol=1e-5, atol=1e-5 * np.abs(slopes).max())


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
    estimate = np.array(z.mean(np.array(slopes)))

    gradient = hessian @ at + linear
    # Every coordinate has a standard error of at most |gradient| / sqrt(count); one side adds half of epsilon z H z.
    bias = 0.5 * epsilon * np.abs(hessian).sum() / np.sqrt(count) if name == "one-sided" else 0
    assert np.abs(estimate - gradient).max() < 5 * (np.linalg.norm(gradient) / np.sqrt(count) + bias)
    middle = 0.5 * at @ hessian @ at + linear @ at
    assert loss.item() == pytest.approx(middle, abs=1e-3 if name == "one-sided" else 0.01)


def test_branches_lie_epsilon_to_both_sides_or_ahead() -> None:
    values, z = mx.array([1.0, 2.0]), estimator.Vectors(mx.array([[1, -1], [-1, -1]], mx.int8))
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
    z = _vectors(estimator.directions(3, 1, 4, 20_000, "gaussian"), 20_000)
    assert abs(z.mean()) < 0.02
    assert abs(z.var() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.2
    scale = mx.array(np.linspace(0, 2, 50).astype(np.float32))
    for law in estimator.LAWS:
        plain, scaled = (_vectors(estimator.directions(3, 1, 4, 50, law, Form(s)), 50) for s in (None, scale))
        assert np.array_equal(scaled, plain * np.array(scale))


@pytest.mark.parametrize("law", estimator.LAWS)
def test_weights_of_a_group_share_a_number_and_of_two_kinds_their_product(law: str) -> None:
    row, column = (mx.array(n.astype(np.uint32).ravel()) for n in np.mgrid[:30, :40])
    rows, columns, both = (
        _vectors(estimator.directions(3, 1, 9, 1200, law, Form(groups=groups)), 1200).reshape(9, 30, 40)
        for groups in ((row,), (column,), (row, column))
    )
    assert (rows == rows[:, :, :1]).all()
    assert (columns == columns[:, :1]).all()
    for z in both:
        assert np.linalg.matrix_rank(z) == 1
    # 9 directions of 30 and 40 numbers each: standard errors of 0.06 and 0.05.
    for numbers in (rows[:, :, 0], columns[:, 0], both[:, :, 0], both[:, 0]):
        assert abs(numbers.mean()) < 0.25
        assert len(np.unique(numbers.T.round(5), axis=0)) > 20


@pytest.mark.skipif(not mx.is_available(mx.gpu), reason="no GPU")
@pytest.mark.parametrize("law", estimator.LAWS)
def test_directions_on_the_gpu_are_those_on_the_cpu(law: str) -> None:
    found, slopes = [], np.array([0.3, -2, 5], np.float32)
    for device in (mx.cpu, mx.gpu):
        with mx.stream(device):
            z = estimator.directions(3, 1, 3, 20_000, law)
            found.append((_vectors(z, 20_000), np.array(z.mean(slopes))))
    for on_cpu, on_gpu in zip(*found, strict=True):
        if law == "rademacher":
            assert np.array_equal(on_cpu, on_gpu)
        else:
            assert np.allclose(on_cpu, on_gpu, rtol=1e-4, atol=1e-5)


def test_the_scale_is_a_power_of_the_scores() -> None:
    scores = np.array([1e-8, 1e-6, 4e-6], np.float32)
    assert estimator.fisher_scale(mx.array(scores), 0) is None
    found = estimator.fisher_scale(mx.array(scores), 0.5)
    assert found is not None
    assert np.allclose(np.array(found), np.sqrt(scores / scores.mean()), rtol=1e-5)
    safe = estimator.fisher_scale(mx.array(np.array([0.0, 1.0], np.float32)), -0.5)
    assert safe is not None
    assert np.isfinite(np.array(safe)).all()


def test_root_mean_squares_of_many_weights_are_exact() -> None:
    """MLX's own sum of as many, one after the other on CPUs, is off by a per cent."""
    values = np.random.default_rng(0).standard_t(3, 8_000_000).astype(np.float32)
    expected = math.sqrt(math.fsum((values.astype(np.float64) ** 2).tolist()) / len(values))
    assert estimator.root_mean_square(mx.array(values)) == pytest.approx(expected, rel=1e-12)
