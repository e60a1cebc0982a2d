"""Convert all models in a folder.

    python examples/convert_folder.py MODELS CONVERTED

MODELS holds Hugging Face directories, and .gguf files; each becomes a directory of the same name in CONVERTED. What is
there already is left alone and what was interrupted goes on, so that the same command can be given again. A model that
cannot be converted is named at the end, and keeps none of the others from being converted.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import zo_mlx


def models_in(folder: Path) -> Iterator[Path]:
    """Directories with a config.json, and .gguf files."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".gguf" or (path / "config.json").exists():
            yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--num-samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--memory-limit", type=float, metavar="GB")
    args = parser.parse_args()
    failed = []
    for source in models_in(args.models):
        out = args.converted / (source.stem if source.suffix == ".gguf" else source.name)
        if out.exists():
            print(f"{out}: there already")
            continue
        try:
            done = zo_mlx.convert(
                str(source), str(out), num_samples=args.num_samples, memory_limit=args.memory_limit, resume=True
            )
            print(f"{out}: {done.trainable:,} sensitive weights, {done.seconds:.0f} s, {done.peak_memory / 1e9:.2f} GB")
        except zo_mlx.Interrupted as e:
            sys.exit(str(e))
        except zo_mlx.ZoError as e:
            failed.append(f"{source}: {e}")
    if failed:
        sys.exit("not converted:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
