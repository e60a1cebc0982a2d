"""What evaluating and training a model take, measured, as a picture.

    python examples/footprint.py footprint.png --model demo/model --data examples/support

Every bar is MLX's peak while a few batches were evaluated, or a few steps taken: first the weights, then what came on
top. As many rows each time, to a batch or to a step.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)
import mlx.core as mx
from matplotlib.figure import Figure

STEPS = 3


def measure(model: str, data: str, rows: int) -> dict[str, tuple[int, int]]:
    """Bytes of weights, and of the peak, for each way to use a model."""
    loaded, tokenizer = zo_mlx.load(model)
    mx.eval(loaded.parameters())
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    zo_mlx.evaluate(loaded, tokenizer, data, batch_size=rows, num_batches=STEPS)
    found = {"evaluating": (weights, mx.get_peak_memory())}
    del loaded
    zo: dict[str, Any] = {"batch_size": rows // 8}  # an example is a row in each of 8 branches
    exact: dict[str, Any] = {"batch_size": rows, "gradient": "exact"}
    ways = {
        "training, random directions": zo,
        "the same, all blocks": {**zo, "num_layers": -1},
        "training, exact gradients": exact,
        "the same, all activations kept": {**exact, "keep_blocks": -1},
    }
    with tempfile.TemporaryDirectory() as place:
        for number, (name, settings) in enumerate(ways.items()):
            out = str(Path(place, str(number)))
            done = zo_mlx.train(model=model, data=data, adapter_path=out, iters=STEPS, val_batches=0, **settings)
            found[name] = done.weights_memory, done.peak_memory
    return found


def draw(found: dict[str, tuple[int, int]], title: str, path: Path) -> None:
    """A bar for each."""
    names = list(found)[::-1]
    weights = [found[name][0] / 1e6 for name in names]
    above = [(found[name][1] - found[name][0]) / 1e6 for name in names]
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, weights, color="#8c959f", label="weights")
    bars = axes.barh(names, above, left=weights, color="#2e86ab", label="on top")
    axes.bar_label(bars, [f" {a:.0f} MB" for a in above])
    axes.set_xlabel("MLX's peak, MB")
    axes.set_title(title, fontsize="medium", loc="left")
    axes.margins(x=0.15)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path, help="a .png, .pdf or .svg file to write")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", default="examples/support")
    parser.add_argument("--rows", type=int, default=32, help="in a batch or a step, at least 8")
    args = parser.parse_args()
    try:
        found = measure(args.model, args.data, args.rows)
    except zo_mlx.ZoError as e:
        sys.exit(str(e))
    title = f"{Path(args.model).name}, {Path(args.data).name}, {args.rows} rows, {mx.default_device()}"
    draw(found, title, args.picture)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
