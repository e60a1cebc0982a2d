"""Objectives that score answers: against stock mlx-lm, worked examples, and what training does to them."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import write_jsonl

import zo_mlx
from zo_mlx import adapter
from zo_mlx.answers import Judge
from zo_mlx.cli import main
from zo_mlx.errors import UsageError, ZoError
from zo_mlx.estimator import Branches, Vectors
from zo_mlx.head import split_head
from zo_mlx.index import read_index
from zo_mlx.metric import METRICS, Metric
from zo_mlx.model import load_sparse
from zo_mlx.objective import collate, scores
from zo_mlx.rows import load_dataset
from zo_mlx.step import make_loss

WORDS = ["apple", "a rather long prompt of many words", "stone", "under the river", "x"]


@pytest.fixture
def text_data(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [{"prompt": w, "completion": w.upper()} for w in WORDS])
    return tmp_path / "data"


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes `scoring_of_mine.py` to the working directory."""

    def write(body: str) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))  # forgets what was imported from there
        (tmp_path / "scoring_of_mine.py").write_text(body)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "scoring_of_mine", raising=False)
    return write


@pytest.mark.parametrize(
    ("metric", "output", "right", "score"),
    [
        ("accuracy", " V", " V", 1),
        ("accuracy", " C", " V", 0),
        ("exact-match", "Paris\n", " Paris", 1),
        ("exact-match", "paris", "Paris", 0),
        # 2 of 3 words found are right, 2 of 4 right ones are found: 2 * (2/3 * 2/4) / (2/3 + 2/4) = 4/7.
        ("f1", "The old Eiffel tower!", "an eiffel tower in Paris", 4 / 7),
        ("f1", "yes yes", "yes", 2 / 3),
        ("f1", "no", "yes", 0),
        ("f1", "the", "a", 1),
    ],
)
def test_built_in_metrics(metric: str, output: str, right: str, score: float) -> None:
    assert METRICS[metric]("a prompt", output, {"completion": right}) == pytest.approx(score)
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": right}]}
    assert Metric(metric)(chat, output) == pytest.approx(score)


def test_generated_answers_are_those_of_mlx_lm(tiny: Path, text_data: Path) -> None:
    model, tokenizer = zo_mlx.load(tiny)
    dataset = load_dataset(text_data / "test.jsonl", tokenizer, 64, mask_prompt=True)
    chats = [[{"role": "user", "content": w}] for w in WORDS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    expected = [
        [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=20) if r.finish_reason != "stop"]
        for prompt in prompts
    ]
    # End some of them early: a token that one of them has in the middle becomes an end of text.
    tokenizer.add_eos_token(str(expected[0][10]))
    ended = [row[: row.index(expected[0][10])] if expected[0][10] in row else row for row in expected]
    assert len(ended[0]) < 20
    judge = Judge(Metric("exact-match"), tokenizer, "tokens", 20)
    assert judge.generate(split_head(model, continuing=True), prompts) == ended
    seen = []
    judge._metric = lambda record, output: seen.append((record, output)) or 0.0  # type: ignore[assignment,func-returns-value]
    judge.text_scores(split_head(model, continuing=True), [dataset.examples])
    assert seen == [(e.record, tokenizer.decode(row)) for e, row in zip(dataset.examples, ended, strict=True)]


def test_branches_generate_apart(tiny: Path, text_data: Path) -> None:
    sparse, tokenizer, index, _ = load_sparse(tiny)
    dataset = load_dataset(text_data / "test.jsonl", tokenizer, 64, mask_prompt=True)
    values = index.initial_values()
    points = mx.stack([values, values + 0.3, 2 * values])
    branches = Branches(mx.zeros(index.size), Vectors(points), tuple((i, 1.0) for i in range(3)))
    judge = Judge(Metric("f1"), tokenizer, "tokens", 12)
    judge._metric = lambda record, output: float(len(set(output)))  # type: ignore[assignment]
    head = split_head(sparse.model, continuing=True)
    alone = []
    for one in points:
        sparse.set_values(one[None])
        outputs = [
            mlx_lm.generate(sparse.model, tokenizer, e.rows[0][: e.targets[0][0].position + 1], max_tokens=12)
            for e in dataset.examples[:4]
        ]
        alone.append([len(set(o)) for o in outputs])
    assert len({tuple(a) for a in alone}) == 3
    for tokens_at_once in (None, 1, 100):
        loss = make_loss(sparse, head, tokens_at_once=tokens_at_once, judge=judge)
        got = loss(branches, [dataset.examples[:4]] * 3)
        np.testing.assert_allclose(np.array(got), -np.mean(alone, axis=1), rtol=1e-6)


