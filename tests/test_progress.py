import fcntl
import os
import re
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from test_train import _train

from zo_mlx import progress
from zo_mlx.data import Example
from zo_mlx.progress import Meter, Progress


def test_a_bar_with_figures_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    figures = "loss 0.838, acc 61.5%, 412 tok/s, 12.15 GB"
    with open(theirs, "w") as stream:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("Training", 1000, "step") as bar:
            for _ in range(3):
                time.sleep(0.15)  # tqdm draws ten times a second
                bar.advance(figures)
    drawn = [line for line in os.read(terminal, 1 << 16).decode().split("\r") if "loss" in line]
    os.close(terminal)
    assert drawn
    assert all(line.endswith(f"left, {figures}") and len(line) <= 80 for line in drawn)


def test_lines_elsewhere_are_plain_and_say_how_it_goes(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
    settings: dict[str, Any] = {"iters": 3, "progress": True, "val_batches": 1}
    _train(tiny, choice_data, tmp_path / "a", **settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Training")]
    figures = r"loss -?\d+\.\d{3}, acc \d+\.\d%, \d+ tok/s, \d+\.\d\d GB"
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(rf"Training: {number}/3, \d+\.\d\d step/s, \d+ s left, {figures}", line)


def test_recent_figures_are_of_the_last_steps() -> None:
    meter = Meter()
    for i in range(30):
        meter.add(0.5, float(i), [Example([[1] * 10], [[]])])
    assert meter.recent(False, None).startswith("loss 19.500, 20 tok/s, ")  # the mean of 10 to 29
    assert meter.recent(True, 0.5).startswith("score -19.500, acc 50.0%, 20 tok/s, ")
