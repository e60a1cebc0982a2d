"""Runs that are stopped by signals, real ones to real processes, go on as if they had not been."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from test_train import FAST, _train, _values

from zo_mlx.journal import Journal

# The command line, which sends itself signals when it calls a function, MODULE:NAME, for the n-th time.
STOPPED = """
import functools, importlib, os, signal, sys, time
from zo_mlx.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
where, at, names, *words = sys.argv[1:]
module, path = where.split(":")
*owners, name = path.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
function, calls = getattr(owner, name), []
def stopping(*args, **kwargs):
    calls.append(1)
    for kind in names.split(",") if len(calls) == int(at) else ():
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(0.01)  # Python handles signals between its own instructions
    return function(*args, **kwargs)
setattr(owner, name, stopping)
sys.exit(main(words))
"""
APPEND, STEP = "zo_mlx.journal:Journal.append", "zo_mlx.run:step"
VALIDATION, LOADING = "zo_mlx.run:evaluate_dataset", "zo_mlx.setup:load_sparse"


def _words(tiny: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    settings = {**FAST, "model": tiny, "data": data, "adapter_path": out, **changes}
    del settings["progress"]
    return ["train", *(w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v)))]


@pytest.fixture(scope="module")
def whole(tiny: Path, choice_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "a"
    _train(tiny, choice_data, path, learning_rate=1e-3)
    return path


@pytest.mark.parametrize(
    ("where", "at", "signals", "steps", "validations"),
    [
        (APPEND, 5, "SIGKILL", 4, 2),
        (APPEND, 5, "SIGINT", 5, 2),
        (APPEND, 5, "SIGTERM", 5, 2),
        (APPEND, 4, "SIGINT", 4, 1),  # a validation is due after this step: it has to wait
        (STEP, 5, "SIGINT,SIGINT", 4, 2),
        (STEP, 5, "SIGTERM,SIGINT", 4, 2),
        (VALIDATION, 2, "SIGINT", 4, 1),
        (VALIDATION, 1, "SIGTERM", 0, 0),
    ],
)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    where: str,
    at: int,
    signals: str,
    steps: int,
    validations: int,
    whole: Path,
    tiny: Path,
    choice_data: Path,
    tmp_path: Path,
) -> None:
    settings = {"learning_rate": 1e-3}
    words = _words(tiny, choice_data, tmp_path / "a", **settings)
    command = [sys.executable, "-c", STOPPED, where, str(at), signals, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if signals == "SIGKILL":
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 130
        *before, last = done.stderr.splitlines()
        assert last == f"zo-mlx: error: stopped after step {steps}; go on with the same command and --resume"
        assert ("Stopping after this step; once more to stop at once" in before) == (where != VALIDATION)
    assert done.stdout.count("Val loss") == validations
    assert len(Journal.read(tmp_path / "a/journal")) == steps
    _train(tiny, choice_data, tmp_path / "a", resume=True, **settings)
    for part in ("", "best"):
        assert (_values(tmp_path / "a" / part) == _values(whole / part)).all()
    records, expected = (Journal.read(path / "journal").records() for path in (tmp_path / "a", whole))
    assert [(r.step, r.loss, r.projected.tolist()) for r in records] == [
        (r.step, r.loss, r.projected.tolist()) for r in expected
    ]


def test_one_signal_is_enough_while_the_model_loads(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, LOADING, "1", "SIGINT", *_words(tiny, choice_data, tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "zo-mlx: error: interrupted"
    assert not (tmp_path / "a").exists()


def test_a_signal_from_outside(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-3, "steps_per_report": 1}
    words = _words(tiny, choice_data, tmp_path / "a", **settings, iters=100_000, val_batches=0)
    with subprocess.Popen(
        [sys.executable, "-m", "zo_mlx.cli", *words, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout
        assert json.loads(process.stdout.readline())["iteration"] == 1
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    done = len(Journal.read(tmp_path / "a/journal"))
    assert f"stopped after step {done}; go on with the same command and --resume" in errors
    _train(tiny, choice_data, tmp_path / "a", **settings, val_batches=0, iters=done + 2, resume=True)
    _train(tiny, choice_data, tmp_path / "whole", **settings, val_batches=0, iters=done + 2)
    assert (_values(tmp_path / "a") == _values(tmp_path / "whole")).all()


def test_handlers_are_left_as_they_were(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    def own(number: int, frame: object) -> None:
        """A program's own handler is not replaced, not even for a step."""

    before = signal.signal(signal.SIGTERM, own)
    seen: set[Any] = set()
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        _train(tiny, choice_data, tmp_path / "a", report=lambda e: seen.add(signal.getsignal(signal.SIGINT)))
        assert seen == {interrupt}
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (interrupt, own)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_in_another_thread(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Where no signal handlers can be installed."""
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(_train(tiny, choice_data, tmp_path / "a").iterations))
    thread.start()
    thread.join()
    assert results == [6]
