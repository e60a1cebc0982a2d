"""The result of training as a LoRA adapter, as stock mlx-lm loads it.

A layer adds x[..., U] @ D.T to what its quantized weight gives (see `sparse`), and D has a low rank: it has few
columns, and where it has many, they are mostly empty. A LoRA layer adds (x @ a) @ b. With the eigenvectors R of
D.T @ D, those of the largest eigenvalues first,

    a[U] = R[:, :r]    b = (D @ R[:, :r]).T

is the best approximation of D with rank r (Eckart and Young 1936), and is D where r is its rank. mlx-lm wants one rank
for all layers of an adapter; layers of a lower rank are padded with zeros. At the full rank a and b are float32, as
mlx-lm writes them; what is an approximation anyway is stored in the dtype of the quantized weights' scales.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from .adapter import LORA_CONFIG, LORA_TENSORS, Snapshot, read_snapshot, run_directory
from .config import check_range
from .convert.sensitivity import DEFAULT_TEXT, token_windows
from .errors import UsageError
from .files import locked, write_atomically
from .index import SensitiveIndex, read_index
from .memory import bounded_cache
from .model import check_snapshot, load_sparse
from .product import stored_dtype
from .sparse import SparseLinear
from .switch import SparseSwitchLinear

# Ranks are tried from below, until the mean KL divergence is at most this many nats.
RANKS = (16, 32, 64, 128, 256)
MOST_KL = 2e-3
# Eigenvectors of more columns than this take minutes.
MOST_COLUMNS = 2048
# The windows of text on which it is measured, and of their tokens how many are context alone.
_WINDOWS, _TOKENS, _CONTEXT = 4, 48, 16
_CHARACTERS = 16_384


@dataclass(frozen=True)
class Fit:
    """How well a LoRA adapter stands for the values it was made from.

    Attributes:
        rank: of all its layers.
        full_rank: at which it would be exact, to rounding.
        layers: how many it has.
        kl: nats; mean over 128 tokens of text of the KL divergence of its next-token distribution from that of the
            values, on the device and in the dtype it was made in.
        residual: root of the sum of squares of what it leaves out, as a share of that of all differences.
    """

    rank: int
    full_rank: int
    layers: int
    kl: float
    residual: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Fit":
        """What is told about a fit, among other things."""
        return cls(**{field.name: found[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        how = f"KL {self.kl:.1e} nats but for rounding, residual {self.residual:.1%}"
        if self.kl > MOST_KL:
            how += "; a higher --rank, or zo-mlx fuse, is closer"
        return f"LoRA of rank {self.rank} in {self.layers} layers ({'exact' if self.rank == self.full_rank else how})"


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter: `lora_a` and `lora_b` by layer, and how many blocks the model has."""

    tensors: dict[str, mx.array]
    blocks: int
    fit: Fit

    def write(self, directory: Path, snapshot: Snapshot) -> None:
        """Write what mlx-lm loads into an adapter directory; the config, which it reads first, comes last."""
        keys = sorted({name.rpartition(".")[0] for name in self.tensors})
        config = {
            "fine_tune_type": "lora",
            "num_layers": self.blocks,
            # Whole paths: named as in a block, a layer would be wanted in all blocks.
            "lora_parameters": {"rank": self.fit.rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
            "zo_mlx": {"step": snapshot.step, "journal": snapshot.journal, **snapshot.fingerprints, **asdict(self.fit)},
        }
        (directory / LORA_CONFIG).unlink(missing_ok=True)
        write_atomically(directory / LORA_TENSORS, lambda p: mx.save_safetensors(str(p), self.tensors))
        write_atomically(directory / LORA_CONFIG, lambda p: p.write_text(json.dumps(config, indent=4, sort_keys=True)))


def export(model: str | Path, adapter_path: str | Path, rank: int | None = None) -> Fit:
    """Write what stock mlx-lm loads into an adapter directory, as training does at its end.

    Args:
        model: the model directory.
        adapter_path: the adapter directory, or `best` in one.
        rank: of the LoRA adapter; None is the lowest of 16, 32, 64, 128, 256 and, if it is lower, the full rank
            with a KL divergence of at most 0.002 nats; 256 if none has that. More than the full rank is that.

    Raises:
        UsageError: as `zo_mlx.load`; the adapter is being trained; the differences are in too many columns.
        ZoError: the disk is full.
    """
    if rank is not None:
        check_range("--rank", rank, 1)
    directory = Path(adapter_path)
    read_snapshot(directory)  # what is not there cannot be locked
    with locked(run_directory(directory)), bounded_cache():
        snapshot = read_snapshot(directory)
        sparse, tokenizer, index, _ = load_sparse(Path(model))
        check_snapshot(snapshot, directory, Path(model), index)
        made = lora_adapter(sparse.model, index, snapshot.values, tokenizer, rank)
        made.write(directory, snapshot)
    return made.fit


def write_loras(
    directories: list[Path], model: nn.Module, model_directory: Path, tokenizer: TokenizerWrapper
) -> Iterator[dict[str, Any]]:
    """Write LoRA adapters of a run's directories, which may be of the same step; of each, yield what is to be told.

    Args:
        model: with sparse layers, whose values are set.
    """
    index, step = read_index(model_directory), None
    for directory in directories:
        snapshot = read_snapshot(directory)
        if snapshot.step != step:
            made, step = lora_adapter(model, index, snapshot.values, tokenizer), snapshot.step
        made.write(directory, snapshot)
        yield {"iteration": step, "path": str(directory), **asdict(made.fit)}


def lora_adapter(
    model: nn.Module, index: SensitiveIndex, values: mx.array, tokenizer: TokenizerWrapper, rank: int | None = None
) -> Lora:
    """Make a LoRA adapter, and measure it in the model.

    Args:
        model: with sparse layers, whose values are set.
        index: the model's.
        values: (K,) float32.
        tokenizer: of the text to measure with.
        rank: as for `export`.

    Raises:
        UsageError: the differences are in too many columns of a layer.
    """
    modules = dict(model.named_modules())
    layers, start = [], 0
    for path, tensor in index.tensors.items():
        own = values[start : (start := start + tensor.size)]
        modules[path].set_values(own[None])
        layers.append(_Layer(path, modules[path], own))
    layers = [layer for layer in layers if layer.rank]
    text = DEFAULT_TEXT.read_text(encoding="utf-8")[:_CHARACTERS]
    windows = mx.array(token_windows(tokenizer, text, _TOKENS)[:_WINDOWS])
    reference = _log_probabilities(model, windows)
    full = max((layer.rank for layer in layers), default=1)
    total = sum(layer.energies.sum() for layer in layers)
    ranks = [*(r for r in RANKS if r < full), *([full] if full <= RANKS[-1] else [])] if rank is None else [rank]
    for wanted in ranks:
        r = min(wanted, full)
        made = {layer.path: layer.lora(r, exact=r == full) for layer in layers}
        with _replaced(model, made):
            kl = float(kl_divergence(reference, _log_probabilities(model, windows)).mean())
        if kl <= MOST_KL:
            break
    left = sum(layer.energies[..., r:].sum() for layer in layers)
    fit = Fit(r, full, len(layers), kl, math.sqrt(left / total) if total else 0.0)
    tensors = {f"{path}.{name}": lora[name] for path, lora in made.items() for name in ("lora_a", "lora_b")}
    return Lora(tensors, len(model.layers), fit)


class _Layer:
    """A layer's difference and its principal directions; E is the number of experts, or 1.

    Attributes:
        energies: (E, C) squares of the singular values of D, falling.
        rank: how many of them are not 0, to rounding.
    """

    def __init__(self, path: str, layer: SparseLinear | SparseSwitchLinear, values: mx.array):
        self.path, self._sparse, self._values = path, layer, values
        columns, difference = layer.difference(values)
        if columns.shape[1] > MOST_COLUMNS:
            raise UsageError(
                f"{path} differs in {columns.shape[1]} columns, too many for a LoRA adapter; make a model of its own "
                "with: zo-mlx fuse"
            )
        d = np.array(difference, np.float64)
        energies, directions = np.linalg.eigh(d @ d.swapaxes(1, 2))
        self.energies, self._directions = energies[:, ::-1].clip(0), directions[:, :, ::-1].astype(np.float32)
        self.rank = int((self.energies > 1e-12 * self.energies.max()).sum(axis=1).max())

    def lora(self, rank: int, exact: bool) -> nn.Module:
        """mlx-lm's own layer in its place; in float32 if it is to be exact."""
        switch = isinstance(self._sparse, SparseSwitchLinear)
        lora = (LoRASwitchLinear if switch else LoRALinear).from_base(self._sparse.base, rank, scale=1.0)  # type: ignore[arg-type]
        columns, difference = self._sparse.difference(self._values)
        directions = self._directions[:, :, :rank]
        a = np.zeros((len(columns), lora.lora_a.shape[-1 if switch else 0], rank), np.float32)
        experts = np.arange(len(columns))[:, None]
        # Added, because columns that fill up an expert's have the number of a real one.
        np.add.at(a[..., : directions.shape[2]], (experts, columns), directions)
        b = mx.array(directions).swapaxes(1, 2) @ difference
        b = mx.pad(b, [(0, 0), (0, rank - b.shape[1]), (0, 0)])
        if switch:
            lora.lora_a, lora.lora_b = mx.array(a.swapaxes(1, 2)), mx.contiguous(b.swapaxes(1, 2))
        else:
            lora.lora_a, lora.lora_b = mx.array(a[0]), b[0]
        dtype = mx.float32 if exact else stored_dtype(self._sparse.base)
        lora.lora_a, lora.lora_b = lora.lora_a.astype(dtype), lora.lora_b.astype(dtype)
        mx.eval(lora.lora_a, lora.lora_b)
        return lora


@contextlib.contextmanager
def _replaced(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """While it lasts, the model has other layers."""
    modules = dict(model.named_modules())
    model.update_modules(tree_unflatten(list(layers.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten([(path, modules[path]) for path in layers]))


def _log_probabilities(model: nn.Module, windows: mx.array) -> mx.array:
    """Of the next token, after the last tokens of each window: (N, T) tokens -> (N, T', V) float32."""
    logits = model(windows)[:, _CONTEXT:].astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def kl_divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL divergence in nats of log-probabilities q from p: (..., V) -> (...)"""
    # Beside sum(p log(p / q)), sum(q - p) = 0: no term is then of first order in what is rounded.
    difference = mx.maximum(p - q, -80)
    return (mx.exp(p) * (difference + mx.expm1(-difference))).sum(axis=-1)
