"""What MLX holds during a step, and its time: as it likes, held to what the step needs, an operation at a time.

    python tests/benchmarks/ahead.py --model smollm2-135m [--gradient exact] [--repeats 4] 4x64 16x64 ...

Each point is a batch size and a length; the ways take turns. The model is a converted directory or the name of a shape,
as for planner.py. It is for GPUs, on which MLX works ahead; runs hold it to what their longest step needs there.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import gc
import time
from collections.abc import Callable
from unittest import mock

import mlx.core as mx
from shapes import SHAPES, model_directory

from zo_mlx import miniature
from zo_mlx.config import TrainConfig
from zo_mlx.memory import bounded_cache, peak_of
from zo_mlx.model import load_sparse

Found = dict[str, list[tuple[int, float]]]


def compared(step: Callable[[], object], repeats: int) -> Found:
    """Peaks in bytes and seconds of a step, taken in each way so many times, and once before."""
    peak_of(step, None)
    need = peak_of(step)
    found: Found = {"as it likes": [], "held": [], "an operation at a time": []}
    for _ in range(repeats):
        for way, aim in zip(found, (None, need, 0), strict=True):
            gc.collect()
            started = time.perf_counter()
            found[way].append((peak_of(step, aim), time.perf_counter() - started))
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
        steps = miniature.Steps(sparse, index, TrainConfig(gradient=args.gradient))
        for rows, length in (map(int, point.split("x")) for point in args.points):
            taken: list[Found] = []

            def above(step: Callable[[], object], _: object, taken: list[Found] = taken) -> int:
                taken.append(compared(step, args.repeats))
                return 0

            with mock.patch.object(miniature, "_above", above):
                steps.peak(rows, length)
            for way, found in taken[0].items():
                peaks, seconds = ([point[i] for point in found] for i in (0, 1))
                print(
                    f"{rows} x {length}, {way}: {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} MB, "
                    f"{min(seconds):.3f} to {max(seconds):.3f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
