"""What the scripts have in common: runs on a tiny model, made the same every time, and what a run leaves behind."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import convert_tiny, write_choice_data, write_hf_llama

from zo_mlx.adapter import REPORT
from zo_mlx.events import FILE_NAME as EVENTS

# Snapshots, validations and best values in almost every step.
OFTEN = {"save_every": 2, "steps_per_eval": 3, "val_batches": 1, "steps_per_report": 1, "progress": False}
KINDS: dict[str, dict[str, Any]] = {
    "automatic learning rate": {"batch_size": 2},
    "Adam, two-sided": {"batch_size": 2, "optimizer": "adam", "estimator": "two-sided", "learning_rate": 1e-3},
    "exact gradients": {"batch_size": 2, "gradient": "exact"},
}


def settings_in(work: Path) -> dict[str, Any]:
    """The settings of a run on the model and data that `prepare` has made."""
    return {**OFTEN, "model": str(work / "model"), "data": str(work / "data"), "adapter_path": str(work / "adapter")}


def prepare(work: Path) -> None:
    """Make the tiny model and its data."""
    convert_tiny(write_hf_llama(work / "hf"), work / "model")
    write_choice_data(work / "data")


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory, by their path in it, but for those of the report: they have times in them."""
    files = (f for f in sorted(directory.rglob("*")) if f.is_file() and f.name not in (EVENTS, REPORT))
    return {str(f.relative_to(directory)): f.read_bytes() for f in files}


def validations(directory: Path) -> list[dict[str, Any]]:
    """Those in a run's file of events, which must be whole lines, but for when they were the best: a run that was
    killed when it had written the best values finds them no better."""
    path = directory / EVENTS
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in e.items() if k not in ("time", "best")} for e in events if e.get("event") == "validation"]
