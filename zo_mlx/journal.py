"""The journal: an append-only file that, with the base model, *is* the fine-tuned model. Format: docs/journal.md."""

import hashlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from .errors import UsageError, ZoError
from .files import flush, reporting_disk_errors, sync, write_atomically

FILE_NAME = "journal"
MAGIC = b"ZOMLXJ1\n"
_LENGTH = struct.Struct("<I")
_CRC = struct.Struct("<I")
_START = struct.Struct("<QI4sff")  # a record's step, tokens at once, data, loss and initial loss
_HEADER_LIMIT = 1 << 20
_MOST_DIRECTIONS = 1 << 10  # a replay makes a bit for each and each weight
_MOST_WEIGHTS = 1 << 32

# Raised whenever the same journal would be replayed to other values: directions, update rule, schedules.
VERSION = 11


@dataclass(frozen=True)
class Record:
    """One step.

    Attributes:
        step: its number, from 1.
        loss: at the values, or of all branches.
        projected: (q,) float32 projected gradients; with exact gradients the slopes along each of the K values, (K,)
            float32 that are bfloat16 numbers.
        tokens_at_once: the most tokens in a forward pass, 0 for no limit: the last bits depend on it, and a run may
            have to change it.
        data: 4 bytes that identify the training data.
        initial: the loss of the same examples at the values before the first step; NaN where it was not asked for.
    """

    step: int
    loss: float
    projected: np.ndarray
    tokens_at_once: int = 0
    data: bytes = bytes(4)
    initial: float = math.nan

    @property
    def is_finite(self) -> bool:
        """Whether loss and projected gradients all are."""
        return math.isfinite(self.loss) and bool(np.isfinite(self.projected).all())


class Journal:
    """A run's journal: `create` a new one or `read` one that exists, then `open` it to append.

    Attributes:
        header: what a replay needs: `config`, the run's settings; `trained`, where the trained weights are among those
            of the index, as pairs of start and end; and `fingerprints` of what it was run on.
        damage: what is wrong before its last record, where `read` was to pass over that; else None.
    """

    damage: str | None = None

    def __init__(self, path: Path, header: dict[str, Any], seed: int, start: int, count: int):
        self.path, self.header = path, header
        # Checksums are chained to the header's, so that a record of another journal is never taken for one of this.
        self._seed = seed
        self._start, self._count = start, count  # where records begin, and how many there are
        self._layout = _Layout.of(header)
        self._fd: int | None = None

    def __len__(self) -> int:
        """The number of records."""
        return self._count

    @property
    def size_bytes(self) -> int:
        """Of the header and the records."""
        return self._start + self._count * self._layout.size

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the trained weights are among those of the index."""
        return [(start, end) for start, end in self.header["trained"]]

    def records(self, first: int = 0) -> Iterator[Record]:
        """The records from a number (from 0) on, read from the file."""
        with self.path.open("rb") as f:
            f.seek(self._start + first * self._layout.size)
            for _ in range(first, self._count):
                yield self._layout.unpack(f.read(self._layout.size))

    def last(self) -> Record | None:
        """The last record, if there is any."""
        return next(self.records(self._count - 1)) if self._count else None

    def copy(self, path: Path, count: int) -> None:
        """Write a journal of the same run with the first `count` records."""

        def write(beside: Path) -> None:
            with self.path.open("rb") as source, beside.open("wb") as target:
                target.write(source.read(self._start))
                for _ in range(count):
                    target.write(source.read(self._layout.size))

        write_atomically(path, write)

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "Journal":
        """Write a new journal with no records."""
        header = {"version": VERSION, **header}
        content = json.dumps(header, sort_keys=True).encode()
        prefix = MAGIC + _LENGTH.pack(len(content)) + content
        seed = zlib.crc32(prefix)
        write_atomically(path, lambda p: p.write_bytes(prefix + _CRC.pack(seed)))
        return cls(path, header, seed, len(prefix) + _CRC.size, 0)

    @classmethod
    def read(cls, path: Path, cut: bool = False) -> "Journal":
        """Read and check a journal. A torn last record, left by a crash while it was written, is ignored.

        Args:
            cut: where it is damaged before its last record, take what is before that.

        Raises:
            UsageError: no journal, one of another version, or one that is damaged before its last record.
        """
        if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
            raise UsageError(f"{path} is not a file")
        try:
            with path.open("rb") as f:
                found = cls._checked(path, f, path.stat().st_size)
        except FileNotFoundError:
            raise UsageError(f"{path} is missing: {path.parent} holds no training run") from None
        except OSError as e:
            raise UsageError(f"{path} cannot be read: {e.strerror}") from None
        if found.damage and not cut:
            raise UsageError(f"{found.damage}; zo-mlx train --resume goes on from before it")
        return found

    @classmethod
    def _checked(cls, path: Path, f: BinaryIO, size: int) -> "Journal":
        """`read`, of an open file of this many bytes."""
        start = f.read(len(MAGIC) + _LENGTH.size)
        if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + _LENGTH.size:
            raise UsageError(f"{path} is not a zo-mlx journal of a version this program reads")
        (length,) = _LENGTH.unpack_from(start, len(MAGIC))
        if length > _HEADER_LIMIT or size < len(start) + length + _CRC.size:
            raise UsageError(f"{path} is damaged: its header is cut short")
        content = f.read(length)
        seed = zlib.crc32(start + content)
        if _CRC.unpack(f.read(_CRC.size))[0] != seed:
            raise UsageError(f"{path} is damaged: its header fails its checksum")
        try:
            header = json.loads(content)
            if type(version := header["version"]) is not int:
                raise ValueError(f"version {version!r}")
            layout = _Layout.of(header) if version == VERSION else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UsageError(f"{path} is damaged: its header is not one of zo-mlx ({type(e).__name__}: {e})") from None
        if layout is None:
            raise UsageError(f"{path} has version {version}, this zo-mlx replays version {VERSION}")
        begin, count, each = f.tell(), 0, layout.size
        while begin + (count + 1) * each <= size:
            record = f.read(each)
            (checksum,) = _CRC.unpack(record[-_CRC.size :])
            if checksum != zlib.crc32(record[: -_CRC.size], seed) or _START.unpack_from(record)[0] != count + 1:
                break
            count += 1
        found = cls(path, header, seed, begin, count)
        if size - begin - count * each > each:
            found.damage = f"{path} is damaged at record {count + 1}, which is not the last"
        return found

    @property
    def identity(self) -> str:
        """Identifies the run: the header's checksum, in hexadecimal."""
        return f"{self._seed:08x}"

    def append(self, record: Record) -> None:
        """Append a record and sync it to the disk: when this returns, the step counts."""
        assert self._fd is not None, "the journal is not open for appending"
        body = self._layout.pack(record)
        content = body + _CRC.pack(zlib.crc32(body, self._seed))
        with reporting_disk_errors(self.path):
            if (written := os.write(self._fd, content)) != len(content):
                raise ZoError(f"cannot write {self.path}: {written} of {len(content)} bytes fitted; is the disk full?")
            flush(self._fd)
        self._count += 1

    def open(self) -> "Journal":
        """Open for appending, without a torn last record; use the result as a context manager.

        Before damaged records, and whole ones after them, are cut off, they are copied beside.
        """
        with reporting_disk_errors(self.path):
            if self.damage:
                sync(shutil.copyfile(self.path, self.path.with_name(f"{FILE_NAME}.damaged-at-{self._count + 1}")))
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._fd, self.size_bytes)
        return self

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


