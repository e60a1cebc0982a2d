"""Exact gradients of the values, against `mx.grad` of stock mlx-lm models with dense weights."""

import contextlib
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import convert_tiny, dense_weights, write_jsonl
from mlx.utils import tree_unflatten
from test_train import FAST, _values

import zo_mlx
from zo_mlx import adapter
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.config import TrainConfig, resolved
from zo_mlx.data import Example
from zo_mlx.errors import UsageError
from zo_mlx.exact import ExactGradient
from zo_mlx.head import split_head
from zo_mlx.index import read_index
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse
from zo_mlx.objective import layout
from zo_mlx.optimizer import Optimizer
from zo_mlx.prefix import Prefix
from zo_mlx.rows import load_dataset
from zo_mlx.step import exact_step

TEXTS = ["one short text", "another text, which is longer than the first one", "x y"]


def dense_gradient(path: Path, values: np.ndarray, examples: list[Example]) -> tuple[float, np.ndarray]:
    """Loss and gradient of the values, from all gradients of the dense weights of the stock model, row by row."""
    model, _ = mlx_lm.load(str(path))
    model.set_dtype(mx.float32)
    weights = dense_weights(model)
    for name, module in model.named_modules():
        if name in weights:
            parent, _, last = name.rpartition(".")
            layer = nn.Linear(*reversed(weights[name].shape), bias="bias" in module)
            layer.weight = weights[name]
            dict(model.named_modules())[parent][last] = layer
    index, start = read_index(path), 0
    for name, tensor in index.tensors.items():
        flat = np.array(weights[name]).ravel()
        flat[tensor.indices] = values[start : start + tensor.size]
        weights[name] = mx.array(flat.reshape(weights[name].shape))
        start += tensor.size
    own = {name: weights[name] for name in index.tensors}

    def loss(own: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten([(f"{name}.weight", w) for name, w in own.items()]))
        total, count = mx.array(0.0), 0
        for e in examples:
            rows = [nn.log_softmax(model(mx.array([row]))[0], axis=-1) for row in e.rows]
            found = [sum(rows[t.row][t.position, t.token] for t in choice) for choice in e.targets]
            if e.label is None:
                total, count = total - found[0], count + len(e.targets[0])
            else:
                total, count = total + mx.logsumexp(mx.stack(found)) - found[e.label], count + 1
        return total / count

    value, gradients = mx.value_and_grad(loss)(own)
    parts = [np.array(gradients[name]).ravel()[tensor.indices] for name, tensor in index.tensors.items()]
    return float(value), np.concatenate(parts)


@pytest.fixture
def examples(spread: Path, choice_data: Path, tmp_path: Path) -> dict[str, list[Example]]:
    """Choices of one and of several rows, texts, and choices that are worth letting go on from their prompts."""
    _, tokenizer = zo_mlx.load(spread)
    choices = load_dataset(choice_data / "train.jsonl", tokenizer, 99).examples[:5]
    long = {"prompt": "a much longer prompt:", "completion": " yes", "choices": [" yes", " never", " no"]}
    choices += load_dataset(write_jsonl(tmp_path / "long.jsonl", [long]), tokenizer, 99).examples
    texts = load_dataset(write_jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in TEXTS]), tokenizer, 99).examples
    colours = {"completion": " green", "choices": [" none", " green", " white"]}
    shared = [{"prompt": f"{p}, what is it?", **colours} for p in (*TEXTS, "a" * 30)]
    answers = load_dataset(write_jsonl(tmp_path / "shared.jsonl", shared), tokenizer, 99).examples
    return {"choices": choices, "texts": texts, "answers": answers}


