"""README and docs against the programs they are about: every command parses, every flag exists, the main ones run."""

import importlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from socketserver import BaseServer
from threading import Thread
from urllib.request import urlopen

import pytest
from markdown_it import MarkdownIt
from safetensors.numpy import load_file

import zo_mlx
from zo_mlx.cli import build_parser, main
from zo_mlx.journal import Journal

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
SCRIPTS = [path for place in ("examples", "tests") for path in (ROOT / place).rglob("*.py")]
COMMANDS = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]


def _code(page: Path) -> Iterator[tuple[bool, str]]:
    """Each line of code, and each piece of code within text; and whether it is the former."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        if token.type in ("code_block", "fence"):
            yield from ((True, line.strip().removeprefix("$ ")) for line in token.content.splitlines())
        for child in token.children or ():
            if child.type == "code_inline":
                yield False, child.content


@cache
def _stock_parser(command: str) -> ArgumentParser:
    """The parser of one of mlx-lm's or MLX's commands, which its `main` makes."""
    made: list[ArgumentParser] = []

    def stop(parser: ArgumentParser, *_: object) -> None:
        made.append(parser)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(ArgumentParser, "parse_args", stop)
        patch.setattr(ArgumentParser, "parse_known_args", stop)
        importlib.import_module("mlx._distributed_utils.launch" if command == "launch" else f"mlx_lm.{command}").main()
    return made[0]


def _flags(parser: ArgumentParser) -> set[str]:
    """All that it takes, in its help or not."""
    return {flag for action in parser._actions for flag in action.option_strings}


def _flags_of(words: list[str]) -> set[str] | None:
    """The flags that a command may have; None where it is no command of ours, or of mlx-lm."""
    if words[0] == "zo-mlx" and len(words) > 1 and words[1] in COMMANDS:
        return _flags(COMMANDS[words[1]])
    if match := re.fullmatch(r"mlx_lm\.(\w+)", words[0]):
        return _flags(_stock_parser(match[1]))
    if script := next((word for word in words if word.endswith(".py")), None):
        (path,) = (p for p in SCRIPTS if str(p).endswith("/" + script))
        return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text()))
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for is_line, code in _code(page):
        code = re.sub(r"^(\w+=\S+ |\.venv/bin/(?=zo-mlx))", "", code)  # a variable, or where `make` installs
        code = re.sub(r"^mlx\.launch .*\bzo-mlx\"? ", "zo-mlx ", code)  # what each machine runs
        if not re.match(r"(zo-mlx|mlx_lm\.\w+|python|\.\.\.) ", code):
            continue
        words = shlex.split(code, comments=True)
        used = {word for word in words if re.match("--[a-z]", word)}
        allowed = _flags_of(words)
        if allowed is None and words[0] == "zo-mlx":
            allowed = _flags(build_parser()) | {"--help"}
            assert words[1] in allowed | {"COMMAND"}, code
        assert used <= (_all_flags() if allowed is None else allowed), code
        if is_line and words[0] == "zo-mlx" and words[1] in COMMANDS:
            build_parser().parse_args(words[1:])
        elif is_line and words[0].startswith("mlx_lm."):
            _stock_parser(words[0].removeprefix("mlx_lm.")).parse_args(words[1:])


@cache
def _all_flags() -> set[str]:
    """Of zo-mlx, mlx-lm, `mlx.launch` and the scripts."""
    stock = ("chat", "convert", "fuse", "generate", "launch", "lora", "server")
    parsers = [build_parser(), *COMMANDS.values(), *map(_stock_parser, stock)]
    scripts = {flag for path in SCRIPTS for flag in re.findall(r'"(--[a-z][\w-]+)"', path.read_text())}
    return {"--no-deps", "--help"} | scripts | {flag for parser in parsers for flag in _flags(parser)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_in_text_exist(page: Path) -> None:
    for _, code in _code(page):
        if match := re.match(r"--[a-z][\w-]*", code):
            assert match[0] in _all_flags(), code


def test_all_flags_have_a_help_text() -> None:
    """The page of the command line is made of these."""
    for name, parser in COMMANDS.items():
        assert parser.description
        for action in parser._actions:
            assert action.help is SUPPRESS or action.help, f"{name} {action.option_strings}"


def test_make_targets_and_extras_exist() -> None:
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        for _, code in _code(page):
            if match := re.match(r"make ([a-z][\w-]*)$", code.partition("#")[0].strip()):
                assert re.search(rf"^{match[1]}:", makefile, re.M), f"{page.name}: {code}"
            for extras in re.findall(r"pip install '\.\[([\w,]+)\]'", code):
                for extra in extras.split(","):
                    assert re.search(rf"^{extra} = \[", project, re.M), f"{page.name}: {code}"


def test_examples_of_data_are_json() -> None:
    lines = [
        code
        for page in PAGES
        for is_line, code in _code(page)
        if is_line and re.match(r'{"(text|prompt|messages)"', code)
    ]
    assert len(lines) >= 5
    for line in lines:
        assert json.loads(line)


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
    lines = [re.sub(r"^\.venv/bin/", "", code) for is_line, code in _code(ROOT / page) if is_line]
    asked = [code for code in lines if code.startswith("zo-mlx classify --model demo/")]
    lines += [code.replace("demo/model", "qwen3-4bit").replace("demo/adapter", "adapters") for code in asked]
    for code in lines:
        if not re.match(r"(zo-mlx (?!--)|mlx_lm\.\w+ )(?!.*(demo/|\.gguf))", code):
            continue
        code = code.replace("Qwen/Qwen3-0.6B", str(tiny_hf)).replace("--until 100", "--until 3")
        code = code.replace("OTHER_ADAPTERS", "adapters")
        program, *words = shlex.split(code)
        words += ["--port", "0"] * ("server" in code)
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # the end of a chat
        if program == "zo-mlx":
            program = words[0]
            assert main(words + ["--iters", "4"] * (program == "train")) == 0, code
        else:
            monkeypatch.setattr(sys, "argv", [program, *words])
            importlib.import_module(program).main()
        ran.add(program)
    assert ran >= expected
    if page == "docs/quickstart.md":
        values = [load_file(Path(place, "values.safetensors"))["values"] for place in ("support", "the-same")]
        assert (values[0] == values[1]).all()


def test_two_processes_on_this_machine_train(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    (command,) = (c for is_line, c in _code(ROOT / "docs/distributed.md") if is_line and c.startswith("mlx.launch -n"))
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


def test_the_page_of_the_api_has_all_public_names() -> None:
    page = (ROOT / "docs/site/api.rst").read_text()
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.M)) == sorted(zo_mlx.__all__)
