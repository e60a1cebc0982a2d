"""A step's work divided among ranks: which branches, or which rows of the batch, each evaluates; and what it tells.

Slopes and learning rates follow from the losses that all have, so every rank makes the same update, and no weight,
gradient or activation is sent. (With exact gradients those of the K trained values are.)
"""

import contextlib
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .config import TrainConfig, filled
from .data import Example
from .errors import UsageError, ZoError
from .estimator import ESTIMATORS, Branches, Loss
from .metric import CROSS_ENTROPY
from .objective import denominator
from .ranks import Ranks
from .step import BranchLosses, Gradient

# With `auto`, the work is divided anew after so many steps, if a step would then take less than this part of the time.
STEPS, WORTH = 16, 0.9

Shares = Sequence[Sequence[Example]]


class Split:
    """How a step is divided.

    Args:
        config: resolved; split, gradient, estimator, directions, batch size and objective are read.

    Attributes:
        together: whether all ranks compute everything together, each with its part of the model.
        by_rows: whether each rank has its rows of the batch, and all branches; else its branches, and all rows.
        portions: how many rows or branches each rank has.
        tokens_at_once: the fewest that a rank let into a forward pass in the last step, 0 for no limit.

    Raises:
        UsageError: there is too little in a step for so many ranks.
    """

    def __init__(self, ranks: Ranks, config: TrainConfig):
        self.ranks, self._config, self.tokens_at_once = ranks, config, 0
        shares, how = self._shares(range(filled(config.batch_size))), config.split
        is_exact, rows = config.gradient == "exact", len(shares[0])
        self.by_rows = how == "data" or is_exact or (how == "auto" and rows >= ranks.count)
        self._size = rows if self.by_rows else len(shares)
        self._seconds: list[np.ndarray] = []  # of all ranks, of the steps since the work was divided
        self.together = how == "model" and ranks.count > 1
        if self.together:
            self.portions = [self._size] * ranks.count
            return
        if self._size < ranks.count:
            what, flag = ("rows", "--batch-size") if self.by_rows else ("branches", "--directions")
            raise UsageError(
                f"{ranks.count} ranks are too many for a step of {self._size} {what}: raise {flag}, or start fewer"
            )
        self.portions = portions(self._size, [1.0] * ranks.count)

    def examples(self, batch: Sequence[Example]) -> list[Example]:
        """Those of a step's examples that this rank evaluates."""
        own = {id(e) for share in self._own(self._shares(batch)) for e in share}
        return [e for e in batch if id(e) in own]

    def loss(self, loss: BranchLosses, tokens_at_once: int | None, step: int) -> Loss:
        """The losses of a step that all ranks take, from this rank's `loss` with so many tokens in a forward pass.

        By branches, each loss is some rank's: the same bits as on one machine, where its backend computes the same for
        few rows as for many. By rows it is a sum over ranks. Together, all have the same.
        """

        def shared(branches: Branches, shares: Sequence[Sequence[Example]]) -> mx.array:
            started, own = time.perf_counter(), self._own(shares)
            mine = branches if self.by_rows else branches[self._mine]
            more = 0 if self.by_rows else len(branches) - self._size  # a branch that lies apart
            portions = [*self.portions[:-1], self.portions[-1] + more]
            most = len(branches) if self.by_rows else max(portions)
            with self.ranks.waiting() if self.together else contextlib.nullcontext():
                losses = np.array(loss(mine, own, denominator(shares, self._config.objective != CROSS_ENTROPY)))
            found = self._told(branches.values, losses, most, tokens_at_once, step, time.perf_counter() - started)
            if self.together:
                return mx.array(found[0])
            if self.by_rows:
                return mx.array(found.sum(axis=0))
            return mx.array(np.concatenate([row[:n] for row, n in zip(found, portions, strict=True)]))

        return loss if self.ranks.count == 1 else shared

    def gradient(self, gradient: Gradient, tokens_at_once: int | None, step: int) -> Gradient:
        """The same of an exact gradient, which is summed over ranks: 4 bytes for each of the K values."""

        def shared(values: mx.array, examples: Sequence[Example]) -> tuple[float, mx.array]:
            started = time.perf_counter()
            loss, part = gradient(values, examples[self._mine], denominator([examples], False))
            seconds, total = time.perf_counter() - started, self.ranks.total(part)
            found = self._told(values, np.array([loss], np.float32), 1, tokens_at_once, step, seconds)
            return float(found.sum()), total

        return gradient if self.ranks.count == 1 else shared

    @property
    def _mine(self) -> slice:
        """This rank's; what there is beyond the step's rows or branches is the last one's."""
        first = 0 if self.together else sum(self.portions[: self.ranks.rank])
        end = first + self.portions[self.ranks.rank]
        return slice(first, end if end < self._size else None)

    def _shares(self, batch: Sequence[Any]) -> Shares:
        """The examples of each of a step's branches."""
        if self._config.gradient == "exact":
            return [batch]
        return ESTIMATORS[self._config.estimator].shares(batch, filled(self._config.directions))

    def _own(self, shares: Shares) -> Shares:
        return [share[self._mine] for share in shares] if self.by_rows else shares[self._mine]

    def _told(
        self, values: mx.array, losses: np.ndarray, most: int, tokens_at_once: int | None, step: int, seconds: float
    ) -> np.ndarray:
        """What all ranks found, (N, most) or (N, most, 2) float32; where a rank has fewer, zeros follow.

        That is the one message of a step. With it go a check of the values, the seconds it took, and tokens at once.
        """
        own = ("losses", "<f4", (most, *losses.shape[1:]))
        form = np.dtype([("check", "<u8"), ("seconds", "<f4"), ("tokens", "<u4"), own])
        said = np.zeros((), form)
        said["check"] = int.from_bytes(hashlib.blake2b(np.array(values).tobytes(), digest_size=8).digest(), "little")
        said["seconds"], said["tokens"] = seconds, tokens_at_once or 0
        said["losses"][: len(losses)] = losses
        found = self.ranks.gather(said)
        for rank, check in enumerate(found["check"]):
            if check != found["check"][0]:
                raise ZoError(
                    f"rank {rank} has other values than rank 0 after step {step - 1}: is it another kind of machine? "
                    "zo-mlx replay makes the values that the journal stands for"
                )
        self.tokens_at_once = min((n for n in found["tokens"].tolist() if n), default=0)
        if self._config.split == "auto":
            self._divide(found["seconds"])
        return found["losses"]

    def _divide(self, seconds: np.ndarray) -> None:
        """After some steps, give more to those ranks that were faster."""
        self._seconds.append(seconds)
        if len(self._seconds) < STEPS:
            return
        each = np.mean(self._seconds, axis=0) / self.portions  # seconds for a row or a branch
        better = portions(self._size, (1 / each).tolist())
        if (each * better).max() < WORTH * (each * self.portions).max():
            self.portions = better
        self._seconds = []


def portions(size: int, speeds: Sequence[float]) -> list[int]:
    """How many of `size` equal pieces of work each rank gets, at least one, so that all are done soonest."""
    found = [1] * len(speeds)
    for _ in range(size - len(speeds)):
        soonest = min(range(len(speeds)), key=lambda r: (found[r] + 1) / speeds[r])
        found[soonest] += 1
    return found
