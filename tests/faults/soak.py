"""Train a tiny model for many steps: memory, open files and the time of a step must stay what they are.

    python tests/faults/soak.py [--steps 50000]

Prints them on the way, a hundred times, and returns 1 if after the first tenth the process grows by 1% or more,
opens a file that it does not close, or if a step of the last tenth takes a tenth more time than one of the first.
"""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import convert_tiny, write_choice_data, write_hf_llama


def resident() -> int:
    """The process's memory in bytes."""
    return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50_000)
    steps = parser.parse_args().steps
    seen: list[tuple[int, int, float]] = []  # memory, open files, CPU seconds a step
    last = [time.process_time(), time.monotonic()]

    def watch(event: dict[str, Any]) -> None:
        if event["event"] != "train":
            return
        now = [time.process_time(), time.monotonic()]
        cpu, wall = ((b - a) / every for a, b in zip(last, now, strict=True))
        last[:] = now
        seen.append((resident(), len(list(Path("/dev/fd").iterdir())), cpu))
        print(
            f"step {event['iteration']}: {seen[-1][0] / 1e6:.1f} MB, {seen[-1][1]} open files, "
            f"a step {1e3 * cpu:.2f} ms of CPU, {1e3 * wall:.2f} ms",
            flush=True,
        )

    every = max(1, steps // 100)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model, data = convert_tiny(write_hf_llama(work / "hf"), work / "model"), write_choice_data(work / "data")
        zo_mlx.train(
            model=str(model), data=str(data), adapter_path=str(work / "adapter"), iters=steps, batch_size=2,
            save_every=every, steps_per_eval=every, steps_per_report=every, progress=False, report=watch,
        )  # fmt: skip
    tenth = len(seen) // 10
    warm = seen[tenth:]
    growth = max(m for m, _, _ in warm[-tenth:]) / max(m for m, _, _ in warm[:tenth]) - 1
    files = {f for _, f, _ in warm}
    first, final = (statistics.median(s for _, _, s in part) for part in (seen[:tenth], seen[-tenth:]))
    print(f"{steps} steps; from the second tenth to the last: memory {growth:+.2%}, open files {sorted(files)}")
    print(f"a step of the first tenth {1e3 * first:.2f} ms of CPU, of the last {1e3 * final:.2f} ms")
    return int(growth >= 0.01 or len(files) > 1 or final > 1.1 * first)


if __name__ == "__main__":
    sys.exit(main())
