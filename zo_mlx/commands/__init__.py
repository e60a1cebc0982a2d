"""The commands of `zo-mlx`, a module each: `add` makes its parser, which runs a thin layer over the Python API."""

import argparse
from collections.abc import Callable
from typing import Any


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    """A parser for one command; `run` gets what it parsed."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, formatter_class=_Help)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model, and with which adapter."""
    parser.add_argument("--model", default="mlx_model", help="MLX model directory.")
    parser.add_argument("--adapter-path", default=None, help="Adapter directory made by `zo-mlx train`.")
