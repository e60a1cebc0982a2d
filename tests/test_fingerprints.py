"""What a run was begun on must be what it goes on with, and what its adapter is loaded with."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import write_hf_llama, write_jsonl
from test_train import _train, _values

import zo_mlx
from zo_mlx.errors import UsageError
from zo_mlx.index import read_index, write_index
from zo_mlx.journal import Journal

MODEL = "the base model (config.json or weights: another model, or one quantized again)"
INDEX = "the sensitive index (sensitive.safetensors)"
SMALL = {"density": 0.01, "q_group_size": 32, "num_samples": 4, "sequence_length": 32, "progress": False}


def _another_model(tiny: Path, tiny_hf: Path, out: Path) -> None:
    zo_mlx.convert(str(write_hf_llama(out.with_name("hf"), seed=1)), str(out), **SMALL)


def _quantized_again(tiny: Path, tiny_hf: Path, out: Path) -> None:
    zo_mlx.convert(str(tiny_hf), str(out), **SMALL, q_bits=8)


def _index_edited(tiny: Path, tiny_hf: Path, out: Path) -> None:
    shutil.copytree(tiny, out)
    index = read_index(out)
    first = next(iter(index.tensors.values()))
    first.values = first.values + mx.array(0.25).astype(first.values.dtype)
    write_index(index, out)


def _other_tokenizer(tiny: Path, tiny_hf: Path, out: Path) -> None:
    shutil.copytree(tiny, out)
    content = json.loads((out / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (out / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_another_model, f"{MODEL} and {INDEX}"),
        (_quantized_again, f"{MODEL} and {INDEX}"),
        (_index_edited, INDEX),
        (_other_tokenizer, "the tokenizer"),
    ],
)
def test_another_model_directory_is_refused(
    change: Callable[[Path, Path, Path], None], named: str, tiny: Path, tiny_hf: Path, choice_data: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "a", tmp_path / "other"
    _train(tiny, choice_data, out)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    change(tiny, tiny_hf, other)
    refusal = re.escape(f"does not belong here: since it was made, {named} changed") + "$"
    with pytest.raises(UsageError, match="^the journal .*" + refusal):
        _train(other, choice_data, out, resume=True, iters=9, changed_data=True)
    with pytest.raises(UsageError, match="^the adapter .*" + refusal):
        zo_mlx.load(other, out)
    with pytest.raises(UsageError, match="^the journal .*" + refusal):
        zo_mlx.replay(other, out, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_changed_training_data_is_refused_unless_asked_for(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    out, changed = tmp_path / "a", tmp_path / "data"
    _train(tiny, choice_data, out, iters=3, learning_rate=1e-3)
    shutil.copytree(choice_data, changed)
    lines = (changed / "train.jsonl").read_text().splitlines(keepends=True)
    (changed / "train.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(UsageError, match="the training data changed since step 3; --changed-data goes on all the same"):
        _train(tiny, changed, out, resume=True)

    warnings: list[str] = []
    _train(
        tiny, changed, out, iters=5, resume=True, changed_data=True, report=lambda e: warnings.append(e.get("message"))
    )
    assert "the training data changed: from step 4 on, the run is not the one that it would have been" in warnings
    records = [*Journal.read(out / "journal").records()]
    assert [r.data == records[0].data for r in records] == [True, True, True, False, False]
    _train(tiny, changed, out, iters=6, resume=True)  # no need to ask again
    with pytest.raises(UsageError, match="the training data changed since step 6"):
        _train(tiny, choice_data, out, resume=True)
    _train(tiny, choice_data, tmp_path / "whole", learning_rate=1e-3)
    assert not (_values(out) == _values(tmp_path / "whole")).all()
    zo_mlx.replay(tiny, out, tmp_path / "replayed", progress=False)  # needs no data
    assert (_values(out) == _values(tmp_path / "replayed")).all()


def test_another_chat_template_is_found_in_the_tokenized_data(tiny: Path, tmp_path: Path) -> None:
    chats: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no"}]} for i in range(8)
    ]
    write_jsonl(tmp_path / "data/train.jsonl", chats)
    _train(tiny, tmp_path / "data", tmp_path / "a", iters=1)
    shutil.copytree(tiny, tmp_path / "other")
    template = tmp_path / "other/chat_template.jinja"
    template.write_text(template.read_text().replace("</s>", "</s> "))
    with pytest.raises(UsageError, match="the chat template, or how the data is tokenized, changed since step 1"):
        _train(tmp_path / "other", tmp_path / "data", tmp_path / "a", resume=True)
