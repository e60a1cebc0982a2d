"""Requests that no client should send: each is answered, and the ones after it are as if it had not been."""

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_serve import PROMPT, ask, running, text_of

import zo_mlx

SAMPLED = {"temperature": 1.0}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
# mlx-lm's validation in place of ours, so that a request can make generation fail.
UNCHECKED = """
from mlx_lm.server import APIHandler
from zo_mlx import cli, serve
serve.Handler.validate_model_parameters = APIHandler.validate_model_parameters
cli.main()
"""


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[str]:
    with running(["--model", str(tiny)]) as (address, _):
        yield address


@pytest.fixture(scope="module")
def expected(tiny: Path) -> str:
    return zo_mlx.generate(*zo_mlx.load(tiny), PROMPT, max_tokens=8)


def _post(server: str, data: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/completions", data, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer.status, json.load(answer)


def _check(server: str, expected: str) -> None:
    """Greedy, and sampled from the likeliest token alone: both are what `zo_mlx.generate` says."""
    assert text_of(ask(server)) == expected
    assert text_of(ask(server, **SAMPLED, top_k=1)) == expected
    assert ask(server, **SAMPLED)["choices"][0]["finish_reason"] in ("stop", "length")  # its text may be empty


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"stop": "\ud800"}, "surrogate"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"repetition_penalty": 1.1, "repetition_context_size": 10**30}, "repetition_context_size must be"),
        ({"presence_penalty": 1.1, "presence_context_size": 10**30}, "presence_context_size must be"),
        ({"presence_penalty": 10**400}, "presence_penalty must be"),
        ({"frequency_penalty": 10**30}, "frequency_penalty must be"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be"),
        ({"temperature": 10**400}, "temperature must be"),
        ({**SAMPLED, "min_p": float("nan")}, "min_p must be"),
        ({**SAMPLED, "xtc_probability": 1.0, "xtc_threshold": 0.9}, "xtc_threshold must be"),
        ({**SAMPLED, "top_k": True}, "top_k must be"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs must be"),
        ({"logit_bias": {"1": None}}, "logit_bias must be"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias must be"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias must be"),
        ({"seed": 2**70}, "seed must be"),
        ({"seed": -1}, "seed must be"),
        ({**CHAT, "chat_template_kwargs": [["chat_template", "x"]]}, "chat_template_kwargs must be"),
        ({**CHAT, "chat_template_kwargs": {"return_tensors": "np"}}, "no variable of a template: return_tensors"),
        ({**CHAT, "chat_template_kwargs": {"truncation": True, "max_length": 0}}, "no variable of a template: max_l"),
    ],
)
def test_odd_values_are_refused_by_name(body: dict[str, Any], problem: str, server: str, expected: str) -> None:
    answer = ask(server, "/v1/chat/completions" if "messages" in body else "/v1/completions", **body)
    assert answer["status"] == 400
    assert problem in answer["error"]
    _check(server, expected)


@pytest.mark.parametrize(
    ("data", "length", "problem"),
    [
        (b"\xff\xfe", None, "can't decode"),
        (b"[" * 100_000, None, "recursion"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", None, "integer"),
        (b"{}", "-5", "Content-Length"),
        (b"{}", "+67108865", "Content-Length must be from 0 to 67108864"),
        (b"{}", "1" + "0" * 30, "Content-Length"),
        (b"{}", "two", "'two'"),
    ],
)
def test_what_is_no_json_is_refused(data: bytes, length: str | None, problem: str, server: str, expected: str) -> None:
    status, answer = _post(server, data, **({"Content_Length": length} if length else {}))
    assert status == 400
    assert problem in answer["error"]
    _check(server, expected)


@pytest.mark.parametrize("top_k", [258, 1000, 10**30])
def test_top_k_of_the_vocabulary_or_more_leaves_out_nothing(top_k: int, server: str, expected: str) -> None:
    everything = text_of(ask(server, **SAMPLED, seed=1))
    assert text_of(ask(server, **SAMPLED, seed=1, top_k=top_k)) == everything
    _check(server, expected)


def test_the_server_samples_after_a_request_that_generation_fails_on(tiny: Path, expected: str) -> None:
    """With a seed, a request is served alone, and the thread survives; without one, it has to start again."""
    with running(["--model", str(tiny)], code=UNCHECKED) as (address, log):
        for alone in ({"seed": 1}, {}):
            answer = ask(address, **SAMPLED, top_k=100_000, **alone)
            assert answer["status"] == 500
            deadline = time.monotonic() + 30
            while "status" in ask(address):
                assert time.monotonic() < deadline
            _check(address, expected)
        ask(address, **SAMPLED, top_k=100_000)  # the end comes while the thread waits to start again
    assert "`top_k` has to be" in log[0]


def test_a_prompt_without_tokens_is_refused(tiny: Path, expected: str) -> None:
    with running(["--model", str(tiny), "--chat-template", "{{ '' }}"]) as (address, _):
        assert ask(address, "/v1/chat/completions", **CHAT)["error"] == "the prompt has no tokens"
        _check(address, expected)
