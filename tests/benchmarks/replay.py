"""How many steps of a journal are replayed in a second: random slopes, the default settings, no model.

    python tests/benchmarks/replay.py [--size 100000] [--steps 5000]

Run it with OPENBLAS_NUM_THREADS=1. Seconds of the processor are those of all threads; on a busy machine more go by.
"""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import argparse
import json
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from zo_mlx.config import filled, resolved
from zo_mlx.journal import Journal, Record
from zo_mlx.memory import bounded_cache
from zo_mlx.optimizer import Optimizer
from zo_mlx.step import replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="Trained weights.")
    parser.add_argument("--steps", type=int, default=5_000)
    args = parser.parse_args()
    config = resolved(zo_mlx.TrainConfig())
    rng = np.random.default_rng(0)
    origin = mx.array(rng.normal(size=args.size).astype(np.float32))
    slopes = rng.normal(size=(args.steps, filled(config.directions))).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory, bounded_cache():
        header = {
            "config": {"directions": config.directions},
            "trained": [[0, args.size]],
            "fingerprints": {"base_model": "none"},
        }
        with Journal.create(Path(directory) / "journal", header).open() as journal:
            for i in range(args.steps):
                journal.append(Record(i + 1, 1.0, slopes[i]))
        optimizer = Optimizer(config, origin)
        wall, processor = time.perf_counter(), time.process_time()
        values, _ = replay(optimizer, origin, optimizer.state, Journal.read(journal.path).records(), config)
        mx.eval(values)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    found = {
        "weights": args.size,
        "directions": config.directions,
        "steps": args.steps,
        "steps_per_second": round(args.steps / wall),
        "steps_per_processor_second": round(args.steps / processor),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
