"""Directions, the branches along them, and projected gradients."""

import functools
import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np


def key(*numbers: int) -> mx.array:
    """A random key from some numbers: their BLAKE2b, 64 bits."""
    packed = struct.pack(f"<{len(numbers)}Q", *numbers)
    return mx.random.key(int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little"))


class Directions(Protocol):
    """The q directions of a step: vectors of K numbers, of which only parts and the weighted mean are ever made."""

    def __len__(self) -> int:
        """q."""

    def part(self, numbers: Sequence[int], start: int, end: int) -> mx.array:
        """From `start` to `end`, the directions with some numbers, of which there are P: (P, end - start)."""

    def mean(self, slopes: np.ndarray) -> mx.array:
        """The gradient estimate: the mean over directions of (q,) float32 slope times direction, (K,) float32."""


class Vectors:
    """Directions that are held as they are: (q, K)."""

    def __init__(self, z: mx.array):
        self._z = z

    def __len__(self) -> int:
        return len(self._z)

    def part(self, numbers: Sequence[int], start: int, end: int) -> mx.array:
        return self._z[:, start:end][mx.array(list(numbers))]

    def mean(self, slopes: np.ndarray) -> mx.array:
        total = mx.zeros(self._z.shape[1])
        for slope, direction in zip(slopes.tolist(), self._z, strict=True):  # memory for K, not for q K
            total = total + slope * direction
        return total / len(self._z)


class Signs:
    """Directions of +-1, a bit each: for every weight, a byte has the signs of 8 directions, 1 for +1.

    So the mean takes one look into a table of 256 sums for 8 directions of a weight, and is the same on every backend:
    bits and sums of float32 in a fixed order.

    Args:
        bits: (ceil(q / 8), K) uint8; direction d is bit d % 8, from the lowest, of the bytes in row d // 8.
        count: q.
        scale: (K,) float32; the directions are multiplied by it. None is 1.
    """

    def __init__(self, bits: mx.array, count: int, scale: mx.array | None = None):
        self._bits, self._count, self._scale = bits, count, scale

    def __len__(self) -> int:
        return self._count

    def part(self, numbers: Sequence[int], start: int, end: int) -> mx.array:
        row, bit = np.divmod(np.array(numbers), 8)
        own = self._bits[:, start:end][mx.array(row)] & mx.array(np.uint8(1) << bit.astype(np.uint8))[:, None]
        signs = mx.where(own, mx.array(1, mx.int8), mx.array(-1, mx.int8))
        return signs if self._scale is None else signs * self._scale[start:end]

    def mean(self, slopes: np.ndarray) -> mx.array:
        # In numpy: MLX's own look-up takes ten times as long on a CPU.
        rows = zip(range(0, self._count, 8), np.asarray(self._bits), strict=True)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever gave such slopes sees what comes of them
            sums = (_table(slopes[first : first + 8], self._count).take(row) for first, row in rows)
            estimate = mx.array(functools.reduce(np.add, sums))
        return estimate if self._scale is None else estimate * self._scale


def _table(slopes: np.ndarray, count: int) -> np.ndarray:
    """For each byte of signs, the sum of up to 8 slopes with these signs, over `count`: (256,) float32."""
    sums = np.zeros(256, np.float32)
    for slope, signs in zip(slopes, _SIGNS, strict=False):
        sums += slope * signs
    return sums / np.float32(count)


# The signs that the bits of all bytes stand for: (8, 256).
_SIGNS = np.where(np.arange(256) >> np.arange(8)[:, None] & 1, np.float32(1), np.float32(-1))


LAWS = ("rademacher", "gaussian")

# By structure of the directions, the kinds of groups whose weights have a number in common. With both kinds, what a
# direction adds to a layer is a part of a matrix of rank one, as in LOZO (Chen et al. 2024, arXiv 2410.07698).
STRUCTURES: dict[str, tuple[str, ...]] = {
    "free": (), "low-rank": ("row", "column"), "row": ("row",), "column": ("column",)
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What the directions of a run have in common beside their law.

    Attributes:
        scale: (K,) float32; directions are multiplied by it. None is 1.
        groups: if there are any, a weight's part in a direction is not a number of its own but the product of those of
            the groups it is in, one of each kind. For each kind (K,) uint32, the number of its group.
    """

    scale: mx.array | None = None
    groups: tuple[mx.array, ...] = ()


FREE = Form()


def directions(seed: int, step: int, count: int, size: int, law: str = "rademacher", form: Form = FREE) -> Directions:
    """The `count` (q) directions of one step along `size` (K) weights.

    Args:
        law: `rademacher`, +-1 with equal probability, from random bits, the same on every backend; or `gaussian`,
            standard normal, whose last bits depend on the backend.
    """
    if law == "gaussian":

        def normal(direction: int) -> mx.array:
            if not form.groups:
                return mx.random.normal((size,), key=key(seed, step, direction))
            parts = (
                mx.random.normal((_count(own),), key=key(seed, step, direction, kind))[own]
                for kind, own in enumerate(form.groups)
            )
            return functools.reduce(mx.multiply, parts)

        z = mx.stack([normal(d) for d in range(count)])
        z = z if form.scale is None else z * form.scale
        mx.eval(z)  # not again for each part
        return Vectors(z)
    rows = -(-count // 8)
    if form.groups:
        parts = (_bits(key(seed, step, kind), rows, _count(own))[:, own] for kind, own in enumerate(form.groups))
        bits = functools.reduce(lambda a, b: ~(a ^ b), parts)  # equal signs make +1
    else:
        bits = _bits(key(seed, step), rows, size)
    mx.eval(bits)
    return Signs(bits, count, form.scale)


def _bits(key: mx.array, rows: int, size: int) -> mx.array:
    """Random bytes: (rows, size) uint8."""
    # Keys made from a key are plain random bits, two words of 32 each. MLX runs on little-endian machines only.
    words = mx.random.split(key, -(-rows * size // 8))
    return words.view(mx.uint8).reshape(-1)[: rows * size].reshape(rows, size)


def _count(groups: mx.array) -> int:
    return int(np.asarray(groups).max()) + 1


def fisher_scale(scores: mx.array, power: float) -> mx.array | None:
    """What directions are scaled with: scores (K,) to a power, with a root mean square of 1; None for power 0."""
    if power == 0:
        return None
    raised = mx.power(mx.maximum(scores, scores.max() * 1e-12), power)
    return raised / root_mean_square(raised)


def root_mean_square(values: mx.array) -> float:
    """Of (K,) float32, summed in float64, which is the same on every backend."""
    return math.sqrt(np.square(np.asarray(values), dtype=np.float64).mean())


@dataclass(frozen=True)
class Branches:
    """P points around some values, made where they are needed: of all weights at once they would take much memory.

    Attributes:
        values: (K,) float32.
        directions: q of them.
        offsets: for each branch, the number of a direction, and how far along it the branch lies.
        apart: (K,) float32, a point of its own that is the last of the branches, if there is one.
        derived: whether the derivatives of the losses with respect to the distances are asked for, too.
        distances: (P,) float32 in place of those of `offsets`, while that derivative is taken.
    """

    values: mx.array
    directions: Directions
    offsets: tuple[tuple[int, float], ...]
    apart: mx.array | None = None
    derived: bool = False
    distances: mx.array | None = None

    def __len__(self) -> int:
        return len(self.offsets) + (self.apart is not None)

    def __getitem__(self, which: slice) -> "Branches":
        has_last = len(self) - 1 in range(len(self))[which]
        return replace(self, offsets=self.offsets[which], apart=self.apart if has_last else None)

    def part(self, start: int, end: int) -> mx.array:
        """The branches' values from `start` to `end`: (P, end - start) float32."""
        apart = [] if self.apart is None else [self.apart[None, start:end]]
        if not self.offsets:
            return apart[0]
        numbers, distances = zip(*self.offsets, strict=True)
        z = self.directions.part(numbers, start, end)
        along = mx.array(distances) if self.distances is None else self.distances
        points = self.values[start:end] + along[:, None] * z
        return mx.concatenate([points, *apart]) if apart else points


# The losses, (P,), of P branches, each on its own examples, of which all have equally many. Where derivatives are asked
# for, (P, 2): losses and derivatives.
Loss = Callable[[Branches, Sequence[Sequence[Any]]], mx.array]


class Estimator(Protocol):
    """How the slopes of the loss along q directions are found from the losses of branches."""

    def branches(self, values: mx.array, directions: Directions, epsilon: float) -> Branches:
        """The points to evaluate the loss at."""

    def shares(self, examples: Sequence[Any], q: int) -> list[Sequence[Any]]:
        """The examples that each branch is evaluated on."""

    def slopes(self, losses: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
        """From what a `Loss` gives for all branches: the step's loss, and the projected gradients, (q,)."""


class TwoSided:
    """SPSA (Spall 1992, eq. 2.2): (loss+ - loss-) / (2 epsilon), for each direction on its own share of the examples.

    The branches are +, -, +, - ...: 2q of them.
    """

    def branches(self, values: mx.array, directions: Directions, epsilon: float) -> Branches:
        return Branches(
            values, directions, tuple((d, sign * epsilon) for d in range(len(directions)) for sign in (1, -1))
        )

    def shares(self, examples: Sequence[Any], q: int) -> list[Sequence[Any]]:
        return [examples[d::q] for d in range(q) for _ in range(2)]

    def slopes(self, losses: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
        pairs = losses.reshape(-1, 2)
        return losses.mean(), (pairs[:, 0] - pairs[:, 1]) / (2 * epsilon)


class OneSided:
    """(loss+ - loss) / epsilon: all directions see the same examples, and share the loss at the values themselves.

    These are the probes of FZOO (arXiv 2506.09034). As there, a step is to be normalized by how far the losses differ:
    `control.Control` does so, over all steps so far. The branches are the values, and one ahead of them along each
    direction: 1 + q of them.
    """

    def branches(self, values: mx.array, directions: Directions, epsilon: float) -> Branches:
        return Branches(values, directions, ((0, 0.0), *((d, epsilon) for d in range(len(directions)))))

    def shares(self, examples: Sequence[Any], q: int) -> list[Sequence[Any]]:
        return [examples] * (1 + q)

    def slopes(self, losses: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
        return losses[0], (losses[1:] - losses[0]) / epsilon


class Jvp:
    """The derivative of the loss along each direction, by forward-mode differentiation (`mx.jvp`): no epsilon, and no
    difference of two losses whose bits cancel. All directions see the same examples.

    Such gradient estimates are those of forward gradients (Baydin et al. 2022, arXiv 2202.08587, eq. 1). The branches
    are the values, once for each direction: q of them, each of the work of two.
    """

    def branches(self, values: mx.array, directions: Directions, epsilon: float) -> Branches:
        return Branches(values, directions, tuple((d, 0.0) for d in range(len(directions))), derived=True)

    def shares(self, examples: Sequence[Any], q: int) -> list[Sequence[Any]]:
        return [examples] * q

    def slopes(self, losses: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
        return losses[0, 0], losses[:, 1]


ESTIMATORS: dict[str, Estimator] = {"one-sided": OneSided(), "two-sided": TwoSided(), "jvp": Jvp()}