@pytest.mark.parametrize("tokens_at_once", [None, 40, 1])
@pytest.mark.parametrize(
    ("by_block", "how"),
    [(True, {}), (False, {}), (True, {"keep_blocks": 1, "spill": True}), (True, {"keep_blocks": -1})],
)
@pytest.mark.parametrize("kind", ["choices", "texts", "answers"])
def test_it_is_the_gradient_of_the_dense_model(
    kind: str,
    by_block: bool,
    how: dict[str, Any],
    tokens_at_once: int | None,
    spread: Path,
    examples: dict[str, list[Example]],
) -> None:
    sparse, _, index, _ = load_sparse(spread)
    values = index.initial_values() + 0.02 * mx.random.normal((sparse.size,), key=mx.random.key(1))
    loss, expected = dense_gradient(spread, np.array(values), examples[kind])
    blocks = BlockwiseModel(sparse.model) if by_block else None
    head = split_head(sparse.model, continuing=kind == "answers")
    gradient = ExactGradient(sparse, head, blocks, tokens_at_once=tokens_at_once, **how)
    assert gradient.continues == (by_block and kind == "answers")
    assert layout([examples["answers"]], share=True)[1]
    got_loss, got = gradient(values, examples[kind])
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert np.abs(np.array(got) - expected).max() < 1e-5 * np.abs(expected).max()


def test_rows_share_no_prompt_where_a_block_does_not_know_how_far_on_they_are(spread: Path) -> None:
    """As where an embedding depends on the position, which mlx-lm's models take from the cache of the first block."""
    model = mlx_lm.load(str(spread))[0]
    embedding = type(model.model.embed_tokens)

    class Positioned(embedding):  # type: ignore[misc, valid-type]
        def __call__(self, tokens: mx.array) -> mx.array:
            return super().__call__(tokens) + 0.1 * mx.arange(tokens.shape[1])[:, None]

    blocks = BlockwiseModel(model)
    assert blocks.continues()
    model.model.embed_tokens.__class__ = Positioned
    assert not blocks.continues()


@pytest.mark.parametrize(
    ("choices", "rounding"),
    [([" delivery", " product"], 1e-5), ([" good music", " loud music", " a bad weather report"], 2e-4)],
)
def test_of_a_real_model(choices: list[str], rounding: float, smollm2: Path, tmp_path: Path) -> None:
    """Where scores are sums over several tokens, rows on their own differ as much (8e-5)."""
    sparse, tokenizer, index, _ = load_sparse(smollm2)
    values, head = index.initial_values(), split_head(sparse.model, continuing=len(choices) == 3)
    texts = ("Put on something by Bach, please", "Will the new kettle that I ordered be here today?")
    rows = [{"prompt": f"{t}\nThis is about", "completion": choices[1], "choices": choices} for t in texts]
    examples = load_dataset(write_jsonl(tmp_path / "train.jsonl", rows), tokenizer, 99).examples
    gradient = ExactGradient(sparse, head, BlockwiseModel(sparse.model), tokens_at_once=64)
    assert gradient.continues == layout([examples], share=True)[1] == (len(choices) == 3)
    loss, expected = dense_gradient(smollm2, np.array(values), examples)
    got_loss, got = gradient(values, examples)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert np.abs(np.array(got) - expected).max() < rounding * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["choices", "answers"])
def test_of_the_last_blocks_alone(kind: str, spread: Path, examples: dict[str, list[Example]]) -> None:
    sparse, _, index, _ = load_sparse(spread)
    everything = index.initial_values()
    _, expected = dense_gradient(spread, np.array(everything), examples[kind])
    ((start, end),) = sparse.train_last(1, everything)
    blocks, shares = BlockwiseModel(sparse.model), kind == "answers"
    prefix = None if shares else Prefix(blocks, sparse.first_block)
    gradient = ExactGradient(sparse, split_head(sparse.model, continuing=shares), blocks, prefix)
    assert gradient.continues == shares
    _, got = gradient(everything[start:end], examples[kind])
    assert np.abs(np.array(got) - expected[start:end]).max() < 1e-5 * np.abs(expected).max()


