"""Convert a model to MLX 4-bit, with the index of its sensitive weights."""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import quantize_model

from .. import __version__
from ..config import check_range
from ..errors import UsageError
from ..files import new_directory, sha256
from ..index import SensitiveIndex, write_index
from ..memory import bounded_cache
from ..model import fingerprint
from ..progress import redirected_to_stderr
from .scoring import Stopwatch, gather, rank
from .select import Scope
from .sensitivity import DEFAULT_TEXT, calibration_sequences
from .sources import open_source
from .write import REPORT, copy_model, write_model

__all__ = ["Conversion", "convert"]

# Freed buffers that MLX keeps for reuse count like used ones, or the peak is that of what has been.
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
    revision: str | None = None,
    progress: bool = True,
) -> Conversion:
    """Write a quantized MLX model that stock mlx-lm loads, plus `sensitive.safetensors`, and `convert.json`, a report.

    The tensors are those `mlx_lm.convert -q` writes from the same source with the same settings, bit by bit. From a
    model that MLX has already quantized they are copied, and the values are those of its quantized weights.

    Args:
        hf_path: a Hugging Face directory, one that MLX has quantized, a hub id, or a `.gguf` file.
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
        revision: of a hub id: a branch, tag or commit; by default its main branch.
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
    limit = None
    if memory_limit is not None:
        check_range("--memory-limit", memory_limit, 1e-3)
        limit = int(memory_limit * 1e9)
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
    with (
        new_directory(out) as beside,
        open_source(hf_path, dtype, beside, revision) as source,
        bounded_cache(CACHE_BYTES),
    ):
        if source.quantized and (q_bits or q_group_size):
            raise UsageError(f"{hf_path} is already quantized: --q-bits and --q-group-size do not apply")
        sequences = calibration_sequences(source.tokenizer, text, num_samples, sequence_length, seed)
        watch = Stopwatch()
        ranking = rank(source, sequences, density, scope, limit, beside, watch, progress)
        index = SensitiveIndex(gather(source.open_model(), ranking.chosen))
        watch.lap("select")
        if source.quantized:
            copy_model(beside, source.directory)
            watch.lap("write")
        else:
            with redirected_to_stderr():
                model, config = quantize_model(source.open_model(), source.config, q_group_size, q_bits)
                write_model(beside, source.directory, source.hub_id, model, source.tokenizer, config, watch.lap)
        index.metadata = {
            "density": density,
            "scope": scope,
            "size": index.size,
            "candidates": ranking.candidates,
            "coverage": ranking.coverage,
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
        done = Conversion(
            str(out),
            index.size,
            ranking.candidates,
            ranking.coverage,
            time.perf_counter() - started,
            watch.seconds,
            mx.get_peak_memory(),
        )
        report = {
            "source": source.hub_id or hf_path,
            "revision": revision,
            "files": {file.name: sha256(file) for file in source.files},
            **index.metadata,
            "q_bits": q_bits,
            "q_group_size": q_group_size,
            "dtype": dtype,
            "memory_limit": memory_limit,
            **{k: v for k, v in dataclasses.asdict(done).items() if k in ("seconds", "phases", "peak_memory")},
            "layers": ranking.layers(),
        }
        (beside / REPORT).write_text(json.dumps(report, indent=2))
    return done
