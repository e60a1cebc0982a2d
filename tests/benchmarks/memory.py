"""Peak memory of a training step against evaluating the same rows, and against mlx-lm's LoRA step.

    python tests/benchmarks/memory.py [--model demo/model] [--plot FILE] [--json FILE]

For batches of 1 to 32 rows of 64 to 1024 tokens: MLX's peak, weights included, while evaluating the rows once, and
while training on them with a memory limit of 1.1 times that. LoRA (all layers, rank 8, Adam, with gradient
checkpointing) has the same weights dequantized to float32, so only what it takes above them is given, for batches
that do not take more than this machine has. With --json, points that the file has already are not measured again: it is
of one model.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from baselines import checkpointed, dense_model, lora_step
from matplotlib.figure import Figure

from zo_mlx.config import TrainConfig, resolved
from zo_mlx.data import Example, Target
from zo_mlx.fit import tokens_that_fit
from zo_mlx.head import split_head
from zo_mlx.memory import bounded_cache, peak_of, with_margin
from zo_mlx.model import load_sparse
from zo_mlx.objective import collate, scores
from zo_mlx.optimizer import Optimizer
from zo_mlx.step import make_loss, step

BATCHES, LENGTHS = (1, 4, 16, 32), (64, 256, 1024)
LORA_TOKENS = 8 * 1024  # of SmolLM2, their logits alone take 1.6 GB, and gradients of the same size


def examples_of(rows: int, length: int, vocabulary: int) -> list[Example]:
    """Random rows with two choices of one token each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (rows, length)).tolist()
    return [Example([row], [[Target(0, length - 1, t)] for t in (5, 6)], 0, ("a", "b")) for row in tokens]


def measure(path: Path, kept: Path | None) -> list[dict[str, Any]]:
    """Peaks in bytes for every batch and length, ours with the weights, LoRA's above them."""
    points: list[dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else []

    def keep(point: dict[str, Any]) -> None:
        print(point, flush=True)
        if kept:
            kept.write_text(json.dumps(points))

    sparse, _, index, config = load_sparse(path)
    head, values = split_head(sparse.model), index.initial_values()
    mx.eval(sparse.model.parameters(), values)
    weights = mx.get_active_memory()
    for length in LENGTHS:
        for rows in BATCHES:
            if any((p["rows"], p["length"]) == (rows, length) for p in points):
                continue
            examples = examples_of(rows, length, config["vocab_size"])
            sparse.set_values(values[None])
            evaluating = peak_of(lambda e=examples: mx.eval(scores(head, collate([e]))))  # type: ignore[misc]
            limit = int(1.1 * evaluating)
            settings = resolved(TrainConfig(batch_size=rows, estimator="two-sided"))
            fit, _ = tokens_that_fit(limit, sparse, head, values, examples, settings)
            loss, optimizer = make_loss(sparse, head, tokens_at_once=fit), Optimizer(settings, values)
            gc.collect()  # or the margin would be of what is held by mistake, too
            training = peak_of(
                lambda e=examples, o=optimizer, f=loss, s=settings: mx.eval(  # type: ignore[misc]
                    step(f, o, values, o.state, e, 1, s)[0]
                ),
                with_margin(limit),
            )
            points.append(
                {
                    "rows": rows,
                    "length": length,
                    "weights": weights,
                    "evaluating": evaluating,
                    "training": training,
                }
            )
            keep(points[-1])
    model = dense_model(path)
    lora = lora_step(model)
    lora(examples_of(1, 16, config["vocab_size"]))  # the optimizer's state exists
    for point in (p for p in points if p["rows"] * p["length"] <= LORA_TOKENS and "lora" not in p):
        examples = examples_of(point["rows"], point["length"], config["vocab_size"])
        before = mx.get_active_memory()
        with checkpointed(model):
            point["lora"] = peak_of(lambda e=examples: lora(e)) - before  # type: ignore[misc]
        keep(point)
    return points


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """What training takes above the weights, against evaluating and LoRA."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(LENGTHS), sharey=True), LENGTHS, strict=True):
        own = [p for p in points if p["length"] == length]
        for name, label in (
            ("lora", "LoRA, checkpointed"),
            ("training", "zo-mlx, training"),
            ("evaluating", "evaluating"),
        ):
            above = 0 if name == "lora" else own[0]["weights"]
            there = [p for p in own if name in p]
            axes.plot([p["rows"] for p in there], [(p[name] - above) / 1e6 for p in there], marker="o", label=label)
        axes.set_title(f"{length} tokens a row", fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("batch size")
    figure.axes[0].set_ylabel("peak above the weights, MB")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="where the points are kept")
    args = parser.parse_args()
    with bounded_cache():
        points = measure(Path(args.model), args.json and Path(args.json))
    print(f"{args.model}, {mx.default_device()}, weights {points[0]['weights'] / 1e6:.0f} MB")
    print(f"{'rows':>5}{'tokens':>8}{'evaluating MB':>15}{'training MB':>13}{'ratio':>7}{'LoRA above MB':>15}")
    for p in points:
        print(
            f"{p['rows']:5}{p['length']:8}{p['evaluating'] / 1e6:15.1f}{p['training'] / 1e6:13.1f}"
            f"{p['training'] / p['evaluating']:7.3f}" + (f"{p['lora'] / 1e6:15.1f}" if "lora" in p else "")
        )
    if args.plot:
        draw(points, Path(args.plot))


if __name__ == "__main__":
    main()
