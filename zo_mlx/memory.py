"""MLX's cache of freed buffers, bounded for the duration of some work."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import mlx.core as mx


@contextlib.contextmanager
def bounded_cache(limit: int) -> Iterator[None]:
    """Let MLX keep at most `limit` bytes of freed buffers; the limit before is put back at the end."""
    before = mx.set_cache_limit(limit)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that MLX holds while something runs, in all."""
    gc.collect()  # modules that refer to each other keep their arrays until then
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()
