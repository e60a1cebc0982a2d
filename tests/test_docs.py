"""README and docs against the programs they are about: every command parses, every flag and every name exists.

That commands run is tested in test_commands.py and test_scripts.py.
"""

import importlib
import json
import re
import shlex
from argparse import SUPPRESS, ArgumentParser
from functools import cache
from pathlib import Path

import pytest
from pages import PAGES, ROOT, code_of

import zo_mlx
from zo_mlx.cli import build_parser

SCRIPTS = [path for place in ("examples", "tests") for path in (ROOT / place).rglob("*.py")]
COMMANDS = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]


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
    for is_line, code in code_of(page):
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
    for _, code in code_of(page):
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
        for _, code in code_of(page):
            if match := re.match(r"make ([a-z][\w-]*)$", code.partition("#")[0].strip()):
                assert re.search(rf"^{match[1]}:", makefile, re.M), f"{page.name}: {code}"
            for extras in re.findall(r"pip install '\.\[([\w,]+)\]'", code):
                for extra in extras.split(","):
                    assert re.search(rf"^{extra} = \[", project, re.M), f"{page.name}: {code}"


def test_examples_of_data_are_json() -> None:
    lines = [
        code
        for page in PAGES
        for is_line, code in code_of(page)
        if is_line and re.match(r'{"(text|prompt|messages)"', code)
    ]
    assert len(lines) >= 5
    for line in lines:
        assert json.loads(line)


def test_the_page_of_the_api_has_all_public_names() -> None:
    page = (ROOT / "docs/site/api.rst").read_text()
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.M)) == sorted(zo_mlx.__all__)
