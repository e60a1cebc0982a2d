"""What a run's report shows, from the journal and the events."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .charts import NO_BAND, Chart, LayerMap, chart, layer_map, line, step_lines, trend
from .events import Event

Row = dict[str, float]


def percent(share: float) -> str:
    """With a decimal, or two digits of a small one."""
    return f"{100 * share:.1f}%" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"


# What validations are measured in, the most telling first, and how it is shown.
METRICS: dict[str, Callable[[float], str]] = {
    "score": "{:.3f}".format,
    "accuracy": percent,
    "perplexity": lambda x: f"{x:,.0f}" if x >= 1000 else f"{x:.4g}",
    "loss": "{:.3f}".format,
}
# On an axis.
_TICKS = {"accuracy": lambda x: f"{100 * x:.3g}%", "perplexity": METRICS["perplexity"]}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of so many weights, `sensitive` of which are in the index, from `start` on.

    Attributes:
        moved: the distance of these from where they were, as a share of their norm; None if they are not trained.
    """

    path: str
    weights: int
    sensitive: int
    start: int
    moved: float | None


def layers(sizes: Mapping[str, int], weights: Mapping[str, int], spans: Sequence[tuple[int, int]]) -> list[Layer]:
    """By path, how many weights of each are in an index, and it has; and where in the index the trained ones are."""
    found, start = list[Layer](), 0
    for path, size in sizes.items():
        trained = any(first <= start < last for first, last in spans)
        found.append(Layer(path, weights[path], size, start, 0.0 if trained else None))
        start += size
    return found


def moved(layers: Sequence[Layer], before: np.ndarray, after: np.ndarray) -> list[Layer]:
    """The layers with other values of all weights of the index, (K,)."""
    found = []
    for layer in layers:
        own = slice(layer.start, layer.start + layer.sensitive)
        if layer.moved is not None:
            start, end = before[own].astype(np.float64), after[own].astype(np.float64)
            distance = np.linalg.norm(end - start) / max(np.linalg.norm(start), 1e-30)
            layer = dataclasses.replace(layer, moved=float(distance))
        found.append(layer)
    return found


def maps(layers: Sequence[Layer]) -> list[LayerMap]:
    """Where the sensitive weights are, and how far they moved."""
    paths, says = [layer.path for layer in layers], []
    for layer in layers:
        change = "not trained" if layer.moved is None else f"moved by {percent(layer.moved)}"
        says.append(f"{layer.path}: {layer.sensitive:,} of {layer.weights:,} weights, {change}")
    density = [layer.sensitive / layer.weights for layer in layers]
    distance = [layer.moved for layer in layers]
    there, far = "Where the sensitive weights are", "How far training moved them"
    return [
        layer_map(there, "Their share of a layer's weights, by block.", paths, density, says, percent),
        layer_map(
            far,
            "Distance from where they were, against their norm; dashed: not trained.",
            paths,
            distance,
            says,
            percent,
        ),
    ]


def rows(events: Sequence[Event], kind: str) -> list[Row]:
    """The numbers of the events of a kind, in the order of their steps; of several of a step, the last."""
    found = {e.get("iteration", 0): e for e in events if e["event"] == kind}
    return [{"iteration": i, **{k: v for k, v in found[i].items() if _is_number(v)}} for i in sorted(found)]


def _is_number(value: Any) -> bool:
    """Whether it is one that can be drawn, of what a JSON file may hold."""
    return type(value) in (int, float) and abs(value) < 1e30


def _points(rows: Sequence[Row], *keys: str) -> np.ndarray:
    """Step and values of those that have them: (n, 1 + keys)."""
    found = [[row["iteration"], *(row[k] for k in keys)] for row in rows if set(keys) <= row.keys()]
    return np.array(found, np.float64).reshape(-1, 1 + len(keys))


def results(
    validations: Sequence[Row], tests: Sequence[Row], steps: np.ndarray, scored: bool
) -> list[tuple[str, str, str, str]]:
    """Name, before, after and on the test set, of the first two there are; without validations, of the training loss.

    Args:
        steps: (n, 3) float32 of loss, root mean square of the slopes, largest of them.
        scored: whether the losses are minus scores.
    """
    found = []
    for name, show in METRICS.items():
        if len(points := _points(validations, name)):
            before = show(points[0, 1]) if points[0, 0] == 0 else "?"
            tested = show(tests[-1][name]) if tests and name in tests[-1] else ""
            found.append((name, before, show(points[-1, 1]), tested))
    if not found and len(means := trend(steps[:, 0])):
        first, last = means[[0, -1], 1] * (-1 if scored else 1)
        found.append(("training score" if scored else "training loss", f"{first:.3f}", f"{last:.3f}", ""))
    return found[:2]


def note(validations: Sequence[Row], best: int | None) -> str:
    """Of the last validation and the best one."""
    last = validations[-1] if validations else {}
    parts = [f"{last['examples']:.0f} validation examples"] if "examples" in last else []
    if {"accuracy_low", "accuracy_high"} <= last.keys():
        parts.append(f"95%: {percent(last['accuracy_low'])} to {percent(last['accuracy_high'])}")
    return "; ".join([*parts, *([] if best is None else [f"the best after step {best}"])])


def curves(
    validations: Sequence[Row], reports: Sequence[Row], steps: np.ndarray, scored: bool, best: int | None
) -> list[Chart]:
    """Of what there is to draw; arguments as above."""
    count, made = len(steps), []
    for name in ("loss", "score", "accuracy", "perplexity"):
        lines = []
        if name == ("score" if scored else "loss"):
            lines = step_lines("training, smoothed", -steps[:, 0] if scored else steps[:, 0])
        band = _points(validations, "accuracy_low", "accuracy_high") if name == "accuracy" else NO_BAND
        called = "validation, with 95% confidence intervals" if len(band) else "validation"
        lines.append(line(called, _points(validations, name), "dots"))
        made.append(chart(name.capitalize(), lines, count, _TICKS.get(name, "{:.3g}".format), band, best))
    slopes = step_lines("smoothed", steps[:, 1])
    made.append(chart("Projected gradients, root mean square", slopes, count, "{:.3g}".format))
    rates = line("at reports", _points(reports, "learning_rate"), "line")
    made.append(chart("Learning rate", [rates], count, "{:.2g}".format))
    return [one for one in made if one]


def slopes(steps: np.ndarray) -> dict[str, float] | None:
    """Of all: their root mean square, that of the first and the last tenth of the steps, and the largest."""
    own = steps[np.isfinite(steps[:, 2]), 1:]
    if not len(own):
        return None
    tenth = max(1, len(own) // 10)
    rms, first, last = (
        math.sqrt(np.square(part, dtype=np.float64).mean()) for part in (own[:, 0], own[:tenth, 0], own[-tenth:, 0])
    )
    return {"rms": rms, "first": first, "last": last, "largest": float(own[:, 1].max())}


def seconds(events: Sequence[Event]) -> float:
    """How long the run took until now, without the times in which it was stopped."""
    total, start, last = 0.0, math.inf, 0.0
    for event in [*events, {"event": "now", "time": time.time()}]:
        if event["event"] == "begun":
            total, start = total + max(0.0, last - start), event["time"]
        last = event["time"]
    return total + max(0.0, last - start)
