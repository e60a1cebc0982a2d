"""Model directories: checks, fingerprints, loading with and without an adapter."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from .adapter import Snapshot, read_snapshot
from .errors import UsageError
from .files import count_tensors, load_safetensors, read_json, sha256
from .index import FILE_NAME as INDEX
from .index import SensitiveIndex, read_index
from .product import prepare
from .shards import shard
from .sparse import SparseModel

# Models are tried with the tokens 1, 2 and 3; where an embedding has fewer, MLX reads and writes beyond it.
LEAST_VOCABULARY = 5


def load_stock_model(directory: Path, lazy: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's `load_model`, after checks that turn damaged or foreign directories into one clear line.

    Returns:
        The model and its config.

    Raises:
        UsageError: not a directory, not a model, unsupported architecture, truncated or mismatched weights.
    """
    if not directory.is_dir():
        raise UsageError(
            f"no such model: {directory} is not a directory; if it is a hub id or a file, make one of it with: "
            f"zo-mlx convert --hf-path {directory} --mlx-path NEW"
        )
    config = read_json(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{directory} is not a model directory: config.json has no model_type")
    if "model_file" in config:
        raise UsageError(f"{directory} needs custom code ({config['model_file']}), which zo-mlx does not run")
    weights = weight_files(directory)
    if not weights:
        raise UsageError(f"{directory} is not a model directory: it has no model*.safetensors")
    if (listing := directory / "model.safetensors.index.json").exists():
        _check_weight_map(listing)
    tensors = sum(count_tensors(file) for file in weights)
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(layers := config.get(key), int) and layers > tensors:  # mlx-lm would build them all first
            raise UsageError(f"{directory} cannot be loaded: config.json has {key} = {layers} for {tensors} tensors")
    try:
        check_vocabulary(config)
        return load_model(directory, lazy=lazy)
    except Exception as e:  # whatever an architecture raises on a config or tensors it does not expect
        raise UsageError(f"{directory} cannot be loaded: {str(e)[:300] or type(e).__name__}") from None


def _check_weight_map(listing: Path) -> None:
    """mlx-lm reads the files that are there, whatever the map says; one that points elsewhere is not to be trusted."""
    names = read_json(listing).get("weight_map")
    if not isinstance(names, dict):
        raise UsageError(f"{listing} has no weight_map")
    for tensor, name in names.items():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise UsageError(f"{listing}: weight_map puts {tensor} into {name!r}, which is not a file of the directory")


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory that mlx-lm reads, sorted by name."""
    return sorted(directory.glob("model*.safetensors"))


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """By layer, the shapes of a model's weights as they would be without quantization; nothing else is read of them."""
    stored: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        stored |= {name: array.shape for name, array in load_safetensors(file)[0].items()}
    config, found = read_json(directory / "config.json"), {}
    for name, shape in stored.items():
        if (path := name.removesuffix(".weight")) != name:
            packed = f"{path}.scales" in stored
            found[path] = (*shape[:-1], shape[-1] * 32 // _bits(config, path)) if packed else shape
    return found


def _bits(config: dict[str, Any], path: str) -> int:
    """Bits per weight of a layer; mlx-lm's config has one number for all, and others for some layers by path."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return 32
    own = quantization.get(path)
    bits = (own if isinstance(own, dict) else quantization).get("bits")
    return bits if type(bits) is int and 0 < bits <= 32 else 32


def load_tokenizer_of(directory: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model directory. Raises UsageError if it is missing or damaged."""
    try:
        return load_tokenizer(directory, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    except Exception as e:  # transformers and tokenizers raise many kinds
        raise UsageError(f"{directory}: the tokenizer cannot be loaded: {str(e)[:300]}") from None


def fingerprint(directory: Path) -> str:
    """SHA-256 that identifies a base model: config.json and the weight files, names and whole contents."""
    return _sha256_of([directory / "config.json", *weight_files(directory)])


def _sha256_of(files: list[Path]) -> str:
    """Of the names and the SHA-256s of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def checked_index(directory: Path) -> SensitiveIndex:
    """The sensitive index of a model directory. Raises UsageError as `read_index`, or if it is of another model."""
    index = read_index(directory)
    recorded = index.metadata.get("base_model")
    if recorded != (actual := fingerprint(directory)):
        raise UsageError(
            f"{directory / INDEX} belongs to another model (fingerprint {str(recorded)[:12]}, "
            f"this one has {actual[:12]}); convert again"
        )
    return index


def fingerprints(directory: Path, index: SensitiveIndex) -> dict[str, str]:
    """Of all that a model directory brings to a run; `index` is its `checked_index`."""
    files = [path for name in _TOKENIZER if (path := directory / name).exists()]
    return {
        "base_model": index.metadata["base_model"],
        "index": sha256(directory / INDEX),
        "tokenizer": _sha256_of(files),
    }


def check_fingerprints(what: str, recorded: dict[str, str], actual: dict[str, str]) -> None:
    """Raise UsageError, naming all differences, where something was made with other things than the actual ones."""
    if changed := [_NAMES[name] for name, value in actual.items() if recorded.get(name) != value]:
        raise UsageError(f"{what} does not belong here: since it was made, {' and '.join(changed)} changed")


# The files that turn text into tokens. Whatever else does so shows in the tokenized training set.
_TOKENIZER = ("added_tokens.json", "merges.txt", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# What fingerprints are of, for people.
_NAMES = {
    "base_model": "the base model (config.json or weights: another model, or one quantized again)",
    "index": "the sensitive index (sensitive.safetensors)",
    "tokenizer": "the tokenizer",
    "objective": "the file with the objective",
}


def load_sparse(
    directory: Path, spread: bool = False, float32: bool = True
) -> tuple[SparseModel, TokenizerWrapper, SensitiveIndex, dict[str, Any]]:
    """Load a base model with its sensitive weights attached, ready for the default device.

    Args:
        spread: load this rank's part of it only; all ranks compute together.
        float32: compute in float32 on a GPU, too, as random directions need it; else in the model's dtype.

    Returns:
        The sparse model (no values set: it computes as the base model), tokenizer, index, and the model's config.

    Raises:
        UsageError: as `load_stock_model` and `checked_index`.
    """
    model, config = load_stock_model(directory, lazy=spread)
    index = checked_index(directory)
    tokenizer = load_tokenizer_of(directory, config)
    if spread:
        sparse = shard(model, load_stock_model(directory, True)[0], index)
    else:
        sparse = SparseModel(prepare(model, float32), index)
    return sparse, tokenizer, index, config


def context_length(config: dict[str, Any]) -> int:
    """The longest sequence a model was made for, in tokens; very large where its config does not say."""
    return next(_numbers(config, "max_position_embeddings", "n_positions", "max_sequence_length"), 1 << 30)


def vocabulary_size(config: dict[str, Any]) -> int:
    """How many tokens a model has at most; very many where its config does not say."""
    return max(_numbers(config, "vocab_size"), default=1 << 30)


def _numbers(config: dict[str, Any], *keys: str) -> Iterator[int]:
    for key in keys:
        for place in (config, config.get("text_config")):
            if isinstance(place, dict) and type(found := place.get(key)) is int:
                yield found


def config_of(model: nn.Module) -> dict[str, Any]:
    """What a loaded model knows of its config."""
    return vars(getattr(model, "args", SimpleNamespace()))


def check_vocabulary(config: dict[str, Any]) -> None:
    """Raise ValueError for a model that has fewer tokens than models are tried with."""
    for size in _numbers(config, "vocab_size"):
        if size < LEAST_VOCABULARY:
            raise ValueError(f"vocab_size is {size}, and must be at least {LEAST_VOCABULARY}")


def load(path: str | Path, adapter_path: str | Path | None = None) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model directory, ready for `zo_mlx.evaluate` and `zo_mlx.generate`.

    Args:
        path: an MLX model directory.
        adapter_path: a directory made by `zo_mlx.train`: its values replace those of the base model. Without it, the
            model computes what stock mlx-lm computes from the same directory (on the CPU backend, in float32).

    Returns:
        The model and its tokenizer, as `mlx_lm.load` returns them.

    Raises:
        UsageError: not a model; the adapter is damaged or belongs to another model or index.
    """
    directory = Path(path)
    if adapter_path is None:
        model, config = load_stock_model(directory)
        return prepare(model), load_tokenizer_of(directory, config)
    sparse, tokenizer, index, _ = load_sparse(directory, float32=False)
    sparse.set_values(read_values(Path(adapter_path), directory, index)[None], keep=True)
    return sparse.model, tokenizer


def read_values(adapter_path: Path, directory: Path, index: SensitiveIndex) -> mx.array:
    """An adapter's values, (K,) float32.

    Args:
        directory: of the model that it must have been trained on.
        index: that model's.

    Raises:
        UsageError: the adapter is damaged or belongs to another model or index.
    """
    snapshot = read_snapshot(adapter_path)
    check_snapshot(snapshot, adapter_path, directory, index)
    return snapshot.values


def check_snapshot(snapshot: Snapshot, adapter_path: str | Path, directory: Path, index: SensitiveIndex) -> None:
    """Raise UsageError if an adapter's values do not belong to a model directory and its index."""
    check_fingerprints(f"the adapter {adapter_path}", snapshot.fingerprints, fingerprints(directory, index))
    if snapshot.values.size != index.size:
        raise UsageError(
            f"the adapter {adapter_path} is damaged: it has {snapshot.values.size} values, not {index.size}"
        )
