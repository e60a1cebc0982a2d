"""What a run reports, kept in its directory: `events.jsonl`. Format: docs/formats.md."""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import __version__
from .errors import ZoError
from .files import reporting_disk_errors, write_atomically

FILE_NAME = "events.jsonl"
FORMAT = "zo-mlx-events"
VERSION = 1

# What is held of reports on the training, of which there are many.
_HELD = {"event", "iteration", "time", "learning_rate", "tokens_per_second", "peak_memory"}
_MOST_BRACKETS = 200  # of a line: what is nested deeper than any event is not unpacked

Event = dict[str, Any]


class EventLog:
    """Writes a run's events to a file, and hands them on.

    What the file has of this run is kept, but for torn lines and for steps that the journal does not have. A file of
    another run is replaced; one that cannot be written is a warning.

    Args:
        directory: of the run.
        journal: the identity of its journal.
        done: how many steps that has.
        report: gets the events, too.

    Attributes:
        events: of the whole run, each with its `time` in seconds since 1970; of `train` no more than is drawn.
    """

    def __init__(self, directory: Path, journal: str, done: int, report: Callable[[Event], None]):
        self._path, self._report = directory / FILE_NAME, report
        self._broken = False  # nothing is to follow half a line
        past = read_events(self._path, journal, done)
        self.events = [_held(event) for event in past]
        lines = [{"format": FORMAT, "version": VERSION, "journal": journal}, *past]
        content = b"".join(map(_line, lines))
        with self._warning():
            write_atomically(self._path, lambda beside: beside.write_bytes(content))

    def __call__(self, event: Event) -> None:
        self._add(event)
        self._report(event)

    def begin(self, iteration: int, before: Iterable[Event], **how: Any) -> None:
        """Note in the file alone that training begins or goes on, how, and where; and what was reported `before`."""
        versions = {"zo_mlx": __version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
        # Not `platform.platform`, which runs a program.
        system = f"{platform.system()} {platform.release()} {platform.machine()}"
        place = {"system": system, "device": str(mx.device_info().get("device_name"))}
        for event in ({"event": "begun", "iteration": iteration, **how, **versions, **place}, *before):
            self._add(event)

    def _add(self, event: Event) -> None:
        event = {**event, "time": round(time.time(), 3)}
        self.events.append(_held(event))
        if not self._broken:
            with self._warning(), reporting_disk_errors(self._path):
                self._append(_line(event))

    def _append(self, line: bytes) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(fd, line) != len(line):
                raise ZoError(f"cannot write {self._path}: no more than a part of a line fitted; is the disk full?")
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except ZoError as e:
            self._broken = True
            self._report({"event": "warning", "message": f"what happens is not kept for the report: {e}"})


def _held(event: Event) -> Event:
    return {k: v for k, v in event.items() if k in _HELD} if event["event"] == "train" else event


def _line(event: Event) -> bytes:
    return json.dumps(event, default=str).encode() + b"\n"  # YAML has dates


def read_events(path: Path, journal: str, done: int) -> list[Event]:
    """The events of a run's first `done` steps; none if the file is not to be read, or not of this journal."""
    lines: list[bytes] = []
    with contextlib.suppress(OSError):
        lines = path.read_bytes().splitlines() if path.is_file() else []
    found: list[Event] = []
    for line in lines:
        if line.count(b"[") + line.count(b"{") > _MOST_BRACKETS:
            continue
        with contextlib.suppress(ValueError):  # torn, or not ours
            if isinstance(event := json.loads(line), dict):
                found.append(event)
    if not found or [found[0].get(key) for key in ("format", "version", "journal")] != [FORMAT, VERSION, journal]:
        return []
    return [event for event in found[1:] if _is_event(event, done)]


def _is_event(event: Event, done: int) -> bool:
    at, when = event.get("iteration", 0), event.get("time")
    known = isinstance(event.get("event"), str) and type(when) is float and math.isfinite(when)
    return known and type(at) is int and 0 <= at <= done
