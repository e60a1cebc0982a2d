"""Convert, inspect, train, resume and evaluate from mutated files: each must end in a result or in one clear line.

    python tests/faults/fuzz.py [--count 5000] [--seed 0]

Models, sensitive indexes, data, settings, journals and adapters, some with their checksums made good again. A process
runs some hundred inputs and is watched by another one. Prints the counts of exit codes, and every input that raised,
ended the process, hung (60 s), wrote outside its output directory, got an error that names neither file nor directory
nor a setting, or took more memory (Linux) than the unchanged file, four times its own size, and 16 MB for what
allocators do. Returns 1 if there is any.
"""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import write_jsonl
from test_gguf import _hf, write_gguf
from test_gguf_families import _original
from zo_mlx.convert import blockwise

from zo_mlx import adapter
from zo_mlx.cli import main
from zo_mlx.config import TrainConfig
from zo_mlx.files import load_safetensors

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
    path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))


def mutate_line(path: Path, rng: random.Random) -> None:
    """The same in one of a file's JSON lines."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(mutated(json.loads(lines[at]), rng))
    path.write_text("\n".join(lines))


def mutate_header(path: Path, rng: random.Random) -> None:
    """The same in a journal's header, with a checksum that holds. No record holds any more."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<I", content, 8)
    header = json.dumps(mutated(json.loads(content[12 : 12 + length]), rng)).encode()
    prefix = content[:8] + struct.pack("<I", len(header)) + header
    path.write_bytes(prefix + struct.pack("<I", zlib.crc32(prefix)))


def mutate_metadata(path: Path, rng: random.Random) -> None:
    """The same in a safetensors file's metadata, and in tensors' names; a snapshot's checksum holds."""
    arrays, metadata = load_safetensors(path)
    if rng.random() < 0.3:
        name = rng.choice(sorted(arrays))
        arrays[rng.choice(["x", "../x", "values.x"])] = arrays.pop(name)
    changed = {k: v if isinstance(v, str) else json.dumps(v) for k, v in mutated(dict(metadata), rng).items()}
    changed.pop("sha256", None)
    if "sha256" in metadata:
        changed["sha256"] = adapter._checksum(arrays, changed)
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, changed)


def mutated(content: Any, rng: random.Random) -> Any:
    """JSON data with a value somewhere in it replaced, removed or renamed."""
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
    return content


Case = tuple[str, Callable[[Path, random.Random], None], str]

_SMALL = "--num-samples 1 --sequence-length 16"
_CONVERT = f"convert {_SMALL} --q-group-size 32 --mlx-path out --hf-path"
_GO_ON = f"convert {_SMALL} --q-group-size 32 --mlx-path again --resume --hf-path hf"
_TRAIN = "train --model model --data data --iters 1 --batch-size 4 --val-batches 0 --adapter-path"
_RESUME = "train --model model --data data --adapter-path adapter --iters 3 --resume"
_EVALUATE = "evaluate --model model --adapter-path adapter --data data"

# Settings as JSON, which is YAML: none that makes a run long.
_SETTINGS = {
    "seed": 1, "learning_rate": 1e-3, "epsilon": 1e-3, "optimizer": "adam", "law": "gaussian", "num_layers": -1,
    "optimizer_config": {"adam": {"betas": [0.9, 0.99]}}, "max_seq_length": 64, "mask_prompt": True,
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 100], "warmup": 2, "warmup_init": 1e-4},
}  # fmt: skip

_WITH_SETTINGS = ("run.yaml", "adapter/journal")
_FIELDS = [f.name for f in dataclasses.fields(TrainConfig)]

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
    (".again.partial/scoring/gradient-3.safetensors", lambda p, r: mutate_bytes(p, r, 9999), _GO_ON),
    (".again.partial/scoring/files.json", lambda p, r: mutate_bytes(p, r, 9999), _GO_ON),
    (".again.partial/conversion.json", lambda p, r: mutate_bytes(p, r, 2000), _GO_ON),
    ("model/config.json", mutate_json, f"convert {_SMALL} --mlx-path out --hf-path model"),
    ("model/sensitive.safetensors", lambda p, r: mutate_bytes(p, r, 6000), f"{_TRAIN} out"),
    ("model/config.json", mutate_json, "info model"),
    ("model/sensitive.safetensors", lambda p, r: mutate_bytes(p, r, 6000), "info model"),
    ("model/sensitive.safetensors", mutate_metadata, f"{_TRAIN} out"),
    ("model/sensitive.safetensors", mutate_metadata, "info model"),
    ("adapter/journal", lambda p, r: mutate_bytes(p, r, 2000), _RESUME),
    ("adapter/journal", lambda p, r: mutate_bytes(p, r, 2000), "info adapter"),
    ("adapter/journal", mutate_header, _RESUME),
    ("adapter/journal", mutate_header, "info adapter"),
    ("adapter/values.safetensors", lambda p, r: mutate_bytes(p, r, 9999), _EVALUATE),
    ("adapter/values.safetensors", mutate_metadata, _EVALUATE),
    ("adapter/values.safetensors", mutate_metadata, "info adapter"),
    ("adapter/values.safetensors", mutate_metadata, _RESUME),
    ("adapter/optimizer.safetensors", mutate_metadata, _RESUME),
    ("adapter/best/values.safetensors", mutate_metadata, _RESUME),
    ("adapter/events.jsonl", lambda p, r: mutate_bytes(p, r, 2000), _RESUME),
    ("adapter/events.jsonl", mutate_line, _RESUME),
    ("data/train.jsonl", lambda p, r: mutate_bytes(p, r, 2000), f"{_TRAIN} out"),
    ("data/train.jsonl", mutate_line, f"{_TRAIN} out"),
    ("data/test.jsonl", mutate_line, _EVALUATE),
    ("run.yaml", lambda p, r: mutate_bytes(p, r, 2000), f"{_TRAIN} out --config run.yaml"),
    ("run.yaml", mutate_json, f"{_TRAIN} out --config run.yaml"),
]


