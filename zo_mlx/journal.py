"""The journal: an append-only file that, with the base model, *is* the fine-tuned model. Format: docs/formats.md."""

import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import UsageError, ZoError
from .files import flush, reporting_disk_errors, write_atomically

FILE_NAME = "journal"
MAGIC = b"ZOMLXJ1\n"
_LENGTH = struct.Struct("<I")
_CRC = struct.Struct("<I")
_HEADER_LIMIT = 1 << 20
_MOST_DIRECTIONS = 1 << 16

# Raised whenever the same journal would be replayed to other values: directions, update rule, schedules.
VERSION = 1


@dataclass(frozen=True)
class Record:
    """One step: its number (from 1), its loss, and its projected gradients, (q,) float32."""

    step: int
    loss: float
    projected: np.ndarray

    @property
    def is_finite(self) -> bool:
        """Whether loss and projected gradients all are."""
        return math.isfinite(self.loss) and bool(np.isfinite(self.projected).all())


class Journal:
    """A run's journal: `create` a new one or `read` one that exists, then `open` it to append.

    Attributes:
        header: what a replay needs: `config`, the run's settings, and `fingerprints` of what it was run on.
        records: those in the file, in order.
    """

    def __init__(self, path: Path, header: dict[str, Any], seed: int, records: list[Record], size: int):
        self.path, self.header, self.records = path, header, records
        # Checksums are chained to the header's, so that a record of another journal is never taken for one of this.
        self._seed = seed
        self._size = size  # bytes of header and whole records
        self._layout = _layout(header)
        self._fd: int | None = None

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "Journal":
        """Write a new journal with no records."""
        header = {"version": VERSION, **header}
        content = json.dumps(header, sort_keys=True).encode()
        prefix = MAGIC + _LENGTH.pack(len(content)) + content
        seed = zlib.crc32(prefix)
        write_atomically(path, lambda p: p.write_bytes(prefix + _CRC.pack(seed)))
        return cls(path, header, seed, [], len(prefix) + _CRC.size)

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """Read and check a journal. A torn last record, left by a crash while it was written, is ignored.

        Raises:
            UsageError: no journal, one of another version, or one that is damaged before its last record.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(f"{path} is missing: {path.parent} holds no training run") from None
        except OSError as e:
            raise UsageError(f"{path} cannot be read: {e.strerror}") from None
        start = len(MAGIC) + _LENGTH.size
        if content[: len(MAGIC)] != MAGIC or len(content) < start:
            raise UsageError(f"{path} is not a zo-mlx journal of a version this program reads")
        (length,) = _LENGTH.unpack_from(content, len(MAGIC))
        end = start + length
        if length > _HEADER_LIMIT or len(content) < end + _CRC.size:
            raise UsageError(f"{path} is damaged: its header is cut short")
        seed = zlib.crc32(content[:end])
        if _CRC.unpack_from(content, end)[0] != seed:
            raise UsageError(f"{path} is damaged: its header fails its checksum")
        try:
            header = json.loads(content[start:end])
            layout = _layout(header)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UsageError(f"{path} is damaged: its header is not one of zo-mlx ({type(e).__name__}: {e})") from None
        if header.get("version") != VERSION:
            raise UsageError(f"{path} has version {header.get('version')}, this zo-mlx replays version {VERSION}")
        records: list[Record] = []
        at = end + _CRC.size
        while len(content) - at >= layout.size + _CRC.size:
            body = content[at : at + layout.size]
            (checksum,) = _CRC.unpack_from(content, at + layout.size)
            step, loss, *projected = layout.unpack(body)
            if checksum != zlib.crc32(body, seed) or step != len(records) + 1:
                break
            records.append(Record(step, loss, np.array(projected, np.float32)))
            at += layout.size + _CRC.size
        if len(content) - at > layout.size + _CRC.size:
            raise UsageError(f"{path} is damaged at record {len(records) + 1}, which is not the last")
        return cls(path, header, seed, records, at)

    @property
    def identity(self) -> str:
        """Identifies the run: the header's checksum, in hexadecimal."""
        return f"{self._seed:08x}"

    def append(self, record: Record) -> None:
        """Append a record and sync it to the disk: when this returns, the step counts."""
        assert self._fd is not None, "the journal is not open for appending"
        body = self._layout.pack(record.step, record.loss, *record.projected.tolist())
        content = body + _CRC.pack(zlib.crc32(body, self._seed))
        with reporting_disk_errors(self.path):
            if (written := os.write(self._fd, content)) != len(content):
                raise ZoError(f"cannot write {self.path}: {written} of {len(content)} bytes fitted; is the disk full?")
            flush(self._fd)
        self.records.append(record)

    def open(self) -> "Journal":
        """Open for appending, without a torn last record; use the result as a context manager."""
        with reporting_disk_errors(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._fd, self._size)
        return self

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _layout(header: dict[str, Any]) -> struct.Struct:
    """A record without its checksum: step (uint64), mean loss (float32), q projected gradients (float32).

    Raises ValueError, KeyError or TypeError for a header that is not a journal's.
    """
    directions = header["config"]["directions"]
    if type(directions) is not int or not 1 <= directions <= _MOST_DIRECTIONS:
        raise ValueError(f"{directions!r} directions")
    prints = header["fingerprints"]
    if not prints or not all(isinstance(v, str) for v in prints.values()):
        raise ValueError(f"fingerprints {prints!r}")
    return struct.Struct(f"<Qf{directions}f")
