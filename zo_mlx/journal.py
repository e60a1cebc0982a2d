"""The journal: an append-only file that, with the base model, *is* the fine-tuned model. Format: docs/formats.md."""

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import UsageError, ZoError
from .files import reporting_disk_errors, sync, write_atomically

FILE_NAME = "journal"
MAGIC = b"ZOMLXJ1\n"
_LENGTH = struct.Struct("<I")
_CRC = struct.Struct("<I")
_HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class Record:
    """One step: its number (from 1), the mean loss of its branches, and its projected gradients, (q,) float32."""

    step: int
    loss: float
    projected: np.ndarray


class Journal:
    """An open journal. Use `create` for a new run, `read` to look at one, `resume` to go on with one.

    Attributes:
        header: what a replay needs: fingerprints, settings, number of directions.
        records: those in the file, in order.
    """

    def __init__(self, path: Path, header: dict[str, Any], seed: int, records: list[Record]):
        self.path, self.header, self.records = path, header, records
        # Checksums are chained to the header's, so that a record of another journal is never taken for one of this.
        self._seed = seed
        self._fd: int | None = None

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "Journal":
        """Write a new journal with no records and open it for appending."""
        content = json.dumps(header, sort_keys=True).encode()
        prefix = MAGIC + _LENGTH.pack(len(content)) + content
        seed = zlib.crc32(prefix)
        write_atomically(path, lambda p: p.write_bytes(prefix + _CRC.pack(seed)))
        journal = cls(path, header, seed, [])
        journal._open()
        return journal

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """Read and check a journal. A torn last record, left by a crash while it was written, is ignored.

        Raises:
            UsageError: no journal, or one that is damaged before its last record.
        """
        return cls._parse(path)[0]

    @classmethod
    def resume(cls, path: Path) -> "Journal":
        """As `read`, then cut a torn last record off and open for appending."""
        journal, good = cls._parse(path)
        with reporting_disk_errors(path):
            os.truncate(path, good)
            sync(path)
        journal._open()
        return journal

    @classmethod
    def _parse(cls, path: Path) -> tuple["Journal", int]:
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
            layout = _layout(int(header["directions"]))
            header["config"].items(), header["fingerprints"].items()
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
            raise UsageError(f"{path} is damaged: its header is not one of zo-mlx ({type(e).__name__}: {e})") from None
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
        return cls(path, header, seed, records), at

    @property
    def identity(self) -> str:
        """Identifies the run: the header's checksum, in hexadecimal."""
        return f"{self._seed:08x}"

    def append(self, record: Record) -> None:
        """Append a record and sync it to the disk: when this returns, the step counts."""
        assert self._fd is not None, "the journal is not open for appending"
        body = _layout(self.header["directions"]).pack(record.step, record.loss, *record.projected.tolist())
        content = body + _CRC.pack(zlib.crc32(body, self._seed))
        with reporting_disk_errors(self.path):
            if (written := os.write(self._fd, content)) != len(content):
                raise ZoError(f"cannot write {self.path}: {written} of {len(content)} bytes fitted; is the disk full?")
            os.fsync(self._fd)
        self.records.append(record)

    def _open(self) -> None:
        with reporting_disk_errors(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _layout(directions: int) -> struct.Struct:
    """A record without its checksum: step (uint64), mean loss (float32), q projected gradients (float32)."""
    return struct.Struct(f"<Qf{directions}f")
