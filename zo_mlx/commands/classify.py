"""`zo-mlx classify`."""

import argparse
import json
from pathlib import Path
from typing import Any

from .. import load
from ..classify import classify_records
from ..errors import UsageError
from ..records import read_file
from . import add_command, add_model


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "classify", _run, "Choose among answers, as a model trained on choices does.")
    add_model(p)
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="What is to be answered, exactly as prompts in the training data are.")
    given.add_argument("--data", help="A .jsonl file of prompts, and their choices.")
    p.add_argument(
        "--choices", nargs="+", metavar="CHOICE", help="The answers to choose among, as in the training data."
    )
    p.add_argument("--batch-size", type=int, default=16, help="Prompts at a time.")
    p.add_argument("--max-seq-length", type=int, default=2048, help="Longest sequence in tokens.")


def _run(args: argparse.Namespace) -> None:
    if args.data is None and args.choices is None:
        raise UsageError("--prompt needs --choices")
    alone = args.data is None
    records = [("--prompt", {"prompt": args.prompt})] if alone else read_file(Path(args.data))
    model, tokenizer = load(args.model, args.adapter_path)
    found = classify_records(
        model, tokenizer, records, args.choices, args.batch_size, args.max_seq_length, progress=not alone
    )
    for (_, record), shares in zip(records, found, strict=True):
        best = sorted(shares, key=lambda choice: -shares[choice])
        if args.json:
            print(json.dumps({**record, "choice": best[0], "probabilities": shares}))
        else:
            print(*(f"{shares[c]:6.1%} {c}" for c in (best if alone else best[:1])), sep="\n")
