"""Time of a training step against one stacked forward pass of the same rows through the same base model.

    python tests/benchmarks/step.py [--model demo/model] [--data examples/support] [--json FILE]

All arms run in one process, in alternation, on the same batches; the table gives medians, and the ratio is the median
of the ratios of neighbours. `floor` computes logits at the target positions only, as the step does; `full` computes
logits everywhere, as calling the model does.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from zo_mlx.config import TrainConfig, resolved
from zo_mlx.data import batch_order, load_dataset
from zo_mlx.head import split_head
from zo_mlx.model import load_sparse
from zo_mlx.objective import collate, scores
from zo_mlx.step import make_loss, make_optimizer, step


def measure(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and the peak of MLX's memory above what it held before, in bytes."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started, mx.get_peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", default="examples/support")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    sparse, tokenizer, index, _ = load_sparse(Path(args.model))
    head = split_head(sparse.model)
    dataset = load_dataset(Path(args.data) / "train.jsonl", tokenizer, 2048)
    config = resolved(TrainConfig(batch_size=args.batch_size, directions=args.directions))
    loss, optimizer, values = make_loss(sparse, head), make_optimizer(config), index.initial_values()
    optimizer.init({"values": values})
    state = optimizer.state
    order = batch_order(dataset.examples, args.batch_size, seed=0, epoch=0)

    times: dict[str, list[float]] = {"step": [], "floor": [], "full": []}
    memory: dict[str, list[int]] = {name: [] for name in times}
    for number in range(args.repeats + 1):
        examples = [dataset.examples[i] for i in order[number % len(order)]]
        batch = collate([examples, examples])
        arms: dict[str, Callable[[], object]] = {
            "step": lambda e=examples, n=number: mx.eval(step(loss, optimizer, values, state, e, n + 1, config)[0]),
            "floor": lambda b=batch: mx.eval(scores(head, b)),
            "full": lambda b=batch: mx.eval(sparse.model(b.tokens)),
        }
        for name, run in arms.items():
            if name != "step":
                sparse.set_values(None)
            seconds, peak = measure(run)
            if number:  # the first round warms up
                times[name].append(seconds)
                memory[name].append(peak)
        print(f"  {number}/{args.repeats}", end="\r", flush=True)

    print(f"{args.model}, {args.data}, batch {args.batch_size}, {args.directions} directions, {mx.default_device()}")
    print(f"{'':8}{'median s':>10}{'step / this':>14}{'peak MB':>10}")
    results = {}
    for name in times:
        ratio = statistics.median(a / b for a, b in zip(times["step"], times[name], strict=True))
        results[name] = {"seconds": times[name], "step_ratio": ratio, "peak_bytes": max(memory[name])}
        print(f"{name:8}{statistics.median(times[name]):10.3f}{ratio:14.3f}{max(memory[name]) / 1e6:10.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), "results": results}))


if __name__ == "__main__":
    main()
