import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import write_hf_llama

import zo_mlx
from zo_mlx.cli import build_parser, main
from zo_mlx.commands import chat, generate
from zo_mlx.commands import server as server_command
from zo_mlx.errors import UsageError
from zo_mlx.serve import named

PROMPT = "apple 3 ->"


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "zo_mlx.cli", *words]


@pytest.fixture(scope="module")
def adapters(tiny: Path, choice_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that say different things."""
    found = {}
    for seed, name in enumerate(("first", "second")):
        found[name] = tmp_path_factory.mktemp("adapters") / name
        settings: dict[str, Any] = {"iters": 3, "learning_rate": 0.1, "epsilon": 1e-3, "val_batches": 0, "seed": seed}
        out = str(found[name])
        zo_mlx.train(model=str(tiny), data=str(choice_data), adapter_path=out, progress=False, **settings)
    return found


@pytest.fixture(scope="module")
def answers(tiny: Path, adapters: dict[str, Path]) -> dict[str | None, str]:
    """What `zo_mlx.generate` says to the prompt, by adapter."""
    paths = {None: None, **adapters}
    found = {n: zo_mlx.generate(*zo_mlx.load(tiny, path), PROMPT, max_tokens=8) for n, path in paths.items()}
    assert len(set(found.values())) == 3
    assert all(found.values())
    return found


@pytest.fixture(scope="module")
def server(tiny: Path, adapters: dict[str, Path]) -> Iterator[str]:
    """The address of a server with both adapters, the first one for requests that name none; it ends in good order."""
    first, second = adapters["first"], adapters["second"]
    with running(["--model", str(tiny), "--adapter-path", str(first), "--adapter-path", f"second={second}"]) as found:
        address, log = found
        yield address
    assert "Traceback" not in log[0]


@contextlib.contextmanager
def running(words: list[str], code: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """A server's address, and what it has said, once it has ended; `code` is what runs in place of the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log: list[str] = []
    command = [sys.executable, "-c", code] if code else _command()
    command += ["server", *words, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "Starting httpd" in line:
            break
    reading = Thread(target=lambda: log.append(process.stderr.read()))  # or a full pipe would stop it
    reading.start()
    yield f"http://127.0.0.1:{port}", log
    process.send_signal(signal.SIGTERM)
    returncode = process.wait(timeout=60)
    reading.join()
    assert returncode == 0, log


def ask(server: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """POST a request, and return the answer's JSON, errors included."""
    data = json.dumps({"prompt": PROMPT, "max_tokens": 8, **body}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server + path, data), timeout=60) as response:
            return json.load(response)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as e:
        return {"status": e.code, **json.load(e)}


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def test_requests_choose_an_adapter_by_name(
    server: str, tiny: Path, adapters: dict[str, Path], answers: dict[str | None, str]
) -> None:
    first = str(adapters["first"])
    for body, name in (
        ({}, "first"),
        ({"adapters": "second"}, "second"),
        ({"model": "second"}, "second"),
        ({"adapters": first}, "first"),
        ({"model": str(tiny), "adapters": first}, "first"),
        ({"model": str(tiny)}, None),
        ({"seed": 1}, "first"),  # those with a seed are served one by one
        ({"seed": 1, "adapters": "second"}, "second"),
    ):
        assert text_of(ask(server, **body)) == answers[name], body
    with urllib.request.urlopen(f"{server}/v1/models") as response:
        assert [m["id"] for m in json.load(response)["data"]] == [first, "second", str(tiny)]


def test_requests_at_the_same_time_get_their_own_adapters_answers(server: str, answers: dict[str | None, str]) -> None:
    names = ["first", "second"] * 6
    with ThreadPoolExecutor(len(names)) as pool:
        asked = [pool.submit(ask, server, **({"adapters": n} if n == "second" else {})) for n in names]
    assert [text_of(a.result()) for a in asked] == [answers[n] for n in names]


def test_chat_is_answered_as_by_generate(server: str, tiny: Path, adapters: dict[str, Path]) -> None:
    model, tokenizer = zo_mlx.load(tiny, adapters["second"])
    expected = zo_mlx.generate(model, tokenizer, "hello", max_tokens=8, ignore_chat_template=False)
    messages = [{"role": "user", "content": "hello"}]
    answer = ask(server, "/v1/chat/completions", messages=messages, adapters="second")
    assert answer["choices"][0]["message"]["content"] == expected


def test_what_was_computed_of_a_prompt_is_not_taken_for_another_adapter(
    server: str, answers: dict[str | None, str]
) -> None:
    prompt = "Zebras: a prompt that begins as no other does"

    def cached(**body: Any) -> int:
        return int(ask(server, prompt=prompt, **body)["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(), cached(adapters="second"), cached(model="second")] == [0, 0, len(prompt) - 1]
    assert cached() == len(prompt) - 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"adapters": "{second}"}, "there is no adapter {second} here, but {first}, second"),
        ({"adapters": "../second"}, "there is no adapter ../second here"),
        ({"adapters": "{first}/best"}, "there is no adapter {first}/best here"),
        ({"adapters": ""}, "there is no adapter  here"),
        ({"adapters": "mlx-community/some-lora"}, "there is no adapter mlx-community/some-lora here"),
        ({"model": "/etc"}, "there is no model /etc here"),
        ({"model": "mlx-community/SmolLM-135M-4bit"}, "there is no model mlx-community/SmolLM-135M-4bit here"),
        ({"model": "{second}"}, "there is no model {second} here"),
        ({"messages": [], "chat_template_kwargs": {"chat_template": "x"}}, "a chat template is a program"),
        ({"draft_model": "mlx-community/SmolLM-135M-4bit"}, "there is no draft model"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "{url}"}}]}]},
            "only co",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "{url}"}]}]}, "only content of type te"),
    ],
)
def test_a_request_cannot_name_what_the_command_line_has_not(
    body: dict[str, Any], problem: str, server: str, adapters: dict[str, Path], answers: dict[str | None, str]
) -> None:
    """Nor make the server fetch anything."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"
        places = {"url": url, **{name: str(path) for name, path in adapters.items()}}
        text = json.dumps(body)
        for name, place in places.items():
            text, problem = text.replace(f"{{{name}}}", place), problem.replace(f"{{{name}}}", place)
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        answer = ask(server, path, **json.loads(text))
        assert answer["status"] in (400, 404)
        assert problem in answer["error"]
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert text_of(ask(server)) == answers["first"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": ["a", "b"]},
        {"prompt": 5},
        {"prompt": None},
        {"stop": [5]},
        {"stop": {"a": 1}},
        {"stop": [""]},
        {"stop": 5},
        {"logit_bias": {"100000": 5.0}},
        {"logit_bias": {"-1": 5.0}},
        {"messages": [], "stop": [["a"]]},
    ],
)
def test_what_cannot_be_answered_is_refused_and_ends_nothing(
    body: dict[str, Any], server: str, answers: dict[str | None, str]
) -> None:
    """Each of these ended the thread that generates, or could have made it write where it should not."""
    answer = ask(server, "/v1/chat/completions" if "messages" in body else "/v1/completions", **body)
    assert answer["status"] == 400
    assert text_of(ask(server)) == answers["first"]


def test_adapters_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rate=1").mkdir()
    odd = str(tmp_path / "rate=1")
    paths, default = named(["a=x/y", "z", odd, "=w"])
    assert paths == {"a": Path("x/y"), "z": Path("z"), odd: Path(odd), "=w": Path("=w")}
    assert default == "z"
    assert named(["a=x"]) == ({"a": Path("x")}, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = named(["a=~/x", "~/y", "~/rate=1"])
    assert at_home == ({"a": tmp_path / "x", "~/y": tmp_path / "y", "~/rate=1": tmp_path / "rate=1"}, "~/y")
    for twice in (["a=x", "a=y"], ["default_model=x"]):
        with pytest.raises(UsageError, match="there is an adapter"):
            named(twice)


def test_a_server_that_cannot_start_says_why_and_ends(
    tiny: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = tmp_path / "other"
    write_hf_llama(tmp_path / "hf", seed=1)
    zo_mlx.convert(str(tmp_path / "hf"), str(other), density=0.01, num_samples=1, sequence_length=16, progress=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        first = str(adapters["first"])
        for words, code, problem in (
            (["--model", str(tiny), "--port", port], 1, f"cannot listen on 127.0.0.1, port {port}"),
            (["--model", str(tmp_path / "none")], 2, "no such model"),
            (["--model", str(tiny), "--adapter-path", str(tmp_path / "none")], 2, "no such adapter"),
            (["--model", str(other), "--adapter-path", f"a={first}"], 2, "does not belong here"),
        ):
            assert main(["server", *words]) == code
            printed = capsys.readouterr().err
            assert problem in printed.splitlines()[-1]
            assert "Traceback" not in printed + caplog.text


def test_chat_through_a_pipe(tiny: Path, adapters: dict[str, Path]) -> None:
    """Two turns; a reset makes the second one's answer the first one's again; then the input ends."""
    words = ["--model", str(tiny), "--adapter-path", str(adapters["second"]), "--max-tokens", "8"]
    command = _command("chat", *words)
    done = subprocess.run(command, input="hello\nr\nhello\n", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    model, tokenizer = zo_mlx.load(tiny, adapters["second"])
    expected = zo_mlx.generate(model, tokenizer, "hello", max_tokens=8, ignore_chat_template=False)
    assert done.stdout.count(expected) == 2
    assert "context cleared" in done.stdout


def test_flags_are_mlx_lms_but_for_those_that_docs_name() -> None:
    """docs/mlx-lm.md has the flags of mlx_lm.generate, chat and server that are left out, and no others."""
    text = (Path(__file__).parents[1] / "docs/mlx-lm.md").read_text()
    parsers = {"generate": generate.stock.setup_arg_parser(), "chat": chat.stock.setup_arg_parser()}
    commands = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for name, stock in {**parsers, "server": server_command._stock_parser()}.items():
        named_there = set(re.findall(rf"^\| `(--[a-z-]+)` \|.*`{name}`", text, re.M))
        theirs, ours = ({a.option_strings[0] for a in p._actions} for p in (stock, commands[name]))
        assert theirs - ours == named_there
        assert ours - theirs <= {"--json"}


def test_generate_is_mlx_lms(
    tiny: Path, adapters: dict[str, Path], answers: dict[str | None, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", str(tiny), "--prompt", PROMPT, "-m", "8", "--ignore-chat-template"]
    own = [*words, "--adapter-path", str(adapters["first"])]
    assert main([*own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": answers["first"]}
    assert main([*own, "--verbose", "F"]) == 0
    assert capsys.readouterr().out == answers["first"] + "\n"
    assert main(own) == 0
    assert answers["first"] in (out := capsys.readouterr().out)
    assert "tokens-per-sec" in out
    # Flags that are mlx-lm's alone. A draft model never changes what is likeliest.
    for more in (["--draft-model", str(tiny)], ["--top-k", "1", "--temp", "1"], ["--min-p", "1", "--temp", "1"]):
        assert main([*own, *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"text": answers["first"]}
    with_system = [*words[:-1], "--system-prompt", "no", "--chat-template-config", '{"x": 1}', "--json"]
    assert main(with_system) == 0
    said = json.loads(capsys.readouterr().out)["text"]
    model, tokenizer = zo_mlx.load(tiny)
    messages = [{"role": "system", "content": "no"}, {"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert said == zo_mlx.generate(model, tokenizer, prompt, max_tokens=8)
    for wrong in (["--chat-template-config", "{"], ["--chat-template-config", "[1]"], ["--min-p", "2", "--temp", "1"]):
        assert main([*words[:-1], *wrong]) == 2
        assert "zo-mlx: error: " in capsys.readouterr().err.splitlines()[-1]
