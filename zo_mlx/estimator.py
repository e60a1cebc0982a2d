"""Directions and projected gradients."""

import hashlib
import struct

import mlx.core as mx


def key(seed: int, step: int, direction: int) -> mx.array:
    """The random key of one direction of one step of one run: BLAKE2b of the three numbers, 64 bits."""
    packed = struct.pack("<QQQ", seed, step, direction)
    return mx.random.key(int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little"))


def directions(seed: int, step: int, count: int, size: int) -> mx.array:
    """The directions of one step: (q, K) float32 of +-1 with equal probability, the same on every backend."""
    signs = [mx.random.bernoulli(0.5, (size,), key=key(seed, step, d)) for d in range(count)]
    return mx.where(mx.stack(signs), 1.0, -1.0)


def branches(values: mx.array, z: mx.array, epsilon: float) -> mx.array:
    """Values of the two branches of every direction: (K,) and (q, K) -> (2q, K), in the order +, -, +, - ..."""
    offsets = epsilon * z
    return mx.stack([values + offsets, values - offsets], axis=1).reshape(-1, values.size)


def projected_gradients(losses: mx.array, epsilon: float) -> mx.array:
    """(loss+ - loss-) / (2 epsilon) of every direction (Spall 1992, eq. 2.2): (2q,) losses -> (q,)."""
    pairs = losses.reshape(-1, 2)
    return (pairs[:, 0] - pairs[:, 1]) / (2 * epsilon)


def gradient_estimate(projected: mx.array, z: mx.array) -> mx.array:
    """The mean over directions of projected gradient times direction: (q,) and (q, K) -> (K,) float32."""
    return (projected[:, None] * z).mean(axis=0)
