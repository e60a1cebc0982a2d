"""Directions and projected gradients."""

import hashlib
import struct
from collections.abc import Callable

import mlx.core as mx


def key(seed: int, step: int, direction: int) -> mx.array:
    """The random key of one direction of one step of one run: BLAKE2b of the three numbers, 64 bits."""
    packed = struct.pack("<QQQ", seed, step, direction)
    return mx.random.key(int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little"))


def rademacher(direction_key: mx.array, size: int) -> mx.array:
    """A direction z: (size,) float32 of +-1 with equal probability, the same on every backend."""
    return mx.where(mx.random.bernoulli(0.5, (size,), key=direction_key), 1.0, -1.0)


def spsa(
    loss: Callable[[mx.array], mx.array], values: mx.array, keys: list[mx.array], epsilon: float
) -> tuple[mx.array, mx.array]:
    """Two-sided simultaneous perturbation (Spall 1992, eq. 2.2).

    Args:
        loss: (P, K) values of P branches -> (P,) losses.
        values: (K,) float32.
        keys: one key per direction, q of them. The two branches of a direction are evaluated together.
        epsilon: how far the branches lie from `values` along a direction.

    Returns:
        (q,) projected gradients (loss+ - loss-) / (2 epsilon), and the mean of all branches' losses.
    """
    projected, means = [], []
    for k in keys:
        offset = epsilon * rademacher(k, values.size)
        pair = loss(mx.stack([values + offset, values - offset]))
        projected.append((pair[0] - pair[1]) / (2 * epsilon))
        means.append(pair.mean())
        mx.eval(projected[-1], means[-1])
    return mx.stack(projected), mx.stack(means).mean()


def gradient_estimate(projected: mx.array, keys: list[mx.array], size: int) -> mx.array:
    """Mean over directions of (projected gradient * direction): (K,) float32."""
    total = mx.zeros((size,))
    for g, k in zip(projected, keys, strict=True):
        total = total + g * rademacher(k, size)
    return total / len(keys)