# The fingerprints of the training data.
DATA = ("train.jsonl", "tokenized training set")


def data_id(fingerprints: dict[str, str]) -> bytes:
    """The 4 bytes that identify the training data in a record, from a header's fingerprints."""
    own = " ".join(fingerprints[name] for name in DATA if name in fingerprints)
    return hashlib.sha256(own.encode()).digest()[:4]


def record_size(header: dict[str, Any]) -> int:
    """How many bytes a step takes in a journal with this header."""
    return _Layout.of(header).size


@dataclass(frozen=True)
class _Layout:
    """Records of `count` projected gradients, of 2 bytes each if they are exact, else 4."""

    count: int
    exact: bool

    @classmethod
    def of(cls, header: dict[str, Any]) -> "_Layout":
        """From a journal's header. Raises ValueError, KeyError or TypeError for one that is no journal's."""
        exact = header["config"].get("gradient") == "exact"
        edges = [edge for start, end in header["trained"] for edge in (start, end)]
        rising = all(type(e) is int for e in edges) and edges == sorted(set(edges))
        if not edges or not rising or edges[0] < 0 or edges[-1] > _MOST_WEIGHTS:
            raise ValueError(f"trained weights at {header['trained']!r}")
        count = sum(edges[1::2]) - sum(edges[::2]) if exact else header["config"]["directions"]
        if type(count) is not int or not 1 <= count <= (_MOST_WEIGHTS if exact else _MOST_DIRECTIONS):
            raise ValueError(f"{count!r} directions")
        prints = header["fingerprints"]
        if not prints or not all(isinstance(v, str) for v in prints.values()):
            raise ValueError(f"fingerprints {prints!r}")
        return cls(count, exact)

    @property
    def size(self) -> int:
        """Bytes of a record, its checksum included."""
        return _START.size + (2 if self.exact else 4) * self.count + _CRC.size

    def pack(self, record: Record) -> bytes:
        """All but the checksum."""
        slopes = record.projected.astype("<f4")
        if self.exact:
            slopes = (slopes.view("<u4") >> 16).astype("<u2")  # the upper halves: the lower ones are 0
        start = _START.pack(record.step, record.tokens_at_once, record.data, record.loss, record.initial)
        return start + slopes.tobytes()

    def unpack(self, content: bytes) -> Record:
        """From a record with its checksum."""
        slopes = np.frombuffer(content[_START.size : -_CRC.size], "<u2" if self.exact else "<f4")
        if self.exact:
            slopes = (slopes.astype("<u4") << 16).view("<f4")
        step, tokens_at_once, data, loss, initial = _START.unpack_from(content)
        return Record(step, loss, slopes, tokens_at_once, data, initial)
