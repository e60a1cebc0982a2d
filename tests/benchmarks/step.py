"""Time and memory of a training step, against forward passes of the same rows, and against other ways to train.

    python tests/benchmarks/step.py [--model demo/model|tinyllama] [--data examples/support] [--others] [--num-layers N]
        [--tokens-at-once N] [--json FILE]

All arms run in one process, in alternation, on the same batches; the table gives medians, and the ratio is the median
of the ratios of neighbours. `floor` is one stacked pass of the base model with the logits that a step makes, at the
target positions and of the choices; `vocabulary` is the same with logits of the whole vocabulary there; `full` computes
logits everywhere, as calling the model does; `step-parts` is the step in passes of at most N tokens; `exact` is a step
with the exact gradient, which sees each row once, not in two branches, in passes of N tokens or of the default's, and
`exact-kept` with nothing computed again. With `--others` all arms compute with dense float32 weights, dequantized once:
`mezo` perturbs all weights in place, `mezo-sparse` the sensitive ones, both with two passes of one direction; `lora` is
mlx-lm's step (all layers, rank 8, Adam), also with its gradient checkpointing. With `--num-layers N` there are steps
that train the last N blocks: `last`, and `last-warm`, for which the others have run already. The other steps train all
blocks.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from baselines import Mezo, checkpointed, dense_model, lora_step
from shapes import SHAPES, model_directory

from zo_mlx import estimator
from zo_mlx.batches import batch_order
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.data import Dataset, Example, Target
from zo_mlx.exact import ExactGradient
from zo_mlx.head import Head, split_head
from zo_mlx.index import read_index
from zo_mlx.memory import bounded_cache
from zo_mlx.model import load_sparse
from zo_mlx.objective import collate, scores
from zo_mlx.optimizer import Optimizer
from zo_mlx.prefix import Prefix
from zo_mlx.rows import load_dataset
from zo_mlx.sparse import SparseModel
from zo_mlx.step import exact_step, make_loss, step

Arms = dict[str, Callable[[list[Any], int], object]]


def measure(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and the peak of MLX's memory above what it held before, in bytes."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    run()
    mx.synchronize()
    return time.perf_counter() - started, mx.get_peak_memory() - before


def own_arms(sparse: SparseModel, config: TrainConfig, values: mx.array, tokens_at_once: int | None) -> Arms:
    """Our step, whole and in parts, and the passes it is made of."""
    head = split_head(sparse.model)
    optimizer = Optimizer(config, values)

    def whole(loss: estimator.Loss) -> Callable[[list[Any], int], object]:
        return lambda examples, n: step(loss, optimizer, values, optimizer.state, examples, n + 1, config)

    def base(run: Callable[[list[Any]], object]) -> Callable[[list[Any], int], object]:
        def arm(examples: list[Any], number: int) -> None:
            sparse.set_values(None)
            mx.eval(run([examples, examples]))

        return arm

    exactly = resolved(TrainConfig(gradient="exact"))
    rule, blocks = Optimizer(exactly, values), BlockwiseModel(sparse.model)

    def exact(keep_blocks: int) -> Callable[[list[Any], int], object]:
        gradient = ExactGradient(sparse, head, blocks, None, tokens_at_once or exactly.tokens_at_once, keep_blocks)
        return lambda examples, n: exact_step(gradient, rule, values, rule.state, examples, n + 1)

    parts = {"step-parts": whole(make_loss(sparse, head, tokens_at_once=tokens_at_once))} if tokens_at_once else {}
    return {
        "step": whole(make_loss(sparse, head)),
        **parts,
        "floor": base(lambda shares: scores(head, collate(shares))),
        "vocabulary": base(lambda shares: scores(Head(head.hidden, head.logits), collate(shares))),
        "full": base(lambda shares: sparse.model(collate(shares).tokens)),
        "exact": exact(0),
        "exact-kept": exact(-1),
    }


def last_arms(path: Path, blocks: int, config: TrainConfig) -> tuple[Arms, Callable[[list[Any]], object]]:
    """Steps that train the last blocks, and what runs the others for a batch beforehand."""
    sparse, _, index, _ = load_sparse(path)
    head, all_values = split_head(sparse.model), index.initial_values()
    values = mx.concatenate([all_values[a:b] for a, b in sparse.train_last(blocks, all_values)])
    model, optimizer = BlockwiseModel(sparse.model), Optimizer(config, values)
    warm = Prefix(model, sparse.first_block)

    def arm(examples: list[Any], n: int, prefix: Prefix) -> None:
        mx.eval(step(make_loss(sparse, head, prefix), optimizer, values, optimizer.state, examples, n + 1, config)[0])

    return {
        "last": lambda examples, n: arm(examples, n, Prefix(model, sparse.first_block)),
        "last-warm": lambda examples, n: arm(examples, n, warm),
    }, warm.prepare


def other_arms(path: Path) -> Arms:
    """The classic loops and LoRA; each with a model of its own."""
    arms: Arms = {}
    for name, index in (("mezo", None), ("mezo-sparse", read_index(path))):
        model = dense_model(path)
        loop = Mezo(model, split_head(model), index)
        arms[name] = lambda examples, n, loop=loop: loop.step(examples, n)  # type: ignore[misc]
    lora_model = dense_model(path)
    lora = lora_step(lora_model)

    def lora_checkpointed(examples: list[Any], number: int) -> None:
        with checkpointed(lora_model):
            lora(examples)

    return {**arms, "lora": lambda examples, n: lora(examples), "lora-ckpt": lora_checkpointed}


def random_examples(dataset: Dataset, vocabulary: int) -> list[Example]:
    """Random tokens for a random model, whose tokenizer knows bytes only: one for every four bytes."""
    rng = np.random.default_rng(0)
    examples = []
    for example in dataset.examples:
        row = rng.integers(0, vocabulary, max(1, len(example.rows[0]) // 4)).tolist()
        targets = [[Target(0, len(row) - 1, token)] for token in (5, 6)]
        examples.append(Example([row], targets, label=int(rng.integers(2)), choices=("a", "b")))
    return examples


def run(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all arms on a model directory."""
    sparse, tokenizer, index, config = load_sparse(path)
    dataset = load_dataset(Path(args.data) / "train.jsonl", tokenizer, 2048)
    examples = random_examples(dataset, config["vocab_size"]) if args.model in SHAPES else dataset.examples
    if args.others:
        sparse = SparseModel(dense_model(path), index)
    settings = resolved(TrainConfig(batch_size=args.batch_size, directions=args.directions, estimator="two-sided"))
    arms = own_arms(sparse, settings, index.initial_values(), args.tokens_at_once)
    if args.others:
        arms = {name: arm for name, arm in arms.items() if name not in ("vocabulary", "full")} | other_arms(path)
    warm: Callable[[list[Any]], object] = lambda batch: None  # noqa: E731
    if args.num_layers:
        last, warm = last_arms(path, args.num_layers, settings)
        arms |= last
    order = batch_order(examples, args.batch_size, seed=0, epoch=0)
    times: dict[str, list[float]] = {name: [] for name in arms}
    memory: dict[str, list[int]] = {name: [] for name in arms}
    tokens = []
    for number in range(args.repeats + 1):
        batch = [examples[i] for i in order[number % len(order)]]
        warm(batch)
        for name, arm in arms.items():
            seconds, peak = measure(lambda a=arm, n=number, b=batch: a(b, n))  # type: ignore[misc]
            if number:  # the first round warms up
                times[name].append(seconds)
                memory[name].append(peak)
        if number:
            tokens.append(sum(len(row) for e in batch for row in e.rows))
        print(f"  {number}/{args.repeats}", end="\r", flush=True)
    return {"tokens": tokens, "seconds": times, "peak_bytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model", help="a model directory, or the name of a shape")
    parser.add_argument("--data", default="examples/support")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--directions", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens-at-once", type=int, metavar="N", help="a step in passes of at most N tokens, too")
    parser.add_argument("--others", action="store_true", help="against MeZO and LoRA, on dense weights")
    parser.add_argument("--num-layers", type=int, metavar="N", help="steps that train the last N blocks, too")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.others and args.num_layers:
        parser.error("--num-layers is measured on quantized weights, --others on dense ones")
    with model_directory(args.model) as path, bounded_cache():
        found = run(path, args)

    weights = "dense float32 weights" if args.others else "quantized weights"
    mean = statistics.mean(found["tokens"]) / args.batch_size
    print(f"{args.model}, {weights}, {args.data}, {args.batch_size} rows of {mean:.0f} tokens, {mx.default_device()}")
    print(f"{'':12}{'median s':>10}{'tokens/s':>10}{'step / this':>13}{'peak MB':>10}{'step / this':>13}")
    step_peak = max(found["peak_bytes"]["step"])
    for name, seconds in found["seconds"].items():
        ratio = statistics.median(a / b for a, b in zip(found["seconds"]["step"], seconds, strict=True))
        rate = statistics.median(t / s for t, s in zip(found["tokens"], seconds, strict=True))
        peak = max(found["peak_bytes"][name])
        print(
            f"{name:12}{statistics.median(seconds):10.3f}{rate:10.0f}{ratio:13.3f}{peak / 1e6:10.1f}"
            f"{step_peak / peak:13.3f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), **found}))


if __name__ == "__main__":
    main()
