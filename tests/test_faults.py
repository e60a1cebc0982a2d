"""The scripts under tests/faults, for a moment each."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [
        "kill_train.py --kills 2",
        "power_loss.py --records 1 --every 200 --places 3 --kind Adam,_two-sided",
        "disk_full.py --steps 1 --every 5 --kind exact_gradients",
    ],
)
def test_faults_are_survived(command: str) -> None:
    name, *flags = command.split()
    script = [sys.executable, str(Path(__file__).parent / "faults" / name), *(f.replace("_", " ") for f in flags)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
