"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere; and figures on the way."""

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import mlx.core as mx
from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15
# A bar with figures, on 80 columns.
_WITH_FIGURES = "{desc}: {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
_RECENT = 20  # steps


class Progress:
    """Use as a context manager and call `advance` once per unit of work. Writes to standard error."""

    def __init__(self, title: str, total: int, unit: str, enabled: bool = True, initial: int = 0):
        self.title, self.total, self.unit, self.enabled = title, total, unit, enabled
        self._done = self._initial = initial
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        self._started = self._printed = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self.title, total=self.total, initial=self._initial, unit=f" {self.unit}", leave=False,
                dynamic_ncols=True,
            )  # fmt: skip
        return self

    def advance(self, figures: str = "") -> None:
        """One more unit is done; `figures` are shown beside the time left."""
        self._done += 1
        if self._bar is not None:
            if figures:
                self._bar.bar_format = _WITH_FIGURES
                self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        elif self.enabled and time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            rate = (self._done - self._initial) / (self._printed - self._started)
            left = (self.total - self._done) / rate
            line = f"{self.title}: {self._done}/{self.total}, {rate:.2f} {self.unit}/s, {left:.0f} s left"
            line += f", {figures}" if figures else ""
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def print_line(text: str) -> None:
    """Print a result on standard output, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


@contextlib.contextmanager
def redirected_to_stderr() -> Iterator[None]:
    """Keep standard output for results: what libraries print goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class Meter:
    """Averages between reports, and of all steps."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0  # in all
        self._reported = (0.0, 0)  # and when they were last taken
        self._losses: list[float] = []
        self._tokens = self._padded = 0
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=_RECENT)  # seconds, loss, tokens
        self.last_loss: float | None = None

    def add(self, seconds: float, loss: float, examples: list[Any]) -> None:
        self._seconds += seconds
        self._steps += 1
        if math.isfinite(loss):
            self._losses.append(loss)
        rows = [len(row) for e in examples for row in e.rows]
        self._tokens += sum(rows)
        self._recent.append((seconds, loss, sum(rows)))
        self._padded += len(rows) * max(rows)

    def take(self) -> dict[str, float | None]:
        """The averages since the last call, under mlx-lm's names; and the share of padding in what was computed."""
        seconds, steps = self._seconds - self._reported[0], self._steps - self._reported[1]
        self.last_loss = sum(self._losses) / len(self._losses) if self._losses else None
        result = {
            "train_loss": self.last_loss,
            "iterations_per_second": steps / seconds,
            "tokens_per_second": self._tokens / seconds,
            "padding": 1 - self._tokens / self._padded,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._losses, self._tokens, self._padded = [], 0, 0
        self._reported = (self._seconds, self._steps)
        return result

    def recent(self, scored: bool, accuracy: float | None) -> str:
        """The last steps in a few words: loss, or the score that it is minus of; tokens per second; peak memory.

        Args:
            accuracy: of the last validation, if there is one.
        """
        seconds, losses, tokens = zip(*self._recent, strict=True)
        loss, rate = sum(losses) / len(losses), sum(tokens) / sum(seconds)
        figures = [f"score {-loss:.3f}" if scored else f"loss {loss:.3f}"]
        figures += [] if accuracy is None else [f"acc {accuracy:.1%}"]
        return ", ".join([*figures, f"{rate:.0f} tok/s", f"{mx.get_peak_memory() / 1e9:.2f} GB"])

    @property
    def seconds(self) -> float | None:
        """A step's, the mean: some steps do work for those after them."""
        return self._seconds / self._steps if self._steps else None
