"""Where a model to convert comes from: a Hugging Face or MLX directory, a hub id, or a GGUF file."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download

from ..blocks import BlockwiseModel
from ..errors import UsageError, ZoError
from ..files import new_directory, read_json
from ..hub import is_hub_id, reason
from ..model import load_stock_model, load_tokenizer_of
from .gguf import write_hf_directory


@dataclass
class Source:
    """A model and what belongs to it.

    Attributes:
        directory: where it is.
        hub_id: where it was fetched from, if it was.
        dtype: what it will be stored in, or None for what it is in.
        files: what it was read from.
    """

    directory: Path
    hub_id: str | None
    files: list[Path]
    dtype: str | None
    config: dict[str, Any]
    tokenizer: TokenizerWrapper

    @property
    def name(self) -> Path:
        """The file or directory, for messages."""
        return self.files[0] if self.files[0].suffix == ".gguf" else self.directory

    @property
    def quantized(self) -> bool:
        """Whether MLX has already quantized it."""
        return "quantization" in self.config

    @cached_property
    def is_chain(self) -> bool:
        """Whether the model's blocks are a plain chain, each fed by the one before: `BlockwiseModel.is_chain`."""
        with BlockwiseModel(self.open_model()) as model:
            return model.is_chain()

    def open_model(self) -> nn.Module:
        """The model with weights that are read when they are first used; every call gives a new one."""
        model, _ = load_stock_model(self.directory, lazy=True)
        if self.dtype in MODEL_CONVERSION_DTYPES:
            _set_dtype(model, getattr(mx, self.dtype))
        return model


def open_source(hf_path: str, dtype: str | None, scratch: Path, revision: str | None = None) -> Source:
    """Open a model for conversion.

    Args:
        hf_path: a directory, a hub id (`name/model`), or a `.gguf` file.
        dtype: float16, bfloat16 or float32 for the tensors that stay unquantized; by default the source's.
        scratch: a directory where a `.gguf` file's tensors are put, dequantized; if they are there they are taken.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        UsageError: no such model, not a model, unsupported architecture, damaged files.
        ZoError: it cannot be fetched from the hub.
    """
    if dtype is not None and dtype not in MODEL_CONVERSION_DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(MODEL_CONVERSION_DTYPES)}")
    path = Path(hf_path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{path} is a file, but not a .gguf file")
        directory = scratch / "gguf"
        if not directory.exists():
            with new_directory(directory) as beside:
                write_hf_directory(path, beside, dtype)
        try:
            return _open_directory(directory, None, [path], dtype)
        except UsageError as e:  # which knows of the directory alone
            raise UsageError(f"{path}: {e}") from None
    if path.is_dir():
        return _open_directory(path, None, _files(path), dtype)
    directory = _fetch(hf_path, revision)
    return _open_directory(directory, hf_path, _files(directory), dtype)


def _files(directory: Path) -> list[Path]:
    return sorted(f for f in directory.iterdir() if f.suffix in (".json", ".safetensors", ".model") and f.is_file())


def _fetch(hub_id: str, revision: str | None) -> Path:
    if not is_hub_id(hub_id):
        raise UsageError(f"no such model: {hub_id} is neither a file, nor a directory, nor a hub id like name/model")
    try:
        return _download(hub_id, revision=revision)
    except Exception as e:
        raise ZoError(f"no such model here, and {hub_id} cannot be fetched from the hub: {reason(e)}") from None


def _open_directory(directory: Path, hub_id: str | None, files: list[Path], dtype: str | None) -> Source:
    config = read_json(directory / "config.json")
    if config.get("quantization_config") is not None and config.get("quantization") is None:
        raise UsageError(f"{directory} is quantized, but not by MLX; convert from the full-precision model instead")
    _, config = load_stock_model(directory, lazy=True)
    for key in ("quantization", "quantization_config"):
        if config.get(key) is None:  # null is what tools write of a model that is not quantized
            config.pop(key, None)
    tokenizer = load_tokenizer_of(directory, config)
    # The same choice, from the same fields, as mlx_lm.convert's, or its tensors would differ from ours.
    text_config = config.get("text_config")
    if "quantization" in config:
        if dtype:
            raise UsageError(f"{directory} is already quantized: --dtype does not apply")
        return Source(directory, hub_id, files, None, config, tokenizer)
    dtype = dtype or config.get("torch_dtype") or (text_config.get("dtype") if isinstance(text_config, dict) else None)
    return Source(directory, hub_id, files, dtype, config, tokenizer)


def _set_dtype(model: nn.Module, dtype: mx.Dtype) -> None:
    castable = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if castable(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))
