"""Every script of tests/benchmarks and tests/faults that README and docs name, with the flags they give it.

With tiny models in place of theirs, and for a moment each.
"""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from conftest import write_jsonl
from pages import PAGES, code_of

import zo_mlx

TESTS = Path(__file__).parent
TINY = (64, 128, 2, 4, 2, 258)  # in place of each shape of tests/benchmarks/shapes.py
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# In place of what the pages have.
WORDS = {"16x256": "2x16", "16x64": "2x16", "4x64": "1x16", "N": "1", "...": "smollm2"}
# What makes a script small, or what it has to be given, besides.
MORE = {
    "ahead": "--repeats 1",
    "calibration": "--sequence-length 32",
    "convergence": f"--hf-path {GGUF} --model smollm2 --data DIR --tasks sst2 --seeds 0 --rows 120 --valid 8",
    "convert": "--num-samples 1 --repeats 1",
    "export": "--prompts 4 --own-dtype 2",
    "layouts": "--rows 16 --length 4 --repeats 1",
    "linearized": "--model smollm2 --data SST2 --train 16 --valid 8 --seeds 1 --rows 64",
    "llama7b": "--batch-size 2 --length 8",
    "ranks": "--model smollm2 --data SST2 --steps 6",
    "scaling": "--steps 2",
    "step": "--model smollm2 --data SST2 --repeats 1",
    "fuzz": "--count 20",
    "kill_ranks": "--kills 1",
    "kill_convert": "--kills 1",
    "soak": "--steps 20",
}
# These have shorter runs in test_faults.py, or are a test themselves.
ELSEWHERE = {"kill_train", "power_loss", "disk_full", "test_architectures"}


@pytest.fixture
def here(tiny_hf: Path, spread: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run in, with all that the pages name."""
    monkeypatch.chdir(tmp_path)
    letters = [
        {"prompt": f"{word} ->", "completion": "V" if word[0] in "aeiou" else "C", "choices": ["V", "C"]}
        for word in map("".join, product("aeiubcdfg", "xyz"))
    ]
    for split in ("train", "valid", "test"):
        write_jsonl(tmp_path / "letters" / f"{split}.jsonl", letters)
    for name in ("SST2", "RTE", "DATA", "DIR/sst2"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(tmp_path / "letters")
    for name in ("smollm2", "smollm2-tensor", "TINY", "MODEL"):
        Path(name).symlink_to(spread)
    for name in (GGUF, "GGUF"):
        Path(name).symlink_to(tiny_hf)
    Path("docs").mkdir()
    return tmp_path


def _smaller(words: list[str]) -> list[str]:
    pairs = zip(["", *words], words, strict=False)
    kept = [(before, word) for before, word in pairs if word != "..." or before[:2] == "--"]
    return ["1" if before == "--num-layers" else WORDS.get(word, word) for before, word in kept]


def _scripts() -> list[str]:
    """Once each."""
    found = {}
    for page in PAGES:
        for _, code in code_of(page):
            if match := re.match(r"(?:python|\.\.\.) (?:tests/\w+/)?(\w+)\.py\b *(.*)", code):
                if (TESTS.parent / "examples" / f"{match[1]}.py").exists() or match[1] in ELSEWHERE:
                    continue
                found[f"{match[1]} {re.sub(r'[][]', '', match[2])}".strip()] = None
    return list(found)


@pytest.mark.parametrize("command", _scripts())
def test_a_script(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = shlex.split(command)
    words = [*_smaller(words), *MORE.get(name, "").split()]
    (path,) = (p for place in ("benchmarks", "faults") for p in (TESTS / place).glob(f"{name}.py"))
    if path.parent.name == "faults":
        done = subprocess.run([sys.executable, path, *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    if name == "export":
        zo_mlx.train(model="smollm2", data="SST2", adapter_path="sst2", iters=2, val_batches=0, progress=False)
    monkeypatch.syspath_prepend(path.parent)
    shapes = importlib.import_module("shapes")
    for shape in shapes.SHAPES:
        monkeypatch.setitem(shapes.SHAPES, shape, TINY)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    module = _loaded(path)
    module.__dict__.update({"BATCHES": (1, 2), "LENGTHS": (8, 16)} if name == "memory" else {})
    module.main()
    assert re.search(r"\d", capsys.readouterr().out)


def _loaded(path: Path) -> ModuleType:
    """As it is when it is run, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
