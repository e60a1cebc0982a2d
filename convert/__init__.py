"""Convert a model to MLX 4-bit, with the index of its sensitive weights."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import quantize_model, save

from .. import __version__
from ..config import check_range
from ..errors import UsageError
from ..files import new_directory
from ..index import SensitiveIndex, SensitiveTensor, write_index
from ..model import fingerprint
from ..progress import Progress, redirected_to_stderr
from .select import Scope, select
from .sensitivity import DEFAULT_TEXT, calibration_sequences, check_finite, fisher_scores
from .sources import open_source

__all__ = ["Conversion", "convert"]


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        mlx_path: the directory written.
        trainable: K, the number of sensitive weights.
        candidates: the number of weights they were chosen from.
        coverage: the sensitive weights' share of the sum of all Fisher scores.
        seconds: wall-clock time.
        peak_memory: bytes, MLX's peak.
    """

    mlx_path: str
    trainable: int
    candidates: int
    coverage: float
    seconds: float
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
    progress: bool = True,
) -> Conversion:
    """Write a quantized MLX model that stock mlx-lm loads, plus `sensitive.safetensors`.

    The tensors are those `mlx_lm.convert -q` writes from the same source with the same settings, bit by bit.

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
    with new_directory(out) as beside, open_source(hf_path, dtype, beside.parent) as source:
        sequences = calibration_sequences(source.tokenizer, text, num_samples, sequence_length, seed)
        with Progress("Scoring weights", total=num_samples, unit="sequence", enabled=progress) as bar:
            scores = fisher_scores(source.model, sequences, bar.advance)
        check_finite(scores)
        chosen = select({p: np.array(s) for p, s in scores.items()}, density, scope)
        modules = dict(source.model.named_modules())
        tensors = {}
        for path, indices in chosen.items():
            at = mx.array(indices)
            values, own_scores = modules[path].weight.reshape(-1)[at], scores[path].reshape(-1)[at]
            mx.eval(values, own_scores)
            tensors[path] = SensitiveTensor(indices, values, np.array(own_scores))
        # mlx-lm frees the dense weights one by one as it writes; hold no other reference to them.
        candidates = sum(s.size for s in scores.values())
        mass = sum(float(s.sum()) for s in scores.values())
        del modules, scores

        with redirected_to_stderr():
            model, config = quantize_model(source.model, source.config, q_group_size, q_bits)
            save(beside, source.origin, model, source.tokenizer, config)
        index = SensitiveIndex(tensors)
        coverage = sum(float(t.scores.sum(dtype=np.float64)) for t in tensors.values()) / mass if mass else 0.0
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
    return Conversion(str(out), index.size, candidates, coverage, time.perf_counter() - started, mx.get_peak_memory())
