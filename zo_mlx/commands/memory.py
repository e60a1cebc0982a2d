"""`zo-mlx memory`."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..planner import as_text, plan
from ..plot import check_plot_file, plot_plan
from . import add_command


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "memory", _run, "Estimate what training takes of memory, from a model's config alone.")
    p.add_argument("model", help="Model directory, converted or not, or hub id, of which config.json alone is fetched.")
    p.add_argument("--batch-size", type=int, help="Examples per step; default: 4, or 16 for exact gradients.")
    p.add_argument("--max-seq-length", type=int, default=512, help="Tokens of each.")
    p.add_argument("--num-layers", type=int, help="Train this many last blocks, -1 for all; default: as train does.")
    p.add_argument("--directions", type=int, help="Directions per step (default: 7).")
    p.add_argument("--memory-limit", type=float, metavar="GB", help="Say what fits this, too.")
    p.add_argument("--density", type=float, default=1e-3, help="Fraction of weights that convert makes trainable.")
    p.add_argument("--q-bits", type=int, default=4, help="Bits per weight that convert quantizes to.")
    p.add_argument("--q-group-size", type=int, default=64, help="Weights that share a scale.")
    p.add_argument(
        "--measure",
        nargs="?",
        const="zo",
        choices=("zo", "exact"),
        help="Take such a step (default: zo) of the converted model itself, and compare.",
    )
    p.add_argument("--plot", metavar="FILE", help="Draw what takes how much (.png, .pdf or .svg).")


def _run(args: argparse.Namespace) -> None:
    if args.plot:
        check_plot_file(Path(args.plot))
    config = TrainConfig(
        batch_size=args.batch_size,
        max_seq_length=args.max_seq_length,
        num_layers=args.num_layers,
        directions=args.directions,
        memory_limit=args.memory_limit,
    )
    planned = plan(args.model, config, args.density, args.q_bits, args.q_group_size, args.measure)
    if args.plot:
        plot_plan(planned, Path(args.plot))
    print(json.dumps(planned) if args.json else as_text(planned))
