"""Kill a conversion at random moments, resume it each time, and compare with an uninterrupted one.

    python tests/faults/kill_convert.py SOURCE [--kills 10] [--seed 0]

Every conversion is a process of its own that gets SIGKILL after a random time, and then is resumed until it ends: by
another kill while there are some left to give, else undisturbed. Prints where each one died, and whether all files but
the report are the same, byte by byte.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(source: str, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zo_mlx.cli", "convert", "--hf-path", source, "--mlx-path", str(out)]
    settings = ["--num-samples", "2", "--sequence-length", "64"]
    return subprocess.Popen([*command, *settings, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a model directory but for the report, which has times in it."""
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "convert.json"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a Hugging Face directory or .gguf file")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    different = kills = outputs = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        started = time.monotonic()
        if start(args.source, whole).wait():
            sys.exit("the conversion fails")
        seconds = time.monotonic() - started
        print(f"uninterrupted: {seconds:.1f} s")
        while kills < args.kills:
            out = Path(scratch, f"out{outputs}")
            outputs += 1
            while not out.exists():
                process = start(args.source, out, "--resume")
                moment = rng.uniform(0, 1.1 * seconds) if kills < args.kills else 600
                try:
                    _, error = process.communicate(timeout=moment)
                    if process.returncode:
                        sys.exit(f"the conversion fails: {error.decode()}")
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    files = sorted(f.name for f in out.with_name(f".{out.name}.partial").rglob("*.safetensors"))
                    print(f"kill {kills} after {moment:.1f} s: {len(files)} files, {files[-1] if files else 'none'}")
            same = contents(out) == contents(whole)
            different += not same
            print("the same output" if same else "the output differs", flush=True)
            shutil.rmtree(out)
    print(f"{kills} kills, {different} of {outputs} outputs differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
