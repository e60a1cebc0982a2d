"""Ctrl-C at the right moment."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def finished_first() -> Iterator[None]:
    """Let the block be finished before Ctrl-C stops the program, with KeyboardInterrupt after it; twice stops at once.

    So do other signals that would raise KeyboardInterrupt, as SIGTERM on the command line. Signals are handled in the
    main thread alone: in others, as wherever they are ignored or handled by somebody else, nothing is changed.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        with contextlib.suppress(OSError):  # not by `print`, which may be what was interrupted
            os.write(2, b"\nStopping after this step; once more to stop at once\n")

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is signal.default_int_handler]
    for s in taken:
        signal.signal(s, note)
    try:
        yield
    finally:
        for s in taken:
            signal.signal(s, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
