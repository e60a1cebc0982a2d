"""The processes that train together, and how they tell each other something: MLX's distributed engine.

`mlx.launch` starts them. Everything here is collective: all ranks call it, in the same order, or wait for each other.
"""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import ZoError

# Bytes of a file that are sent at once.
_PIECE = 1 << 20

_RESUME = "the same command with --resume goes on, with as many ranks as there are then"


class Ranks:
    """This process among the others; the only one, if `mlx.launch` did not start it.

    Args:
        timeout: seconds to wait for the others before this process ends. MLX cannot be told to stop waiting.

    Attributes:
        rank: the number of this process, from 0.
        count: of the processes.

    Raises:
        ZoError: the others are not to be reached.
    """

    def __init__(self, timeout: float = 300.0):
        group = _group(timeout)
        self.rank, self.count, self._timeout, self._messages = group.rank(), group.size(), timeout, 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reports and writes the result."""
        return self.rank == 0

    def directory(self, adapter_path: Path) -> Path:
        """Where this process keeps its journal: several may have the same disk."""
        return adapter_path if self.is_first else adapter_path / f"rank-{self.rank}"

    def gather(self, said: np.ndarray) -> np.ndarray:
        """What all ranks say, (N, ...), in their order; each says an array of the same shape and dtype.

        Raises:
            ZoError: a rank has gone.
        """
        if self.count == 1:
            return said[None]
        self._messages += 1
        content = said.tobytes()
        own = np.array([self._messages, self.rank], np.uint32).tobytes() + content
        with self.waiting():
            found = np.array(mx.distributed.all_gather(mx.array(np.frombuffer(_padded(own), np.uint32))))
            rows = found.reshape(self.count, -1)
            # Where a connection is lost, MLX may return what was in that memory before.
            if any(rows[:, 0] != self._messages) or any(rows[:, 1] != range(self.count)):
                raise RuntimeError("a message is not whole")
        texts = np.ascontiguousarray(rows[:, 2:]).view(np.uint8)[:, : len(content)]
        return np.ascontiguousarray(texts).view(said.dtype).reshape(self.count, *said.shape)

    def gather_texts(self, text: str) -> list[str]:
        """What all ranks say, of whatever length, without null characters."""
        content = text.encode()
        most = int(self.gather(np.array(len(content))).max())
        found = self.gather(np.frombuffer(content.ljust(most, b"\0"), np.uint8))
        return [row.tobytes().rstrip(b"\0").decode() for row in found]

    def total(self, x: mx.array) -> mx.array:
        """The sum of all ranks' arrays of one shape and dtype: the same bits everywhere.

        Of no use before a `gather` after it has succeeded: what comes where a rank has gone may be anything.
        """
        if self.count == 1:
            return x
        with self.waiting():
            found = mx.distributed.all_sum(x)
            mx.eval(found)
        return found

    def hear(self, source: int, path: Path | None, size: int) -> Iterator[bytes]:
        """The first `size` bytes of a file that a rank has, some at a time; the others give None for its path."""
        with (path or Path(os.devnull)).open("rb") as file:
            for start in range(0, size, _PIECE):
                length = min(_PIECE, size - start)
                own = _padded(file.read(length).ljust(length, b"\0"))  # zeros, of those who do not have it
                yield np.array(self.total(mx.array(np.frombuffer(own, np.uint32)))).tobytes()[:length]
        self.gather(np.array(0))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While others are waited for: for so long only. Raises ZoError where a rank has gone."""
        timer = threading.Timer(self._timeout, self._give_up)
        timer.daemon = True
        timer.start()
        # What stops the others when one has gone, mlx.launch and the like, must not wait for the end of this.
        own = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL) if own else None
        try:
            yield
        except RuntimeError as e:
            raise ZoError(f"rank {self.rank} has lost the others ({e}); {_RESUME}") from None
        finally:
            timer.cancel()
            if own:
                signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)

    def _give_up(self) -> None:
        message = f"zo-mlx: error: rank {self.rank} waited {self._timeout:g} s for the others; {_RESUME}\n"
        os.write(2, message.encode())
        os._exit(ZoError.exit_code)


_connected: list[mx.distributed.Group] = []


def _group(timeout: float) -> mx.distributed.Group:
    """All processes; connects to them at the first call."""
    if not _connected and (rank := os.environ.get("MLX_RANK")) is not None:
        # MLX connects without letting go of Python's lock, so that only this can end it; and it can say nothing.
        os.write(2, f"rank {rank} connects to the others, for {timeout:g} s at most\n".encode())
        with Path(os.devnull).open("w") as nowhere:
            faulthandler.dump_traceback_later(timeout, exit=True, file=nowhere)
            try:
                _connected.append(mx.distributed.init())
            except RuntimeError as e:
                raise ZoError(f"rank {rank} cannot reach the others: {e}") from None
            finally:
                faulthandler.cancel_dump_traceback_later()
    return _connected[0] if _connected else mx.distributed.init()


def _padded(content: bytes) -> bytes:
    """Whole words."""
    return content.ljust(-(-len(content) // 4) * 4, b"\0")
