"""`zo-mlx info`."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..info import as_text, info
from ..plot import plot
from . import add_command


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "info", _run, "Say what is in a model directory, an index or an adapter.")
    p.add_argument("path", help="Model directory, sensitive.safetensors, adapter directory, or journal.")
    p.add_argument("--plot", metavar="FILE", help="Draw where the sensitive weights sit (.png, .pdf or .svg).")


def _run(args: argparse.Namespace) -> None:
    found = info(args.path)
    if args.plot:
        plot(found, Path(args.plot))
    print(json.dumps(found) if args.json else as_text(found))
