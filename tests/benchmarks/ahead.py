"""What MLX holds during a step, and its time, where it works ahead: on a GPU.

    python tests/benchmarks/ahead.py --model smollm2-135m [--gradient exact] [--repeats 4] 4x64 16x64 ...

As it likes; held as runs hold it; to what the step needs; and an operation at a time, which shows what that is. Each
point is a batch size and a length; the ways take turns. The model is a converted directory or the name of a shape, as
for planner.py.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import time
from collections.abc import Callable

import mlx.core as mx
from shapes import SHAPES, model_directory

from zo_mlx.config import TrainConfig
from zo_mlx.memory import bounded_cache, peak_of, room
from zo_mlx.miniature import Steps
from zo_mlx.model import load_sparse


def compared(step: Callable[[], None], repeats: int) -> dict[str, list[tuple[int, float]]]:
    """Peaks in bytes and seconds of a step, taken in each way so many times, and once before."""
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started  # of the step alone: `peak_of` clears up before it

    peak_of(timed, None)
    ways = {"as it likes": None, "as runs do": room(0), "what it needs": peak_of(timed), "an operation at a time": 0}
    found: dict[str, list[tuple[int, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, aim in ways.items():
            peak = peak_of(timed, aim)
            found[way].append((peak, seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=f"directory, or one of {', '.join(SHAPES)}")
    parser.add_argument("--gradient", choices=("zo", "exact"), default="zo")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("points", nargs="+", metavar="ROWSxLENGTH")
    args = parser.parse_args()
    print(f"{args.model}, {args.gradient}, {mx.default_device()}")
    with model_directory(args.model) as path, bounded_cache():
        sparse, _, index, _ = load_sparse(path, float32=args.gradient == "zo")
        steps = Steps(sparse, index, TrainConfig(gradient=args.gradient))
        for rows, length in (map(int, point.split("x")) for point in args.points):
            for way, found in compared(steps.step(rows, length), args.repeats).items():
                peaks, seconds = zip(*found, strict=True)
                print(
                    f"{rows} x {length}, {way}: {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} MB, "
                    f"{min(seconds):.3f} to {max(seconds):.3f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
