"""Loss and accuracy against forward passes: our defaults, the paper's recipe, other estimators, masks, MeZO and LoRA.

    python tests/benchmarks/convergence.py --data DIR [--tasks sst2,trec] [--arms default,spsa-0.0002] [--seeds 0,1]
        [--rows 9600] [--results FILE] [--plot FILE]

DIR holds a directory of JSON lines for each task. The budget is rows of the batch that went forward, so that arms
compare: SPSA with batches of 16 takes 32 a step, 600 passes of its batch are 9600. Those of LoRA and of exact gradients
count three times, for the backward pass, and those of forward-mode derivatives twice; through some of the blocks a row
counts for as much as they are of all. MeZO, on all weights, and LoRA train the base model's weights, dequantized to
float32. Validation is before, at 1/9, 1/3, 2/3 and all of the budget, on the first `--valid` examples. Results go to a
file of JSON lines, one for each arm, task and seed; what is there is not run again. An arm with `mask` or `density`
needs the model converted so, which is done once, in `--work`.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import json
import math
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from baselines import Mezo, dense_model, lora_step
from matplotlib.figure import Figure

from zo_mlx.batches import batch_order
from zo_mlx.config import filled, resolved
from zo_mlx.evaluate import evaluate_dataset
from zo_mlx.head import split_head
from zo_mlx.journal import FILE_NAME, Journal
from zo_mlx.memory import bounded_cache
from zo_mlx.model import load_sparse
from zo_mlx.rows import load_dataset
from zo_mlx.step import rows_of_step

Points = list[dict[str, Any]]

SPSA: dict[str, Any] = {
    "estimator": "two-sided", "directions": 1, "batch_size": 16, "epsilon": 1e-3, "num_layers": -1
}  # fmt: skip


def _constant(rate: float) -> dict[str, Any]:
    return {"lr_schedule": {"name": "exponential_decay", "arguments": [rate, 1.0]}}


# Settings of `zo_mlx.train`, and `mask`, `density` and `scope` of `zo_mlx.convert`.
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"last-{n}": {"num_layers": n} for n in (4, 8, 16, 20)},
    "all-blocks": {"num_layers": -1},
    **{f"spsa-{rate:g}": {**SPSA, **_constant(rate)} for rate in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4)},
    "two-sided": {"estimator": "two-sided", "batch_size": 16},
    "two-sided-1": {"estimator": "two-sided", "batch_size": 16, "directions": 1},
    "batch-2": {"batch_size": 2, "directions": 15},
    "batch-8": {"batch_size": 8, "directions": 3},
    "adam": {"optimizer": "adam"},
    "lion": {"optimizer": "lion"},
    "momentum": {"optimizer_config": {"sgd": {"momentum": 0.9}}},
    "jvp": {"estimator": "jvp"},
    "gaussian": {"law": "gaussian"},
    **{structure: {"structure": structure} for structure in ("low-rank", "row", "column")},
    **{f"precondition{power:+g}": {"precondition": power} for power in (-0.25, 0.25)},
    "random": {"mask": "random"},
    "largest": {"mask": "largest"},
    "smallest": {"mask": "smallest"},
    "all": {"mask": "all"},
    "density-1e-4": {"density": 1e-4},
    "density-1e-2": {"density": 1e-2},
    "tensor": {"scope": "tensor"},
    "exact": {"gradient": "exact"},
    **{f"mezo-{rate:g}": {"batch_size": 16, "rate": rate} for rate in (1e-6, 1e-5, 3e-5, 1e-4)},
    "lora": {"batch_size": 16},
}
CONVERSION = ("mask", "density", "scope")
NINTHS = (0, 1, 3, 6, 9)  # of the budget, when arms are validated


def shortened(data: Path, valid: int, path: Path) -> Path:
    """A copy of a task's data whose validation set ends after `valid` examples."""
    path.mkdir()
    (path / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    lines = (data / "valid.jsonl").read_bytes().splitlines(keepends=True)
    (path / "valid.jsonl").write_bytes(b"".join(lines[:valid]))
    return path


def model_for(arm: dict[str, Any], args: argparse.Namespace) -> Path:
    """The converted model that an arm trains; converted if it is not there yet."""
    settings = {k: v for k, v in arm.items() if k in CONVERSION}
    if not settings:
        return Path(args.model)
    path = Path(args.work) / "-".join(f"{k}-{v}" for k, v in settings.items())
    if not path.exists():
        zo_mlx.convert(args.hf_path, str(path), **settings)
    return path


def zo_run(path: Path, settings: dict[str, Any], data: Path, args: argparse.Namespace, seed: int) -> Points:
    """Validations of a training run."""
    config = resolved(zo_mlx.TrainConfig(**settings))
    cost = 3 if config.gradient == "exact" else 2 if config.estimator == "jvp" else 1
    rows, once = cost * rows_of_step(config), float(filled(config.batch_size))
    if config.gradient == "zo" and config.num_layers != -1:  # the blocks before are computed once for all branches
        sparse = load_sparse(path)[0]
        blocks = len(sparse.model.layers)
        last = config.num_layers or sparse.last_half()
        part = 1.0 if last == -1 else min(1.0, last / blocks)
        rows, once = part * rows + (1 - part) * once, part * once
    ninth = max(1, round(args.rows / rows / 9))
    points: Points = []
    started = time.perf_counter()

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "validation" and event["iteration"] in {n * ninth for n in NINTHS}:
            points.append(_point(event["iteration"], started, event["loss"], event["accuracy"]))

    with tempfile.TemporaryDirectory() as work:
        zo_mlx.train(
            model=str(path), data=str(data), adapter_path=work, seed=seed, iters=9 * ninth, steps_per_eval=ninth,
            val_batches=-1, report=report, **settings,
        )  # fmt: skip
        again = [not math.isnan(r.initial) for r in Journal.read(Path(work, FILE_NAME)).records()]
    for point in points:  # steps so far; in the first ones examples are evaluated at the first values, too
        point["rows"] = round(point["rows"] * rows + once * sum(again[: point["rows"]]))
    return points


def dense_run(path: Path, settings: dict[str, Any], data: Path, args: argparse.Namespace, seed: int) -> Points:
    """The same of MeZO's loop if there is a `rate`, else of mlx-lm's LoRA step."""
    _, tokenizer, _, _ = load_sparse(path)
    train_set, valid_set = (load_dataset(data / f"{s}.jsonl", tokenizer, 2048) for s in ("train", "valid"))
    model, size = dense_model(path), settings["batch_size"]
    if "rate" in settings:
        head, rows = split_head(model), 2 * size
        mezo = Mezo(model, head, None)
        train = lambda batch, step: mezo.step(batch, 1000 * seed + step, rate=settings["rate"])  # noqa: E731
    else:
        lora, head, rows = lora_step(model), split_head(model), 3 * size
        train = lambda batch, step: lora(batch)  # noqa: E731
    points, step, started = [], 0, time.perf_counter()
    for ninth in NINTHS:
        while step * rows < ninth / 9 * args.rows:
            epoch, position = divmod(step, len(train_set) // size)
            order = batch_order(train_set.examples, size, seed, epoch)
            train([train_set.examples[i] for i in order[position]], step)
            step += 1
        found = evaluate_dataset(head, valid_set, 16, progress=False)
        points.append(_point(step * rows, started, found.loss, found.accuracy))
    return points


def _point(rows: int, started: float, loss: float, accuracy: float) -> dict[str, Any]:
    return {"rows": rows, "seconds": time.perf_counter() - started, "loss": loss, "accuracy": accuracy}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> None:
    """Medians over seeds, for each task and arm."""
    print(f"{'task':8}{'arm':16}{'seeds':>6}   rows: loss, accuracy")
    for task, arm in sorted({(r["task"], r["arm"]) for r in results}):
        own = [r["points"] for r in results if (r["task"], r["arm"]) == (task, arm)]
        cells = [
            f"{points[0]['rows']}: {statistics.median(p['loss'] for p in points):.3f}, "
            f"{statistics.median(p['accuracy'] for p in points):.1%}"
            for points in zip(*own, strict=True)
        ]
        print(f"{task:8}{arm:16}{len(own):6}   {'   '.join(cells)}")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against rows, one panel for each task; lines are medians over seeds."""
    tasks, arms = sorted({r["task"] for r in results}), sorted({r["arm"] for r in results})
    figure = Figure(figsize=(3.2 * len(tasks), 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for number, arm in enumerate(arms):
            own = [r["points"] for r in results if (r["task"], r["arm"]) == (task, arm)]
            if own:
                median = [statistics.median(p["loss"] for p in points) for points in zip(*own, strict=True)]
                axes.plot([p["rows"] for p in own[0]], median, f"C{number}", marker=".", label=arm)
        axes.set_title(task)
        axes.set_xlabel("rows forward")
    figure.axes[0].set_ylabel("validation loss, nats")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", ncols=len(labels), loc="outside lower center")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model", help="as `zo-mlx convert` makes it by default")
    parser.add_argument("--hf-path", help="what to convert for arms with another mask, density or scope")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--tasks", default="sst2,trec,cb,rte")
    parser.add_argument("--arms", default="default,spsa-5e-05,spsa-0.0001,spsa-0.0002,two-sided,lora")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rows", type=int, default=9600)
    parser.add_argument("--valid", type=int, default=208, help="a multiple of 16, so that all arms see the same")
    parser.add_argument("--work", default="convergence", metavar="DIR", help="where models are converted to")
    parser.add_argument("--results", default="convergence.jsonl", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()
    tasks, arms = args.tasks.split(","), args.arms.split(",")
    if unknown := set(arms) - ARMS.keys():
        parser.error(f"no such arms: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    if not args.hf_path and any(key in ARMS[name] for name in arms for key in CONVERSION):
        parser.error("some of the arms need --hf-path, a model to convert")
    path = Path(args.results)
    with tempfile.TemporaryDirectory() as work:
        data = {task: shortened(Path(args.data) / task, args.valid, Path(work, task)) for task in tasks}
        for seed, task, name in product(map(int, args.seeds.split(",")), tasks, arms):
            if any((r["task"], r["arm"], r["seed"]) == (task, name, seed) for r in read(path)):
                continue
            settings = {k: v for k, v in ARMS[name].items() if k not in CONVERSION}
            run = dense_run if name == "lora" or "rate" in settings else zo_run
            with bounded_cache():
                points = run(model_for(ARMS[name], args), settings, data[task], args, seed)
            with path.open("a") as f:
                f.write(json.dumps({"task": task, "arm": name, "seed": seed, "points": points}) + "\n")
            table(read(path)[-1:])
    shown = [r for r in read(path) if r["task"] in tasks and r["arm"] in arms]
    table(shown)
    if args.plot:
        draw(shown, Path(args.plot))


if __name__ == "__main__":
    main()
