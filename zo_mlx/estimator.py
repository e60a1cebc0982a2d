"""Directions, the branches along them, and projected gradients."""

import hashlib
import struct
from dataclasses import dataclass

import mlx.core as mx


def key(seed: int, step: int, direction: int) -> mx.array:
    """The random key of one direction of one step of one run: BLAKE2b of the three numbers, 64 bits."""
    packed = struct.pack("<QQQ", seed, step, direction)
    return mx.random.key(int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little"))


def directions(seed: int, step: int, count: int, size: int) -> mx.array:
    """The directions of one step: (q, K) int8 of +-1 with equal probability, the same on every backend."""
    signs = [mx.random.bernoulli(0.5, (size,), key=key(seed, step, d)) for d in range(count)]
    return mx.where(mx.stack(signs), mx.array(1, mx.int8), mx.array(-1, mx.int8))


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


def two_sided(values: mx.array, z: mx.array, epsilon: float) -> Branches:
    """The two branches of every direction: 2q of them, in the order +, -, +, - ..."""
    return Branches(values, z, tuple((d, sign * epsilon) for d in range(len(z)) for sign in (1, -1)))


def projected_gradients(losses: mx.array, epsilon: float) -> mx.array:
    """(loss+ - loss-) / (2 epsilon) of every direction (Spall 1992, eq. 2.2): (2q,) losses -> (q,)."""
    pairs = losses.reshape(-1, 2)
    return (pairs[:, 0] - pairs[:, 1]) / (2 * epsilon)


def gradient_estimate(projected: mx.array, z: mx.array) -> mx.array:
    """The mean over directions of projected gradient times direction: (q,) and (q, K) -> (K,) float32."""
    total = mx.zeros(z.shape[1])
    for slope, direction in zip(projected, z, strict=True):  # one at a time: memory for K, not for q K
        total = total + slope * direction
    return total / len(z)
