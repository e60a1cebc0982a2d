"""The whole path on a real model: SmolLM2-135M-Instruct, 4 bits, real sentences."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import SHARED_DATA

import zo_mlx
from zo_mlx import adapter
from zo_mlx.cli import main
from zo_mlx.index import read_index
from zo_mlx.journal import Journal, record_size

EXAMPLES = Path(__file__).parents[1] / "examples" / "support"


def test_stock_mlx_lm_loads_and_continues_sensibly(smollm2: Path) -> None:
    model, tokenizer = mlx_lm.load(str(smollm2))
    model.set_dtype(mx.float32)  # CPU products in bfloat16 are very slow
    assert mlx_lm.generate(model, tokenizer, "The capital of France is", max_tokens=2).strip().startswith("Paris")
    index = read_index(smollm2)
    assert index.size == round(1e-3 * index.metadata["candidates"]) == 106_168
    assert index.metadata["coverage"] > 0.4


def test_convert_train_resume_evaluate_generate(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, whole, parts = tmp_path / "data", tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(EXAMPLES, data)
    lines = (data / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "test.jsonl").write_text("".join(lines[:12]))
    common = ["--model", str(smollm2), "--data", str(data), "--val-batches", "0", "--json"]
    common += ["--iters", "6", "--num-layers", "4"]

    assert main(["train", *common, "--adapter-path", str(whole)]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert trained["iterations"] == 6
    shutil.copytree(whole, parts)
    # As if the machine had died in the middle of writing step 4, and had never finished a snapshot.
    journal = (parts / "journal").read_bytes()
    record = record_size(Journal.read(parts / "journal").header)
    (parts / "journal").write_bytes(journal[: -2 * record - 5])
    adapter.remove_run(parts)
    assert main(["train", *common, "--adapter-path", str(parts), "--resume"]) == 0
    capsys.readouterr()
    values = [np.array(adapter.read_snapshot(d).values) for d in (whole, parts)]
    assert (values[0] == values[1]).all()
    assert (parts / "journal").read_bytes() == journal

    results = []
    for more in ([], ["--adapter-path", str(whole)]):
        assert main(["evaluate", "--model", str(smollm2), "--data", str(data), "--json", *more]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1]["loss"] < 0.9 * results[0]["loss"]
    prompt = json.loads(lines[0])["prompt"]
    words = ["generate", "--model", str(smollm2), "--prompt", prompt, "--ignore-chat-template", "-m", "3", "--json"]
    assert main([*words, "--adapter-path", str(whole)]) == 0
    assert json.loads(capsys.readouterr().out)["text"]


@pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"{SHARED_DATA} with SST-2 is not there")
def test_zero_shot_on_sst2_is_the_published_starting_point(smollm2: Path) -> None:
    """48% on SST-2's first test sentences, measured with an independent prototype on the same weights."""
    model, tokenizer = zo_mlx.load(smollm2)
    result = zo_mlx.evaluate(model, tokenizer, SHARED_DATA / "sst2" / "test.jsonl", num_batches=6, progress=False)
    assert result.examples == 96
    assert result.accuracy == pytest.approx(0.48, abs=0.1)
