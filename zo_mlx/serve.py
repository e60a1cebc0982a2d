"""mlx-lm's server over one base model and any number of adapters, each of which costs its values only.

A request comes from a stranger. All that it can choose from is in memory before the first one comes: what it names is
looked up, and never opened, fetched or run.
"""

import argparse
import inspect
import json
import logging
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator, _run_http_server
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer, maybe_set_recommended_wired_limit
from transformers import PreTrainedTokenizerBase

from .config import check_range
from .errors import UsageError, ZoError
from .files import expanded, is_text
from .model import load, load_sparse, read_values
from .sparse import SparseModel

# Of mlx-lm's settings, those that `zo-mlx server` has no flags for.
LEFT_OUT = {"trust_remote_code": False, "pipeline": False, "draft_model": None, "num_draft_tokens": 0}
DEFAULT = "default_model"  # mlx-lm's name for the model of requests that name none
# What a request sets that becomes numbers of MLX, which must fit into 32 bits.
NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold", "top_logprobs"),
    *(f"{kind}_{what}" for kind in ("repetition", "presence", "frequency") for what in ("penalty", "context_size")),
)
LARGEST = 2**31 - 1
# Bytes of a request, which memory is taken for as soon as it says how many there are: more than any context has.
LONGEST = 64 << 20
# How a chat template is applied, as opposed to the variables that it has: with some of these, there is no prompt left.
APPLYING = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"documents"}


def named(given: list[str]) -> tuple[dict[str, Path], str | None]:
    """Adapters as given on the command line, `[NAME=]DIR`: directories by name, and which one is the default.

    What has no name is called as it was given; the first of these is the default. Raises UsageError for a name that is
    given twice.
    """
    found: dict[str, Path] = {}
    default = None
    for text in given:
        name, equals, directory = text.partition("=")
        if not (name and equals) or Path(expanded(text)).is_dir():
            name, directory = text, text
            default = default or name
        if name in found or name == DEFAULT:
            raise UsageError(f"--adapter-path {text}: there is an adapter {name} already")
        found[name] = Path(expanded(directory))
    return found, default


class Provider(ModelProvider):  # type: ignore[misc]
    """Hands the server its model, with the values of the adapter that a request names.

    mlx-lm asks for it between batches of requests, and keeps what it has computed of prompts apart by `model_key`.

    Args:
        args: what `zo-mlx server` parsed.

    Attributes:
        adapters: by the name that a request can give as its model: the adapter, or None for the base model.
        vocabulary: how many logits a token has.
        opened: has a result when all is loaded, or the UsageError for what is missing, damaged or of another model.
    """

    model: Any
    tokenizer: Any
    model_key: Any

    def __init__(self, args: argparse.Namespace):
        paths, default = named(args.adapter_path)
        super().__init__(argparse.Namespace(**{**vars(args), **LEFT_OUT}))
        self._paths = paths
        self._model: Any = None
        self._sparse: SparseModel | None = None
        self._values: dict[str | None, mx.array | None] = {None: None}
        self.adapters = {**{name: name for name in paths}, args.model: None, DEFAULT: default}
        self.vocabulary = 0
        self.opened: Future[None] = Future()

    def load_default(self) -> None:
        """Load everything, once. mlx-lm calls this in the thread that generates, whose arrays no other can use."""
        if self.opened.done():
            return
        try:
            self._open(Path(self.cli_args.model))
            self.opened.set_result(None)
        except BaseException as e:
            self.opened.set_exception(e)

    def _open(self, directory: Path) -> None:
        args = self.cli_args
        if self._paths:
            self._sparse, self._tokenizer, index, _ = load_sparse(directory, float32=False)
            self._model = self._sparse.model
            self._values.update({name: read_values(path, directory, index) for name, path in self._paths.items()})
        else:
            self._model, self._tokenizer = load(directory)
        self.vocabulary = self._model(mx.array([[0]])).shape[-1]
        if args.chat_template:
            ends = list(self._tokenizer.eos_token_ids)
            self._tokenizer = load_tokenizer(directory, self._tokenizer_config, eos_token_ids=ends)

    def reset(self) -> None:
        """Let everything go. mlx-lm calls this at the end, in the thread that generates."""
        super().reset()
        self._model = self._sparse = None
        mx.clear_streams()  # a thread's streams that outlive it abort the process

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[nn.Module, TokenizerWrapper]:
        """The model with an adapter. Raises ValueError, which becomes the answer, for names that there are not."""
        if model_path not in self.adapters:
            raise ValueError(f"there is no model {model_path} here, but {', '.join(self.adapters)}")
        name = self.adapters[model_path] if adapter_path is None else adapter_path
        if name not in self._values:
            raise ValueError(f"there is no adapter {name} here, but {', '.join(filter(None, self._values)) or 'none'}")
        if draft_model_path not in (None, DEFAULT):
            raise ValueError(f"there is no draft model {draft_model_path} here")
        key = (self.cli_args.model, name, None)
        if key != self.model_key:
            if self._sparse:
                values = self._values[name]
                self._sparse.set_values(None if values is None else values[None], keep=True)
            self.model, self.tokenizer, self.model_key = self._model, self._tokenizer, key
            self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(self.model))
        return self.model, self.tokenizer


