"""One training step of Llama-2-7B's shape with random 4-bit weights: peak memory of the process, and time.

    python tests/benchmarks/llama7b.py [--batch-size 8] [--length 128] [--memory-limit GB] [--gradient exact]
        [--scratch DIR]

The weights are drawn as packed integers and written to a file first; the step runs in a process of its own, whose peak
resident memory is read from Linux's /proc.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from memory import examples_of
from mlx.utils import tree_map
from shapes import make_quantized_model

from zo_mlx.blocks import BlockwiseModel
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.exact import ExactGradient
from zo_mlx.fit import exact_tokens_that_fit, tokens_that_fit
from zo_mlx.head import split_head
from zo_mlx.memory import bounded_cache, held_below, with_margin
from zo_mlx.model import load_sparse
from zo_mlx.optimizer import Optimizer
from zo_mlx.step import exact_step, make_loss, step


def train_one_step(path: Path, rows: int, length: int, memory_limit: float | None, gradient: str) -> dict[str, float]:
    """Load the model and take a step, as a run does."""
    sparse, _, index, config = load_sparse(path)
    head, values = split_head(sparse.model), index.initial_values()
    mx.eval(sparse.model.parameters(), values)
    weights = mx.get_active_memory()
    examples = examples_of(rows, length, config["vocab_size"])
    settings = resolved(TrainConfig(batch_size=rows, estimator="two-sided", gradient=gradient))
    limit, fit = None if memory_limit is None else int(memory_limit * 1e9), settings.tokens_at_once
    optimizer = Optimizer(settings, values)
    # As later in a run, where the values, and those that the state holds, are no longer those before the first step.
    values, state = tree_map(lambda leaf: leaf + 0, (values, optimizer.state))
    mx.eval(values, state)
    blocks = BlockwiseModel(sparse.model) if gradient == "exact" else None
    if blocks and limit:
        fit = exact_tokens_that_fit(limit, ExactGradient(sparse, head, blocks), values, examples)[0]
    elif limit:
        fit = tokens_that_fit(limit, sparse, head, values, examples, settings)[0]
    started = time.perf_counter()
    with held_below(None if limit is None else with_margin(limit)):
        if blocks:
            exact = ExactGradient(sparse, head, blocks, tokens_at_once=fit)
            exact_step(exact, optimizer, values, state, examples, 1)
        else:
            loss = make_loss(sparse, head, tokens_at_once=fit)
            step(loss, optimizer, values, state, examples, 1, settings)
    seconds = time.perf_counter() - started
    peak = next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    bytes_of = {"process": peak, "mlx": mx.get_peak_memory(), "weights": weights}
    return {"seconds": seconds, "trainable": index.size, **bytes_of}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--memory-limit", type=float, metavar="GB")
    parser.add_argument("--gradient", choices=("zo", "exact"), default="zo")
    parser.add_argument("--scratch", metavar="DIR", help="where the random model is put")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with bounded_cache():
            found = train_one_step(Path(args.child), args.batch_size, args.length, args.memory_limit, args.gradient)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as work:
        make_quantized_model(Path(work, "model"), "llama2-7b")
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(Path(work, "model"))]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    gib = {name: f"{found[name] / 2**30:.2f} GiB" for name in ("process", "mlx", "weights")}
    rows = f"{args.batch_size} x {args.length} tokens"
    print(f"llama2-7b, {args.gradient} gradient, {rows}, limit {args.memory_limit}, {mx.default_device()}")
    print(f"{found['trainable']:,} trainable weights, {found['seconds']:.0f} s")
    print(f"peak: process {gib['process']}, MLX {gib['mlx']}, of which weights {gib['weights']}")


if __name__ == "__main__":
    main()
