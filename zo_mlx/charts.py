"""Curves and maps as plain geometry, which the report's template draws as SVG.

matplotlib is an extra, and its colours do not follow the reader's scheme; libraries that draw in the page need scripts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from .plot import block_and_name

WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
# More points than this are not seen: a curve of thousands of steps becomes the lowest and highest of each stretch.
_STRETCHES = 280
_DOTS = 40
NO_BAND = np.zeros((0, 3))
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: in the legend.
        points: (n, 2) of step and value, as they are drawn.
        kind: every, faint; trend; line; or dots, with a mark at each.
        low, high: between which the chart must show it. A step that explodes is not to flatten all others: what is
            beyond is drawn at the edge.
    """

    name: str
    points: np.ndarray
    kind: str
    low: float
    high: float


def line(name: str, points: np.ndarray, kind: str) -> Line | None:
    """Of some points, the finite ones, if that is a line; or at least a dot."""
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) < (1 if kind == "dots" else 2):
        return None
    return Line(name, points, kind, float(points[:, 1].min()), float(points[:, 1].max()))


def step_lines(name: str, values: np.ndarray) -> list[Line | None]:
    """A value of each step from 1 on, (n,), and its trend; no more is held of them than is drawn."""
    each = line("each step", thinned(values), "every")
    if each:
        low, high = np.quantile(values[np.isfinite(values)], (0.01, 0.99))
        each = replace(each, low=float(low), high=float(high))
    return [each, line(name, trend(values), "trend")]


@dataclass
class Chart:
    """What to draw, in a box of WIDTH by HEIGHT."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str, str]] = field(default_factory=list)  # kind, name, points
    dots: list[tuple[float, float, str, bool]] = field(default_factory=list)  # x, y, what it says, whether the best
    band: str = ""


def chart(
    title: str,
    found: Sequence[Line | None],
    steps: int,
    show: Callable[[float], str],
    band: np.ndarray = NO_BAND,
    best: int | None = None,
) -> Chart | None:
    """A chart of curves over the steps from 0 to `steps`, or None where there is nothing to draw.

    Args:
        found: the curves there are.
        show: a value as text.
        band: (n, 3) of step, low and high.
        best: the step whose dot is marked.
    """
    lines = [one for one in found if one]
    if not lines:
        return None
    low = min([one.low for one in lines] + band[:, 1].tolist())
    high = max([one.high for one in lines] + band[:, 2].tolist())
    margin = 0.06 * (high - low)
    if high - low <= max(1e-9 * abs(high), 1e-100):  # a flat line
        margin = 0.1 * abs(high) if abs(high) > 1e-9 else 1.0
    low, high = low - margin, high + margin
    last = max(1, steps)

    def place(points: np.ndarray) -> np.ndarray:
        x = LEFT + (WIDTH - LEFT - RIGHT) * points[:, 0] / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - points[:, 1].clip(low, high)) / (high - low)
        return np.stack([x, y], axis=1).round(1)

    def text(points: np.ndarray) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y in place(points))

    x_ticks = [(float(place(np.array([[t, low]]))[0, 0]), f"{t:,.0f}") for t in ticks(0, last, whole=True)]
    y_ticks = [(float(place(np.array([[0, t]]))[0, 1]), show(t)) for t in ticks(low, high)]
    made = Chart(title, x_ticks, y_ticks)
    for one in lines:
        made.lines.append((one.kind, one.name, text(one.points)))
        if one.kind == "dots":
            marked = one.points[:: 1 + len(one.points) // _DOTS]
            chosen = np.unique(np.concatenate([marked, one.points[one.points[:, 0] == best]]), axis=0)
            for (x, y), (step, value) in zip(place(chosen).tolist(), chosen.tolist(), strict=True):
                made.dots.append((x, y, f"step {step:.0f}: {show(value)}", step == best))
    if len(band):
        made.band = text(np.concatenate([band[:, :2], band[::-1, [0, 2]]]))
    return made


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers between two, about as many as look well."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * m for m in (1, 2, 2.5, 5) if power * m >= rough), 10 * power)
    step = math.ceil(step) if whole else step
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def thinned(values: np.ndarray) -> np.ndarray:
    """Step and value, from step 1 on, of the lowest and the highest of each stretch: the curve looks the same."""
    if len(values) <= 2 * _STRETCHES:
        return np.stack([np.arange(1, len(values) + 1), values], axis=1)
    kept = []
    for start, end in pairwise(np.linspace(0, len(values), _STRETCHES + 1).astype(int)):
        own = values[start:end]
        finite = start + np.flatnonzero(np.isfinite(own))
        if len(finite):
            kept += sorted({finite[values[finite].argmin()], finite[values[finite].argmax()]})
    return np.array([(i + 1, values[i]) for i in kept], np.float64).reshape(-1, 2)


def trend(values: np.ndarray) -> np.ndarray:
    """Step and mean over a twelfth of the curve around it, less at the ends, at no more points than are seen."""
    half = max(1, len(values) // 24)
    found = []
    for at in np.unique(np.linspace(0, len(values) - 1, _STRETCHES).astype(int)) if len(values) else []:
        own = values[max(0, at - half) : at + half + 1]
        own = own[np.isfinite(own)]
        found += [(at + 1, own.mean(dtype=np.float64))] if len(own) else []
    return np.array(found, np.float64).reshape(-1, 2)


@dataclass
class LayerMap:
    """A grid with a row for each kind of layer and a column for each block.

    Attributes:
        rows: name and cells: (block, strength from 0 to 1 or None for none, what it says).
        low, high: what the faintest and the strongest stand for.
    """

    title: str
    note: str
    blocks: int
    rows: list[tuple[str, list[tuple[int, float | None, str]]]]
    low: str
    high: str


def layer_map(
    title: str,
    note: str,
    paths: Sequence[str],
    values: Sequence[float | None],
    says: Sequence[str],
    show: Callable[[float], str],
) -> LayerMap:
    """A map of one positive number for each layer, None where there is none; by its logarithm.

    Args:
        paths: of the layers.
        says: what the reader is told of each.
    """
    known = [v for v in values if v is not None and v > 0]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    rows: dict[str, list[tuple[int, float | None, str]]] = {}
    for path, value, text in zip(paths, values, says, strict=True):
        block, name = block_and_name(path)
        strength = None if value is None else 0.0
        if value:
            strength = 1.0 if high == low else 0.1 + 0.9 * math.log(value / low) / math.log(high / low)
        rows.setdefault(name, []).append((block, strength, text))
    blocks = 1 + max(block for cells in rows.values() for block, _, _ in cells)
    return LayerMap(title, note, blocks, list(rows.items()), show(low), show(high))
