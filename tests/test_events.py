import json
from pathlib import Path
from typing import Any

import pytest
from test_files import run_on_full_disk
from test_train import FAST, _train

from zo_mlx.events import FILE_NAME, EventLog, read_events
from zo_mlx.journal import Journal

RUN = "0123abcd"


def _lines(path: Path) -> list[dict[str, Any]]:
    """As any reader of JSON lines has them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _log(directory: Path, steps: int) -> list[dict[str, Any]]:
    """Write a log, and return what it has told."""
    told: list[dict[str, Any]] = []
    log = EventLog(directory, RUN, 0, told.append)
    for step in range(steps + 1):
        log({"event": "validation", "iteration": step, "loss": 1 / (step + 1)})
    return told


def test_a_runs_file_holds_what_it_told(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    _train(tiny, choice_data, tmp_path / "a", report=events.append, test=True)
    head, begun, *written = _lines(tmp_path / "a" / FILE_NAME)
    identity = Journal.read(tmp_path / "a/journal").identity
    assert head == {"format": "zo-mlx-events", "version": 1, "journal": identity}
    assert (begun["event"], begun["iteration"]) == ("begun", 0)
    assert begun["settings"]["batch_size"] == FAST["batch_size"]
    times = [event.pop("time") for event in (begun, *written)]
    assert times == sorted(times)
    assert written == events
    # What a run warns of before it has a file comes after `begun`.
    _train(tiny, choice_data, tmp_path / "b", report=events.append, val_batches=0, patience=1)
    (early,) = (event for event in events if "--patience" in event.get("message", ""))
    assert {**early, "time": 0.0} == {**_lines(tmp_path / "b" / FILE_NAME)[2], "time": 0.0}


def test_a_file_cut_anywhere_gives_the_events_before(tmp_path: Path) -> None:
    _log(tmp_path, 3)
    path = tmp_path / FILE_NAME
    content, events = path.read_bytes(), _lines(path)[1:]
    for at in range(len(content)):
        path.write_bytes(content[:at])
        # A line is there when it is whole, with or without what ends it.
        whole = max(0, content[: at + 1].count(b"\n") - 1)
        assert read_events(path, RUN, 3) == events[:whole]
        if at % 9 == 0:
            EventLog(tmp_path, RUN, 3, print)({"event": "test"})
            assert [e["event"] for e in _lines(path)[1:]] == ["validation"] * whole + ["test"]


def test_what_is_not_of_this_run_and_its_steps_is_left_out(tmp_path: Path) -> None:
    _log(tmp_path, 4)
    path = tmp_path / FILE_NAME
    assert [e["iteration"] for e in read_events(path, RUN, 2)] == [0, 1, 2]  # the journal has lost its end
    assert read_events(path, "another", 4) == []
    with path.open("a") as f:
        for line in (
            "[]", "{", '{"event": 1, "time": 1.0}', '{"event": "test"}', '{"event": "test", "time": 1e999}',
            '{"event": "test", "time": 1.0, "iteration": -1}', '{"event": "test", "time": 1.0, "iteration": "1"}',
            '{"event": "test", "time": 1.0, "iteration": ' + 5000 * "9" + "}", "[" * 100_000,
            '{"event": "begun", "time": 1.0, "settings": ' + 300 * "[" + 300 * "]" + "}",
        ):  # fmt: skip
            f.write(line + "\n")
    assert len(read_events(path, RUN, 4)) == 5
    path.unlink()
    path.mkdir()
    assert read_events(path, RUN, 4) == []
    assert read_events(tmp_path / "nothing", RUN, 4) == []


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    """An adapter directory may be a stranger's."""
    (tmp_path / "mine").write_text("mine\n")
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "mine")
    _log(tmp_path, 1)
    assert (tmp_path / "mine").read_text() == "mine\n"
    assert len(_lines(tmp_path / FILE_NAME)) == 3


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from zo_mlx.events import EventLog
told = []
log = EventLog(Path({str(tmp_path)!r}), "{RUN}", 0, told.append)
for step in range(9):
    log({{"event": "validation", "iteration": step}})
print(len(told), [e["message"] for e in told if e["event"] == "warning"])
"""
    text = run_on_full_disk(code, 200)
    assert text.startswith("10 ['what happens is not kept for the report: cannot write ")
    assert [e["iteration"] for e in read_events(tmp_path / FILE_NAME, RUN, 9)] == [0, 1]
    (tmp_path / "other" / FILE_NAME).mkdir(parents=True)
    told: list[dict[str, Any]] = []
    log = EventLog(tmp_path / "other", RUN, 0, told.append)  # not even begun
    log({"event": "test"})
    assert [e["event"] for e in told] == ["warning", "test"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_goes_on_in_its_file(lost: bool, tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    _train(tiny, choice_data, out, iters=5, steps_per_eval=2)
    if lost:
        (out / FILE_NAME).unlink()
    _train(tiny, choice_data, out, resume=True, iters=6)
    events = _lines(out / FILE_NAME)[1:]
    assert [(e["iteration"], e.get("resume", False)) for e in events if e["event"] == "begun"] == [
        *([] if lost else [(0, False)]),
        (5, True),
    ]
    steps = [e["iteration"] for e in events if e["event"] == "validation"]
    assert steps == ([5, 6] if lost else [0, 2, 4, 5, 5, 6])
    _train(tiny, choice_data, out, overwrite=True, iters=1)
    assert max(e["iteration"] for e in _lines(out / FILE_NAME) if "iteration" in e) == 1
