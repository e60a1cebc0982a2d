"""Convert a model to MLX 4-bit, with the index of its sensitive weights."""

import contextlib
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import quantize_model

from .. import __version__
from ..config import check_range
from ..errors import UsageError
from ..files import new_directory
from ..index import SensitiveIndex, SensitiveTensor, write_index
from ..model import fingerprint
from ..product import dequantized, weight_shape
from ..progress import Progress, redirected_to_stderr
from .blocks import BlockwiseModel
from .blockwise import blockwise_fisher_scores
from .select import Scope, Selector
from .sensitivity import (
    DEFAULT_TEXT,
    calibration_sequences,
    check_finite,
    fisher_scores,
    scored_layers,
)
from .sources import Source, open_source
from .write import copy_model, write_model

__all__ = ["Conversion", "convert"]

CACHE_BYTES = 64 << 20


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        mlx_path: the directory written.
        trainable: K, the number of sensitive weights.
        candidates: the number of weights they were chosen from.
        coverage: the sensitive weights' share of the sum of all Fisher scores.
        seconds: wall-clock time.
        phases: what of it went into `forward`, `backward`, `select`, `quantize` and `write`.
        peak_memory: bytes, MLX's peak.
    """

    mlx_path: str
    trainable: int
    candidates: int
    coverage: float
    seconds: float
    phases: dict[str, float]
    peak_memory: int


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    *,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    dtype: str | None = None,
    density: float = 1e-3,
    scope: Scope = "global",
    calibration_data: str | None = None,
    num_samples: int = 16,
    sequence_length: int = 256,
    seed: int = 0,
    memory_limit: float | None = None,
    progress: bool = True,
) -> Conversion:
    """Write a quantized MLX model that stock mlx-lm loads, plus `sensitive.safetensors`.

    The tensors are those `mlx_lm.convert -q` writes from the same source with the same settings, bit by bit. From a
    model that MLX has already quantized they are copied, and the values are those of its quantized weights.

    Args:
        hf_path: a Hugging Face directory, a hub id, or a `.gguf` file.
        mlx_path: the directory to write; must not exist.
        q_bits: bits per weight, by default mlx-lm's (4).
        q_group_size: weights that share a scale, by default mlx-lm's (64).
        dtype: dtype of what stays unquantized; by default the source's.
        density: fraction of the linear layers' weights that is trainable.
        scope: `global` (one threshold over all layers) or `tensor` (the same fraction of each).
        calibration_data: a UTF-8 text file; by default the text that ships with the package.
        num_samples: calibration sequences.
        sequence_length: tokens in each.
        seed: decides which parts of the text are taken.
        memory_limit: GB to aim at, for machines on which a transformer block with its scores does not fit. The result
            is the same.
        progress: report progress on standard error.

    Raises:
        UsageError: bad arguments or source; `mlx_path` exists.
        ZoError: a download or a write failed.
    """
    started = time.perf_counter()
    mx.reset_peak_memory()
    check_range("--num-samples", num_samples, 1)
    check_range("--sequence-length", sequence_length, 2)
    check_range("--seed", seed, 0)
    check_range("--memory-limit", memory_limit or 1, 1e-3)
    limit = None if memory_limit is None else int(memory_limit * 1e9)
    if (q_group_size is not None and not 0 < q_group_size <= 1024) or (q_bits is not None and not 0 < q_bits <= 16):
        raise UsageError(f"--q-bits {q_bits} with --q-group-size {q_group_size} is out of range")
    if q_bits is not None or q_group_size is not None:
        try:
            mx.quantize(mx.zeros((1, q_group_size or 64)), q_group_size, q_bits)
        except ValueError as e:
            raise UsageError(f"--q-bits {q_bits} with --q-group-size {q_group_size}: {e}") from None
    text_path = Path(calibration_data) if calibration_data else DEFAULT_TEXT
    try:
        text = text_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"calibration text {text_path} cannot be read: {e}") from None

    out = Path(mlx_path)
    with new_directory(out) as beside, open_source(hf_path, dtype, beside.parent) as source, _bounded_cache():
        if source.quantized and (q_bits or q_group_size):
            raise UsageError(f"{hf_path} is already quantized: --q-bits and --q-group-size do not apply")
        sequences = calibration_sequences(source.tokenizer, text, num_samples, sequence_length, seed)
        watch = Stopwatch()
        selector, candidates, mass = _score(source, sequences, density, scope, limit, beside.parent, watch, progress)
        index = SensitiveIndex(_gather(source.open_model(), selector.result()))
        watch.lap("select")
        if source.quantized:
            copy_model(beside, source.directory)
            watch.lap("write")
        else:
            with redirected_to_stderr():
                model, config = quantize_model(source.open_model(), source.config, q_group_size, q_bits)
                write_model(beside, source.directory, source.hub_id, model, source.tokenizer, config, watch.lap)
        coverage = sum(float(t.scores.sum(dtype=np.float64)) for t in index.tensors.values()) / mass if mass else 0.0
        index.metadata = {
            "density": density,
            "scope": scope,
            "size": index.size,
            "candidates": candidates,
            "coverage": coverage,
            "calibration": {
                "name": text_path.name,
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "num_samples": num_samples,
                "sequence_length": sequence_length,
                "seed": seed,
            },
            "base_model": fingerprint(beside),
            "zo_mlx": __version__,
        }
        write_index(index, beside)
    seconds = time.perf_counter() - started
    return Conversion(str(out), index.size, candidates, coverage, seconds, watch.seconds, mx.get_peak_memory())


class Stopwatch:
    """Seconds spent in each phase of the work: `lap` books the time since the last lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The phase that has just ended."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _score(
    source: Source,
    sequences: np.ndarray,
    density: float,
    scope: Scope,
    memory_limit: int | None,
    scratch: Path,
    watch: Stopwatch,
    progress: bool,
) -> tuple[Selector, int, float]:
    """Rank the weights of all linear layers; also their number, and the sum of their scores."""
    model = source.open_model()
    modules = dict(model.named_modules())
    sizes = {path: math.prod(weight_shape(modules[path])) for path in scored_layers(model)}
    selector, mass = Selector(sizes, density, scope), 0.0
    blocks = len(model.layers)
    with BlockwiseModel(model) as blockwise:
        chain = blockwise.is_chain()
    del model, modules
    if not chain and source.quantized:
        raise UsageError(
            f"the blocks of {source.config['model_type']} are not a plain chain, each fed by the one before; such a "
            "model cannot be converted once it is quantized: use the full-precision one"
        )
    if not chain:
        print(
            f"Warning: the blocks of {source.config['model_type']} are not a plain chain, each fed by the one before: "
            "the whole model and all its gradients are held in memory",
            file=sys.stderr,
        )
    rounds = len(sequences) * (2 * blocks if chain else 1)
    with (
        tempfile.TemporaryDirectory(prefix=".inputs.", dir=scratch) as inputs,
        Progress("Scoring weights", rounds, "block" if chain else "sequence", progress) as bar,
    ):

        def advance(phase: str) -> None:
            watch.lap(phase)
            bar.advance()

        scores = (
            blockwise_fisher_scores(source.open_model, sequences, Path(inputs), memory_limit, advance)
            if chain
            else fisher_scores(source.open_model(), sequences, advance)
        )
        for path, layer_scores in scores:
            watch.lap("backward")
            check_finite(path, layer_scores)
            selector.add(path, np.array(layer_scores, copy=False))
            mass += float(layer_scores.sum())
            watch.lap("select")
    return selector, sum(sizes.values()), mass


def _gather(model: nn.Module, chosen: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, SensitiveTensor]:
    """Look the chosen weights up, reading one layer at a time."""
    modules = dict(model.named_modules())
    tensors = {}
    for path, (indices, scores) in chosen.items():
        module = modules[path]
        weight = dequantized(module) if "scales" in module else module.weight
        values = weight.reshape(-1)[mx.array(indices)]
        mx.eval(values)
        module.pop("weight")
        del weight
        tensors[path] = SensitiveTensor(indices, values, scores)
    return tensors


@contextlib.contextmanager
def _bounded_cache() -> Iterator[None]:
    """Let MLX return freed buffers to the system at once, or the peak is that of what has been."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
