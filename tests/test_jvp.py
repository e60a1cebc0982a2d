"""Slopes by forward-mode differentiation, against `mx.grad` of stock mlx-lm models with dense weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_experts, write_jsonl
from test_exact import TEXTS, dense_gradient, examples  # noqa: F401
from test_train import _train, _values

import zo_mlx
from zo_mlx import objective
from zo_mlx.config import TrainConfig
from zo_mlx.data import Example
from zo_mlx.errors import UsageError
from zo_mlx.estimator import Jvp, directions
from zo_mlx.head import split_head
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse
from zo_mlx.rows import load_dataset
from zo_mlx.sparse import SparseModel
from zo_mlx.step import make_loss


@pytest.mark.parametrize("tokens_at_once", [None, 200, 1])
@pytest.mark.parametrize("kind", ["choices", "texts", "letters"])
def test_slopes_are_the_dense_model_s_gradient_times_the_directions(
    kind: str,
    tokens_at_once: int | None,
    spread: Path,
    examples: dict[str, list[Example]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objective, "LOGIT_BYTES", 4 * 258 * 3)  # logits of 3 states at a time
    sparse, tokenizer, index, _ = load_sparse(spread, float32=True)
    # Choices of one token: no logits of others are made, from a part of the head's weights.
    letters = [{"prompt": text, "completion": "y", "choices": ["y", "n"]} for text in TEXTS]
    examples["letters"] = load_dataset(write_jsonl(tmp_path / "letters.jsonl", letters), tokenizer, 99).examples
    values, own = index.initial_values() + 0.01, examples[kind]
    z = directions(0, 1, 3, index.size)
    branches = Jvp().branches(values, z, 1e-3)
    found = make_loss(sparse, split_head(sparse.model), tokens_at_once=tokens_at_once)(branches, [own] * 3)
    loss, slopes = Jvp().slopes(found, 1e-3)
    expected, gradient = dense_gradient(spread, np.array(values), own)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    exact = np.array(z.part(range(3), 0, index.size), np.float64) @ gradient
    assert np.abs(np.array(slopes) - exact).max() < 1e-4 * np.abs(exact).max()


def test_a_run_beats_where_it_began_and_its_journal_gives_it_again(
    spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"estimator": "jvp", "num_layers": 1, "directions": 7, "iters": 60, "val_batches": 0}
    _train(spread, choice_data, tmp_path / "a", **settings)
    before, after = (
        zo_mlx.evaluate(*zo_mlx.load(spread, path), choice_data / "train.jsonl", progress=False).loss
        for path in (None, tmp_path / "a")
    )
    assert after < before - 0.02
    zo_mlx.replay(spread, tmp_path / "a", tmp_path / "b", progress=False)
    assert (_values(tmp_path / "b") == _values(tmp_path / "a")).all()


def test_the_first_steps_are_compared_with_the_initial_values(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    """As one-sided ones are; and at the initial values, where the first step is, both losses are the same."""
    _train(spread, choice_data, tmp_path / "a", estimator="jvp", iters=4, val_batches=0)
    records = list(Journal.read(tmp_path / "a/journal").records())
    assert records[0].initial == pytest.approx(records[0].loss, rel=1e-5)
    assert all(np.isfinite(r.initial) for r in records)
    assert records[-1].initial != records[-1].loss


def test_scores_and_experts_have_no_derivatives() -> None:
    with pytest.raises(UsageError, match=r"^objective f1 has no derivatives: leave out --estimator jvp$"):
        TrainConfig(estimator="jvp", objective="f1").check()
    model, index, _ = tiny_experts()
    with pytest.raises(UsageError, match=r"^--estimator jvp: mlx_lm\.models\.qwen3_moe .*derivative"):
        SparseModel(model, index).check_derivative(index.initial_values())
