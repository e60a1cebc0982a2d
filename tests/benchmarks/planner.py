"""What `zo-mlx memory` estimates against what runs report as their peak.

    python tests/benchmarks/planner.py --model smollm2 [--gradient exact] [--texts] 1x64 4x64 ...

Each point is a batch size and a length. A run of its own takes one step, whose peak, loading included, is compared. The
model is a converted directory, or the name of a shape for random 4-bit weights of it: `tinyllama`, `llama2-7b`, or two
blocks of one, `llama2-7b-2-blocks`. Examples have two choices of one token; with --texts, all tokens are targets.
"""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from shapes import SHAPES, model_directory

from zo_mlx.config import TrainConfig
from zo_mlx.files import read_json
from zo_mlx.model import load_tokenizer_of
from zo_mlx.planner import plan


class _Enough(Exception):
    """Ends a run after its first step."""


def peak_of_a_run(path: Path, gradient: str, texts: bool, rows: int, length: int) -> float:
    """What a run reports after its first step, in bytes."""
    tokenizer = load_tokenizer_of(path, read_json(path / "config.json"))
    word = " the" if len(tokenizer.encode(" the the")) == 2 else "a"  # a token
    letters = [" A", " B"] if word == " the" else ["A", "B"]
    records: list[dict[str, Any]] = [{"text": word * length}] * 8 * rows
    if not texts:
        records = [{"prompt": word * length, "completion": c, "choices": letters} for c in letters * 4 * rows]

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            raise _Enough(event["peak_memory"] * 1e9)

    with tempfile.TemporaryDirectory() as work:
        Path(work, "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        gc.collect()  # what is left of the run before
        mx.reset_peak_memory()
        try:
            zo_mlx.train(
                model=str(path), data=work, adapter_path=f"{work}/adapter", gradient=gradient, batch_size=rows,
                iters=1, val_batches=0, steps_per_report=1, report=report, progress=False,
            )  # fmt: skip
        except _Enough as e:
            return float(e.args[0])
    raise AssertionError("the run reported no step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=f"directory, or one of {', '.join(SHAPES)}")
    parser.add_argument("--gradient", choices=("zo", "exact"), default="zo")
    parser.add_argument("--texts", action="store_true")
    parser.add_argument("points", nargs="+", metavar="ROWSxLENGTH")
    args = parser.parse_args()
    points = [tuple(map(int, point.split("x"))) for point in args.points]
    print(f"{args.model}, {args.gradient}, {'texts' if args.texts else 'choices'}")
    with model_directory(args.model) as path:
        for rows, length in points:
            need = plan(str(path), TrainConfig(batch_size=rows, max_seq_length=length))["needs"][args.gradient]
            estimate = need["total"] - (0 if args.texts else need["logits"])
            peak = peak_of_a_run(path, args.gradient, args.texts, rows, length)
            print(
                f"{rows} x {length}: estimate {estimate / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB, "
                f"{estimate / peak - 1:+.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
