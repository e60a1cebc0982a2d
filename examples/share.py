"""Share a fine-tune as a file of some kilobytes: its journal.

    python examples/share.py --model demo/model --data examples/support

Anna trains, and sends the journal alone. Ben has the same base model, and makes the same adapter of it: without Anna's
data, without running the model, and bit for bit.
"""

import argparse
import shutil
import sys
from pathlib import Path

import zo_mlx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", default="examples/support")
    parser.add_argument("--directory", default="share", help="to write; must not exist")
    parser.add_argument("--iters", type=int, default=60)
    args = parser.parse_args()
    anna, ben = Path(args.directory, "anna"), Path(args.directory, "ben")
    try:
        if anna.exists():
            sys.exit(f"{anna} is there already")
        zo_mlx.train(model=args.model, data=args.data, adapter_path=str(anna), iters=args.iters, val_batches=0)

        ben.mkdir()
        sent = Path(shutil.copy(anna / "journal", ben / "from-anna"))
        print(f"sent: {sent}, {sent.stat().st_size:,} bytes")

        done = zo_mlx.replay(args.model, sent, ben / "adapter")
        print(f"replayed: {done.steps} steps in {done.seconds:.2f} s")
    except zo_mlx.ZoError as e:
        sys.exit(str(e))
    same = (anna / "values.safetensors").read_bytes() == (ben / "adapter/values.safetensors").read_bytes()
    print("the adapters are", "the same, bit for bit" if same else "different")
    if not same:
        sys.exit(1)
    print(f"$ zo-mlx chat --model {args.model} --adapter-path {ben / 'adapter'}")


if __name__ == "__main__":
    main()
