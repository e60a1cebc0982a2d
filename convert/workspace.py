"""The directory beside the output in which a conversion works, and from which an interrupted one goes on."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UsageError, ZoError
from ..files import check_space, locked, read_json, reporting_disk_errors, settle, write_atomically

_IDENTITY = "conversion.json"


class Workspace:
    """What a conversion has made so far.

    Attributes:
        directory: for whatever is not to be part of the result.
        result: the directory that becomes the output.
        scoring: the directory of finished blocks.
    """

    def __init__(self, directory: Path):
        self.directory, self.result, self.scoring = directory, directory / "result", directory / "scoring"
        if not self.begun:
            self._clear()
        self.result.mkdir(exist_ok=True)

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return (self.directory / _IDENTITY).exists()

    def _clear(self) -> None:
        """Remove what a process has left that was killed before it had begun."""
        leftovers = [f for f in self.directory.iterdir() if not f.name.startswith(".")]
        if foreign := [f.name for f in leftovers if f.name not in ("gguf", "result")]:
            raise UsageError(f"{self.directory} is no conversion's: it holds {foreign[0]}; move it away")
        for leftover in self.directory.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

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
        """Raise UsageError if the disk has not room for result and finished blocks of `needed` bytes in all."""
        there = [f for part in (self.result, self.scoring) for f in part.rglob("*") if f.is_file()]
        check_space(self.directory, needed - sum(f.stat().st_size for f in there))


@contextlib.contextmanager
def workspace(out: Path, resume: bool) -> Iterator[Workspace]:
    """Yield a workspace beside `out`; if the block succeeds, its result is renamed to `out`, whole.

    What an interruption or a failure leaves is kept, to be resumed; bad input leaves nothing, unless a block of the
    model was finished before it was noticed. A process holds the workspace for itself.

    Args:
        out: must not exist.
        resume: go on with what is there; if nothing is, begin.

    Raises:
        UsageError: `out` exists; there is an interrupted conversion and it is not to be resumed; another process works
            on it.
        ZoError: the block failed, with a word on how to go on.
        Interrupted: so was the block.
    """
    _refuse(out)
    directory = out.with_name(f".{out.name}.partial")
    with reporting_disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        _refuse(out)  # another process may just have made it
        with reporting_disk_errors(directory):
            work = Workspace(directory)
        resumed = work.begun
        if resumed and not resume:
            raise UsageError(f"a conversion to {out} was interrupted: go on with --resume, or remove {directory}")
        try:
            yield work
            with reporting_disk_errors(out):
                settle(work.result, out)
        except BaseException as e:
            if not work.result.exists():
                raise
            useless = isinstance(e, UsageError) and not resumed and not any(work.scoring.glob("*"))
            if useless or not work.begun:
                shutil.rmtree(directory, ignore_errors=True)
                raise
            how = f"what is finished is kept in {directory}: go on with --resume"
            if isinstance(e, KeyboardInterrupt):
                raise Interrupted(f"interrupted; {how}") from None
            if isinstance(e, UsageError):
                raise UsageError(f"{e}; {how}") from e
            if isinstance(e, ZoError | OSError | RuntimeError | MemoryError):
                raise ZoError(f"{str(e) or type(e).__name__}; {how}") from e
            raise
        finally:
            if not work.result.exists():
                shutil.rmtree(directory, ignore_errors=True)


def _refuse(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} already exists; name another directory or remove it first")
