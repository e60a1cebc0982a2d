"""Directions, the branches along them, and projected gradients."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx


def key(seed: int, step: int, direction: int) -> mx.array:
    """The random key of one direction of one step of one run: BLAKE2b of the three numbers, 64 bits."""
    packed = struct.pack("<QQQ", seed, step, direction)
    return mx.random.key(int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little"))


LAWS = ("rademacher", "gaussian")


def directions(
    seed: int, step: int, count: int, size: int, law: str = "rademacher", scale: mx.array | None = None
) -> mx.array:
    """The directions of one step: (q, K).

    Args:
        law: `rademacher`, +-1 with equal probability, from random bits, the same on every backend; or `gaussian`,
            standard normal, whose last bits depend on the backend.
        scale: (K,) float32; directions are multiplied by it. None is 1.

    Returns:
        int8 for `rademacher` without a scale, else float32.
    """
    keys = [key(seed, step, d) for d in range(count)]
    if law == "gaussian":
        z = mx.stack([mx.random.normal((size,), key=k) for k in keys])
    else:
        signs = mx.stack([mx.random.bernoulli(0.5, (size,), key=k) for k in keys])
        z = mx.where(signs, mx.array(1, mx.int8), mx.array(-1, mx.int8))
    return z if scale is None else z * scale


def fisher_scale(scores: mx.array, power: float) -> mx.array | None:
    """What directions are scaled with: scores (K,) to a power, with a root mean square of 1; None for power 0."""
    if power == 0:
        return None
    raised = mx.power(mx.maximum(scores, scores.max() * 1e-12), power)
    return raised / mx.sqrt(mx.square(raised).mean())


@dataclass(frozen=True)
class Branches:
    """P points around some values, made where they are needed: of all weights at once they would take much memory.

    Attributes:
        values: (K,) float32.
        z: (q, K) directions.
        offsets: for each branch, the number of a direction, and how far along it the branch lies.
    """

    values: mx.array
    z: mx.array
    offsets: tuple[tuple[int, float], ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, which: slice) -> "Branches":
        return Branches(self.values, self.z, self.offsets[which])

    def part(self, start: int, end: int) -> mx.array:
        """The branches' values from `start` to `end`: (P, end - start) float32."""
        numbers, distances = zip(*self.offsets, strict=True)
        z = self.z[:, start:end][mx.array(numbers)]
        return self.values[start:end] + mx.array(distances)[:, None] * z


# The losses, (P,), of P branches, each on its own examples; all have equally many.
Loss = Callable[[Branches, Sequence[Sequence[Any]]], mx.array]


class Estimator(Protocol):
    """How the slopes of the loss along q directions are found from the losses of branches."""

    def branches(self, values: mx.array, z: mx.array, epsilon: float) -> Branches:
        """The points to evaluate the loss at."""

    def shares(self, examples: Sequence[Any], q: int) -> list[Sequence[Any]]:
        """The examples that each branch is evaluated on."""

    def slopes(self, losses: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
        """From the losses of all branches, (P,): the step's loss, and the projected gradients, (q,)."""


class TwoSided:
    """SPSA (Spall 1992, eq. 2.2): (loss+ - loss-) / (2 epsilon), for each direction on its own share of the examples.

    The branches are +, -, +, - ...: 2q of them.
    """

    def branches(self, values: mx.array, z: mx.array, epsilon: float) -> Branches:
        return Branches(values, z, tuple((d, sign * epsilon) for d in range(len(z)) for sign in (1, -1)))

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

    def branches(self, values: mx.array, z: mx.array, epsilon: float) -> Branches:
        return Branches(values, z, ((0, 0.0), *((d, epsilon) for d in range(len(z)))))

    def shares(self, examples: Sequence[Any], q: int) -> list[Sequence[Any]]:
        return [examples] * (1 + q)

    def slopes(self, losses: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
        return losses[0], (losses[1:] - losses[0]) / epsilon


ESTIMATORS: dict[str, Estimator] = {"one-sided": OneSided(), "two-sided": TwoSided()}


def gradient_estimate(projected: mx.array, z: mx.array) -> mx.array:
    """The mean over directions of projected gradient times direction: (q,) and (q, K) -> (K,) float32."""
    total = mx.zeros(z.shape[1])
    for slope, direction in zip(projected, z, strict=True):  # one at a time: memory for K, not for q K
        total = total + slope * direction
    return total / len(z)
