"""Reading files from strangers and writing files that cannot be half-written."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .errors import UsageError, ZoError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError if the file is missing, not JSON, or not an object."""
    if not path.is_file():  # a pipe or a device would be read for ever
        raise UsageError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path} is not readable JSON: {e}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """Check a safetensors file's header against its size and return its metadata. Raises UsageError."""
    with _open_safetensors(path) as f:
        return f.metadata() or {}


def count_tensors(path: Path) -> int:
    """The number of tensors in a safetensors file; its header is checked as well. Raises UsageError."""
    with _open_safetensors(path) as f:
        return len(f.keys())


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:  # or it may not be read
        raise UsageError(f"{path} {'cannot be read' if path.exists() else 'is missing'}") from None
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{path} is truncated or not a safetensors file ({e}); fetch or make it again") from None


def load_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Load a checked safetensors file: (tensors by name, metadata). Raises UsageError."""
    metadata = read_safetensors_metadata(path)
    try:
        return mx.load(str(path), format="safetensors"), metadata  # type: ignore[return-value]
    except RuntimeError as e:
        raise UsageError(f"{path} cannot be read by MLX: {e}") from None


def expanded(path: str) -> str:
    """A path whose ~ is replaced, as shells do, but not after = or in files. Raises UsageError if it is not text."""
    if not is_text(path):  # which safetensors are not written to
        raise UsageError(f"the path {path!r} is not valid UTF-8")
    return os.path.expanduser(path)  # noqa: PTH111  (pathlib takes ./a/b for a/b, which could be a hub id)


def is_text(string: str) -> bool:
    """Whether a string can be written as UTF-8: JSON escapes and undecodable bytes may leave lone surrogates."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, sync it, then rename it over `path`: readers see old or new."""
    # The suffix stays last because MLX's savers append theirs where it is missing.
    beside = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        with reporting_disk_errors(path):
            write(beside)
            sync(beside)
            beside.replace(path)
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`, which does not exist; then rename it, or remove it if the block fails."""
    beside = path.with_name(f".{path.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    with reporting_disk_errors(path):
        beside.mkdir(parents=True)
        try:
            yield beside
            settle(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def settle(directory: Path, path: Path) -> None:
    """Rename a directory to `path`, once all that is in it is on the disk."""
    for inside in (*directory.rglob("*"), directory):
        sync(inside)
    directory.rename(path)
    sync(path.parent)


def check_space(directory: Path, needed: int) -> None:
    """Raise UsageError if a directory's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UsageError(
            f"{directory.resolve()} needs {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free"
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for one process; death releases it. Raises UsageError if another process holds it."""
    with reporting_disk_errors(directory):
        fd = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the process that held it may have removed it: what is locked is no longer it.
            held = os.path.samestat(os.fstat(fd), directory.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise UsageError(f"{directory} is in use by another process")
        yield
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        flush(fd)
    finally:
        os.close(fd)


def flush(fd: int) -> None:
    """Flush an open file to the disk itself: on macOS, `fsync` alone leaves the data in the drive's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # network file systems do not have it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


@contextlib.contextmanager
def reporting_disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into a ZoError that names `path`."""
    try:
        yield
    except OSError as e:
        raise ZoError(f"cannot write {path}: {e.strerror or e}") from e
    except RuntimeError as e:
        # MLX's savers raise RuntimeError("[write] Unable to write N bytes to file.") and the like.
        if "write" in str(e) or "open file" in str(e):
            raise ZoError(f"cannot write {path}: {e} (is the disk full?)") from e
        raise
