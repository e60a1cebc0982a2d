"""What input makes the commands do, seen by Python's audit hooks in a process of its own."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

# Code that is made at run time, and by which modules: definitions of classes, annotations, constants, none of it from
# input. The exception is jinja2, which compiles a model's chat template (and makes tracebacks of it); transformers runs
# that in jinja2's sandbox.
MADE = {
    "compile: <internal> by <frozen importlib._bootstrap>",
    "compile: <string> by collections/__init__.py",
    "compile: <string> by dataclasses.py",
    "compile: <string> by typing.py",
    "compile: <template> by jinja2/debug.py",
    "compile: <template> by jinja2/environment.py",
    "compile: <unknown> by ast.py",
    "exec: <string> by collections/__init__.py",
    "exec: <string> by dataclasses.py",
    "exec: <template> by jinja2/debug.py",
    "exec: <template> by jinja2/environment.py",
}
SMALL = ["--num-samples", "2", "--sequence-length", "16", "--density", "0.02"]


def _run(tmp_path: Path, commands: list[list[str]], plant: str = "") -> dict[str, Any]:
    """Run commands in an audited process, which may write to `tmp_path / "out"`, and temporary files, only."""
    writable = [str(tmp_path / "out"), str(tmp_path / "temporary")]
    for directory in writable:
        Path(directory).mkdir(exist_ok=True)
    spec = {"commands": commands, "writable": writable, "plant": plant}
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": writable[1]}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("audited.py")), json.dumps(spec)],
        capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=300, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["noted"] = sorted(set(found["noted"]) - MADE)
    return found


def _training(model: object, data: object, out: object, *more: str) -> list[str]:
    paths = ["--model", str(model), "--data", str(data), "--adapter-path", str(out)]
    return ["train", *paths, "--iters", "2", "--val-batches", "1", *more]


class _Evil:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def test_no_command_does_what_input_must_not_make_it_do(tiny_hf: Path, choice_data: Path, tmp_path: Path) -> None:
    """Beside the weights lie pickled ones, and code that the configs name as the model's and the tokenizer's."""
    source, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(tiny_hf, source)
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    (source / "evil.py").write_text("open('pwned', 'w')\n")
    for name, entries in (
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}}),
    ):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, **entries}))
    model, adapter = out / "model", out / "adapter"
    using = ["--model", str(model), "--adapter-path", str(adapter)]
    found = _run(
        tmp_path,
        [
            ["convert", "--hf-path", str(source), "--mlx-path", str(model), *SMALL],
            _training(model, choice_data, adapter),
            [*_training(model, choice_data, adapter, "--resume")[:-5], "--iters", "3", "--resume"],
            ["evaluate", *using, "--data", str(choice_data)],
            ["classify", *using, "--data", str(choice_data / "test.jsonl")],
            ["generate", *using, "--prompt", "hi", "--max-tokens", "2"],
            ["memory", str(source)],
            ["memory", str(model), "--measure"],
            ["info", str(model)],
            ["info", str(adapter)],
            ["chat", *using],
            ["replay", "--model", str(model), str(adapter / "journal"), "--adapter-path", str(out / "again")],
            ["export", *using, "--rank", "1"],
            ["fuse", *using, "--save-path", str(out / "new/fused")],
        ],
    )
    assert [code for code, _ in found["runs"]] == [0] * 14
    assert (found["noted"], found["strangers"]) == ([], [])
    assert not list(tmp_path.rglob("pwned"))


def _journal_naming_a_function(adapter: Path) -> None:
    """The run's journal, with an objective of the user's own that nobody has asked for."""
    content = (adapter / "journal").read_bytes()
    (length,) = struct.unpack_from("<I", content, 8)
    header = json.loads(content[12 : 12 + length])
    header["config"]["objective"] = "evil:score"
    new = json.dumps(header).encode()
    prefix = content[:8] + struct.pack("<I", len(new)) + new
    (adapter / "journal").write_bytes(prefix + struct.pack("<I", zlib.crc32(prefix)))


def test_malicious_files_are_refused(tiny_hf: Path, tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open('pwned', 'w')\n")
    (tmp_path / "secret.safetensors").write_bytes((tiny_hf / "model.safetensors").read_bytes())

    def source(name: str) -> Path:
        return Path(shutil.copytree(tiny_hf, tmp_path / name))

    (source("pickled") / "model.safetensors").rename(tmp_path / "away")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    config = json.loads((tiny_hf / "config.json").read_text())
    (source("file") / "config.json").write_text(json.dumps({**config, "model_file": "../evil.py"}))
    (source("type") / "config.json").write_text(json.dumps({**config, "model_type": "..evil"}))
    (source("map") / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}})
    )
    shutil.copytree(tiny, tmp_path / "template")
    (tmp_path / "template/chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (tmp_path / "run.yaml").write_text("iters: !!python/object/apply:os.system ['touch pwned']\n")
    (tmp_path / "function.yaml").write_text("objective: evil:score\n")
    found = _run(tmp_path, [_training(tiny, choice_data, tmp_path / "out/run")])
    assert found["runs"] == [[0, []]]
    _journal_naming_a_function(tmp_path / "out/run")
    found = _run(
        tmp_path,
        [
            *(
                ["convert", "--hf-path", str(tmp_path / name), "--mlx-path", str(tmp_path / "out/model"), *SMALL]
                for name in ("pickled", "file", "type", "map")
            ),
            ["generate", "--model", str(tmp_path / "template"), "--prompt", "x"],
            _training(tiny, choice_data, tmp_path / "out/new", "--config", str(tmp_path / "run.yaml")),
            _training(tiny, choice_data, tmp_path / "out/new", "--config", str(tmp_path / "function.yaml")),
            ["train", "--adapter-path", str(tmp_path / "out/run"), "--resume"],
        ],
    )
    messages = [line[0] for _, line in found.pop("runs")]
    for message, expected in zip(
        messages,
        (
            "it has no model*.safetensors", "needs custom code (../evil.py)", "cannot be loaded", "weight_map puts",
            "the model's chat template fails", "not readable YAML", "is taken from --objective only",
            "give --objective",
        ),
        strict=True,
    ):  # fmt: skip
        assert message.startswith("zo-mlx: error: ") and expected in message
    assert found == {"noted": [], "strangers": []}
    assert not list(tmp_path.rglob("pwned"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["run"]


PLANTED = {
    "import pickle, pathlib; pickle.loads(b'cpathlib\\nPath\\n.')": "pickle.find_class: pathlib Path",
    "exec(compile('1', 'input', 'exec'))": "compile: input by <string>",
    "import socket; socket.getaddrinfo('localhost', 80)": "socket.getaddrinfo: localhost",
    "import os; os.system('true')": "os.system: b'true'",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen: true",
    "open('elsewhere', 'w')": "write: elsewhere",
    "import os; os.mkdir('directory')": "os.mkdir: directory",
    "import sys; sys.path.insert(0, '.'); import planted": "planted",
}


def test_what_must_not_happen_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("")
    found = _run(tmp_path, [], "\n".join(PLANTED))
    seen = found["noted"] + found["strangers"]
    assert [e for e in PLANTED.values() if not any(line.startswith(e) for line in seen)] == []
