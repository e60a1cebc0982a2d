import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss

from zo_mlx import objective
from zo_mlx.data import Example, Target
from zo_mlx.head import Head, split_head
from zo_mlx.objective import branch_losses, collate, layout, scores


@pytest.fixture(scope="module")
def model() -> llama.Model:
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 60,
        "rms_norm_eps": 1e-5,
    }
    mx.random.seed(0)
    return llama.Model(llama.ModelArgs.from_dict(config))


@pytest.fixture(scope="module")
def head(model: llama.Model) -> Head:
    return split_head(model, continuing=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _tokens(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, 60, length).tolist()


def _completion(tokens: list[int], offset: int) -> Example:
    return Example([tokens[:-1]], [[Target(0, i - 1, tokens[i]) for i in range(offset, len(tokens))]])


def _choices(prompt: list[int], choices: list[list[int]], label: int) -> Example:
    rows = [prompt + c[:-1] for c in choices]
    targets = [
        [Target(n, len(prompt) - 1 + i, token) for i, token in enumerate(choice)] for n, choice in enumerate(choices)
    ]
    return Example(rows, targets, label, tuple(map(str, choices)))


@pytest.mark.parametrize("logit_bytes", [objective.LOGIT_BYTES, 4 * 60 * 3])
def test_token_loss_equals_mlx_lms(
    model: llama.Model, head: Head, logit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's own loss on the same rows; the second case makes the logits three positions at a time."""
    monkeypatch.setattr(objective, "LOGIT_BYTES", logit_bytes)
    rng = np.random.default_rng(0)
    rows = [(_tokens(rng, n), offset) for n, offset in ((9, 4), (5, 1), (12, 7))]
    batch = collate([[_completion(*r) for r in rows]])
    got = branch_losses(scores(head, batch), batch, sum(len(t) - offset for t, offset in rows))

    width = max(len(t) for t, _ in rows)
    padded = mx.array([t + [0] * (width - len(t)) for t, _ in rows])
    # mlx-lm's mask reaches one token past the end: give it lengths that end at the last real token.
    expected, _ = default_loss(model, padded, mx.array([[offset, len(t) - 1] for t, offset in rows]))
    assert got.shape == (1,)
    assert abs(got.item() - expected.item()) < 1e-5


def test_branches_average_to_the_loss_over_all_tokens(head: Head) -> None:
    rng = np.random.default_rng(1)
    examples = [_completion(_tokens(rng, n), 2) for n in (4, 9, 6, 14)]
    together, apart = collate([examples]), collate([examples[:2], examples[2:]])
    targets = sum(len(e.targets[0]) for e in examples)
    one = branch_losses(scores(head, together), together, targets)
    two = branch_losses(scores(head, apart), apart, targets / 2)
    assert mx.allclose(two.mean(), one[0], atol=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_choice_loss_equals_full_logits_in_float64(
    share: bool, model: llama.Model, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices of different lengths and numbers, in two branches, against log-softmax of full logits in numpy."""
    monkeypatch.setattr(objective, "WORTH_SHARING", 9)
    rng = np.random.default_rng(2)
    branches = [
        [_choices(_tokens(rng, 5), [[3], [4, 5], [6, 7, 8]], 1), _choices(_tokens(rng, 8), [[9], [10]], 0)],
        [_choices(_tokens(rng, 3), [[1, 2], [1, 3]], 1), _choices(_tokens(rng, 4), [[5], [6], [7]], 2)],
    ]
    batch = collate(branches, share)
    assert (batch.continuations is not None) == share
    got = scores(head, batch)
    assert got.shape == (2, 2, 3)
    losses = np.zeros((2, 2))
    for p, examples in enumerate(branches):
        for e, example in enumerate(examples):
            expected = []
            for targets in example.targets:
                total = 0.0
                for t in targets:
                    logits = np.array(model(mx.array([example.rows[t.row]])), np.float64)[0, t.position]
                    total += log_softmax(logits)[t.token]
                expected.append(total)
            assert np.allclose(np.array(got)[p, e, : len(expected)], expected, atol=1e-4)
            assert np.isneginf(np.array(got)[p, e, len(expected) :]).all()
            assert example.label is not None
            losses[p, e] = -log_softmax(np.array(expected))[example.label]
    assert np.allclose(np.array(branch_losses(got, batch, count=2)), losses.mean(axis=1), atol=1e-4)


def test_of_single_tokens_only_their_logits_are_made(model: llama.Model, head: Head) -> None:
    made = set()

    def logits(states: mx.array) -> mx.array:
        made.add(head.logits(states).shape[-1])
        return head.logits(states)

    rng = np.random.default_rng(3)
    prompts, tokens = [_tokens(rng, length) for length in (5, 8, 3, 4)], [(9, 3), (3, 7), (3, 9, 20), (20, 9)]
    examples = [
        Example([prompt], [[Target(0, len(prompt) - 1, t)] for t in choices], 1, tuple(map(str, choices)))
        for prompt, choices in zip(prompts, tokens, strict=True)
    ]
    batch = collate([examples[:2], examples[2:]])
    narrow = scores(Head(head.hidden, logits, vocabulary=head.vocabulary), batch)
    assert made == {4}, "of 3, 7, 9 and 20"
    expected = [
        -log_softmax(np.array(model(mx.array([prompt])), np.float64)[0, -1][list(choices)])[1]
        for prompt, choices in zip(prompts, tokens, strict=True)
    ]
    losses = branch_losses(narrow, batch, count=2)
    assert np.allclose(np.array(losses), [np.mean(expected[:2]), np.mean(expected[2:])], atol=1e-5)
    assert np.isneginf(np.array(narrow)[0, :, 2]).all()


def test_prompts_are_shared_where_that_is_less_work() -> None:
    rng = np.random.default_rng(3)
    long, short = _tokens(rng, 20), _tokens(rng, 1)
    choices = [[5, 6, 7, 8], [7, 8, 9, 5], [9, 9]]
    for prompt, tokens in ((long, 20 + 3 * 3), (short, 3 * 4)):
        example = _choices(prompt, choices, 0)
        assert layout([[example], [example]], share=True) == (tokens, prompt is long)
    assert layout([[_choices(long, choices, 0)]], share=False) == (3 * 23, False)
    # A single row has nothing to share.
    assert layout([[_completion(long, 5)]], share=True) == (19, False)
