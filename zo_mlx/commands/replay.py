"""`zo-mlx replay`."""

import argparse
import dataclasses
import json
from typing import Any

from .. import replay
from . import add_command


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "replay", _run, "Rebuild an adapter, or an earlier moment of its run, from its journal.")
    p.add_argument("journal", metavar="JOURNAL", help="A run's journal, or the adapter directory that it is in.")
    p.add_argument("--model", default="mlx_model", help="MLX model directory that it was trained on.")
    p.add_argument("--adapter-path", required=True, help="Directory to write; must not exist.")
    p.add_argument("--until", type=int, metavar="STEP", help="The last step to replay; default: the journal's last.")


def _run(args: argparse.Namespace) -> None:
    done = replay(args.model, args.journal, args.adapter_path, until=args.until)
    if args.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        print(f"{done.adapter_path}: {done.steps} of {done.recorded} steps, replayed in {done.seconds:.1f} s")
        print(f"For stock mlx-lm: zo-mlx export --model {args.model} --adapter-path {done.adapter_path}")
