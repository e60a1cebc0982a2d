"""Convert, inspect and train from mutated files: every run must end in a result or in one clear line.

    python tests/faults/fuzz.py [--count 2000] [--seed 0]

Prints the counts of exit codes, and every input that raised, hung (30 s) or wrote outside its output directory.
"""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import write_jsonl
from test_gguf import _hf, write_gguf
from test_gguf_families import _original
from zo_mlx.convert import blockwise

from zo_mlx.cli import main

ODD = [None, -1, 0, 1, 3, 10**9, 2**70, 1.5, -0.0, "x", "", "../../x", [], [1], {}, {"type": "x"}, True]


def mutate_bytes(path: Path, rng: random.Random, within: int) -> None:
    """Change, remove or repeat some of the first `within` bytes, or cut the file."""
    content = bytearray(path.read_bytes())
    end = min(within, len(content))
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(end)
        match rng.randrange(5):
            case 0:
                content[at] = rng.randrange(256)
            case 1:
                content[at] ^= 1 << rng.randrange(8)
            case 2:
                del content[at : at + rng.randrange(1, 9)]
            case 3:
                content[at:at] = content[at : at + rng.randrange(1, 9)]
            case 4:
                content[at : at + 8] = rng.choice([b"\0" * 8, b"\xff" * 8, b"9" * 8])
        end = max(1, min(end, len(content)))
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(content)


def mutate_json(path: Path, rng: random.Random) -> None:
    """Replace, remove or rename a value somewhere in a JSON object."""
    content = json.loads(path.read_text())
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        break
    if rng.random() < 0.2:
        del place[key]
    elif rng.random() < 0.1 and isinstance(place, dict):
        place[rng.choice(["x", "../x", ""])] = place.pop(key)
    else:
        place[key] = rng.choice(ODD)
    path.write_text(json.dumps(content))


Case = tuple[str, Callable[[Path, random.Random], None], str]

_SMALL = "--mlx-path out --num-samples 1 --sequence-length 16"
_CONVERT = f"convert {_SMALL} --q-group-size 32 --hf-path"
_TRAIN = "train --model model --data data --iters 1 --batch-size 4 --val-batches 0 --adapter-path"

# What to mutate, how, and the command to run on it.
CASES: list[Case] = [
    ("hf/model.safetensors", lambda p, r: mutate_bytes(p, r, 3000), f"{_CONVERT} hf"),
    ("hf/config.json", mutate_json, f"{_CONVERT} hf"),
    ("hf/config.json", lambda p, r: mutate_bytes(p, r, 10**6), f"{_CONVERT} hf"),
    ("hf/tokenizer.json", mutate_json, f"{_CONVERT} hf"),
    ("hf/tokenizer_config.json", mutate_json, f"{_CONVERT} hf"),
    ("hf/model.safetensors.index.json", mutate_json, f"{_CONVERT} hf"),
    ("m.gguf", lambda p, r: mutate_bytes(p, r, 12000), f"{_CONVERT} m.gguf"),
    ("gemma.gguf", lambda p, r: mutate_bytes(p, r, 12000), f"{_CONVERT} gemma.gguf"),
    (".out.partial/scoring/gradient-3.safetensors", lambda p, r: mutate_bytes(p, r, 9999), f"{_CONVERT} hf --resume"),
    (".out.partial/scoring/files.json", lambda p, r: mutate_bytes(p, r, 9999), f"{_CONVERT} hf --resume"),
    (".out.partial/conversion.json", lambda p, r: mutate_bytes(p, r, 2000), f"{_CONVERT} hf --resume"),
    ("model/config.json", mutate_json, f"convert {_SMALL} --hf-path model"),
    ("model/sensitive.safetensors", lambda p, r: mutate_bytes(p, r, 6000), f"{_TRAIN} out"),
    ("model/config.json", mutate_json, "info model"),
    ("model/sensitive.safetensors", lambda p, r: mutate_bytes(p, r, 6000), "info model"),
    ("adapter/journal", lambda p, r: mutate_bytes(p, r, 2000), "train --model model --adapter-path adapter --resume"),
    (
        "adapter/values.safetensors",
        lambda p, r: mutate_bytes(p, r, 500),
        "evaluate --model model --adapter-path adapter --data data",
    ),
    ("data/train.jsonl", lambda p, r: mutate_bytes(p, r, 2000), f"{_TRAIN} out"),
]


def interrupt_conversion(work: Path) -> None:
    """Leave a conversion of `hf` to `out` after its first gradient."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    os.chdir(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_score_block", stop)
        main(f"{_CONVERT} hf".split())


def prepare(work: Path) -> None:
    """The files that get mutated."""
    _hf(work / "hf")
    (work / "hf/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}})
    )
    write_gguf(work / "hf", work / "m.gguf")
    gemma = _original("gemma3", work / "gemma", head_dim=16, sliding_window=4, query_pre_attn_scalar=16)
    write_gguf(gemma, work / "gemma.gguf", family="gemma3", gemma3__attention__sliding_window=4)
    interrupt_conversion(work)
    zo_mlx.convert(
        str(work / "hf"), str(work / "model"), density=0.01, q_group_size=32, num_samples=1, sequence_length=16,
        progress=False,
    )  # fmt: skip
    records: list[dict[str, object]] = [
        {"prompt": f"{i} is", "completion": " odd" if i % 2 else " even", "choices": [" odd", " even"]}
        for i in range(12)
    ]
    for split in ("train", "test"):
        write_jsonl(work / f"data/{split}.jsonl", records)
    zo_mlx.train(
        model=str(work / "model"), data=str(work / "data"), adapter_path=str(work / "adapter"), iters=2, batch_size=4,
        val_batches=0, progress=False,
    )  # fmt: skip


def hung(*_: object) -> None:
    raise TimeoutError("hung")


def main_loop(count: int, seed: int) -> int:
    """Run the cases in turn; return how many went wrong."""
    signal.signal(signal.SIGALRM, hung)
    codes: Counter[Any] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as top:
        work = Path(top, "work")
        work.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            prepare(work)
        for n in range(count):
            rng = random.Random(seed * 10**9 + n)
            file, mutate, command = CASES[n % len(CASES)]
            copy = Path(top, "copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(work, copy)
            mutate(copy / file, rng)
            before = {p for p in Path(top).rglob("*") if "out" not in p.parts}
            out, err = io.StringIO(), io.StringIO()
            problem = None
            signal.alarm(30)
            try:
                os.chdir(copy)
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code: Any = main(command.split())
            except BaseException:
                code, problem = "raised", traceback.format_exc()
            finally:
                signal.alarm(0)
                os.chdir(top)
            codes[code] += 1
            if code in (1, 2) and not err.getvalue().strip().splitlines()[-1].startswith("zo-mlx: error: "):
                problem = f"no clear line: {err.getvalue()[-300:]}"
            after = {p for p in Path(top).rglob("*") if "out" not in p.parts and "adapter" not in p.parts}
            if new := after - before:
                problem = f"left behind: {sorted(new)[:3]}"
            if problem:
                wrong += 1
                print(f"case {n}, {file}, zo-mlx {command}\n{problem}", flush=True)
    print(f"{count} mutated inputs: " + ", ".join(f"exit code {k}: {v}" for k, v in sorted(codes.items(), key=str)))
    print(f"wrong: {wrong}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main_loop(arguments.count, arguments.seed) > 0)
