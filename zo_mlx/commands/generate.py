"""`zo-mlx generate`."""

import argparse
import json
import sys
from typing import Any

from .. import generate, load
from ..errors import UsageError
from . import add_command, add_model


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "generate", _run, "Generate text with a model, with or without an adapter.")
    add_model(p)
    p.add_argument("-p", "--prompt", required=True, help="The prompt; - reads it from standard input.")
    p.add_argument("-m", "--max-tokens", type=int, default=100, help="Longest continuation.")
    p.add_argument("--temp", type=float, default=0.0, help="Sampling temperature.")
    p.add_argument("--top-p", type=float, default=1.0, help="Nucleus sampling.")
    p.add_argument("--seed", type=int, default=None, help="Makes sampling repeatable.")
    p.add_argument("--ignore-chat-template", action="store_true", help="Take the prompt as it is.")


def _run(args: argparse.Namespace) -> None:
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as e:
        raise UsageError(f"the prompt on standard input is not text: {e}") from None
    model, tokenizer = load(args.model, args.adapter_path)
    text = generate(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        seed=args.seed,
        ignore_chat_template=args.ignore_chat_template,
    )
    print(json.dumps({"text": text}) if args.json else text)
