"""`zo-mlx export`."""

import argparse
import dataclasses
import json
from typing import Any

from .. import export
from . import add_command


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "export", _run, "Write what stock mlx-lm loads into an adapter directory.")
    p.add_argument("--model", default="mlx_model", help="MLX model directory.")
    p.add_argument("--adapter-path", default="adapters", help="Adapter directory made by `zo-mlx train`.")
    p.add_argument("--rank", type=int, help="Of the LoRA adapter; default: the lowest that keeps the distributions.")


def _run(args: argparse.Namespace) -> None:
    fit = export(args.model, args.adapter_path, args.rank)
    print(json.dumps(dataclasses.asdict(fit)) if args.json else f"{args.adapter_path}: {fit}")
