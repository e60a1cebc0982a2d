"""GGUF files, read with the pure-Python `gguf` package: checked offsets, no C parser. Format: docs/gguf.md of ggml."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError


class GgufFile:
    """A GGUF file's metadata, by key, and its tensors. Raises UsageError where the file is damaged."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise UsageError("reading GGUF needs the gguf package: pip install gguf") from None
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        except Exception as e:  # the reader has no errors of its own: damage surfaces as whatever numpy raises
            raise UsageError(f"{path} is truncated or not a GGUF file ({type(e).__name__}: {e})") from None
        self._dequantize = gguf.quants.dequantize
        self._tensors = {t.name: t for t in reader.tensors}

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of the given Python type. Raises UsageError if it is missing (and no default) or another."""
        value = self.metadata.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            problem = "is missing" if value is None else f"is {value!r:.60}"
            raise UsageError(f"{self.path}: metadata {key} {problem}")
        return value

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, outermost dimension first. Raises UsageError if there is no such tensor."""
        if name not in self._tensors:
            raise UsageError(f"{self.path}: tensor {name} is missing")
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def type_names(self) -> list[str]:
        """The storage type of every tensor with two dimensions, e.g. Q4_1."""
        return [t.tensor_type.name for t in self._tensors.values() if len(t.shape) > 1]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor dequantized to float32. Raises UsageError for a storage type the gguf package cannot decode."""
        shape, raw = self.shape(name), self._tensors[name]
        try:
            return self._dequantize(raw.data, raw.tensor_type).reshape(shape)
        except (NotImplementedError, KeyError, ValueError) as e:
            raise UsageError(
                f"{self.path}: tensor {name} of type {raw.tensor_type.name} cannot be decoded: {e}"
            ) from None
