"""Fine-tune within a machine's memory, and see how much of it was used.

    python examples/within.py --memory 8 --model demo/model --data examples/support

MLX is told to use two thirds of it at most, weights included; the rest is for the system and for other programs. A
batch that does not fit goes through the model in parts: slower, with the same result. Where even a single row takes
more, a warning says so before the first step.
"""

import argparse
import resource
import sys
from typing import Any

import zo_mlx

SHARE = 2 / 3


def show(event: dict[str, Any]) -> None:
    """Called by the training with everything that it reports."""
    if event["event"] == "train":
        print(f"step {event['iteration']}: loss {event['train_loss']:.3f}, peak {1000 * event['peak_memory']:,.1f} MB")
    elif event["event"] == "warning":
        print(event["message"], file=sys.stderr)


def process_peak() -> int:
    """The most memory that this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", type=float, default=8, metavar="GB", help="the machine's")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", default="examples/support")
    parser.add_argument("--adapter-path", default="within")
    parser.add_argument("--iters", type=int, default=100)
    args = parser.parse_args()
    limit = SHARE * args.memory
    try:
        done = zo_mlx.train(
            model=args.model,
            data=args.data,
            adapter_path=args.adapter_path,
            iters=args.iters,
            memory_limit=limit,
            report=show,
        )
    except zo_mlx.ZoError as e:
        sys.exit(str(e))
    rows = {
        f"two thirds of {args.memory:g} GB": limit * 1e9,
        "weights": done.weights_memory,
        "MLX's peak in training": done.peak_memory,
        "the process's peak": process_peak(),
    }
    for name, size in rows.items():
        print(f"{name:25}{size / 1e6:10,.1f} MB")


if __name__ == "__main__":
    main()
