"""A model of its own from a base model and an adapter, that needs neither zo-mlx nor the adapter.

The layers with sensitive weights are stored with more bits, and all others as they are: at 4 bits most of what training
changed would be rounded away.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.utils import dequantize_model

from .adapter import read_snapshot
from .convert.write import model_bytes, upload, write_model
from .errors import UsageError, ZoError
from .files import check_space, new_directory, read_json, reporting_disk_errors
from .index import SensitiveIndex
from .model import check_snapshot, checked_index, load_stock_model, load_tokenizer_of
from .product import make_dense, stored_dtype, with_values
from .progress import redirected_to_stderr

BITS = (8, 16)
_GROUP_SIZES = (64, 32)
# As in `mlx_lm.fuse`.
_GGUF_TYPES = ("llama", "mixtral", "mistral")


@dataclass(frozen=True)
class Fused:
    """What `fuse` did.

    Attributes:
        save_path: the directory written.
        layers: how many have values of the adapter.
        bits: per weight of these layers.
        bytes: of the model's weights.
        gguf: the GGUF file written, if there is one.
    """

    save_path: str
    layers: int
    bits: int
    bytes: int
    gguf: str | None


def fuse(
    model: str | Path,
    adapter_path: str | Path,
    save_path: str | Path,
    *,
    bits: int = 8,
    dequantize: bool = False,
    export_gguf: bool = False,
    gguf_path: str = "ggml-model-f16.gguf",
    upload_repo: str | None = None,
    progress: bool = True,
) -> Fused:
    """Write a model directory that stock mlx-lm loads, with an adapter's values in place, a tensor at a time.

    Args:
        model: the model directory.
        adapter_path: the adapter directory, or `best` in one.
        save_path: the directory to write; must not exist.
        bits: 8 or 16, of the layers with sensitive weights; all others are copied bit by bit.
        dequantize: write all layers with 16 bits instead.
        export_gguf: write a GGUF file, too, by mlx-lm, which holds the whole model in memory.
        gguf_path: the file's name.
        upload_repo: a hub repository to upload the result to.
        progress: report progress on standard error.

    Raises:
        UsageError: as `zo_mlx.load`; `save_path` exists; mlx-lm writes no GGUF file of such a model.
        ZoError: the write or the upload failed.
    """
    directory, out = Path(model), Path(save_path)
    if bits not in BITS:
        raise UsageError(f"--bits must be 8 or 16, not {bits}")
    if out.exists():
        raise UsageError(f"{out} already exists; name another directory or remove it first")
    snapshot = read_snapshot(Path(adapter_path))
    loaded, config = load_stock_model(directory, lazy=True)
    index = checked_index(directory)
    check_snapshot(snapshot, adapter_path, directory, index)
    tokenizer = load_tokenizer_of(directory, config)
    if export_gguf:
        _check_gguf(directory, config, dequantize, gguf_path)
    bits = 16 if dequantize else bits
    _put(loaded, config, index, snapshot.values, bits)
    if dequantize:
        loaded = dequantize_model(loaded)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    size = model_bytes(loaded)
    with reporting_disk_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    check_space(out.absolute().parent, size * (2 if export_gguf else 1))
    with new_directory(out) as beside:
        write_model(beside, directory, None, loaded, tokenizer, config, lambda _: None, progress)
        if export_gguf:
            _write_gguf(beside, config, gguf_path)
    if upload_repo:
        upload(out, upload_repo)
    return Fused(str(out), len(index.tensors), bits, size, str(out / gguf_path) if export_gguf else None)


def _put(model: nn.Module, config: dict[str, Any], index: SensitiveIndex, values: mx.array, bits: int) -> None:
    """Put values (K,) into a model none of whose weights is read yet, and say in its config how they are stored."""
    modules, start = dict(model.named_modules()), 0
    for path, tensor in index.tensors.items():
        layer = modules[path]
        own = values[start : (start := start + tensor.size)]
        weight = with_values(layer, tensor.indices, own).astype(stored_dtype(layer))
        group_size = next((size for size in _GROUP_SIZES if weight.shape[-1] % size == 0), None)
        if "scales" in layer and bits == 8 and group_size:
            layer.weight, layer.scales, layer.biases = mx.quantize(weight, group_size, 8)
            layer.pop("global_scale", None)
            settings = {"group_size": group_size, "bits": 8, "mode": "affine"}
            layer.group_size, layer.bits, layer.mode = settings.values()
            config["quantization"][path] = settings
        else:
            make_dense(layer, weight)
            config.get("quantization", {}).pop(path, None)


def _check_gguf(directory: Path, config: dict[str, Any], dequantize: bool, name: str) -> None:
    """Raise UsageError for what mlx-lm's GGUF writer would not do, or not right."""
    if not dequantize:
        raise UsageError("--export-gguf needs --dequantize: mlx-lm writes GGUF files with 16 bits only")
    if Path(name).name != name or not name.endswith(".gguf"):  # which the model's own files do not
        raise UsageError(f"--gguf-path {name} must be a name that ends in .gguf, of a file in the directory to write")
    if config["model_type"] not in _GGUF_TYPES:
        raise UsageError(f"mlx-lm writes GGUF files of {', '.join(_GGUF_TYPES)} models, not of {config['model_type']}")
    vocabulary = read_json(directory / "tokenizer.json").get("model")
    if not isinstance(vocabulary, dict) or not vocabulary.get("byte_fallback"):
        raise UsageError(
            "mlx-lm writes GGUF files with a SentencePiece vocabulary, and the model has another one; leave out "
            "--export-gguf, and give the result to llama.cpp's convert_hf_to_gguf.py"
        )


def _write_gguf(directory: Path, config: dict[str, Any], name: str) -> None:
    model, _ = load_stock_model(directory, lazy=True)
    try:
        with redirected_to_stderr():
            convert_to_gguf(directory, dict(tree_flatten(model.parameters())), config, str(directory / name))
    except Exception as e:  # tokenizers and configs it was not made for
        raise ZoError(f"mlx-lm cannot write {name}: {type(e).__name__}: {e}") from None
