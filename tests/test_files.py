import fcntl
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from zo_mlx import files
from zo_mlx.errors import UsageError, ZoError


def test_errors_are_one_line() -> None:
    assert str(UsageError("file.yaml: expected a mapping\n   at line 3,  'a  b'\n")) == (
        "file.yaml: expected a mapping at line 3,  'a  b'"
    )


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write_atomically(path, lambda p: mx.save_safetensors(str(p), {"a": mx.ones(3)}))

    def fail(beside: Path) -> None:
        beside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ZoError, match="cannot write .*No space left"):
        files.write_atomically(path, fail)
    assert files.load_safetensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    for attempt in range(2):
        with pytest.raises(ValueError, match="stop"), files.new_directory(tmp_path / "out") as beside:
            (beside / f"file{attempt}").write_text("x")
            raise ValueError("stop")
        assert not (tmp_path / "out").exists()
    with files.new_directory(tmp_path / "deep/out") as beside:
        (beside / "file").write_text("x")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["deep", "deep/out", "deep/out/file"]


@pytest.mark.parametrize("length", [0, 4, 12, -3])
def test_truncated_safetensors_are_refused(length: int, tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.ones(3)})
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(content[:length])
    with pytest.raises(UsageError, match="b.safetensors is truncated or not a safetensors file"):
        files.load_safetensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100000, b"\xff\xfe"])
def test_json_that_is_not_an_object_is_refused(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match="config.json"):
        files.read_json(path)


FULL_DISK = """
import zo_mlx, resource, sys
from pathlib import Path
from zo_mlx.errors import ZoError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))  # a write past this size fails, as on a full disk
exec(sys.argv[2])
"""


def run_on_full_disk(code: str, size: int) -> str:
    """Run Python code in which no file can grow past `size` bytes; return its last line of output."""
    command = [sys.executable, "-c", FULL_DISK, str(size), code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def test_mlx_failing_to_write_is_one_clear_line(tmp_path: Path) -> None:
    code = f"""
import mlx.core as mx
from zo_mlx import files
try:
    files.write_atomically(
        Path({str(tmp_path)!r}, "a.safetensors"), lambda p: mx.save_safetensors(str(p), {{"a": mx.ones(10000)}})
    )
except ZoError as e:
    print("ZoError", e)
"""
    assert run_on_full_disk(code, 5000).startswith("ZoError cannot write")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made_again", [False, True])
def test_a_directory_removed_before_it_is_locked_is_not_held(
    tmp_path: Path, made_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        (tmp_path / "a").rmdir()
        if made_again:
            (tmp_path / "a").mkdir()
        lock(fd, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(UsageError, match="in use by another process"), files.locked(tmp_path / "a"):
        pass
