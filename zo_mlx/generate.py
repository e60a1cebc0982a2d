"""Generate text with mlx-lm's own generator; sparse layers take part like any other."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .config import check_range
from .errors import UsageError
from .files import is_text


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str,
    *,
    max_tokens: int = 100,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    ignore_chat_template: bool = True,
    **more: Any,
) -> str:
    """Continue a prompt.

    Args:
        model, tokenizer: from `zo_mlx.load`.
        prompt: the text to continue, or with `ignore_chat_template=False` a user's message to answer.
        max_tokens: the longest continuation; -1 for no limit.
        temp: sampling temperature; 0 takes the likeliest token each time.
        top_p: nucleus sampling.
        seed: makes sampling repeatable.
        ignore_chat_template: take the prompt as it is.
        **more: passed on to `mlx_lm.generate`; a `sampler` takes the place of `temp` and `top_p`.

    Returns:
        The generated text, without the prompt.

    Raises:
        UsageError: an empty prompt or one that is not text, settings out of range, no chat template that works.
    """
    check_request(prompt, max_tokens, temp, top_p, seed)
    if ignore_chat_template:
        tokens = tokenizer.encode(prompt)
    elif not tokenizer.has_chat_template:
        raise UsageError("the model has no chat template; give --ignore-chat-template")
    else:
        messages = [{"role": "user", "content": prompt}]
        try:
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as e:  # chat templates are programs; they raise what they like
            raise UsageError(f"the model's chat template fails: {e}; give --ignore-chat-template") from None
    if seed is not None:
        mx.random.seed(seed)  # mlx-lm samples from the global state
    more.setdefault("sampler", make_sampler(temp=temp, top_p=top_p))
    return mlx_lm.generate(model, tokenizer, tokens, max_tokens=max_tokens, **more)


def check_request(prompt: str, max_tokens: int, temp: float, top_p: float, seed: int | None) -> None:
    """Raise UsageError for a prompt that is none, and for settings out of range."""
    if not prompt or not is_text(prompt):
        raise UsageError("the prompt is empty" if not prompt else "the prompt is not valid UTF-8 text")
    if max_tokens != -1:
        check_range("--max-tokens", max_tokens, 1)
    check_range("--temp", temp, 0)
    check_range("--top-p", top_p, 0, 1)
    check_range("--seed", seed or 0, 0)
