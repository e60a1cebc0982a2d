"""Time and memory of a conversion.

    python tests/benchmarks/convert.py compare SOURCE [--num-samples 4] [--repeats 3]
    python tests/benchmarks/convert.py tinyllama|llama2-7b [--num-samples 8] [--memory-limit GB] [--scratch DIR]

`compare` times the block-by-block scores of a model against the ones with all gradients in memory, in alternation in
one process. A shape converts a model of that shape with random bfloat16 weights, made first, in a process of its own:
its peak resident memory (read from Linux's /proc) is given in all, and above that of an interpreter that has imported
zo_mlx.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from shapes import SHAPES, make_model
from zo_mlx.convert.blockwise import blockwise_fisher_scores
from zo_mlx.convert.checkpoint import Checkpoint
from zo_mlx.convert.sensitivity import DEFAULT_TEXT, calibration_sequences, fisher_scores
from zo_mlx.convert.sources import open_source


def compare(source_path: str, num_samples: int, repeats: int) -> None:
    """Print the median times of both ways, and the median of the ratios of neighbours."""
    seconds: dict[str, list[float]] = {"block by block": [], "in memory": []}
    peaks = dict.fromkeys(seconds, 0)
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(source_path, None, Path(scratch))
        text = DEFAULT_TEXT.read_text(encoding="utf-8")
        sequences = calibration_sequences(source.tokenizer, text, num_samples, 256, seed=0)

        def block_by_block() -> Iterator[tuple[str, mx.array]]:
            with tempfile.TemporaryDirectory(dir=scratch) as fresh:
                yield from blockwise_fisher_scores(source.open_model, sequences, Checkpoint(Path(fresh)))

        ways = {
            "block by block": block_by_block,
            "in memory": lambda: fisher_scores(source.open_model(), sequences),
        }
        for _ in range(repeats):
            for name, way in ways.items():
                mx.clear_cache()
                mx.reset_peak_memory()
                started = time.perf_counter()
                for _, scores in way():
                    del scores
                seconds[name].append(time.perf_counter() - started)
                peaks[name] = max(peaks[name], mx.get_peak_memory())
    print(f"{source_path}, {num_samples} x 256 tokens, {mx.default_device()}")
    for name, own in seconds.items():
        print(f"{name:16}{statistics.median(own):8.1f} s   MLX's peak {peaks[name] / 2**30:.2f} GiB")
    ratios = [a / b for a, b in zip(seconds["block by block"], seconds["in memory"], strict=True)]
    print(f"ratio {statistics.median(ratios):.2f}")


CHILD = """
import json, sys
import zo_mlx
def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
import mlx.core as mx
mx.eval(mx.ones(8) @ mx.ones(8))
own = peak()
done = zo_mlx.convert(**json.loads(sys.argv[1]))
print(json.dumps({"own": own, "peak": peak(), "mlx": done.peak_memory, "seconds": done.seconds, "phases": done.phases}))
"""


def convert_shape(shape: str, num_samples: int, memory_limit: float | None, scratch: str | None) -> None:
    """Convert a model of a shape and print its peak memory and times."""
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        make_model(Path(work, "model"), shape)
        settings = {"num_samples": num_samples, "sequence_length": 256, "memory_limit": memory_limit}
        paths = {"hf_path": str(Path(work, "model")), "mlx_path": str(Path(work, "out"))}
        command = [sys.executable, "-c", CHILD, json.dumps({**paths, **settings})]
        done = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
    print(f"{shape}, {num_samples} x 256 tokens, memory limit {memory_limit}, {mx.default_device()}")
    print(f"peak resident memory {done['peak'] / 2**30:.2f} GiB, {(done['peak'] - done['own']) / 2**30:.2f} GiB above")
    print(f"the interpreter's own {done['own'] / 2**30:.2f} GiB; MLX's peak {done['mlx'] / 2**30:.2f} GiB")
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in done["phases"].items())
    print(f"{done['seconds']:.0f} s, of which {phases}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["compare", *SHAPES])
    parser.add_argument("source", nargs="?", help="for compare: a Hugging Face directory or .gguf file")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-limit", type=float, metavar="GB")
    parser.add_argument("--scratch", metavar="DIR", help="where the random model is put")
    args = parser.parse_args()
    if args.what != "compare":
        convert_shape(args.what, args.num_samples, args.memory_limit, args.scratch)
    elif args.source:
        compare(args.source, args.num_samples, args.repeats)
    else:
        parser.error("compare needs a source")


if __name__ == "__main__":
    main()
