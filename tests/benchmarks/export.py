"""What each way to use a trained adapter costs, and how far it is from zo-mlx's own runtime.

Distributions and accuracy are computed in float32 with weights dequantized first, which is the same to rounding as what
stock mlx-lm computes after `set_dtype(float32)` (the tests compare them), and much faster on a CPU. Tokens per second
of CPU time, so that other processes matter less, are those of mlx-lm's generator with its own layers, in float32:
16-bit products are very slow on MLX's CPU backend.

    python tests/benchmarks/export.py --model smollm2 --adapter-path sst2 --data SST2
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

from zo_mlx.adapter import LORA_TENSORS, VALUES
from zo_mlx.data import Example
from zo_mlx.lora import kl_divergence
from zo_mlx.product import prepare
from zo_mlx.rows import load_dataset

ROUNDS, GENERATED, TOGETHER = 3, 16, 10


def log_probabilities(model: nn.Module, examples: list[Example]) -> list[mx.array]:
    """Of the next token at each position of each prompt; several go together, padded at their end."""
    found = []
    for start in range(0, len(examples), TOGETHER):
        rows = [example.rows[0] for example in examples[start : start + TOGETHER]]
        width = max(map(len, rows))
        logits = model(mx.array([row + [0] * (width - len(row)) for row in rows])).astype(mx.float32)
        part = [own[: len(row)] for own, row in zip(logits, rows, strict=True)]
        found += [own - mx.logsumexp(own, axis=-1, keepdims=True) for own in part]
        mx.eval(found)
    return found


def divergence(reference: list[mx.array], other: list[mx.array]) -> float:
    """Mean over all positions, in nats."""
    return float(mx.concatenate([kl_divergence(p, q) for p, q in zip(reference, other, strict=False)]).mean())


def answers(examples: list[Example], found: list[mx.array]) -> np.ndarray:
    """The number of the likeliest choice of each prompt; choices must have one row."""
    scores = [
        [sum(float(p[target.position, target.token]) for target in choice) for choice in example.targets]
        for example, p in zip(examples, found, strict=True)
    ]
    return np.argmax(scores, axis=1)


def megabytes(*paths: Path) -> float:
    return sum(p.stat().st_size for p in paths) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter-path", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="directory with test.jsonl, of choices")
    parser.add_argument("--prompts", type=int, default=50, help="of the test set")
    parser.add_argument("--own-dtype", type=int, default=0, help="prompts computed in the model's own dtype, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch))


def measure(args: argparse.Namespace, scratch: Path) -> None:
    weights = sorted(args.model.glob("model*.safetensors"))
    auto, full = scratch / "auto", scratch / "full"
    for directory in (auto, full):
        directory.mkdir()
        shutil.copy(args.adapter_path / VALUES, directory)
    fits = zo_mlx.export(args.model, auto), zo_mlx.export(args.model, full, rank=10_000)
    # name, model directory, adapter directory, megabytes on disk
    routes = [("the model without the adapter", args.model, None, megabytes(*weights))]
    for directory, fit in zip((auto, full), fits, strict=True):
        size = megabytes(*weights, directory / LORA_TENSORS)
        routes.append((f"stock mlx-lm, adapter of rank {fit.rank}", args.model, directory, size))
    for name, more in (("8 bits", {}), ("16 bits", {"bits": 16}), ("dequantized", {"dequantize": True})):
        out = scratch / name.replace(" ", "")
        zo_mlx.fuse(args.model, args.adapter_path, out, progress=False, **more)
        routes.append((f"fused, {name}", out, None, megabytes(*out.glob("model*.safetensors"))))

    def stock(route: tuple) -> nn.Module:
        return mlx_lm.load(str(route[1]), adapter_path=route[2] and str(route[2]))[0]

    ours, tokenizer = zo_mlx.load(args.model, args.adapter_path)
    dataset = load_dataset(args.data / "test.jsonl", tokenizer, 2048)
    prompts = dataset.examples[: args.prompts]
    labels = np.array([example.label for example in prompts])
    reference = log_probabilities(ours, prompts)
    chosen = answers(prompts, reference)
    accuracy, divergences, in_own_dtype, same = [np.mean(chosen == labels)], [], [], []
    some = prompts[: args.own_dtype]
    for route in routes:
        if args.own_dtype:
            got = log_probabilities(stock(route), some)
            right = np.mean(answers(some, got) == labels[: len(some)])
            in_own_dtype.append(f"{divergence(reference, got):.1e}, {right:.1%}")
        model = prepare(stock(route))
        got = log_probabilities(model, prompts)
        divergences.append(divergence(reference, got))
        same.append(np.mean(answers(prompts, got) == chosen))
        accuracy.append(np.mean(answers(prompts, got) == labels))
        del model, got
        print(f"{route[0]}: done", file=sys.stderr, flush=True)

    def rate(model: nn.Module) -> float:
        steps = mlx_lm.stream_generate(model, tokenizer, prompts[0].rows[0], max_tokens=GENERATED + 1)
        next(steps)  # after the prompt
        started = time.process_time()
        return sum(1 for _ in steps) / (time.process_time() - started)

    rates: list[list[float]] = []
    for _ in range(ROUNDS):  # each round has every route, so that all see the same neighbours on the machine
        rates.append([rate(ours)])
        for route in routes:
            model = stock(route)
            model.set_dtype(mx.float32)
            rates[-1].append(rate(model))
    speeds = np.median(rates, axis=0)
    relative = np.median([np.array(r) / r[0] for r in rates], axis=0)

    print(f"{len(prompts)} prompts; KL and accuracy in the model's own dtype on {len(some)} of them.")
    print("| route | MB on disk | tokens per CPU second (of zo-mlx's) | KL | own dtype | same answers | accuracy |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    own = megabytes(*weights, args.model / "sensitive.safetensors", args.adapter_path / VALUES)
    print(f"| zo-mlx | {own:.1f} | {speeds[0]:.1f} | | | | {accuracy[0]:.1%} |")
    for i, route in enumerate(routes):
        own_dtype = in_own_dtype[i] if in_own_dtype else ""
        print(
            f"| {route[0]} | {route[3]:.1f} | {speeds[i + 1]:.1f} ({relative[i + 1]:.2f}) | {divergences[i]:.1e} | "
            f"{own_dtype} | {same[i]:.0%} | {accuracy[i + 1]:.1%} |"
        )


if __name__ == "__main__":
    main()
