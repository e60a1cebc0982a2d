"""What a training run did."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from .adapter import Best
from .evaluate import Evaluation


@dataclass
class TrainResult:
    """What a run did: `before` (this process's first step) and `after` on the validation set, `test` on the test set.

    Attributes:
        best: the run's best validation so far; its values are in `best/` of the adapter directory.
        seconds_per_step: mean over this process's steps.
        weights_memory: bytes MLX held before the first step.
        peak_memory: bytes MLX held at most during the steps; evaluations have their own, lower or higher.
    """

    adapter_path: str
    iterations: int
    trainable: int
    train_loss: float | None
    before: Evaluation | None
    after: Evaluation | None
    test: Evaluation | None
    best: Best | None
    seconds_per_step: float | None
    weights_memory: int
    peak_memory: int
    adapter_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **found,
            **{k: v.as_dict() for k, v in found.items() if isinstance(v, Evaluation)},
            "best": asdict(self.best) if self.best else None,
        }