class Generator(ResponseGenerator):  # type: ignore[misc]
    """mlx-lm's, whose thread goes on after a request that it fails on, which is logged, and samples as before."""

    def _run_generate(self) -> None:
        super()._run_generate()
        while self._generation_failed:
            _seed()
            # Whoever waits for an answer looks once in a second whether there can be any.
            time.sleep(0 if self._stop else 2)
            self._generation_failed = False
            super()._run_generate()  # to the end, when it is to stop: it lets go of the model there

    def _serve_single(self, request: Any, stream: Any) -> None:
        super()._serve_single(request, stream)  # keeps its failures to itself
        _seed()

    def _tokenize(self, tokenizer: TokenizerWrapper, request: Any, args: Any) -> Any:
        found = super()._tokenize(tokenizer, request, args)
        if not found[0]:
            raise ValueError("the prompt has no tokens")
        return found


def _seed() -> None:
    """A new state for MLX's random numbers: a sampler that fails while it is compiled leaves one that no other can use,
    and a request's seed is not for the next ones."""
    mx.random.seed(time.time_ns())


class Handler(APIHandler):  # type: ignore[misc]
    """mlx-lm's, with its own list of models, and without what a request could make it fetch or run, or die of.

    Every request is answered: with 400 where it cannot be read or is refused, with 404 or 500 where generation fails
    on it; a stream that has begun just ends.
    """

    _begun = False  # whether some of the answer has been sent

    def do_POST(self) -> None:
        try:
            if not 0 <= int(self.headers.get("Content-Length", 0)) <= LONGEST:
                raise ValueError(f"Content-Length must be from 0 to {LONGEST}")
            super().do_POST()
        except Exception as e:
            if self._begun:
                raise
            logging.exception("no answer")
            status = 500 if getattr(self, "_headers_buffer", None) else 400  # what was to be sent with an answer
            self._headers_buffer: list[bytes] = []
            self._set_completion_headers(status)
            self.end_headers()
            self.wfile.write(json.dumps({"error": str(e) or type(e).__name__}).encode())

    def end_headers(self) -> None:
        self._begun = True
        super().end_headers()

    def validate_model_parameters(self) -> None:
        """Raises ValueError, which becomes the answer, also for what mlx-lm finds out only when all requests suffer."""
        try:
            super().validate_model_parameters()
        except (TypeError, OverflowError):
            raise ValueError("logit_bias must be a dict of int to float") from None
        provider: Any = self.response_generator.model_provider
        stops, size = self.body.get("stop") or [], provider.vocabulary
        if not is_text(json.dumps(self.body, ensure_ascii=False)):
            raise ValueError("half of a surrogate pair is not text")
        if not isinstance(stops, str | list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("stop must be a text, or a list of texts")
        if self.top_k >= size:
            self.top_k = 0  # all tokens, as asked for, which mlx-lm's sampler refuses
        for name in NUMBERS:
            if isinstance(value := getattr(self, name), bool) or not abs(value) <= LARGEST:  # nor is NaN
                raise ValueError(f"{name} must be a number from {-LARGEST} to {LARGEST}")
        self._validate("xtc_threshold", float, max_val=0.5)
        self._validate("seed", int, min_val=0, max_val=2**64 - 1, optional=True)
        if any(not 0 <= token < size or not abs(bias) <= LARGEST for token, bias in (self.logit_bias or {}).items()):
            raise ValueError(f"logit_bias must be of tokens from 0 to {size - 1}, and from {-LARGEST} to {LARGEST}")

    def handle_text_completions(self) -> Any:
        prompt = self.body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("the prompt must be a text that is not empty")
        return super().handle_text_completions()

    def handle_chat_completions(self) -> Any:
        variables = self.chat_template_kwargs or {}
        if not isinstance(variables, dict):
            raise ValueError("chat_template_kwargs must be an object")
        if "chat_template" in variables:
            raise ValueError("a chat template is a program, and is not taken from a request")
        if others := variables.keys() & APPLYING:
            raise ValueError(f"chat_template_kwargs has what is no variable of a template: {', '.join(sorted(others))}")
        for message in self.body["messages"]:
            if isinstance(content := message.get("content"), list) and any(p["type"] != "text" for p in content):
                raise ValueError("only content of type text is taken")  # images are fetched from wherever it says
        return super().handle_chat_completions()

    def handle_models_request(self) -> None:
        provider: Any = self.response_generator.model_provider
        names = [name for name in provider.adapters if name != DEFAULT]
        listed = [{"id": name, "object": "model", "created": self.created} for name in names]
        self._set_completion_headers(200)
        self.end_headers()
        self.wfile.write(json.dumps({"object": "list", "data": listed}).encode())


def serve(args: argparse.Namespace) -> None:
    """Answer requests until interrupted.

    Args:
        args: what `zo-mlx server` parsed.

    Raises:
        UsageError: the model or an adapter is missing, damaged or belongs to another model; the port is none.
        ZoError: the address cannot be used.
    """
    check_range("--port", args.port, 0, 65535)
    provider = Provider(args)
    logging.basicConfig(level=args.log_level, format="%(asctime)s - %(levelname)s - %(message)s")
    maybe_set_recommended_wired_limit()
    generator = Generator(provider, LRUPromptCache(args.prompt_cache_size))
    try:
        provider.opened.result()
        try:
            _run_http_server(args.host, args.port, generator, handler_class=Handler)
        except OSError as e:
            raise ZoError(f"cannot listen on {args.host}, port {args.port}: {e.strerror}") from None
    finally:
        generator.stop_and_join()
