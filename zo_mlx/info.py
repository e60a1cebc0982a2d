"""Say what is in a model directory or an adapter directory."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from . import adapter
from .errors import UsageError
from .files import read_json, sha256
from .index import FILE_NAME as INDEX
from .index import SensitiveTensor, in_order, read_index
from .journal import FILE_NAME as JOURNAL
from .journal import Journal
from .model import fingerprint, weight_files, weight_shapes


def info(path: str | Path) -> dict[str, Any]:
    """Describe a directory (or a sensitive index file in one), or a journal, as JSON-ready data.

    Raises:
        UsageError: it is neither a model nor an adapter, or damaged.
    """
    directory = Path(path)
    if directory.is_file() and directory.name == INDEX:
        directory = directory.parent
    if directory.is_file():
        return {"kind": "journal", "path": str(directory), **_run(Journal.read(directory))}
    if not directory.is_dir():
        raise UsageError(f"no such directory: {directory}")
    if (directory / JOURNAL).exists() or (directory / adapter.VALUES).exists():
        return _adapter(directory)
    if (directory / "config.json").exists():
        return _model(directory)
    raise UsageError(f"{directory} is neither a model directory (no config.json) nor an adapter (no journal)")


def _model(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "config.json")
    shapes = weight_shapes(directory)
    found: dict[str, Any] = {
        "kind": "model",
        "path": str(directory),
        "model_type": config.get("model_type"),
        "quantization": config.get("quantization"),
        "bytes": sum(f.stat().st_size for f in weight_files(directory)),
        "fingerprint": fingerprint(directory),
    }
    if (directory / INDEX).exists():
        index = read_index(directory)
        found["index"] = {
            **index.metadata,
            "sha256": sha256(directory / INDEX),
            "matches_model": index.metadata.get("base_model") == found["fingerprint"],
            "layers": [_layer(path, tensor, shapes.get(path, (0,))) for path, tensor in index.tensors.items()],
        }
    return found


def _layer(path: str, tensor: SensitiveTensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """Of a layer of the index: its trainable weights, their scores, and the input columns that have any of them."""
    *rows, width = shape
    weights = math.prod(rows) * width
    known = len(rows) > 0 and weights > tensor.indices[-1]
    columns = None
    if known:
        expert, position = np.divmod(tensor.indices.astype(np.int64), rows[-1] * width)
        columns = len(np.unique(expert * width + position % width)) / (math.prod(rows[:-1]) * width)
    return {
        "path": path,
        "trainable": tensor.size,
        "density": tensor.size / weights if known else None,
        "columns": columns,
        "score": float(tensor.scores.sum()),
    }


def _run(journal: Journal) -> dict[str, Any]:
    last = journal.last()
    return {
        "journal": journal.identity,
        "steps": len(journal),
        "last_loss": last.loss if last and math.isfinite(last.loss) else None,
        "trainable": sum(end - start for start, end in journal.spans),
        "config": journal.header["config"],
        "fingerprints": journal.header["fingerprints"],
    }


def _adapter(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "adapter", "path": str(directory)}
    if (directory / JOURNAL).exists():
        found |= _run(Journal.read(directory / JOURNAL))
    if (directory / adapter.VALUES).exists():
        snapshot = adapter.read_snapshot(directory)
        found |= {"values": snapshot.values.size, "snapshot_step": snapshot.step}
        found["values_sha256"] = sha256(directory / adapter.VALUES)
        found.setdefault("fingerprints", snapshot.fingerprints)
    if (report := directory / adapter.REPORT).exists():
        found["report"] = str(report)
    return found


def as_text(found: dict[str, Any]) -> str:
    """`info`'s result as lines for people."""
    lines = []
    layers: list[dict[str, Any]] = []
    for key, value in found.items():
        if key == "index":
            layers = value["layers"]
            lines += ["sensitive index"]
            lines += [f"  {k}: {_short(v)}" for k, v in value.items() if k != "layers"]
        elif isinstance(value, dict):
            lines += [key, *(f"  {k}: {_short(v)}" for k, v in value.items() if v is not None)]
        else:
            lines.append(f"{key}: {_short(value)}")
    if layers:
        total = sum(layer["score"] for layer in layers) or math.nan
        width = max(len(layer["path"]) for layer in layers)
        lines.append(f"{'layer':{width}}  trainable   density  columns  share of the index's scores")
        lines += [
            f"{layer['path']:{width}}  {layer['trainable']:9d}  {layer['density'] or math.nan:8.2e}  "
            f"{layer['columns'] or math.nan:7.2%}  {layer['score'] / total:6.2%}"
            for layer in sorted(layers, key=lambda layer: in_order(layer["path"]))
        ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
