"""The training entry point: which run to begin or to go on with, and who may write to its directory."""

import contextlib
import gc
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import adapter, journal
from .config import TrainConfig
from .errors import UsageError
from .files import locked, reporting_disk_errors
from .memory import bounded_cache, held_below, room, with_margin
from .ranks import Ranks
from .result import TrainResult
from .resume import resume as resume_run
from .resume import resumed_config, share_journal
from .run import Report, Run
from .tracking import followed


def train(
    *,
    resume: bool = False,
    overwrite: bool = False,
    changed_data: bool = False,
    report: Report | None = None,
    progress: bool = True,
    **settings: Any,
) -> TrainResult:
    """Fine-tune a converted model's sensitive weights.

    Processes that `mlx.launch` has started train together: the first one reports and writes the result.

    Args:
        resume: go on with the run in `adapter_path`; its own settings hold, and those given must agree with them.
        overwrite: replace a run in `adapter_path`.
        changed_data: with `resume`, go on even if the training data is not what it was. The steps to come are then
            those of a run with the new data, and the journal says from which step on.
        report: called with every event (`train`, `validation`, `test`, `stopped`, `chosen`,
            `returned`, `restarted`, `exported`, `warning`) as a dictionary; by default warnings become Python's.
        progress: report progress on standard error.
        **settings: the fields of `TrainConfig`: model, data, adapter_path, iters, learning_rate ...

    Raises:
        UsageError: wrong settings, model or data; a run is already in `adapter_path`, or not the one to resume.
        ZoError: the loss is not finite; a file cannot be written; data of the hub cannot be fetched; the objective's
            function fails; another rank is lost; a service does not begin.
        Interrupted: Ctrl-C, which lets a step be finished, or twice, which does not; the run can be resumed.
    """
    if unknown := set(settings) - {f.name for f in fields(TrainConfig)}:
        raise UsageError(f"no such settings: {', '.join(sorted(unknown))}")
    given = TrainConfig(**settings)
    given.check()
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    try:
        return _train(given, settings, resume, overwrite, changed_data, report or _print_warning, progress)
    finally:
        gc.collect()  # a run's parts refer to each other: its model would stay beside that of the next one


def _train(
    given: TrainConfig,
    settings: dict[str, Any],
    resume: bool,
    overwrite: bool,
    changed_data: bool,
    report: Report,
    progress: bool,
) -> TrainResult:
    ranks = Ranks(given.rank_timeout)
    directory = ranks.directory(Path(given.adapter_path))
    with contextlib.ExitStack() as held, bounded_cache():
        if resume:
            share_journal(Path(given.adapter_path), ranks)
            if not adapter.has_run(directory):
                raise UsageError(f"{directory} holds no training run to resume")
            held.enter_context(locked(directory))
            past = journal.Journal.read(directory / journal.FILE_NAME, cut=True)
            run = Run(resumed_config(past.header, settings), report, progress, ranks)
            run.report = followed(run.report, run.config) if ranks.is_first else run.report
            resume_run(run, past, changed_data, settings)
        else:
            check_place(directory, overwrite, ranks.count)
            run = Run(given, report, progress, ranks)
            with reporting_disk_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(directory))
            check_place(directory, overwrite, ranks.count)  # another process may have begun one in the meantime
            run.report = followed(run.report, run.config) if ranks.is_first else run.report
            run.start(settings)
        held.enter_context(run.journal.open())
        limit = run.config.memory_limit
        held.enter_context(held_below(room(run.cache_bytes) if limit is None else with_margin(int(limit * 1e9))))
        return run.go()


def check_place(directory: Path, overwrite: bool, ranks: int = 1) -> None:
    """Raise UsageError where a new run, of so many ranks, would mix with a model, or replace something unasked."""
    if (directory / "config.json").exists():
        raise UsageError(f"{directory} holds a model: give another --adapter-path")
    if overwrite or not adapter.would_replace(directory, ranks):
        return
    if (directory / journal.FILE_NAME).exists():
        raise UsageError(
            f"{directory} already holds a run; give --resume to go on with it or --overwrite to replace it; "
            "zo-mlx evaluate measures it"
        )
    raise UsageError(
        f"{directory} holds files that a run would replace, but no run of zo-mlx; give another --adapter-path, or "
        "--overwrite if they are of no use"
    )


def _print_warning(event: dict[str, Any]) -> None:
    if event["event"] == "warning":
        warnings.warn(event["message"], stacklevel=2)
