"""The commands of `zo-mlx`, a module each: `add` makes its parser, which runs a thin layer over the Python API."""

import argparse
import contextlib
from collections.abc import Callable, Collection, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

from jinja2 import TemplateError

from .. import load
from ..errors import UsageError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default in (None, False, ()) or "(default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, json: bool = True
) -> argparse.ArgumentParser:
    """A parser for one command; `run` gets what it parsed. With `json` it has that flag."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, formatter_class=_Help)
    parser.set_defaults(run=run)
    if json:
        parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    return parser


def add_stock(parser: argparse.ArgumentParser, stock: argparse.ArgumentParser, without: Collection[str]) -> None:
    """The flags of one of mlx-lm's parsers, but for some."""
    for action in stock._actions:
        if not {"--help", *without}.intersection(action.option_strings):
            parser._add_action(action)


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """While it lasts, a module or class has other attributes."""
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def run_stock(command: ModuleType, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Run one of mlx-lm's commands as it is, with arguments that are parsed and models from `zo_mlx.load`.

    Args:
        command: its module, with a `main` that calls `setup_arg_parser` and `load`.
        parser: its parser, for what `args` does not have.

    Raises:
        UsageError: what `zo_mlx.load` refuses, and what mlx-lm does.
    """
    arguments = argparse.Namespace(**{**vars(parser.parse_args([])), **vars(args)})

    def own_load(path: str, adapter_path: str | None = None, return_config: bool = False, **_: Any) -> Any:
        loaded = load(path, adapter_path)
        return (*loaded, {}) if return_config else loaded  # the config says how to read images

    parsed = SimpleNamespace(parse_args=lambda: arguments)
    try:
        with replaced(command, setup_arg_parser=lambda: parsed, load=own_load):
            command.main()
    except TemplateError as e:
        raise UsageError(f"the model's chat template fails: {e}") from None
    except (ValueError, TypeError) as e:
        raise UsageError(str(e)) from None


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model, and with which adapter."""
    parser.add_argument("--model", default="mlx_model", help="MLX model directory.")
    parser.add_argument("--adapter-path", default=None, help="Adapter directory made by `zo-mlx train`.")
