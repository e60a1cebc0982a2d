"""How many machines are worth it: steps of up to 64 of them, simulated.

    python tests/benchmarks/scaling.py [--row-ms 240] [--delay-ms 2] [--jitter-ms 2] [--spread 0.05] [--steps 2000]

Each machine takes its rows' time, which varies from step to step (normal, `--spread` of the mean). Then messages go
around the ring: in each of N - 1 rounds a machine hands on what it got last, which takes `--delay-ms` and an
exponential delay of `--jitter-ms` on average, and waits for its neighbour's. The step ends when the last has all.
"""

import argparse

import numpy as np


def step_seconds(machines: int, rows: int, args: argparse.Namespace) -> float:
    """The mean over steps, in seconds; each machine has so many rows."""
    rng = np.random.default_rng(0)
    work = args.row_ms / 1e3 * rows
    ready = work * np.maximum(0.1, rng.normal(1, args.spread, (args.steps, machines)))
    for _ in range(machines - 1):
        arrival = ready + (args.delay_ms + rng.exponential(args.jitter_ms, ready.shape)) / 1e3
        ready = np.maximum(ready, np.roll(arrival, 1, axis=1))
    return float(ready.max(axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row-ms", type=float, default=240.0, help="one machine's time for a row of the batch")
    parser.add_argument("--delay-ms", type=float, default=2.0)
    parser.add_argument("--jitter-ms", type=float, default=2.0)
    parser.add_argument("--spread", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    counts = (1, 2, 4, 8, 16, 32, 64)
    print("rows each   " + "".join(f"{n:>16}" for n in counts) + "   machines")
    for rows in (1, 2, 4, 8):
        alone = args.row_ms / 1e3 * rows
        cells = [(seconds := step_seconds(n, rows, args), n * alone / seconds) for n in counts]
        print(f"{rows:<12}" + "".join(f"{f'{seconds:.2f} s, x {gain:.1f}':>16}" for seconds, gain in cells))


if __name__ == "__main__":
    main()
