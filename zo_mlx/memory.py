"""MLX's memory, bounded for the duration of some work, and measured."""

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


@contextlib.contextmanager
def held_below(limit: int | None) -> Iterator[None]:
    """Let MLX finish what it has begun before it holds more than `limit` bytes, as far as that is possible.

    Without it, MLX makes room for operations long before their turn, and how long depends on the machine.
    """
    if limit is None:
        yield
        return
    before = mx.set_memory_limit(limit)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that MLX must hold while something runs, in all: with one operation at a time."""
    gc.collect()  # modules that refer to each other keep their arrays until then
    mx.clear_cache()
    mx.reset_peak_memory()
    with held_below(1):
        run()
    return mx.get_peak_memory()
