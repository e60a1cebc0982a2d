"""MLX's cache of freed buffers, bounded for the duration of some work."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx


@contextlib.contextmanager
def bounded_cache(limit: int) -> Iterator[None]:
    """Let MLX keep at most `limit` bytes of freed buffers; the limit before is put back at the end."""
    before = mx.set_cache_limit(limit)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
