"""Rebuild an adapter from a model directory and the journal of its run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx

from . import adapter
from .config import TrainConfig, resolved
from .errors import UsageError
from .files import new_directory
from .journal import FILE_NAME, Journal, Record
from .memory import bounded_cache
from .model import check_fingerprints, checked_index, fingerprints, weight_shapes
from .optimizer import Optimizer
from .progress import Progress
from .step import replay as replay_records
from .trainable import Trainable


@dataclass
class Replay:
    """What was rebuilt: `steps` of the `recorded` ones, in so many seconds."""

    adapter_path: str
    steps: int
    recorded: int
    seconds: float


def replay(
    model: str | Path, journal: str | Path, adapter_path: str | Path, *, until: int | None = None, progress: bool = True
) -> Replay:
    """Rebuild an adapter, or an earlier moment of its run. No data is needed, and the model is not run.

    Training can go on from there, with `resume`. What validation found best, `best/`, is not in a journal.

    Args:
        model: the model directory that the run was on.
        journal: its journal, or the adapter directory that holds it.
        adapter_path: the directory to write; it must not exist.
        until: the last step to replay; 0 gives the values before training. None is the journal's last.
        progress: report progress on standard error.

    Raises:
        UsageError: the journal is damaged, is not of this model and index, or has fewer steps; `adapter_path` exists.
        ZoError: a file cannot be written.
    """
    directory, path, out = Path(model), Path(journal), Path(adapter_path)
    if out.exists():
        raise UsageError(f"{out} already exists")
    past = Journal.read(path / FILE_NAME if path.is_dir() else path, cut=until is not None)
    steps = len(past) if until is None else until
    if not 0 <= steps <= len(past):
        raise UsageError(f"--until {steps}: {past.damage or past.path} has steps 0 to {len(past)}")
    config = resolved(TrainConfig.recorded(past.header["config"]))
    index = checked_index(directory)
    prints = fingerprints(directory, index)
    check_fingerprints(f"the journal {past.path}", past.header["fingerprints"], prints)
    if past.spans[-1][1] > index.size:
        raise UsageError(f"{past.path} is damaged: it is of more weights than the index's {index.size}")
    trainable = Trainable(index, past.spans, config, lambda: weight_shapes(directory))
    optimizer = Optimizer(config, trainable.initial, trainable.at_random)

    started = time.perf_counter()
    with bounded_cache(), Progress("Replaying", steps, "step", progress) as bar:

        def records() -> Iterator[Record]:
            for record in islice(past.records(), steps):
                yield record
                bar.advance()

        values, state = replay_records(optimizer, trainable.initial, optimizer.state, records(), config, trainable.form)
        mx.eval(values)
    seconds = time.perf_counter() - started
    if not mx.isfinite(values).all():
        raise UsageError(f"{past.path} leads to values that are not finite")
    with new_directory(out) as beside:
        past.copy(beside / FILE_NAME, steps)
        found = adapter.Snapshot(steps, past.identity, prints, trainable.among_all(values))
        adapter.write_snapshot(beside, found, state)
    return Replay(str(out), steps, len(past), seconds)
