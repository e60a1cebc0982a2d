"""MLX's memory, bounded for the duration of some work, and measured."""

import contextlib
import gc
import re
from collections.abc import Callable, Iterator

import mlx.core as mx

from .product import on_cpu

# MLX keeps freed buffers for reuse; batches of many lengths would otherwise make it keep several generations of them.
GPU_CACHE_BYTES = 256 << 20

# On a GPU MLX begins operations, and makes room for them, long before their turn: several times what a step needs. For
# so much more than what is held before the first step it need not wait (docs/memory.md).
GPU_AHEAD_BYTES = 256 << 20

# How far a step may go beyond a limit before it counts as too large: what was planned for it takes up to 1.07 times it.
OVERRUN = 1.1


@contextlib.contextmanager
def bounded_cache() -> Iterator[None]:
    """Let MLX keep few freed buffers, on the CPU none: the system's allocator keeps them (see `_linux.py`), and better.

    The limit before is put back at the end.
    """
    before = mx.set_cache_limit(0 if on_cpu() else GPU_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


@contextlib.contextmanager
def held_below(aim: int | None) -> Iterator[None]:
    """Let MLX finish what it has begun before it holds more than `aim` bytes, as far as that is possible.

    Without it, MLX makes room for operations long before their turn, and how long depends on the machine.
    """
    if aim is None:
        yield
        return
    before = mx.set_memory_limit(max(0, aim))
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def room(kept: int) -> int | None:
    """What to hold MLX below where no limit is given, with so many bytes that are yet to be kept; None on the CPU."""
    return None if on_cpu() else mx.get_active_memory() + kept + GPU_AHEAD_BYTES


def with_margin(limit: int) -> int:
    """What to aim at, so that MLX stays within a limit in bytes: 70% of what the limit leaves above what is held now.

    MLX looks at what it holds before an operation, not at what that adds; and it may let go of an operation's inputs
    after the next one has begun. On the CPU, that took passes of 1,300 tokens of SmolLM2 up to 15% above their need.
    """
    held = mx.get_active_memory()
    return held + int(0.7 * (limit - held))


def is_shortage(error: Exception) -> bool:
    """Whether an error of MLX, or of Python, says that there was not enough memory."""
    return isinstance(error, MemoryError) or re.search("alloc|memory", str(error), re.IGNORECASE) is not None


def peak_of(run: Callable[[], object], aim: int | None = 0) -> int:
    """The most bytes that MLX holds while something runs, in all.

    Args:
        aim: as for `held_below`; 0 is an operation at a time, which holds no more than what must be, None is as MLX
            likes.
    """
    gc.collect()  # modules that refer to each other keep their arrays until then
    mx.clear_cache()
    mx.reset_peak_memory()
    with held_below(aim):
        run()
    return mx.get_peak_memory()