def test_the_likeliest_choice_is_scored(tiny: Path, choice_data: Path) -> None:
    model, tokenizer = zo_mlx.load(tiny)
    train = choice_data / "train.jsonl"
    plain = zo_mlx.evaluate(model, tokenizer, train, progress=False)
    scored = zo_mlx.evaluate(model, tokenizer, train, objective="accuracy", progress=False)
    assert scored.score == pytest.approx(plain.accuracy)
    assert (scored.loss, plain.score) == (pytest.approx(plain.loss), None)
    assert plain.accuracy not in (0, 1)


def test_training_raises_a_score_without_a_gradient(
    tiny: Path, text_data: Path, tmp_path: Path, user_module: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The share of small letters in what is generated."""
    user_module("def letters(prompt, output, example):\n    return sum(c.islower() for c in output) / 8\n")
    settings = ["--model", str(tiny), "--data", str(text_data), "--max-tokens", "8", "--objective"]
    assert main(["train", *settings, "scoring_of_mine:letters", "--iters", "120"]) == 0
    out = capsys.readouterr().out
    assert "Train score" in out
    assert "Val score" in out
    model, tokenizer = zo_mlx.load(tiny)
    before = zo_mlx.evaluate(model, tokenizer, text_data, objective="scoring_of_mine:letters", max_tokens=8)
    model, tokenizer = zo_mlx.load(tiny, "adapters")
    after = zo_mlx.evaluate(model, tokenizer, text_data, objective="scoring_of_mine:letters", max_tokens=8)
    assert before.score is not None
    assert after.score is not None
    assert after.score > before.score + 0.1

    # A run from a stranger could name any function: it has to be given again; and to be the same.
    assert main(["train", *settings[:-1], "--resume", "--iters", "121"]) == 2
    assert "give --objective scoring_of_mine:letters" in capsys.readouterr().err
    assert main(["train", *settings, "scoring_of_mine:letters", "--resume", "--iters", "121"]) == 0
    (tmp_path / "scoring_of_mine.py").write_text("def letters(prompt, output, example):\n    return 1.0\n")
    assert main(["train", *settings, "scoring_of_mine:letters", "--resume", "--iters", "122"]) == 2
    assert "since it was made, the file with the objective changed" in capsys.readouterr().err
    # Nor may a file name one.
    (tmp_path / "c.yaml").write_text("objective: scoring_of_mine:letters\n")
    assert main(["train", "-c", "c.yaml", "--model", str(tiny), "--data", str(text_data)]) == 2
    assert "taken from --objective only" in capsys.readouterr().err


def test_a_function_may_have_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, or where a program is read from standard input."""
    module = ModuleType("scoring_of_mine")
    exec("def score(prompt, output, example):\n    return float(len(output))", module.__dict__)
    monkeypatch.setitem(sys.modules, "scoring_of_mine", module)
    metric = Metric("scoring_of_mine:score")
    assert (metric.path, metric({"prompt": "a", "completion": "b"}, "abc")) == (None, 3.0)


def test_a_function_prints_and_keeps_to_its_own_copy_and_is_the_files_latest(
    user_module: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    user_module("print('here')\ndef score(p, o, e):\n    print('there')\n    return float(o == e.pop('completion'))")
    record = {"prompt": "a", "completion": "b"}
    assert [Metric("scoring_of_mine:score")(record, "b") for _ in range(2)] == [1.0, 1.0]
    assert capsys.readouterr() == ("", "here\nthere\nthere\n")
    Path("scoring_of_mine.py").write_text("def score(prompt, output, example):\n    return 0.25  # changed\n")
    assert Metric("scoring_of_mine:score")(record, "b") == 0.25


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(): ...", "has no function score"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def score(p, o, e): return e['missing']", "fails on the prompt 'apple 0 ->': KeyError: 'missing'"),
        ("def score(p, o, e): return 'good'", "fails on the prompt 'apple 0 ->': ValueError"),
        ("def score(p, o, e): return float('nan')", "gives nan for the prompt 'apple 0 ->'"),
        ("def score(p, o, e): return 1e39", "gives 1e+39 for the prompt 'apple 0 ->'"),
        ("def score(p, o, e): raise SystemExit(0)", "fails on the prompt 'apple 0 ->': SystemExit: 0"),
        ("score = 3", "has no function score"),
        ("import sys; sys.exit(3)", "importing scoring_of_mine fails: SystemExit: 3"),
    ],
)
def test_functions_that_do_not_work(
    tiny: Path, choice_data: Path, user_module: Callable[[str], None], body: str, message: str
) -> None:
    user_module(body)
    model, tokenizer = zo_mlx.load(tiny)
    data = write_jsonl(Path("one.jsonl"), [load_dataset(choice_data / "train.jsonl", tokenizer, 99).examples[0].record])
    with pytest.raises(ZoError, match=re.escape(message)):
        zo_mlx.evaluate(model, tokenizer, data, objective="scoring_of_mine:score", progress=False)


