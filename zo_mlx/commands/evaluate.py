"""`zo-mlx evaluate`."""

import argparse
import json
from typing import Any

from .. import evaluate, load
from ..metric import CROSS_ENTROPY
from ..records import FEATURES
from . import add_command, add_model


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "evaluate", _run, "Measure a model, with or without an adapter, on a data file.")
    add_model(p)
    p.add_argument("--data", required=True, help="A .jsonl file, a directory with a test.jsonl, or a hub id.")
    p.add_argument("--batch-size", type=int, default=16, help="Examples at a time.")
    p.add_argument("--test-batches", type=int, default=-1, help="Batches to evaluate, -1 for all.")
    p.add_argument("--max-seq-length", type=int, default=2048, help="Longest sequence in tokens.")
    p.add_argument("--mask-prompt", action="store_true", help="Leave the prompt out of the loss.")
    for feature, field in FEATURES.items():
        p.add_argument("--" + feature.replace("_", "-"), default=field, help=f"Name of the data's field {field}.")
    p.add_argument(
        "--objective",
        default=CROSS_ENTROPY,
        help="Score the answers, too: accuracy, exact-match, f1, or module:function.",
    )
    p.add_argument("--max-tokens", type=int, help="Tokens of a generated answer; default: of the longest completion.")


def _run(args: argparse.Namespace) -> None:
    model, tokenizer = load(args.model, args.adapter_path)
    result = evaluate(
        model,
        tokenizer,
        args.data,
        batch_size=args.batch_size,
        num_batches=args.test_batches,
        max_seq_length=args.max_seq_length,
        mask_prompt=args.mask_prompt,
        objective=args.objective,
        max_tokens=args.max_tokens,
        **{feature: getattr(args, feature) for feature in FEATURES},
    )
    print(json.dumps(result.as_dict()) if args.json else result)
