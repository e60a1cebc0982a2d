import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from zo_mlx.errors import UsageError
from zo_mlx.journal import Journal, Record

HEADER = {"config": {"seed": 3, "directions": 2}, "trained": [[0, 5]], "fingerprints": {"base_model": "ab"}}
RECORD_SIZE = 8 + 4 + 4 + 4 + 4 + 2 * 4 + 4


def _write(path: Path, count: int, header: dict[str, object] = HEADER) -> bytes:
    with Journal.create(path, header).open() as journal:
        for n in range(1, count + 1):
            journal.append(Record(n, 0.5 * n, np.array([n, -n], np.float32)))
    return path.read_bytes()


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    content = _write(tmp_path / "journal", 3)
    journal = Journal.read(tmp_path / "journal")
    assert journal.header == {**HEADER, "version": 11}
    assert [(r.step, r.loss, r.projected.tolist()) for r in journal.records()] == [
        (1, 0.5, [1, -1]),
        (2, 1.0, [2, -2]),
        (3, 1.5, [3, -3]),
    ]
    assert len(content) - len(_write(tmp_path / "empty", 0)) == 3 * RECORD_SIZE


def test_a_journal_cut_at_any_byte_keeps_its_whole_records_and_goes_on(tmp_path: Path) -> None:
    content = _write(tmp_path / "journal", 3)
    start = len(content) - 3 * RECORD_SIZE
    for length in range(start, len(content)):
        path = tmp_path / "cut"
        path.write_bytes(content[:length])
        whole = (length - start) // RECORD_SIZE
        assert len(Journal.read(path)) == whole
        assert path.stat().st_size == length, "reading must not write"
        with Journal.read(path).open() as journal:
            journal.append(Record(whole + 1, 0.5 * (whole + 1), np.array([whole + 1, -whole - 1], np.float32)))
        assert path.read_bytes() == content[: start + (whole + 1) * RECORD_SIZE]


def test_a_journal_cut_in_its_header_is_refused(tmp_path: Path) -> None:
    content = _write(tmp_path / "journal", 1)
    for length in range(len(content) - RECORD_SIZE):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(UsageError, match="cut"):
            Journal.read(tmp_path / "cut")


def test_any_changed_byte_is_detected(tmp_path: Path) -> None:
    content = _write(tmp_path / "journal", 3)
    last = len(content) - RECORD_SIZE
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / "bad").write_bytes(changed)
        if at >= last:  # could be a torn write: the record does not count
            assert len(Journal.read(tmp_path / "bad")) == 2
        else:
            with pytest.raises(UsageError, match="damaged|not a zo-mlx journal"):
                Journal.read(tmp_path / "bad")


def test_a_damaged_journal_can_be_cut_and_is_kept(tmp_path: Path) -> None:
    content = bytearray(_write(tmp_path / "journal", 4))
    start = len(content) - 4 * RECORD_SIZE
    content[start + RECORD_SIZE + 5] ^= 1
    (tmp_path / "journal").write_bytes(content)
    with Journal.read(tmp_path / "journal", cut=True).open():
        pass
    assert (tmp_path / "journal").read_bytes() == content[: start + RECORD_SIZE]
    assert (tmp_path / "journal.damaged-at-2").read_bytes() == content


def test_records_of_another_run_are_not_taken(tmp_path: Path) -> None:
    ours, theirs = (
        _write(tmp_path / "a", 2),
        _write(tmp_path / "b", 2, {**HEADER, "config": {"seed": 4, "directions": 2}}),
    )
    (tmp_path / "mixed").write_bytes(ours[:-RECORD_SIZE] + theirs[-RECORD_SIZE:])
    assert len(Journal.read(tmp_path / "mixed")) == 1


def _write_header(path: Path, header: object) -> None:
    content = json.dumps(header).encode()
    prefix = b"ZOMLXJ1\n" + struct.pack("<I", len(content)) + content
    path.write_bytes(prefix + struct.pack("<I", zlib.crc32(prefix)))


@pytest.mark.parametrize("directions", [0, -1, True, "2", 2.0, 1e999, 10**9, None])
def test_headers_with_absurd_directions_are_refused(directions: object, tmp_path: Path) -> None:
    _write_header(tmp_path / "journal", {**HEADER, "version": 11, "config": {"directions": directions}})
    with pytest.raises(UsageError, match="its header is not one of zo-mlx"):
        Journal.read(tmp_path / "journal")


@pytest.mark.parametrize(
    "header",
    [[], {}, {"version": 11}, {**HEADER, "config": 1}, {**HEADER, "fingerprints": {}}, {**HEADER, "fingerprints": [1]}],
)
def test_headers_of_something_else_are_refused(header: object, tmp_path: Path) -> None:
    _write_header(tmp_path / "journal", header)
    with pytest.raises(UsageError, match="its header is not one of zo-mlx"):
        Journal.read(tmp_path / "journal")


@pytest.mark.parametrize(
    "trained",
    [None, 5, [], [[]], [[0]], [[0, 5, 6]], [[5, 5]], [[5, 0]], [[0, 5], [5, 9]], [[0, 5], [3, 9]], [[-1, 5]],
     [[0, 2**33]], [[0, "5"]], [[0, 5.0]], [[True, 5]], "05", {"0": 5}],
)  # fmt: skip
def test_headers_with_absurd_places_of_the_trained_weights_are_refused(trained: object, tmp_path: Path) -> None:
    _write_header(tmp_path / "journal", {**HEADER, "version": 11, "trained": trained})
    with pytest.raises(UsageError, match="its header is not one of zo-mlx"):
        Journal.read(tmp_path / "journal")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "journal")
    with pytest.raises(UsageError, match="journal is not a file"):
        Journal.read(tmp_path / "journal")


def test_a_journal_that_would_replay_differently_is_refused(tmp_path: Path) -> None:
    _write_header(tmp_path / "journal", {**HEADER, "version": 1, "trained": 5})  # as that version had it
    with pytest.raises(UsageError, match="has version 1, this zo-mlx replays version 11"):
        Journal.read(tmp_path / "journal")


def test_a_record_is_on_the_disk_before_the_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("zo_mlx.journal.flush", lambda fd: synced.append(os.fstat(fd).st_size))
    with Journal.create(tmp_path / "journal", HEADER).open() as journal:
        journal.append(Record(1, 0.5, np.array([1, -1], np.float32)))
        assert synced == [(tmp_path / "journal").stat().st_size]
