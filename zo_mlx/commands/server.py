"""`zo-mlx server`: mlx-lm's own, with the sparse layers in place and an adapter for every request that names one."""

import argparse
import contextlib
from typing import Any

import mlx_lm.server as stock

from ..errors import UsageError
from ..serve import serve
from . import add_command, add_stock, replaced

# One machine, no code that comes with a model; transformers have no default templates any more. With a draft model,
# mlx-lm's server gives another answer when it is asked the same again.
WITHOUT = {"--pipeline", "--trust-remote-code", "--use-default-chat-template", "--draft-model", "--num-draft-tokens"}


def add(commands: Any) -> None:
    """Its parser."""
    p = add_command(commands, "server", serve, "Serve a model and any number of adapters over HTTP.", json=False)
    p.add_argument("--model", default="mlx_model", help="MLX model directory.")
    p.add_argument(
        "--adapter-path",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="Adapter directory; may be repeated. Requests choose one by name (without one: by this path) in the field "
        "adapters or model; those that do not get the first one without a name, or the base model.",
    )
    if parser := _stock_parser():
        add_stock(p, parser, without={"--model", "--adapter-path", *WITHOUT})
    else:  # the other commands are not to suffer
        p.set_defaults(run=_unknown)


def _unknown(args: argparse.Namespace) -> None:
    raise UsageError("the installed mlx-lm has a server that zo-mlx does not know: another version of either is needed")


def _stock_parser() -> argparse.ArgumentParser | None:
    """mlx-lm's parser of flags, which its `main` makes and keeps to itself; None if it does so no more."""
    made: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        made.append(parser)
        raise _Made

    with replaced(argparse.ArgumentParser, parse_known_args=stop), contextlib.suppress(Exception):
        stock.main()
    return made[0] if made else None


class _Made(Exception):
    pass
