"""The directory beside the output in which a conversion works, and from which an interrupted one goes on."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UsageError, ZoError
from ..files import check_space, locked, read_json, reporting_disk_errors, sync, write_atomically

_IDENTITY = "conversion.json"


class Workspace:
    """What a conversion has made so far.

    Attributes:
        directory: for whatever is not to be part of the result.
        result: the directory that becomes the output.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if not self.begun:
            for leftover in directory.iterdir():  # of a process that was killed before it had begun
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.result = directory / "result"
        self.result.mkdir(exist_ok=True)

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return (self.directory / _IDENTITY).exists()

    def begin(self, identity: dict[str, Any]) -> None:
        """Note what is being converted, and how. Raises UsageError if something else was begun here."""
        identity = json.loads(json.dumps(identity))
        path = self.directory / _IDENTITY
        if not self.begun:
            write_atomically(path, lambda p: p.write_text(json.dumps(identity)))
        elif changed := [k for k, v in identity.items() if read_json(path).get(k) != v]:
            raise UsageError(
                f"the interrupted conversion had other {', '.join(changed)}: repeat its command, or remove "
                f"{self.directory}"
            )

    def check_space(self, needed: int) -> None:
        """Raise UsageError if the disk has not room for `needed` bytes in all, those already written included."""
        check_space(self.directory, needed - sum(f.stat().st_size for f in self.directory.rglob("*") if f.is_file()))


@contextlib.contextmanager
def workspace(out: Path, resume: bool) -> Iterator[Workspace]:
    """Yield a workspace beside `out`; if the block succeeds, its result is renamed to `out`, whole.

    What an interruption or a failure leaves is kept, from `begin` on, to be resumed. A process holds the workspace for
    itself.

    Args:
        out: must not exist.
        resume: go on with what is there; if nothing is, begin.

    Raises:
        UsageError: `out` exists; there is an interrupted conversion and it is not to be resumed; another process works
            on it.
        ZoError: the block failed, with a word on how to go on.
        Interrupted: so was the block.
    """
    if out.exists():
        raise UsageError(f"{out} already exists; name another directory or remove it first")
    directory = out.with_name(f".{out.name}.partial")
    with reporting_disk_errors(out):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(directory), reporting_disk_errors(out):
        work = Workspace(directory)
        resumed = work.begun
        if resumed and not resume:
            raise UsageError(f"a conversion to {out} was interrupted: go on with --resume, or remove {directory}")
        try:
            with reporting_disk_errors(out):
                yield work
                for file in (f for f in work.result.iterdir() if f.is_file()):
                    sync(file)
                work.result.rename(out)
                sync(out.parent)
        except BaseException as e:
            if not work.begun or (isinstance(e, UsageError) and not resumed):
                shutil.rmtree(directory, ignore_errors=True)
                raise
            if isinstance(e, UsageError):
                raise
            how = f"what is finished is kept in {directory}: go on with --resume"
            if isinstance(e, KeyboardInterrupt):
                raise Interrupted(f"interrupted; {how}") from None
            if isinstance(e, ZoError | RuntimeError | MemoryError):
                raise ZoError(f"{str(e) or type(e).__name__}; {how}") from e
            raise
        shutil.rmtree(directory)
