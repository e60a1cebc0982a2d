"""The sensitive index, `sensitive.safetensors`: which weights are trainable. Format: docs/formats.md."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import UsageError
from .files import load_safetensors, write_atomically

FILE_NAME = "sensitive.safetensors"
FORMAT = "zo-mlx-sensitive"
VERSION = 1
_PARTS = ("indices", "values", "scores")


@dataclass
class SensitiveTensor:
    """The trainable weights of one linear layer, in order of position.

    Attributes:
        indices: (n,) uint32, flat row-major positions in the (out, in) weight, strictly increasing.
        values: (n,) the weights before quantization, in the source's dtype, or that of `--dtype`.
        scores: (n,) float32 Fisher scores.
    """

    indices: np.ndarray
    values: mx.array
    scores: np.ndarray

    @property
    def size(self) -> int:
        return len(self.indices)


@dataclass
class SensitiveIndex:
    """All trainable weights of a model: `tensors` by mlx-lm module path, in the order of `values`."""

    tensors: dict[str, SensitiveTensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> str:
        """How its weights were chosen, as `convert` takes it."""
        return str(self.metadata.get("mask", "sensitive"))

    @property
    def size(self) -> int:
        """K, the number of trainable weights."""
        return sum(t.size for t in self.tensors.values())

    def initial_values(self) -> mx.array:
        """The weights before any training: (K,) float32."""
        return mx.concatenate([t.values.astype(mx.float32) for t in self.tensors.values()])


def write_index(index: SensitiveIndex, directory: Path) -> None:
    """Write `sensitive.safetensors` into a model directory, whole or not at all."""
    arrays = {}
    for path, tensor in index.tensors.items():
        parts = mx.array(tensor.indices), tensor.values, mx.array(tensor.scores)
        arrays.update({f"{path}.{part}": array for part, array in zip(_PARTS, parts, strict=True)})
    # The order of tensors in a safetensors file is not the writer's: it is kept as metadata.
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "tensors": json.dumps(list(index.tensors)),
        **{key: json.dumps(value) for key, value in index.metadata.items()},
    }
    write_atomically(directory / FILE_NAME, lambda p: mx.save_safetensors(str(p), arrays, metadata))


def read_index(directory: Path) -> SensitiveIndex:
    """Read and check a model directory's sensitive index.

    Raises:
        UsageError: the file is missing, damaged, of another format or version, or inconsistent.
    """
    path = directory / FILE_NAME
    if not path.exists():
        raise UsageError(
            f"{directory} has no sensitive index ({FILE_NAME}); make one with: "
            f"zo-mlx convert --hf-path {directory} --mlx-path NEW"
        )
    arrays, raw = load_safetensors(path)
    if raw.get("format") != FORMAT:
        raise UsageError(f"{path} is not a sensitive index: its metadata lacks format = {FORMAT}")
    if raw.get("version") != str(VERSION):
        raise UsageError(f"{path} has version {raw.get('version')}, this zo-mlx reads version {VERSION}")
    try:
        metadata = {k: json.loads(v) for k, v in raw.items() if k not in ("format", "version")}
        order = list(metadata.pop("tensors"))
        if sorted(f"{p}.{part}" for p in order for part in _PARTS) != sorted(arrays):
            raise ValueError("the list of tensors does not match the file's tensors")
        tensors = {p: _checked(p, *(arrays[f"{p}.{part}"] for part in _PARTS)) for p in order}
        if not tensors:
            raise ValueError("it names no weights")
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is damaged: {e}; make it again with: zo-mlx convert") from None
    return SensitiveIndex(tensors, metadata)


def _checked(path: str, indices: mx.array, values: mx.array, scores: mx.array) -> SensitiveTensor:
    if indices.dtype != mx.uint32 or indices.ndim != 1 or indices.size == 0:
        raise ValueError(f"{path}.indices must be a non-empty vector of uint32")
    if values.shape != indices.shape or not mx.issubdtype(values.dtype, mx.floating):
        raise ValueError(f"{path}.values must be a floating-point vector of length {indices.size}")
    if scores.shape != indices.shape or scores.dtype != mx.float32:
        raise ValueError(f"{path}.scores must be a float32 vector of length {indices.size}")
    positions = np.array(indices)
    if not np.all(positions[1:] > positions[:-1]):
        raise ValueError(f"{path}.indices are not strictly increasing")
    if not mx.all(mx.isfinite(values)).item():
        raise ValueError(f"{path}.values are not all finite")
    return SensitiveTensor(positions, values, np.array(scores))


def in_order(path: str) -> str:
    """What sorts layers' paths by the numbers in them."""
    return re.sub(r"\d+", lambda number: number[0].zfill(5), path)