def test_the_record_holds_the_gradient_in_bfloat16(spread: Path, examples: dict[str, list[Example]]) -> None:
    sparse, _, index, _ = load_sparse(spread)
    values = index.initial_values()
    update = Optimizer(resolved(TrainConfig(gradient="exact", optimizer="sgd", learning_rate=0.5)), values)
    gradient = ExactGradient(sparse, split_head(sparse.model), BlockwiseModel(sparse.model))
    moved, _, record = exact_step(gradient, update, values, update.state, examples["texts"], 1)
    exact = np.array(gradient(values, examples["texts"])[1])
    assert np.abs(record.projected - exact).max() > 0
    np.testing.assert_allclose(record.projected, exact, rtol=2**-8)
    np.testing.assert_allclose(np.array(moved), np.array(values) - 0.5 * record.projected, rtol=1e-6)


def _train(tiny: Path, data: Path, out: Path, **changes: Any) -> zo_mlx.TrainResult:
    settings = {**FAST, "model": str(tiny), "data": str(data), "adapter_path": str(out), "gradient": "exact"}
    return zo_mlx.train(**{**settings, **changes})


def test_training_with_the_defaults(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    before = zo_mlx.evaluate(*zo_mlx.load(tiny), choice_data / "train.jsonl", progress=False)
    data = {"model": str(tiny), "data": str(choice_data), "adapter_path": str(tmp_path / "a")}
    zo_mlx.train(**data, gradient="exact", iters=60, progress=False)  # type: ignore[arg-type]
    config = Journal.read(tmp_path / "a/journal").header["config"]
    assert (config["batch_size"], config["optimizer"]) == (16, "adam")
    after = zo_mlx.evaluate(*zo_mlx.load(tiny, tmp_path / "a"), choice_data / "train.jsonl", progress=False)
    assert after.loss < 0.5 * before.loss


@pytest.mark.parametrize("keep", ["everything", "journal"])
def test_resuming_is_bit_identical(keep: str, tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _train(tiny, choice_data, whole)
    _train(tiny, choice_data, parts, iters=4)
    if keep == "journal":
        adapter.remove_run(parts)
    # As if the machine had died in the middle of writing a step.
    with (parts / "journal").open("ab") as f:
        f.write(b"torn")
    _train(tiny, choice_data, parts, resume=True)
    assert (_values(parts) == _values(whole)).all()
    records = [list(Journal.read(d / "journal").records()) for d in (whole, parts)]
    assert [(r.step, r.loss, r.projected.tolist()) for r in records[0]] == [
        (r.step, r.loss, r.projected.tolist()) for r in records[1]
    ]


def test_a_memory_limit_keeps_what_it_has_room_for(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """What is decided is recorded, and changes nothing but rounding."""
    _train(tiny, choice_data, tmp_path / "none")
    recorded = []
    for limit in (1.0, 0.0001):
        with pytest.warns(UserWarning, match="longest example alone") if limit < 1 else contextlib.nullcontext():
            _train(tiny, choice_data, tmp_path / f"{limit}", memory_limit=limit)
        config = Journal.read(tmp_path / f"{limit}/journal").header["config"]
        recorded.append((config["keep_blocks"], config["spill"]))
        assert np.allclose(_values(tmp_path / f"{limit}"), _values(tmp_path / "none"), rtol=1e-3, atol=1e-5)
        _train(tiny, choice_data, tmp_path / f"{limit}", memory_limit=limit, iters=8, resume=True)
    assert recorded == [(3, False), (0, True)]


def test_a_journal_of_exact_gradients_in_numpy(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """The format of docs/journal.md, and its replay with SGD, whose rate falls by 0.1% a step."""
    _train(tiny, choice_data, tmp_path / "a", optimizer="sgd", learning_rate=0.1, iters=3)
    content = (tmp_path / "a/journal").read_bytes()
    values = np.array(read_index(tiny).initial_values())
    size = 8 + 4 + 4 + 4 + 4 + 2 * values.size + 4
    assert Journal.read(tmp_path / "a/journal").header["trained"] == [[0, values.size]]
    for n in range(3):
        record = content[len(content) - (3 - n) * size :][:size]
        halves = np.frombuffer(record[24:-4], "<u2")
        values = values - np.float32(0.1 * 0.999**n) * (halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(_values(tmp_path / "a"), values, atol=1e-6)


@pytest.mark.parametrize(("optimizer", "mask"), [("adam", "sensitive"), ("lion", "sensitive"), ("adam", "random")])
def test_the_default_rate_rises_and_falls(
    optimizer: str, mask: str, tiny_hf: Path, choice_data: Path, tmp_path: Path
) -> None:
    """Adam (Kingma and Ba 2015, algorithm 1) and Lion (Chen et al. 2023, algorithm 2) with the learning rates of
    docs/journal.md, and its average."""
    model = convert_tiny(tiny_hf, tmp_path / "model", mask=mask)
    _train(model, choice_data, tmp_path / "a", iters=13, optimizer=optimizer)
    origin = np.array(read_index(model).initial_values(), np.float64)
    points, first, second = [origin], 0.0, 0.0
    for record in Journal.read(tmp_path / "a/journal").records():
        g, t = record.projected.astype(np.float64), record.step
        share = 0.05 if mask == "random" else 0.01
        rate = share * min(t / 10, 1) / (1 + (t - 1) / 100) * np.sqrt(np.mean(origin**2))
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            points.append(points[-1] - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8))
        else:
            rate *= math.sqrt(math.pi / 2 * (0.1**2 + 0.9**2 * 0.01 / 1.99))
            points.append(points[-1] - rate * np.sign(0.9 * first + 0.1 * g))
            first = 0.99 * first + 0.01 * g
    values = np.average(points[1:], axis=0, weights=[math.comb(i + 3, 4) for i in range(1, 14)])
    np.testing.assert_allclose(_values(tmp_path / "a"), values, atol=1e-4 * np.abs(values - origin).max())
    zo_mlx.replay(model, tmp_path / "a", tmp_path / "again")
    assert (_values(tmp_path / "again") == _values(tmp_path / "a")).all()


def test_the_rate_is_said_and_one_far_below_it_doubted(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    _train(tiny, choice_data, tmp_path / "a", report=events.append)
    (chosen,) = [e for e in events if e["event"] == "chosen"]
    origin = np.array(read_index(tiny).initial_values(), np.float64)
    assert chosen["iteration"] == 1
    assert chosen["learning_rate"] == pytest.approx(0.01 * np.sqrt(np.mean(origin**2)) / 1.09, rel=1e-5)
    assert chosen["share"] == pytest.approx(0.01 / 1.09, rel=1e-5)
    for rate, doubts in ((chosen["learning_rate"] / 9, 0), (chosen["learning_rate"] / 11, 1)):
        events.clear()
        _train(tiny, choice_data, tmp_path / f"{rate}", report=events.append, learning_rate=rate)
        assert [e["event"] for e in events].count("chosen") == 0
        assert sum("is far below" in e.get("message", "") for e in events) == doubts


def test_the_loss_that_a_step_uses_is_the_one_that_its_record_holds() -> None:
    optimizer = Optimizer(resolved(TrainConfig(gradient="exact")), mx.ones(3))
    *_, record = exact_step(lambda *_: (0.1, mx.ones(3)), optimizer, mx.ones(3), optimizer.state, [], 1)
    assert record.loss == float(np.float32(0.1)) != 0.1


def test_what_does_not_go_together(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="objective accuracy has no gradient"):
        _train(tiny, choice_data, tmp_path / "a", objective="accuracy")
    with pytest.raises(UsageError, match="give --learning-rate"):
        _train(tiny, choice_data, tmp_path / "a", optimizer="sgd")
    _train(tiny, choice_data, tmp_path / "a", iters=2)
    with pytest.raises(UsageError, match="gradient was exact"):
        _train(tiny, choice_data, tmp_path / "a", gradient="zo", resume=True)
