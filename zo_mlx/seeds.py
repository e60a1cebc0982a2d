"""Several runs that differ in their seed only, and the mean and spread of their results."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import adapter
from .config import TrainConfig, check_range
from .errors import UsageError
from .ranks import Ranks
from .result import TrainResult
from .run import Report
from .train import check_place, train


@dataclass
class SeedsResult:
    """The runs, in the order of their seeds.

    Attributes:
        spread: for the validation (`val`) and `test` after training, where there was one: mean and sample standard
            deviation over the runs of `loss`, and of those of `accuracy`, `perplexity` and `score` that apply.
    """

    runs: list[TrainResult]
    spread: dict[str, dict[str, tuple[float, float]]]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        return {"runs": [run.as_dict() for run in self.runs], "spread": self.spread}


def train_seeds(seeds: int, *, resume: bool = False, report: Report | None = None, **settings: Any) -> SeedsResult:
    """`train` with as many seeds, from `seed` on; each run has a directory of its own in `adapter_path`, `seed-N`.

    Args:
        seeds: at least 2.
        resume: go on with the runs that were begun, and begin the others.
        report: as for `train`; events have a `seed`.
        **settings: as for `train`, `overwrite`, `changed_data` and `progress` included.

    Raises:
        As `train`.
    """
    check_range("--seeds", seeds, 2)
    if resume and settings.get("overwrite"):
        raise UsageError("--resume and --overwrite exclude each other")
    if settings.get("report_to"):
        raise UsageError("--report-to follows a single run: leave out --seeds")
    if Ranks().count > 1:
        raise UsageError("several seeds are for one machine: leave out --seeds, or mlx.launch")
    config = TrainConfig(**{k: settings[k] for k in ("adapter_path", "seed") if k in settings})
    config.check()
    places = {s: Path(config.adapter_path, f"seed-{s}") for s in range(config.seed, config.seed + seeds)}
    begun = {s for s, place in places.items() if resume and adapter.has_run(place)}
    for seed, place in places.items():  # before hours of the first ones
        if seed not in begun:
            check_place(place, settings.get("overwrite", False))
    runs = []
    for seed, place in places.items():
        own = {**settings, "seed": seed, "adapter_path": str(place)}
        tell = None if report is None else lambda event, seed=seed: report({**event, "seed": seed})  # type: ignore[misc]
        runs.append(train(resume=seed in begun, report=tell, **own))
    spread = {}
    for name, found in (("val", [r.after for r in runs]), ("test", [r.test for r in runs])):
        if all(found):
            results = [evaluation.as_dict() for evaluation in found if evaluation]
            spread[name] = {
                key: (statistics.mean(values), statistics.stdev(values))
                for key in ("loss", "accuracy", "perplexity", "score")
                if len(values := [r[key] for r in results if key in r]) == seeds
            }
    return SeedsResult(runs, spread)
