import json
import math
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import stock_scores, write_jsonl
from mlx_lm.tokenizer_utils import TokenizerWrapper

import zo_mlx
from zo_mlx.evaluate import macro_f1, wilson_interval


def _stock_in_float32(path: Path) -> tuple[nn.Module, TokenizerWrapper]:
    """mlx-lm's own model; in bfloat16, which it would take, its losses are off by some per cent."""
    model, tokenizer = mlx_lm.load(str(path))
    model.set_dtype(mx.float32)
    return model, tokenizer


def test_accuracy_and_loss_equal_full_logits_of_stock_mlx_lm(tiny: Path, choice_data: Path) -> None:
    stock, tokenizer = _stock_in_float32(tiny)
    losses, correct = [], 0
    for line in (choice_data / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        scores = stock_scores(stock, tokenizer, record["prompt"], record["choices"])
        label = record["choices"].index(record["completion"])
        losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[label])
        correct += int(np.argmax(scores) == label)
    got = zo_mlx.evaluate(*zo_mlx.load(tiny), choice_data, batch_size=3, progress=False)
    assert got.examples == len(losses)
    assert got.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert got.accuracy == pytest.approx(correct / len(losses))


def test_a_part_of_a_file_is_of_all_of_it_and_always_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may be in the order of its labels."""
    seen: list[list[str]] = []
    monkeypatch.setattr(sys.modules["zo_mlx.evaluate"], "macro_f1", lambda _, right: seen.append(right) or 0.0)
    rows = [{"prompt": f"{i}?", "completion": c, "choices": [" a", " b"]} for c in (" a", " b") for i in range(20)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    for _ in range(2):
        zo_mlx.evaluate(*zo_mlx.load(tiny), path, batch_size=10, num_batches=2, progress=False)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20
    assert 5 <= seen[0].count(" a") <= 15


def test_no_text_is_longer_than_the_model_was_made_for(tiny: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "word " * 200}])
    whole, short = (zo_mlx.evaluate(*zo_mlx.load(tiny), path, max_seq_length=n, progress=False) for n in (2048, 512))
    assert whole == short
    assert whole.truncated == 1


def test_perplexity_equals_stock_mlx_lm(tiny: Path, tmp_path: Path) -> None:
    texts = ["one two three", "a somewhat longer line of text", "x"]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": t} for t in texts])
    stock, tokenizer = _stock_in_float32(tiny)
    total, count = 0.0, 0
    for text in texts:
        tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
        logits = np.array(stock(mx.array([tokens])).astype(mx.float32), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= sum(log_p[i, tokens[i + 1]] for i in range(len(tokens) - 1))
        count += len(tokens) - 1
    got = zo_mlx.evaluate(*zo_mlx.load(tiny), path, progress=False)
    assert got.loss == pytest.approx(total / count, abs=1e-4)
    assert got.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_wilson_interval_equals_published_values() -> None:
    """Newcombe 1998, Statistics in Medicine 17, 857, table I: method 3."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_macro_f1_is_the_mean_over_classes() -> None:
    right = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "a", "a"]
    # a: precision 2/4, recall 2/3; b: 1/2, 1/2; c: 0
    assert macro_f1(predicted, right) == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert macro_f1(right, right) == 1