def test_objectives_that_do_not_fit(tiny: Path, text_data: Path, tmp_path: Path) -> None:
    model, tokenizer = zo_mlx.load(tiny)
    with pytest.raises(UsageError, match="objective must be one of .* not bleu"):
        zo_mlx.train(model=str(tiny), data=str(text_data), objective="bleu")
    with pytest.raises(UsageError, match="accuracy is for data with choices"):
        zo_mlx.evaluate(model, tokenizer, text_data, objective="accuracy")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "some words"}])
    with pytest.raises(UsageError, match="no prompts"):
        zo_mlx.evaluate(model, tokenizer, texts, objective="f1")
    with pytest.raises(UsageError, match="--max-tokens must be at least 1"):
        zo_mlx.evaluate(model, tokenizer, text_data, objective="f1", max_tokens=0)
    with pytest.raises(UsageError, match="needs an --epsilon"):
        zo_mlx.train(model=str(tiny), data=str(text_data), objective="f1", learning_rate=1e-3)
    (text_data / "valid.jsonl").write_text('{"prompt": "x", "completion": " a", "choices": [" a", " b"]}\n')
    with pytest.raises(UsageError, match="some of its files have choices and some have not"):
        zo_mlx.train(model=str(tiny), data=str(text_data), objective="f1", batch_size=4)
    asked = {"role": "user", "content": "?"}
    for messages in ([asked], [asked, {"role": "assistant", "content": None}]):
        chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages}])
        with pytest.raises(UsageError, match="line 1: the last message must be the assistant's"):
            zo_mlx.evaluate(model, tokenizer, chats, objective="f1")


def test_the_example(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the answers are worth, from the shares of right ones and of needless returns; and a step of its command."""
    monkeypatch.chdir(Path(__file__).parents[1])
    model, tokenizer = zo_mlx.load(tiny)
    data, objective = tmp_path / "test.jsonl", "examples.triage:worth"
    data.write_text("".join(Path("examples/support/test.jsonl").read_text().splitlines(keepends=True)[:24]))
    result = zo_mlx.evaluate(model, tokenizer, data, objective=objective, batch_size=8, progress=False)
    dataset = load_dataset(data, tokenizer, 512)
    winners = scores(split_head(model, continuing=True), collate([dataset.examples])).argmax(axis=-1)[0].tolist()
    pairs = [(e.choices[w], e.choices[e.label or 0]) for e, w in zip(dataset.examples, winners, strict=True)]
    right = sum(found == asked for found, asked in pairs)
    needless = sum(found == " product" != asked for found, asked in pairs)
    assert result.score == pytest.approx((right - 2 * needless) / 24)
    words = ["--objective", objective, "--data", "examples/support", "--adapter-path", str(tmp_path / "a")]
    assert main(["train", "--model", str(tiny), *words, "--iters", "1", "--val-batches", "1"]) == 0
    assert 0 < right < 24


@pytest.mark.parametrize(("objective", "iters"), [("accuracy", 30), ("scoring_of_mine:letters", 8)])
def test_resuming_is_bit_identical(
    objective: str,
    iters: int,
    tiny: Path,
    choice_data: Path,
    text_data: Path,
    tmp_path: Path,
    user_module: Callable[[str], None],
) -> None:
    """From the journal alone, and although there are longer completions to be tested on now."""
    user_module("def letters(prompt, output, example):\n    return sum(c.islower() for c in output) / 8\n")
    data = tmp_path / "own"
    shutil.copytree(choice_data if objective == "accuracy" else text_data, data)
    settings: dict[str, Any] = {
        "model": str(tiny), "data": str(data), "objective": objective, "val_batches": 0, "progress": False
    }  # fmt: skip
    zo_mlx.train(**settings, adapter_path=str(tmp_path / "whole"), iters=iters)
    zo_mlx.train(**settings, adapter_path=str(tmp_path / "parts"), iters=iters // 2)
    adapter.remove_run(tmp_path / "parts")
    if objective != "accuracy":
        write_jsonl(data / "test.jsonl", [{"prompt": "x", "completion": "y" * 50}])
    zo_mlx.train(**settings, adapter_path=str(tmp_path / "parts"), iters=iters, resume=True, test=True)
    values = [np.array(adapter.read_snapshot(tmp_path / d).values) for d in ("whole", "parts")]
    assert (values[0] == values[1]).all()
    assert (values[0] != np.array(read_index(tiny).initial_values())).any()
