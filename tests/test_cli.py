import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl

import zo_mlx
from zo_mlx import cli
from zo_mlx.cli import main
from zo_mlx.commands.train import _print_event

TRAIN = ["--iters", "2", "--batch-size", "4", "--directions", "2"]


def test_train_evaluate_generate_and_info(
    tiny: Path, choice_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = str(tiny), str(choice_data), str(tmp_path / "a")
    assert main(["train", "--model", model, "--data", data, "--adapter-path", out, *TRAIN]) == 0
    text = capsys.readouterr().out
    assert "Iter 0: Val loss" in text
    assert "Iter 2: Train loss" in text
    assert f"{out}/report.html: the run as a page" in text
    assert main(["evaluate", "--model", model, "--adapter-path", out, "--data", data]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["generate", "--model", model, "--adapter-path", out, "--prompt", "a", "-m", "3", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"text"}

    assert main(["info", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["index"]["matches_model"]
    assert sum(layer["trainable"] for layer in found["index"]["layers"]) == found["index"]["size"]
    assert all(0 < layer["density"] < 1 for layer in found["index"]["layers"])
    assert main(["info", out, "--json"]) == 0
    adapter = json.loads(capsys.readouterr().out)
    assert (adapter["steps"], adapter["snapshot_step"], adapter["trainable"]) == (2, 2, found["index"]["size"])
    assert adapter["fingerprints"]["base_model"] == found["fingerprint"]
    assert adapter["report"] == f"{out}/report.html"
    assert main(["info", f"{out}/journal", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["journal"] == adapter["journal"]
    for path in (model, out):
        assert main(["info", path]) == 0
    assert "coverage" in capsys.readouterr().out


def test_json_output_is_one_object_a_line(
    tiny: Path, choice_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny), "--data", str(choice_data), "--adapter-path", str(tmp_path / "a"), *TRAIN]
    assert main(["train", *arguments, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    exported = ["exported", "exported"]  # the last and the best
    assert [e["event"] for e in events] == ["validation", "train", "validation", "warning", *exported, "result"]
    assert events[-1]["after"]["accuracy"] == events[2]["accuracy"]


def test_a_reader_that_has_seen_enough_ends_it_silently(tiny: Path) -> None:
    program = "from zo_mlx.cli import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "info", str(tiny)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.close()
    assert (process.communicate()[1], process.returncode) == (b"", 141)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_standard_streams_may_be_closed(closed: int, tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    words = ["train", "--model", tiny, "--data", choice_data, "--adapter-path", tmp_path / "a", "--iters", "1"]
    program = "import sys; from zo_mlx.cli import main; raise SystemExit(main(sys.argv[1:]))"
    command = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a/values.safetensors").exists()


def test_flags_take_precedence_over_yaml_and_yaml_over_defaults(
    tiny: Path, choice_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {tiny}\ndata: {choice_data}\niters: 5\nbatch_size: 4\ndirections: 2\nseed: 7\n"
        f"adapter_path: {tmp_path / 'a'}\n"
    )
    assert main(["train", "-c", str(config), "--iters", "1", "--json"]) == 0
    assert main(["info", str(tmp_path / "a"), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out.splitlines()[-1])["config"]
    assert (settings["iters"], settings["seed"], settings["epsilon"]) == (1, 7, zo_mlx.TrainConfig().epsilon)
    schedule = "lr_schedule: {name: linear_schedule, arguments: [0.1, 0, 1]}\n"
    config.write_text(config.read_text() + schedule)
    rates = {"name": "exponential_decay", "arguments": [0.01, 0.999]}
    for flags, expected in ((["--learning-rate", "0.01"], rates), (["--learning-rate", "auto"], None)):
        assert main(["train", "-c", str(config), "--iters", "1", "--overwrite", "--json", *flags]) == 0
        assert main(["info", str(tmp_path / "a"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["config"]["lr_schedule"] == expected


@pytest.mark.parametrize(
    ("command", "code", "problem"),
    [
        ("convert --hf-path {tmp}/none --mlx-path {tmp}/o", 2, "no such model"),
        ("convert --hf-path {tmp}/empty --mlx-path {tmp}/o", 2, "config.json is missing"),
        ("convert --hf-path {data}/train.jsonl --mlx-path {tmp}/o", 2, "not a .gguf file"),
        ("convert --hf-path {model} --mlx-path {tmp}/o --q-bits 8", 2, "already quantized: --q-bits"),
        ("convert --hf-path {model} --mlx-path {tmp}/empty", 2, "already exists"),
        ("train --model {tmp}/none --data {data} --adapter-path {tmp}/a", 2, "no such model"),
        ("train --model {tmp}/empty --data {data} --adapter-path {tmp}/a", 2, "config.json is missing"),
        ("train --model {plain} --data {data} --adapter-path {tmp}/a", 2, "has no sensitive index"),
        ("train --model {model} --data {tmp}/none --adapter-path {tmp}/a", 2, "no such data: "),
        (
            "train --model {model} --data no-such/data-set --adapter-path {tmp}/a",
            1,
            "no-such/data-set: there is no such directory, and the dataset cannot be loaded",
        ),
        ("train --model {model} --data {broken} --adapter-path {tmp}/a", 2, "train.jsonl, line 2: not JSON"),
        ("train --model {model} --data {data} --adapter-path {tmp}/a --batch-size 64", 2, "fewer than --batch-size"),
        ("train --model {model} --data {data} --adapter-path {tmp}/a --max-seq-length 4", 2, "more than fit"),
        ("train --model {model} --data {data} --adapter-path {tmp}/a --resume", 2, "holds no training run"),
        ("train --model {model} --data {data} --adapter-path {tmp}/a --config {tmp}/none", 2, "no such config file"),
        ("evaluate --model {model} --data {data} --adapter-path {tmp}/none", 2, "no such adapter"),
        ("evaluate --model {model} --data {data} --adapter-path {tmp}/empty", 2, "values.safetensors is missing"),
        ("evaluate --model {model} --data {data} --adapter-path {stock}", 2, "runs with mlx-lm's commands"),
        (
            "train --model {model} --data {data}/train.jsonl --adapter-path {tmp}/a",
            2,
            "train.jsonl is a file: give the",
        ),
        ("info {model}/model.safetensors", 2, "model.safetensors is not a zo-mlx journal"),
        ("evaluate --model {cut} --data {data}", 2, "truncated or not a safetensors file"),
        ("generate --model {model} --prompt=", 2, "the prompt is empty"),
        ("generate --model {model} --prompt a -m 0", 2, "--max-tokens must be at least 1"),
        ("generate --model {model} --prompt a --temp -1", 2, "--temp must be at least 0"),
        ("generate --model {model} --prompt a --seed -1", 2, "--seed must be at least 0"),
        ("generate --model {model} --prompt a\udcff", 2, "the prompt is not valid UTF-8"),
        ("train --model {model} --data {data} --adapter-path {tmp}/a\udcff", 2, "a\\udcff' is not valid UTF-8"),
        ("convert --hf-path {model} --mlx-path {tmp}/o --seed -1", 2, "--seed must be at least 0"),
        ("train --model {odd} --data {data} --adapter-path {tmp}/a", 2, "must hold a JSON object"),
        ("train --model {model} --data {data} --adapter-path=", 2, "adapter_path must not be empty"),
        ("server --model {model} --port 99999", 2, "--port must be at most 65535"),
        ("train --model {pipe} --data {data} --adapter-path {tmp}/a", 2, "config.json is not a file"),
        ("info {tmp}/none", 2, "no such directory"),
        ("info {tmp}/empty", 2, "neither a model directory"),
        ("convert --hf-path no-such-name/no-such-model --mlx-path {tmp}/o", 1, "cannot be fetched from the hub"),
    ],
)
def test_bad_input_is_one_clear_line_and_the_right_exit_code(
    command: str,
    code: int,
    problem: str,
    tiny: Path,
    choice_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("huggingface_hub.constants", "datasets.config"):  # as on a machine with no network
        monkeypatch.setattr(f"{package}.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny, tmp_path / "plain", ignore=shutil.ignore_patterns("sensitive*"))
    shutil.copytree(tiny, tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:5000])
    for name in ("odd", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd/config.json").write_text("7")
    os.mkfifo(tmp_path / "pipe/config.json")
    write_jsonl(tmp_path / "broken/train.jsonl", [{"text": "a"}])
    with (tmp_path / "broken/train.jsonl").open("a") as f:
        f.write("{oops\n")
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock/adapter_config.json").write_text("{}")
    places = {name: str(tmp_path / name) for name in ("plain", "cut", "broken", "odd", "pipe", "stock")}
    words = command.format(tmp=tmp_path, model=tiny, data=choice_data, **places).split()
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("zo-mlx: error: ")
    assert problem in last
    assert "Traceback" not in captured.err
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "a").exists()


def test_wrong_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["fly"], ["train", "--iters", "many"], ["train", "--optimizer", "none"], ["convert"]):
        with pytest.raises(SystemExit) as e:
            main(words)
        assert e.value.code == 2
    capsys.readouterr()


def test_a_chat_template_that_fails_is_one_clear_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    assert main(["generate", "--model", str(tmp_path / "m"), "--prompt", "a"]) == 2
    assert "chat template fails: roles must alternate" in capsys.readouterr().err.splitlines()[-1]


def test_help_shows_defaults_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("convert", "memory", "train", "evaluate", "generate", "chat", "server", "info"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "(default: None)" not in text
        assert "(default: False)" not in text


def test_completion_is_a_script_for_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as e:
        main(["--print-completion", "bash"])
    assert e.value.code == 0
    (tmp_path / "my_data").mkdir()
    script = capsys.readouterr().out
    for words, completed in (("train --max-s", "--max-seq-length"), ("train --data my", "my_data"), ("cha", "chat")):
        typed = ["zo-mlx", *words.split()]
        ask = f'COMP_WORDS=({" ".join(typed)}); COMP_CWORD={len(typed) - 1}; _shtab_zo_mlx; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.split() == [completed]
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as e:
        main(["--print-completion", "zsh"])
    assert e.value.code == 2
    assert "needs the package shtab: pip install shtab" in capsys.readouterr().err


def test_what_a_run_decides_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    event = {"event": "chosen", "iteration": 3, "learning_rate": 2e-4, "epsilon": 1e-3, "slope": 16.6, "directions": 21}
    _print_event(event)
    _print_event({"event": "chosen", "iteration": 1, "learning_rate": 8e-4, "share": 0.0092, "warmup": 10})
    _print_event({"event": "returned", "iteration": 75, "step": 50, "halvings": 2})
    _print_event({"event": "restarted", "iteration": 75, "steps": 50, "halvings": 2})
    lines = capsys.readouterr().out.splitlines()
    assert "Iter 3: Learning Rate 2.000e-04, epsilon 1.0e-03: slopes along 21 directions" in lines[0]
    assert lines[1].startswith("Iter 1: Learning Rate up to 8.000e-04 in 10 steps, 0.92% of the values' root mean")
    assert lines[2] == "Iter 75: the loss rose too far: back to the values of step 50, learning rate halved 2 times"
    assert lines[3].startswith("Iter 75: no clear gain in 50 steps: back to the values before training, learning rate")


@pytest.mark.parametrize("value", ["auto", "1e-4"])
def test_a_rate_is_a_number_or_auto(value: str) -> None:
    args = cli.build_parser().parse_args(["train", "--learning-rate", value, "--epsilon", value])
    expected = "auto" if value == "auto" else 1e-4
    assert (args.learning_rate, args.epsilon) == (expected, expected)
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["train", "--learning-rate", "fast"])
