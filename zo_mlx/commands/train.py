"""`zo-mlx train`."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from .. import train, train_seeds
from ..adapter import BEST, LORA_TENSORS, REPORT
from ..config import TrainConfig, value_type
from ..lora import Fit
from ..lora_settings import CHECKED, NOT_HERE, read_yaml, understood
from ..progress import print_line
from ..ranks import Ranks
from ..result import TrainResult
from . import add_command


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "train", _run, "Fine-tune a converted model's sensitive weights.")
    p.add_argument("-c", "--config", metavar="YAML", help="Settings file with mlx-lm's keys; flags take precedence.")
    p.add_argument("--resume", action="store_true", help="Go on with the run in the adapter directory.")
    p.add_argument("--changed-data", action="store_true", help="Resume even if the training data changed.")
    p.add_argument("--overwrite", action="store_true", help="Replace the run in the adapter directory.")
    p.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="Train with N seeds, from --seed on, in ADAPTER_PATH/seed-SEED.",
    )
    for f in dataclasses.fields(TrainConfig):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if value_type(f) is bool:
            p.add_argument(flag, action="store_true", default=None, help=text)
        elif value_type(f) not in (dict, list):
            p.add_argument(
                flag,
                type=_number_or(f.metadata["word"]) if "word" in f.metadata else value_type(f),
                default=argparse.SUPPRESS,
                choices=f.metadata.get("choices"),
                help=text if f.default is None else f"{text} (default: {f.default})",
            )
    for name in (*CHECKED, *NOT_HERE):  # mlx_lm.lora's: flags with and without a value
        p.add_argument("--" + name.replace("_", "-"), nargs="?", const=True, help=argparse.SUPPRESS)


def _number_or(word: str) -> Any:
    """An argument's type: a number, or a word in its place."""

    def number(text: str) -> float | str:
        return text if text == word else float(text)

    return number


def _run(args: argparse.Namespace) -> None:
    names = {*CHECKED, *NOT_HERE, *(f.name for f in dataclasses.fields(TrainConfig))}
    flags = {k: v for k, v in vars(args).items() if k in names and v is not None}
    settings = read_yaml(Path(args.config), flags) if args.config else {}
    if "learning_rate" in flags:
        settings.pop("lr_schedule", None)  # which would come before it
    settings |= understood(flags, "flags")
    report = _print_json if args.json else _print_event
    how = {name: getattr(args, name) for name in ("resume", "overwrite", "changed_data")}
    if args.seeds is not None:
        found = train_seeds(args.seeds, report=report, **how, **settings)
        if args.json:
            _print_json({"event": "result", **found.as_dict()})
            return
        for name, numbers in found.spread.items():
            spread = ", ".join(f"{key} {mean:.3f} ± {deviation:.3f}" for key, (mean, deviation) in numbers.items())
            print(f"{name.capitalize()} over {args.seeds} seeds: {spread}")
        for run in found.runs:
            print(f"{run.adapter_path}: {run.iterations} steps")
            _print_best(run)
        return
    result = train(report=report, **how, **settings)
    if not Ranks().is_first:
        return
    if args.json:
        _print_json({"event": "result", **result.as_dict()})
    else:
        lora = Path(result.adapter_path) / LORA_TENSORS
        more = f", and {lora.stat().st_size / 1e6:.0f} MB for stock mlx-lm" if lora.exists() else ""
        print(f"{result.adapter_path}: {result.iterations} steps, {result.adapter_bytes / 1e6:.2f} MB{more}")
        if (page := Path(result.adapter_path) / REPORT).exists():
            print(f"{page}: the run as a page for the browser")
        _print_best(result)


def _print_best(result: TrainResult) -> None:
    """What was better on the validation set than the last values, if anything was."""
    if result.best and result.best.iteration < result.iterations:
        scored = result.after is not None and result.after.score is not None
        what = f"score {-result.best.loss:.3f}" if scored else f"loss {result.best.loss:.3f}"
        print(f"{result.adapter_path}/{BEST}: step {result.best.iteration}, validation {what}")


def _print_json(event: dict[str, Any]) -> None:
    print_line(json.dumps(event))


def _print_event(event: dict[str, Any]) -> None:
    if event["event"] == "train":
        loss = math.nan if event["train_loss"] is None else event["train_loss"]  # none of the losses was finite
        what = f"score {-loss:.3f}" if "train_score" in event else f"loss {loss:.3f}"
        line = (
            f"Iter {event['iteration']}: Train {what}, "
            f"Learning Rate {event['learning_rate']:.3e}, It/sec {event['iterations_per_second']:.3f}, "
            f"Tokens/sec {event['tokens_per_second']:.1f}, Peak mem {event['peak_memory']:.3f} GB"
        )
    elif event["event"] == "chosen" and "share" in event:
        line = (
            f"Iter {event['iteration']}: Learning Rate up to {event['learning_rate']:.3e} in {event['warmup']} steps, "
            f"{event['share']:.2%} of the values' root mean square, and less from then on"
        )
    elif event["event"] == "chosen":
        line = (
            f"Iter {event['iteration']}: Learning Rate {event['learning_rate']:.3e}, epsilon {event['epsilon']:.1e}: "
            f"slopes along {event['directions']} directions have a root mean square of {event['slope']:.3g}"
        )
    elif event["event"] == "returned":
        line = (
            f"Iter {event['iteration']}: the loss rose too far: back to the values of step {event['step']}, "
            f"learning rate halved {event['halvings']} times"
        )
    elif event["event"] == "restarted":
        line = (
            f"Iter {event['iteration']}: no clear gain in {event['steps']} steps: back to the values before training, "
            f"learning rate halved {event['halvings']} times"
        )
    elif event["event"] == "exported":
        line = f"Iter {event['iteration']}: {event['path']} for stock mlx-lm, {Fit.of(event)}"
    elif event["event"] == "warning":
        line = f"Warning: {event['message']}"
    elif event["event"] == "stopped":
        line = f"Iter {event['iteration']}: stopped, none of the last {event['patience']} validations was the best"
    else:
        name = "Val" if event["event"] == "validation" else "Test"
        score = f"{name} score {event['score']:.3f}, " if "score" in event else ""
        line = f"Iter {event['iteration']}: {score}{name} loss {event['loss']:.3f}"
        if "accuracy" in event:
            line += f", {name} accuracy {event['accuracy']:.1%}, macro-F1 {event['macro_f1']:.3f}"
        else:
            line += f", {name} ppl {event['perplexity']:.3f}"
    print_line(f"Seed {event['seed']}: {line}" if "seed" in event else line)
