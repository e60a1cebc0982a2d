"""Commands of README and docs, run as they stand there, with tiny models and few steps."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socketserver import BaseServer
from threading import Thread
from urllib.request import urlopen

import pytest
from pages import PAGES, ROOT, code_of
from safetensors.numpy import load_file

from zo_mlx import train
from zo_mlx.cli import main
from zo_mlx.journal import Journal

MAIN = {"convert", "train", "evaluate", "generate"}


def _asked_and_stopped(server: BaseServer, own: Callable[[BaseServer], None] = BaseServer.serve_forever) -> None:
    """In place of `serve_forever`: answer a request, then end as with Ctrl-C."""

    def ask() -> None:
        try:
            with urlopen(f"http://127.0.0.1:{server.server_address[1]}/health", timeout=60) as answer:
                answered.append(json.load(answer))
        finally:
            server.shutdown()

    answered: list[object] = []
    asking = Thread(target=ask)
    asking.start()
    own(server)
    asking.join()
    assert answered == [{"status": "ok"}]
    raise KeyboardInterrupt


def _run(code: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """With few steps; the command of `zo-mlx`, or the program of another."""
    program, *words = shlex.split(code)
    words += ["--port", "0"] * ("server" in code)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # the end of a chat
    if program == "zo-mlx":
        assert main(words + ["--iters", "4"] * (words[0] == "train")) == 0, code
        return words[0]
    monkeypatch.setattr(sys, "argv", [program, *words])
    importlib.import_module(program).main()
    return program


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("README.md", {*MAIN, "chat", "mlx_lm.generate", "fuse", "classify", "server", "mlx_lm.server"}),
        ("docs/quickstart.md", {*MAIN, "chat", "mlx_lm.generate", "fuse", "replay", "server"}),
        ("docs/guide.md", {*MAIN, "replay", "server"}),
        ("docs/memory.md", {"memory"}),
    ],
)
def test_commands_run_in_their_order(
    page: str, expected: set[str], tiny_hf: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model and few steps. What `make demo` does has its test; what is done after it comes last here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BaseServer, "serve_forever", _asked_and_stopped)
    Path("examples").mkdir()
    for data in ("my_data", "examples/support"):
        Path(data).symlink_to(choice_data)
    ran = set()
    lines = [re.sub(r"^\.venv/bin/", "", code) for is_line, code in code_of(ROOT / page) if is_line]
    asked = [code for code in lines if code.startswith("zo-mlx classify --model demo/")]
    lines += [code.replace("demo/model", "qwen3-4bit").replace("demo/adapter", "adapters") for code in asked]
    for code in lines:
        if not re.match(r"(zo-mlx (?!--)|mlx_lm\.\w+ )(?!.*(demo/|\.gguf))", code):
            continue
        code = code.replace("Qwen/Qwen3-0.6B", str(tiny_hf)).replace("--until 100", "--until 3")
        code = code.replace("OTHER_ADAPTERS", "adapters")
        ran.add(_run(code, monkeypatch))
    assert ran >= expected
    if page == "docs/quickstart.md":
        values = [load_file(Path(place, "values.safetensors"))["values"] for place in ("support", "the-same")]
        assert (values[0] == values[1]).all()


def test_two_processes_on_this_machine_train(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    (command,) = (
        c for is_line, c in code_of(ROOT / "docs/distributed.md") if is_line and c.startswith("mlx.launch -n")
    )
    (tmp_path / "qwen3-4bit").symlink_to(tiny)
    (tmp_path / "my_data").symlink_to(choice_data)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [*shlex.split(command, comments=True), "--iters", "4", "--rank-timeout", "60"]
    words[1:1] = ["--starting-port", port]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = (Journal.read(tmp_path / "adapters" / place / "journal") for place in ("", "rank-1"))
    assert len(first) == 4
    assert first.identity == second.identity


def test_python_of_the_guide_runs(
    tiny_hf: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.S)
    for name, there in (("SmolLM2-135M-Instruct.Q4_1.gguf", tiny_hf), ("examples/support", choice_data)):
        assert name in block
        block = block.replace(name, str(there))
    exec(block, {})
    assert Path("step-30/values.safetensors").exists()


LORA_YAML = (
    "data: examples/support\ntrain: true\nfine_tune_type: lora\nlora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}\n"
)


def _whole(page: Path) -> list[str]:
    """The commands within its text that name a model; `...` is what stands in the one before."""
    found: list[str] = []
    for is_line, code in code_of(page):
        if is_line or not re.match(r"(zo-mlx|mlx_lm)\S* (?=.*(--model|--hf-path|info .|memory .|fuse [.]{3}))", code):
            continue
        code = code.removesuffix(" ...")
        before = next((other for other in found if other.startswith("zo-mlx fuse ")), "")
        found.append(code.replace("zo-mlx fuse ...", before).replace("--mlx-path smollm2", "--mlx-path converted"))
    return [code for code in found if "--export-gguf" not in code]  # its tokenizers are those of test_fuse.py


WITHIN_TEXT = {page: found for page in PAGES if (found := _whole(page))}


@pytest.mark.parametrize("page", WITHIN_TEXT, ids=lambda page: page.name)
def test_commands_within_text_run(
    page: Path, tiny_hf: Path, tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "M", "CONVERTED", "MODEL", "Qwen/Qwen3-0.6B", "qwen3-4bit", "my-model", "demo/model"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(tiny)
    for name in ("SST2", "examples/support"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(choice_data)
    for name in ("A", "demo/adapter", "the-same"):
        train(model="M", data="SST2", adapter_path=name, iters=2, learning_rate=1e-3, val_batches=0, progress=False)
    Path("SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(tiny_hf)
    Path("wikitext2_test.txt").write_text("A text of some length, and more of it. " * 50)
    Path("lora.yaml").write_text(LORA_YAML)
    for code in WITHIN_TEXT[page]:
        for out in ("adapters", "OUT"):
            shutil.rmtree(out, ignore_errors=True)
        _run(code, monkeypatch)
