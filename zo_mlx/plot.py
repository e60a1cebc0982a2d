"""Draw where a model's sensitive weights sit (by layer, their number, their scores, and the columns they touch), and
what training it takes of memory."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .files import write_atomically

_FORMATS = (".png", ".pdf", ".svg")
_TICKS = 12

# What `planner.plan` says of what, and as people read it.
WAYS = {"zo": "random directions", "exact": "exact gradients", "lora": "LoRA by mlx-lm"}
PARTS = {"weights": "weights", "trained": "trained part", "activations": "activations", "logits": "logits"}


def check_plot_file(path: Path) -> None:
    """Raise UsageError if nothing can be drawn to a file: it exists, is of another kind, or there is no matplotlib."""
    if path.suffix not in _FORMATS:
        raise UsageError(f"--plot {path}: the file's name must end with one of {', '.join(_FORMATS)}")
    if path.exists():
        raise UsageError(f"{path} already exists; name another file or remove it first")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: no such directory")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plotting needs matplotlib: pip install matplotlib") from None


def plot(found: dict[str, Any], path: Path) -> None:
    """Write a figure of a sensitive index.

    Args:
        found: what `info` says of a model directory.
        path: a .png, .pdf or .svg file; must not exist.

    Raises:
        UsageError: there is no index, matplotlib is not installed, the file exists or is of another kind.
        ZoError: it cannot be written.
    """
    if "index" not in found:
        raise UsageError(f"{found['path']} has no sensitive index to plot")
    check_plot_file(path)
    from matplotlib.figure import Figure

    layers = found["index"]["layers"]
    places = [block_and_name(layer["path"]) for layer in layers]
    modules = list(dict.fromkeys(module for _, module in places))
    blocks = 1 + max(block for block, _ in places)
    total = sum(layer["score"] for layer in layers) or 1.0
    panels = {
        "Share of the layer's weights that are sensitive": [layer["density"] for layer in layers],
        "Share of the sensitive weights' Fisher scores": [layer["score"] / total for layer in layers],
        "Share of the layer's input columns with sensitive weights": [layer["columns"] for layer in layers],
    }
    height = 0.7 + 0.22 * len(modules)
    figure = Figure(figsize=(max(6.0, 2.6 + 0.2 * blocks), 0.6 + height * len(panels)), layout="constrained")
    if not all(any(value and value > 0 for value in values) for values in panels.values()):
        raise UsageError(f"{found['path']}: the sensitive index does not fit the model, or its scores are all 0")
    name = Path(found["path"]).resolve().name
    figure.suptitle(f"{name}: {sum(layer['trainable'] for layer in layers):,} sensitive weights")
    for axes, (title, values) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
        grid = np.full((len(modules), blocks), np.nan)
        for (block, module), value in zip(places, values, strict=True):
            grid[modules.index(module), block] = np.nan if value is None else value
        image = axes.imshow(grid, cmap="viridis_r", norm="log", aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_yticks(range(len(modules)), modules, fontsize="small")
        axes.set_xticks(range(0, blocks, 1 + blocks // _TICKS))
        figure.colorbar(image, ax=axes, format=lambda share, _: f"{100 * share:g}%")
    axes.set_xlabel("block")
    write_atomically(path, lambda p: figure.savefig(p, dpi=150))


def plot_plan(planned: dict[str, Any], path: Path) -> None:
    """Write a figure of what `planner.plan` says: arguments and errors are those of `plot`."""
    check_plot_file(path)
    from matplotlib.figure import Figure

    needs = planned["needs"]
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    names = [f"{title}\n{needs[way]['batch_size']} examples" for way, title in WAYS.items()]
    below = np.zeros(len(names))
    for part in PARTS:
        sizes = np.array([(needs[way][part] or 0) / 1e9 for way in WAYS])
        axes.bar(names, sizes, bottom=below, width=0.6, label=PARTS[part])
        below += sizes
    for limit in planned["limits"]:
        if limit["bytes"] / 1e9 <= 1.5 * below.max():
            axes.axhline(limit["bytes"] / 1e9, color="gray", linestyle="--", linewidth=1)
            axes.annotate(limit["name"], (1.01, limit["bytes"] / 1e9), xycoords=("axes fraction", "data"), va="center")
    axes.set_ylabel("GB")
    axes.set_title(f"{Path(planned['model']).name}: estimated peak, {planned['max_seq_length']} tokens an example")
    axes.legend(frameon=False)
    write_atomically(path, lambda p: figure.savefig(p, dpi=150))


def block_and_name(path: str) -> tuple[int, str]:
    """A layer's block number and its name in the block: model.layers.3.mlp.up_proj -> 3, mlp.up_proj."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)", path)
    return (int(match[1]), match[2]) if match else (0, path)
