"""Go on with a run: its settings, what it must find unchanged, and its state after the last step."""

import contextlib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from . import adapter
from .adapter import Best
from .config import CHANGEABLE, TrainConfig
from .errors import UsageError
from .files import check_space, locked, reporting_disk_errors, write_atomically
from .hub import is_hub_id
from .journal import DATA, FILE_NAME, Journal, data_id, record_size
from .metric import is_function
from .model import check_fingerprints
from .ranks import Ranks
from .run import Run
from .step import replay


def resumed_config(header: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The settings in a journal's header with the given ones; only those in `CHANGEABLE` may differ."""
    recorded = header["config"]
    own = {"adapter_path": TrainConfig.adapter_path, "report_to": None}
    TrainConfig.recorded(recorded, **own)
    asked = TrainConfig(**given)
    asked.check()
    # Before they are put together: what differs may not go with the rest.
    if different := [k for k in sorted(given.keys() - CHANGEABLE) if getattr(asked, k) != recorded[k]]:
        listed = ", ".join(f"{k} was {recorded[k]}" for k in different)
        raise UsageError(f"a resumed run keeps its settings: {listed}")
    config = TrainConfig.recorded(recorded, **{**own, **given})
    if is_function(config.objective) and "objective" not in given:
        # A run may come from a stranger: it is not to say what functions run, or what is fetched or sent.
        raise UsageError(f"the run's objective is a function: give --objective {config.objective} to go on with it")
    if config.hf_dataset is not None and "hf_dataset" not in given:
        raise UsageError("the run's data are of hf_dataset blocks: give their file with --config to go on with it")
    if is_hub_id(config.data) and config.hf_dataset is None and "data" not in given:
        if "train.jsonl" in header["fingerprints"]:
            raise UsageError(f"the run's data are no longer in {config.data}: say with --data where they are")
        raise UsageError(f"the run's data are of the hub: give --data {config.data} to go on with it")
    return config


def share_journal(adapter_path: Path, ranks: Ranks) -> None:
    """Give each rank the longest journal that one of them has, where its own is shorter or missing.

    A machine may have been another rank, so that its journal is in that one's directory.

    Raises:
        UsageError: there are journals of several runs.
    """
    path = ranks.directory(adapter_path) / FILE_NAME
    longest = _longest(path, [adapter_path / FILE_NAME, *adapter_path.glob(f"rank-*/{FILE_NAME}")])
    own = [len(longest), int(longest.identity, 16), longest.size_bytes] if longest else [-1, 0, 0]
    counts, identities, sizes = ranks.gather(np.array(own)).T
    source = int(counts.argmax())
    for rank in np.flatnonzero(counts >= 0):
        if identities[rank] != identities[source]:
            raise UsageError(f"{adapter_path}: rank {rank} has the journal of another run than rank {source}")
    has_it = longest is not None and longest.path == path and len(longest) == counts[source]
    if counts[source] < 0 or ranks.gather(np.array(has_it)).all():
        return
    pieces = ranks.hear(source, longest.path if longest and ranks.rank == source else None, int(sizes[source]))
    if has_it:
        _write(Path(os.devnull), pieces)  # all take part in it
        return
    with reporting_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        write_atomically(path, lambda beside: _write(beside, pieces))


def _longest(own: Path, paths: Iterable[Path]) -> Journal | None:
    """The one with most records among those of the same run; damaged ones are left alone."""
    found = []
    for path in {own, *paths}:
        with contextlib.suppress(UsageError):
            found.append(Journal.read(path, cut=True))
    mine = [journal.identity for journal in found if journal.path == own]
    same = [journal for journal in found if journal.identity in mine or not mine]
    if len({journal.identity for journal in same}) > 1:
        raise UsageError(f"there are journals of several runs: {', '.join(sorted(str(j.path) for j in same))}")
    return max(same, key=lambda journal: (len(journal), journal.path == own), default=None)


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(pieces)


def resume(run: Run, past: Journal, changed_data: bool, given: dict[str, Any]) -> None:
    """Restore the state after a journal's last record: from a snapshot if there is one, and by replay.

    Where the best values are lost, all is replayed, and validated again on the way.

    Args:
        changed_data: go on even if the training data is not that of the last record.
        given: the settings asked for.
    """
    others = {name: value for name, value in run.fingerprints.items() if name not in DATA}
    check_fingerprints(f"the journal {past.path}", past.header["fingerprints"], others)
    _check_data(run, past, changed_data)
    if past.spans != run.depth.spans:
        raise UsageError(f"{past.path} is of other trained weights: those at {past.spans}, not {run.depth.spans}")
    if past.damage:
        run.warn(f"{past.damage}: going on after step {len(past)}; the whole journal is kept beside it")
    check_space(run.directory, (run.config.iters - len(past)) * record_size(past.header))
    with reporting_disk_errors(run.directory):
        adapter.remove_lora(run.directory)
        adapter.remove_later(run.directory, len(past))
    run.follow(past, settings=given, resume=True, changed_data=changed_data)
    last = past.last()
    if last and last.tokens_at_once != (run.config.tokens_at_once or 0):  # memory was short
        run.config.tokens_at_once, run.config.keep_blocks = last.tokens_at_once or None, 0
    best = adapter.read_best(run.directory, past.identity)
    found = [best.iteration, best.loss] if best and best.iteration <= len(past) else [-1, 0.0]
    iteration, loss = run.ranks.gather(np.array(found))[0].tolist()  # the first rank's: the others keep none
    run.best = Best(int(iteration), loss) if iteration >= 0 else None
    every = run.config.steps_per_eval
    lost = range(0, len(past), every) if run.validates and run.best is None else ()
    if not lost:
        _restore(run, past)
    for number in [*lost, len(past)]:
        some = islice(past.records(run.done), number - run.done)
        run.values, run.state = replay(run.optimizer, run.values, run.state, some, run.config, run.trainable.form)
        run.done = number
        if number in lost:
            run.validate()


def _check_data(run: Run, past: Journal, changed_data: bool) -> None:
    """Raise UsageError, or warn, if the training data is not that of the last record."""
    recorded, last = past.header["fingerprints"], past.last()
    if data_id(run.fingerprints) == (last.data if last else data_id(recorded)):
        return
    file, tokens = (recorded.get(name) == run.fingerprints.get(name) for name in DATA)
    what = "the chat template, or how the data is tokenized," if file and not tokens else "the training data"
    if not changed_data:
        raise UsageError(f"{past.path}: {what} changed since step {len(past)}; --changed-data goes on all the same")
    run.warn(f"{what} changed: from step {len(past) + 1} on, the run is not the one that it would have been")


def _restore(run: Run, past: Journal) -> None:
    """Take the state of a snapshot of this run, if there is one."""
    try:
        snapshot = adapter.read_snapshot(run.directory)
    except UsageError:
        return  # the journal alone suffices
    if snapshot.journal == past.identity and snapshot.step <= len(past):
        state = adapter.read_optimizer_state(run.directory, snapshot, like=run.state)
        if state is not None and snapshot.values.shape == run.trainable.everything.shape:
            run.values, run.state, run.done = run.trainable.of(snapshot.values), state, snapshot.step
