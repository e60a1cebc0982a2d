"""`zo-mlx chat`: mlx-lm's own, with the sparse layers in place."""

import argparse
import contextlib
from typing import Any

import mlx_lm.chat as stock

from ..generate import check_request
from . import add_command, add_model, add_stock, run_stock

WITHOUT = {"--pipeline", "--trust-remote-code"}  # one machine, and no code that comes with a model


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "chat", _run, "Chat with a model, with or without an adapter.", json=False)
    add_model(p)
    add_stock(p, stock.setup_arg_parser(), without={"--model", "--adapter-path", *WITHOUT})


def _run(args: argparse.Namespace) -> None:
    check_request("any", args.max_tokens, args.temp, args.top_p, args.seed)
    with contextlib.suppress(EOFError):  # the end of what is typed or piped in
        run_stock(stock, stock.setup_arg_parser(), args)
