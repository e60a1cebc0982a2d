"""YAML files and data as users of `mlx_lm.lora` have them, written after its documentation, run unchanged."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from mlx_lm import lora as mlx_lora

import zo_mlx
from zo_mlx.cli import main
from zo_mlx.config import TrainConfig
from zo_mlx.errors import UsageError
from zo_mlx.journal import Journal
from zo_mlx.lora_settings import CHECKED, NOT_HERE, read_yaml

ROOT = Path(__file__).parents[1]


def _completions(directory: Path, prompt: str = "prompt", completion: str = "completion") -> None:
    for split in ("train", "valid", "test"):
        write_jsonl(directory / f"{split}.jsonl", [{prompt: f"q {i}", completion: f"a {i}"} for i in range(8)])


def _questions(directory: Path) -> None:
    _completions(directory, "question", "answer")


def _extra_columns(directory: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": i, "prompt": f"q {i}", "completion": "", "source": None, "choices": None} for i in range(8)
    ]
    write_jsonl(directory / "train.jsonl", rows)
    write_jsonl(directory / "valid.jsonl", rows)


def _texts(directory: Path) -> None:
    for split in ("train", "valid", "test"):
        write_jsonl(directory / f"{split}.jsonl", [{"text": f"text {i} " * (1 + i)} for i in range(8)])


def _train_alone(directory: Path) -> None:
    write_jsonl(directory / "train.jsonl", [{"text": f"text {i}"} for i in range(8)])


def _chats(directory: Path, field: str = "messages") -> None:
    turns = [("system", "be brief"), ("user", "q"), ("assistant", "a"), ("user", "and?"), ("assistant", "b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    # As on the hub: the first prompt has a column of its own.
    rows: list[dict[str, object]] = [{"prompt": "q", "prompt_id": i, field: messages} for i in range(8)]
    write_jsonl(directory / "train.jsonl", rows)
    write_jsonl(directory / "valid.jsonl", rows)


def _conversations(directory: Path) -> None:
    _chats(directory, "conversations")


def _tools(directory: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    for split in ("train", "valid"):
        write_jsonl(directory / f"{split}.jsonl", [{"messages": messages, "tools": [tool]}] * 8)


def _hub_like(directory: Path) -> None:
    """A dataset that the package datasets opens from a directory as it does from the hub."""
    write_jsonl(directory / "train.jsonl", [{"question": f"q {i}", "answer": f"a {i}"} for i in range(20)])


LORA = "fine_tune_type: lora\nlora_parameters:\n  rank: 8\n  dropout: 0.0\n  scale: 20.0\n"
FULL = """
# The kind of fine-tuning, the model and the data.
model: {model}
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adam: {{}}
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "{data}"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
grad_accumulation_steps: 1
resume_adapter_file: null
adapter_path: "{out}"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
clear_cache_threshold: 0
report_to: null
project_name: null
trust_remote_code: false
mask_prompt: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""
FILES = {
    "everything": (FULL, _completions, "learning_rate 1e-05 and lr_schedule (made for LoRA"),
    "next to nothing": ("train: true\n", _texts, ""),
    "a rate": ("train: true\nlearning_rate: 1e-5\n", _texts, "learning_rate 1e-05 (made for LoRA"),
    "a rate with a point": (LORA + "learning_rate: 1.0e-05\n", _texts, "learning_rate 1e-05 (made for LoRA"),
    "dora": ("fine_tune_type: dora\nnum_layers: 8\n", _completions, "fine_tune_type (the sensitive"),
    "full": ("fine_tune_type: full\nnum_layers: -1\n", _completions, "fine_tune_type (the sensitive"),
    "cosine": (
        LORA + "lr_schedule:\n  name: cosine_decay\n  warmup: 10\n  arguments: [1e-4, 500]\n",
        _texts,
        "lr_schedule (made for LoRA",
    ),
    "exponential": (
        LORA + "lr_schedule:\n  name: exponential_decay\n  arguments: [1e-4, 0.99]\n",
        _texts,
        "lr_schedule (made",
    ),
    "momentum": (LORA + "optimizer: SGD\noptimizer_config:\n  sgd:\n    momentum: 0.9\n", _texts, "lora_parameters"),
    "muon": (LORA + "optimizer: muon\noptimizer_config:\n  muon: {{}}\n", _texts, "optimizer muon (it is for"),
    "adafactor": (LORA + "optimizer: adafactor\n", _texts, "optimizer adafactor (it is for"),
    "little memory": (
        LORA + "grad_checkpoint: true\ngrad_accumulation_steps: 4\nclear_cache_threshold: 1\n",
        _completions,
        "grad_checkpoint (forward passes keep nothing",
    ),
    "older names": (LORA + "lora_layers: 16\nuse_dora: false\n", _texts, "no settings lora_layers, use_dora"),
    "test": (LORA + "test: true\ntest_batches: 2\n", _completions, "lora_parameters"),
    "mask": (LORA + "mask_prompt: true\n", _chats, "lora_parameters"),
    "mask, empty completions": (LORA + "mask_prompt: true\n", _extra_columns, "lora_parameters"),
    "features": (
        LORA + "prompt_feature: question\ncompletion_feature: answer\nmask_prompt: true\n",
        _questions,
        "lora_parameters",
    ),
    "chat feature": (LORA + "chat_feature: conversations\n", _conversations, "lora_parameters"),
    "tools": (LORA + "mask_prompt: true\n", _tools, "lora_parameters"),
    "no validation": (LORA + "val_batches: -1\n", _train_alone, "lora_parameters"),
    "short sequences": (LORA + "max_seq_length: 12\n", _texts, "lora_parameters"),
    "code": (LORA + "trust_remote_code: true\n", _texts, "trust_remote_code (code that comes with a model"),
    "hf_dataset": (
        LORA + "hf_dataset:\n  path: {data}\n  prompt_feature: question\n  completion_feature: answer\n"
        '  train_split: "train[:80%]"\n  valid_split: "train[-20%:]"\n',
        _hub_like,
        "lora_parameters",
    ),
    "two hf_datasets": (
        LORA + "test: true\nhf_dataset:\n"
        '  - path: {data}\n    prompt_feature: question\n    completion_feature: answer\n    test_split: "train[:5]"\n'
        '  - path: json\n    config:\n      data_files: {data}/train.jsonl\n    text_feature: answer\n'
        '    test_split: "train[5:9]"\n',
        _hub_like,
        "lora_parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_lora_yaml_runs_unchanged(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hf_dataset" in name:
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text, write, warned = FILES[name]
    data, out, file = tmp_path / "data", tmp_path / "adapters", tmp_path / "lora.yaml"
    write(data)
    if "model:" not in text:
        text = "model: {model}\ndata: {data}\nadapter_path: {out}\n" + text
    file.write_text(text.format(model=tiny, data=data, out=out))
    assert main(["train", "-c", str(file), "--iters", "2", "--val-batches", "1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning")]
    assert warned in " ".join(said)
    assert len(said) <= 2
    run = Journal.read(out / "journal")
    assert len(run) == 2
    assert run.header["config"]["lr_schedule"] is None  # the learning rate is chosen here
    assert run.header["config"]["num_layers"] in (-1, 2, 8, 16)


def test_what_a_file_says_arrives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "l.yaml").write_text(FULL.format(model="m", data="d", out="a"))
    config = TrainConfig(**read_yaml(tmp_path / "l.yaml"))
    config.check()
    assert (config.model, config.data, config.adapter_path, config.num_layers) == ("m", "d", "a", 16)
    assert (config.optimizer, config.optimizer_config["adamw"]["eps"]) == ("adamw", 1e-6)  # type: ignore[index]
    assert (config.steps_per_eval, config.test_batches, config.max_seq_length) == (200, 100, 2048)
    assert config.learning_rate == "auto"
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "home.yaml").write_text("data: ~/d\nmodel: ./m\n")
    assert read_yaml(tmp_path / "home.yaml") == {"data": str(Path.home() / "d"), "model": "./m"}
    (tmp_path / "t.yaml").write_text("learning_rate: 1e-5\n")
    assert "learning_rate" not in read_yaml(tmp_path / "t.yaml", ["train"])  # a flag of LoRA's
    assert "learning_rate 1e-05 (made for LoRA" in capsys.readouterr().err
    # With none of LoRA's own keys it is a file for zo-mlx, and its rate is meant.
    (tmp_path / "z.yaml").write_text("learning_rate: 1e-5\nrank: 8\n")
    assert read_yaml(tmp_path / "z.yaml") == {"learning_rate": 1e-5}
    assert capsys.readouterr().err == (
        f"Warning: {tmp_path / 'z.yaml'}: zo-mlx has no settings rank; they are ignored\n"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("train: false\ntest: true", "train is false; to evaluate only, take zo-mlx evaluate"),
        (
            "resume_adapter_file: a.safetensors",
            "resume_adapter_file a.safetensors is none that a run can go on with; --resume",
        ),
        ("a: [", "not readable YAML"),
        ("just text", "must hold a mapping"),
        ("- 1", "must hold a mapping"),
        ("\x00", "not readable YAML"),
    ],
)
def test_what_cannot_be_done_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UsageError, match=re.escape(problem)) as e:
        read_yaml(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ("hf_dataset: {name: a/b}", "hf_dataset 1 needs a path, the name of a dataset; it has name"),
        ("hf_dataset: [a]", "hf_dataset must be a block of settings, or a list of them"),
        ("hf_dataset: []", "hf_dataset must be a block"),
        ("hf_dataset: {path: a/b, config: {trust_remote_code: true}}", "trust_remote_code is not possible"),
        ("hf_dataset: {path: a/b, config: 5}", "hf_dataset 1, a/b: config must be a block of arguments, not 5"),
        ("hf_dataset: {path: a/b}\ntest: true", "hf_dataset 1, a/b: there is no test_split, which --test needs"),
        ("hf_dataset: {path: /none}", "/none: the dataset cannot be loaded"),
    ],
)
def test_wrong_blocks_are_named(
    blocks: str, problem: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(blocks)
    assert main(["train", "-c", str(tmp_path / "c.yaml"), "--model", str(tiny), "--iters", "1"]) in (1, 2)
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_mlx_lms_flags_are_taken_and_those_without_effect_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every flag of the installed mlx_lm.lora, with a value where it takes one."""
    _completions(tmp_path / "data")
    own = {"model": tiny, "data": tmp_path / "data", "adapter_path": tmp_path / "a", "iters": 1, "val_batches": 1}
    values = {**own, "config": tmp_path / "c.yaml", "optimizer": "sgd", "fine_tune_type": "dora", "report_to": ""}
    values |= {"learning_rate": 1e-3, "max_seq_length": 99, "clear_cache_threshold": "1GB", "num_layers": 3}
    (tmp_path / "c.yaml").write_text("seed: 3\n")
    words = ["train"]
    for action in mlx_lora.build_parser()._actions:
        if action.dest not in ("help", "resume_adapter_file"):
            value = [] if action.nargs == 0 else [str(values.get(action.dest, 4))]
            words += [max(action.option_strings, key=len), *value]
    assert main(words) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning")]
    for name in NOT_HERE.keys() - {"lora_parameters"}:
        assert f"{name} ({NOT_HERE[name]})" in warning
    assert Journal.read(tmp_path / "a/journal").header["config"]["learning_rate"] == 1e-3  # a flag is meant
    paths = [text for name, value in own.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    defaults = ["--grad-accumulation-steps", "1", "--clear-cache-threshold", "0"]
    assert main(["train", "--overwrite", *paths, *defaults]) == 0
    assert "Warning" not in capsys.readouterr().err


def test_the_table_has_all_of_mlx_lms_options_and_no_others() -> None:
    """docs/mlx-lm.md against the installed mlx_lm.lora: flags, YAML keys, and what zo-mlx makes of each."""
    rows = re.findall(r"^\| `([a-z][a-z-]*)` \| (.*?) \|", (ROOT / "docs/mlx-lm.md").read_text(), re.M)
    table = {name.replace("-", "_"): ours for name, ours in rows}
    flags = {action.dest for action in mlx_lora.build_parser()._actions} - {"help"}
    from_yaml = {"hf_dataset", "prompt_feature", "completion_feature", "chat_feature", "text_feature"}
    assert table.keys() == flags | mlx_lora.CONFIG_DEFAULTS.keys() | from_yaml
    ours = set(TrainConfig.__dataclass_fields__) | {"config"}
    for name, meaning in table.items():
        assert (meaning == "no") == (name in NOT_HERE or name == "resume_adapter_file"), name
        assert meaning == "no" or name in ours or name in CHECKED, name


@pytest.mark.parametrize(("optimizer", "low"), [("sgd", 1e-5), ("adam", 1e-7)])
def test_a_rate_far_too_low_is_doubted_once(
    optimizer: str, low: float, spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    """Against the rate that a run with the same seed chooses; schedules count by their highest rate."""

    def warnings(number: int, **settings: object) -> tuple[list[str], list[float]]:
        events: list[dict[str, Any]] = []
        more = {"iters": 5, "val_batches": 0, "steps_per_report": 1, "optimizer": optimizer, **settings}
        places = {"model": str(spread), "data": str(choice_data), "adapter_path": str(tmp_path / str(number))}
        zo_mlx.train(**places, **more, report=events.append, progress=False)  # type: ignore[arg-type]
        return [e["message"] for e in events if e["event"] == "warning"], [
            e["learning_rate"] for e in events if e["event"] == "train"
        ]

    none, rates = warnings(0, epsilon=1e-3)
    chosen = rates[2]  # 7 directions a step, 16 are measured first
    assert (none, chosen > 0, rates[:2]) == ([], True, [0, 0])
    (doubt,) = warnings(1, learning_rate=low)[0]
    assert f"the learning rate, {low:.1e}, is far below the {chosen:.1e} that would be chosen" in doubt
    assert warnings(2, learning_rate=chosen / 9)[0] == []
    warm = {"name": "linear_schedule", "arguments": [0.0, chosen / 9, 5]}
    assert warnings(3, lr_schedule=warm)[0] == []
    assert len(warnings(4, lr_schedule={**warm, "arguments": [0.0, chosen / 11, 5]})[0]) == 1
