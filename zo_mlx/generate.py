"""Generate text with mlx-lm's own generator; sparse layers take part like any other."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import UsageError


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
        max_tokens: the longest continuation.
        temp: sampling temperature; 0 takes the likeliest token each time.
        top_p: nucleus sampling.
        seed: makes sampling repeatable.
        ignore_chat_template: take the prompt as it is.
        **more: passed on to `mlx_lm.generate`.

    Returns:
        The generated text, without the prompt.

    Raises:
        UsageError: an empty prompt, or no chat template to apply.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    tokens = tokenizer.encode(prompt)
    if not ignore_chat_template:
        if not tokenizer.has_chat_template:
            raise UsageError("the model has no chat template; give --ignore-chat-template")
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    if seed is not None:
        mx.random.seed(seed)  # mlx-lm samples from the global state
    return mlx_lm.generate(
        model, tokenizer, tokens, max_tokens=max_tokens, sampler=make_sampler(temp=temp, top_p=top_p), **more
    )