def interrupt_conversion(work: Path) -> None:
    """Leave a conversion of `hf` to `again` after its first gradient."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    os.chdir(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_score_block", stop)
        main(_GO_ON.split())


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
    write_jsonl(work / "data/valid.jsonl", records[:4])
    (work / "run.yaml").write_text(json.dumps(_SETTINGS, indent=1))
    zo_mlx.train(
        model=str(work / "model"), data=str(work / "data"), adapter_path=str(work / "adapter"), iters=2, batch_size=4,
        val_batches=1, progress=False,
    )  # fmt: skip


def memory(which: str) -> int:
    """This process's memory now (VmRSS), or at most since `forget_peak` (VmHWM), in bytes; 0 where none says."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(which)), 0)


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def run(top: Path, case: Case, rng: random.Random | None) -> tuple[Any, str | None, int]:
    """Run a case, mutated or, without `rng`, as it is: exit code, what is wrong, and how much memory it took."""
    file, mutate, command = case
    copy = top / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(top / "work", copy)
    if rng:
        mutate(copy / file, rng)
    before = set(top.rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    problem = None
    forget_peak()
    had = memory("VmRSS")
    try:
        os.chdir(copy)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: Any = main(command.split())
    except BaseException:
        code, problem = "raised", traceback.format_exc()
    finally:
        os.chdir(top)
    took = memory("VmHWM") - had
    if code in (1, 2):
        message = err.getvalue().strip().splitlines()[-1]
        places = [Path(file).name, Path(file).parts[0], *(_FIELDS if file in _WITH_SETTINGS else [])]
        said = message.replace("-", "_")  # a setting is named as in a file, or as its flag
        if not message.startswith("zo-mlx: error: ") or not any(p.replace("-", "_") in said for p in places):
            problem = f"no clear line: {message[-300:]}"
    if new := {p for p in set(top.rglob("*")) - before if not {"out", "again", "adapter"} & set(p.parts)}:
        problem = f"left behind: {sorted(new)[:3]}"
    return code, problem, took


def run_some(top: Path, numbers: range, seed: int, results: Connection) -> None:
    """Run some of the numbered cases, saying which begins, and how it ended."""
    usual: dict[int, int] = {}
    for n in numbers:
        results.send(n)
        case = CASES[n % len(CASES)]
        if n % len(CASES) not in usual:
            usual[n % len(CASES)] = run(top, case, None)[2]
        code, problem, most = run(top, case, random.Random(seed * 10**9 + n))
        size = (top / "work" / case[0]).stat().st_size
        if most > usual[n % len(CASES)] + 4 * size + (16 << 20):
            problem = problem or f"took {most / 1e6:.0f} MB; unchanged {usual[n % len(CASES)] / 1e6:.0f} MB"
        results.send((code, problem))


def main_loop(count: int, seed: int) -> int:
    """Run the cases in turn; return how many went wrong."""
    # Processes begin as copies of this one, which has imported everything and must not compute anything.
    processes = get_context("fork")
    codes: Counter[Any] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        (top / "work").mkdir()
        maker = processes.Process(target=prepare, args=(top / "work",))
        maker.start()
        maker.join()
        next_case = 0
        while next_case < count:
            results, theirs = processes.Pipe(duplex=False)
            numbers = range(next_case, min(next_case + 500, count))
            process = processes.Process(target=run_some, args=(top, numbers, seed, theirs))
            process.start()
            theirs.close()
            for n in numbers:
                next_case = n + 1
                try:
                    if not (results.poll(60) and results.recv() == n and results.poll(60)):
                        raise TimeoutError
                    code, problem = results.recv()
                except TimeoutError:
                    code, problem = "hung", "hung"
                except EOFError:
                    process.join()
                    code, problem = "died", f"the process ended with {process.exitcode}"
                codes[code] += 1
                if problem:
                    wrong += 1
                    file, _, command = CASES[n % len(CASES)]
                    print(f"case {n}, {file}, zo-mlx {command}\n{problem}", flush=True)
                if code in ("hung", "died"):
                    break
            process.kill()
            process.join()
    print(f"{count} mutated inputs: " + ", ".join(f"exit code {k}: {v}" for k, v in sorted(codes.items(), key=str)))
    print(f"wrong: {wrong}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main_loop(arguments.count, arguments.seed) > 0)
