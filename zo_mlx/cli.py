"""The command line: which commands there are, and what becomes of their errors."""

import argparse
import gc
import os
import signal
import sys
from typing import Any

from . import __version__
from .commands import chat, classify, convert, evaluate, export, fuse, generate, info, memory, replay, server, train
from .errors import UsageError, ZoError
from .files import expanded

gc.freeze()  # collections, which let go of models, need not look at all modules: a tenth of a second each


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zo-mlx", description=__import__("zo_mlx").__doc__)
    parser.add_argument("--version", action="version", version=f"zo-mlx {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="Print a script for the shell's completion.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (convert, memory, train, evaluate, classify, generate, chat, server, export, fuse, replay, info):
        module.add(commands)
    return parser


# Arguments that are files or directories, which shells complete.
PATHS = {
    "adapter_path",
    "calibration_data",
    "config",
    "data",
    "draft_model",
    "hf_path",
    "journal",
    "mlx_path",
    "model",
    "path",
    "perplexity_data",
    "plot",
    "save_path",
}


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(f"{option} needs the package shtab: pip install shtab")
        for command in parser._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
            for action in command._actions:
                if action.dest in PATHS:
                    action.complete = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 (run-time error), 2 (usage), 130 (interrupted), 141 (nobody reads)."""
    _open_standard_streams()
    args = build_parser().parse_args(argv)
    # Stop as for Ctrl-C: a run is left to be resumed, temporary files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in PATHS:
            if (path := getattr(args, name, None)) == "":
                raise UsageError(f"{name} must not be empty")
            if isinstance(path, str):
                setattr(args, name, expanded(path))
        args.run(args)
        sys.stdout.flush()
    except ZoError as e:
        return _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (OSError, RuntimeError, MemoryError) as e:
        return _fail(str(ZoError(str(e))) or type(e).__name__, ZoError.exit_code)
    return 0


def _open_standard_streams() -> None:
    """Let /dev/null take the place of those that are closed, lest the next files to be opened do."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _fail(message: str, code: int) -> int:
    print(f"zo-mlx: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
