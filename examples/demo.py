"""The main job on a real model: convert SmolLM2-135M, teach it to sort support messages, show before and after.

Runs the same commands as a user would type, and prints them. A second run goes on where the first one stopped.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from smollm2 import smollm2_path

OUT = Path("demo")
MODEL, ADAPTER, BEFORE = OUT / "model", OUT / "adapter", OUT / "before.json"
DATA = Path(os.path.relpath(Path(__file__).parent / "support"))


def run(command: str) -> list[dict[str, Any]]:
    """Run a zo-mlx command with --json and return the objects it prints; its progress goes to the terminal."""
    print(f"$ {command}", flush=True)
    # The module, not the script, so that the demo does not depend on PATH.
    words = [sys.executable, "-m", "zo_mlx.cli", *shlex.split(command)[1:], "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1].get("event") == "train":
            print("  step {iteration}: loss {train_loss:.3f}".format(**events[-1]), flush=True)
    if code := process.wait():
        sys.exit(code)
    return events


def main() -> None:
    started = time.monotonic()
    source = smollm2_path()
    if source is None:
        sys.exit("SmolLM2 is not installed; run: make demo")
    OUT.mkdir(exist_ok=True)
    if not MODEL.exists():
        run(f"zo-mlx convert --hf-path {shlex.quote(os.path.relpath(source))} --mlx-path {MODEL} --num-samples 8")
    if not BEFORE.exists():
        before = run(f"zo-mlx evaluate --model {MODEL} --data {DATA}")[-1]
        BEFORE.write_text(json.dumps(before))
    command = f"zo-mlx train --model {MODEL} --data {DATA} --adapter-path {ADAPTER}"
    command += " --iters 60 --val-batches 0"
    trained = run(command + (" --resume" if (ADAPTER / "journal").exists() else ""))[-1]
    after = run(f"zo-mlx evaluate --model {MODEL} --adapter-path {ADAPTER} --data {DATA}")[-1]
    before = json.loads(BEFORE.read_text())

    step = trained["seconds_per_step"]
    rows = [
        ("accuracy", f"{before['accuracy']:.1%}", f"{after['accuracy']:.1%}"),
        ("loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}"),
        ("trainable weights", "", f"{trained['trainable']:,}"),
        ("steps", "", f"{trained['iterations']}"),
        ("time per step", "", f"{step:.2f} s" if step else "(finished earlier)"),
        ("peak memory while training", "", f"{trained['peak_memory'] / 1e6:.0f} MB"),
        ("of which weights", "", f"{trained['weights_memory'] / 1e6:.0f} MB"),
        ("size of the adapter", "", f"{trained['adapter_bytes'] / 1e6:.2f} MB"),
    ]
    print(f"\n{after['examples']} messages it never trained on{'':8}{'before':>10}{'after':>14}")
    for name, first, second in rows:
        print(f"{name:40}{first:>10}{second:>14}")
    print(f"\nTook {time.monotonic() - started:.0f} s. Look at the result:\n$ .venv/bin/zo-mlx info {ADAPTER}")


if __name__ == "__main__":
    main()
