"""The command line: which commands there are, and what becomes of their errors."""

import argparse
import signal
import sys

from . import __version__
from .commands import convert, evaluate, export, fuse, generate, info, train
from .errors import ZoError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zo-mlx", description=__import__("zo_mlx").__doc__)
    parser.add_argument("--version", action="version", version=f"zo-mlx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (convert, train, evaluate, generate, export, fuse, info):
        module.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 (run-time error), 2 (usage) or 130 (interrupted)."""
    args = build_parser().parse_args(argv)
    # Stop as for Ctrl-C: a run is left to be resumed, temporary files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args.run(args)
    except ZoError as e:
        return _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (OSError, RuntimeError, MemoryError) as e:
        return _fail(str(ZoError(str(e))) or type(e).__name__, ZoError.exit_code)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"zo-mlx: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
