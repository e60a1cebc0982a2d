from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cohere2, gemma2, llama, qwen2

from zo_mlx.head import split_head
from zo_mlx.model import load_sparse

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "head_dim": 8,
}
ARCHITECTURES = {
    "tied": (llama, {"model_type": "llama", "tie_word_embeddings": True}),
    "untied": (llama, {"model_type": "llama", "tie_word_embeddings": False}),
    "biased": (qwen2, {"model_type": "qwen2", "tie_word_embeddings": True}),
    "soft-capped": (gemma2, {"model_type": "gemma2", "final_logit_softcapping": 5.0}),
    "scaled": (cohere2, {"model_type": "cohere2", "logit_scale": 0.3, "num_hidden_layers": 4}),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_chosen_positions_equal_full_logits(kind: str) -> None:
    module, changes = ARCHITECTURES[kind]
    model = module.Model(module.ModelArgs.from_dict({**SIZES, **changes}))
    head = split_head(model, continuing=True)
    tokens = mx.random.randint(0, 50, (3, 9))
    full = model(tokens)
    states = head.hidden(tokens)
    assert states.shape == (3, 9, 32), "the head was not separated"
    at = mx.array([[0, 4], [2, 8], [1, 0]])
    chosen = head.logits(states[at[:, 0], at[:, 1]])
    assert mx.abs(chosen - full[at[:, 0], at[:, 1]]).max() < 1e-5
    assert mx.array_equal(model(tokens), full), "splitting changed the model"
    with head.narrowed(mx.array([7, 0, 49])):
        assert mx.abs(head.logits(states) - full[..., mx.array([7, 0, 49])]).max() < 1e-5
    assert mx.array_equal(model(tokens), full), "the vocabulary is not what it was"
    # gemma2 has no masks for each row; where some layers see only the last tokens (cohere2) there are other caches.
    assert head.continues == (kind not in ("soft-capped", "scaled"))


def test_a_model_that_does_not_heed_its_cache_is_not_continued() -> None:
    class Deaf(llama.LlamaModel):
        def __call__(self, inputs: mx.array, *args: object, **kwargs: object) -> mx.array:
            return super().__call__(inputs)

    model = llama.Model(llama.ModelArgs.from_dict({**SIZES, "model_type": "llama"}))
    assert split_head(model, continuing=True).continues
    model.model.__class__ = Deaf
    assert not split_head(model, continuing=True).continues


def test_a_real_model_goes_on_from_prompts(smollm2: Path) -> None:
    assert split_head(load_sparse(smollm2)[0].model, continuing=True).continues


class _Unusual(nn.Module):
    """A model whose head also looks at the tokens: it cannot be separated."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Embedding(50, 16)
        self.out = nn.Linear(16, 50)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.out(self.model(tokens)) + tokens[..., None] * 0.1


def test_a_head_that_cannot_be_separated_falls_back_to_full_logits() -> None:
    model = _Unusual()
    head = split_head(model)
    tokens = mx.array([[5, 6, 7], [8, 9, 10]])
    assert mx.array_equal(head.logits(head.hidden(tokens)), model(tokens))
    assert head.hidden(tokens).shape == (2, 3, 50)
    assert head.vocabulary is None


def test_a_head_that_takes_the_vocabulary_for_whole_is_not_narrowed() -> None:
    class Centred(llama.Model):
        def __call__(self, inputs: mx.array, *args: object, **kwargs: object) -> mx.array:
            logits = super().__call__(inputs, *args, **kwargs)
            return logits - logits.mean(axis=-1, keepdims=True)

    model = llama.Model(llama.ModelArgs.from_dict({**SIZES, "model_type": "llama"}))
    assert split_head(model).vocabulary is model.model.embed_tokens
    model.__class__ = Centred
    assert split_head(model).vocabulary is None
