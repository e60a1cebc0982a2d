"""`zo-mlx generate`: mlx-lm's own, with the sparse layers in place."""

import argparse
import contextlib
import importlib
import io
import json
from typing import Any

from ..generate import check_request
from . import add_command, add_model, add_stock, run_stock

stock = importlib.import_module("mlx_lm.generate")  # the package's own attribute of that name is a function

# No images, and layers that are not mlx-lm's own; the keys and values in a file are those of a model without adapter.
WITHOUT = {"--image", "--quantize-activations", "--prompt-cache-file", "--trust-remote-code"}


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "generate", _run, "Generate text with a model, with or without an adapter.")
    add_model(p)
    add_stock(
        p, stock.setup_arg_parser(), without={"--model", "--adapter-path", "--use-default-chat-template", *WITHOUT}
    )


def _run(args: argparse.Namespace) -> None:
    check_request(args.prompt, args.max_tokens, args.temp, args.top_p, args.seed)
    if not args.json:
        run_stock(stock, stock.setup_arg_parser(), args)
        return
    args.verbose = False
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_stock(stock, stock.setup_arg_parser(), args)
    print(json.dumps({"text": printed.getvalue().removesuffix("\n")}))
