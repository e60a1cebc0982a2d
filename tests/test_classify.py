"""Choosing among answers, against stock mlx-lm's logits."""

import json
import os
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import stock_scores, write_jsonl

import zo_mlx
from zo_mlx.cli import main
from zo_mlx.errors import UsageError

RECORDS = [
    {"prompt": "a long prompt, ", "choices": ["yes", "no", "it may be"]},
    {"prompt": "b", "choices": [" A", " B"], "completion": "neither", "id": 7},
    {"prompt": "cc"},
]
ANSWERS = ["x", "y", "z"]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[dict[str, float]]:
    """From the logits of each prompt with each choice."""
    model, tokenizer = mlx_lm.load(str(tiny))
    model.set_dtype(mx.float32)
    found = []
    for record in RECORDS:
        choices = record.get("choices", ANSWERS)
        sums = stock_scores(model, tokenizer, record["prompt"], choices)
        shares = np.exp(sums) / np.exp(sums).sum()
        found.append(dict(zip(choices, shares, strict=True)))
    return found


@pytest.mark.parametrize("batch_size", [1, 16])
def test_probabilities_are_those_of_stock_mlx_lm(
    batch_size: int, tiny: Path, tmp_path: Path, expected: list[dict[str, float]]
) -> None:
    loaded = zo_mlx.load(tiny)
    for data in (RECORDS, write_jsonl(tmp_path / "new.jsonl", RECORDS)):
        got = zo_mlx.classify(*loaded, data, ANSWERS, batch_size=batch_size, progress=False)
        assert [list(shares) for shares in got] == [list(shares) for shares in expected]
        for ours, theirs in zip(got, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    assert zo_mlx.classify(*loaded, []) == []
    unlabelled = {**RECORDS[2], "choices": None}
    assert zo_mlx.classify(*loaded, [unlabelled], tuple(ANSWERS))[0] == pytest.approx(expected[2], abs=1e-5)


def test_the_command(
    tiny: Path, tmp_path: Path, expected: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "new.jsonl", RECORDS)
    words = ["classify", "--model", str(tiny), "--choices", *ANSWERS]
    assert main([*words, "--data", str(file), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["choice"] for line in lines] == [max(shares, key=lambda c: shares[c]) for shares in expected]
    assert [line["prompt"] for line in lines] == [r["prompt"] for r in RECORDS]
    assert lines[1]["id"] == 7
    assert lines[1]["probabilities"] == pytest.approx(expected[1], abs=1e-5)
    assert main([*words, "--data", str(file)]) == 0
    assert [line.split("% ")[1] for line in capsys.readouterr().out.splitlines()] == [line["choice"] for line in lines]
    assert main([*words, "--prompt", "cc"]) == 0
    printed = [line.split("% ") for line in capsys.readouterr().out.splitlines()]
    assert {choice: float(share) / 100 for share, choice in printed} == pytest.approx(expected[2], abs=1e-3)
    assert [float(share) for share, _ in printed] == sorted((float(share) for share, _ in printed), reverse=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "line 1: field 'choices' is missing; --choices gives"),
        ({"prompt": "", "choices": ["b", "c"]}, "line 1: field 'prompt' must be a non-empty string"),
        ({"choices": ["b", "c"]}, "line 1: field 'prompt' is missing"),
        ({"prompt": "a", "choices": ["b"]}, "line 1: field 'choices' must hold at least two"),
        ({"prompt": "a", "choices": 3}, "line 1: field 'choices' must be a list"),
        ({"prompt": "a" * 600, "choices": ["b", "c"]}, "line 1: prompt and choice have"),
    ],
)
def test_what_is_wrong_is_said(record: dict[str, object], message: str, tiny: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "new.jsonl", [record])
    with pytest.raises(UsageError, match=message):
        zo_mlx.classify(*zo_mlx.load(tiny), file)


def test_a_prompt_needs_choices(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "--model", str(tiny), "--prompt", "a"]) == 2
    assert "--prompt needs --choices" in capsys.readouterr().err
    assert main(["classify", "--model", str(tiny), "--prompt", "a", "--choices", "b"]) == 2
    assert "--prompt: field 'choices' must hold at least two" in capsys.readouterr().err


def test_prompts_may_come_from_a_pipe(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.write(writing, json.dumps(RECORDS[0]).encode())
    os.close(writing)
    assert main(["classify", "--model", str(tiny), "--data", f"/dev/fd/{reading}", "--json"]) == 0
    os.close(reading)
    assert json.loads(capsys.readouterr().out)["prompt"] == RECORDS[0]["prompt"]
