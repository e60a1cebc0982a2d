"""Convert a model to MLX 4-bit, with the index of its sensitive weights."""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..config import GB, check_range
from ..errors import UsageError
from ..files import sha256
from ..index import SensitiveIndex, write_index
from ..memory import bounded_cache
from ..model import context_length, fingerprint, vocabulary_size
from .checkpoint import Checkpoint
from .masks import Mask, rank_unscored
from .perplexity import before_and_after, perplexity_windows
from .quantize import Quantization, clip_sensitive
from .scoring import Stopwatch, checkpoint_bytes, gather, rank
from .select import Scope, check_choice, check_option
from .sensitivity import DEFAULT_TEXT, calibration_sequences
from .sources import open_source
from .workspace import workspace
from .write import REPORT, copy_model, model_bytes, model_files, upload, write_model

__all__ = ["Conversion", "convert"]


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        mlx_path: the directory written.
        trainable: K, the number of sensitive weights.
        candidates: the number of weights they were chosen from.
        coverage: the sensitive weights' share of the sum of all Fisher scores; None with another mask.
        seconds: wall-clock time; of a resumed conversion, since then.
        phases: what of it went into `forward`, `backward`, `select`, `quantize`, `write` and `perplexity`.
        peak_memory: bytes, MLX's peak.
        perplexity: with `perplexity_data`, of the `source`, of the model as `quantized`, and of the model
            `with_sensitive` weights in place, each with its standard error.
    """

    mlx_path: str
    trainable: int
    candidates: int
    coverage: float | None
    seconds: float
    phases: dict[str, float]
    peak_memory: int
    perplexity: dict[str, Any] | None = None


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    *,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    dtype: str | None = None,
    density: float = 1e-3,
    scope: Scope = "global",
    mask: Mask = "sensitive",
    isolate: bool = False,
    calibration_data: str | None = None,
    num_samples: int = 16,
    sequence_length: int = 256,
    seed: int = 0,
    perplexity_data: str | None = None,
    memory_limit: float | None = None,
    revision: str | None = None,
    upload_repo: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write a quantized MLX model that stock mlx-lm loads, plus `sensitive.safetensors`, and `convert.json`, a report.

    The tensors are those `mlx_lm.convert -q` writes from the same source with the same settings, bit by bit (but for
    `isolate`). From a model that MLX has already quantized they are copied, and the values are those of its quantized
    weights.

    Args:
        hf_path: a Hugging Face directory, one that MLX has quantized, a hub id, or a `.gguf` file.
        mlx_path: the directory to write; must not exist.
        q_bits: bits per weight, by default mlx-lm's (4).
        q_group_size: weights that share a scale, by default mlx-lm's (64).
        q_mode: `affine`, `mxfp4`, `nvfp4` or `mxfp8`.
        quant_predicate: one of mlx-lm's recipes of mixed bits, e.g. `mixed_4_6`.
        dtype: dtype of what stays unquantized; by default the source's.
        density: fraction of the linear layers' weights that is trainable.
        scope: `global` (one threshold over all layers) or `tensor` (the same fraction of each).
        mask: which weights are trainable: the most `sensitive` ones; or, to compare with, `random` ones, the `largest`
            or `smallest` in absolute value, or `all`, whatever the density.
        isolate: leave the sensitive weights out of the quantizer's range.
        calibration_data: a UTF-8 text file; by default the text that ships with the package.
        num_samples: calibration sequences.
        sequence_length: tokens in each.
        seed: decides which parts of the text are taken.
        perplexity_data: a UTF-8 text file on which to measure perplexity before and after.
        memory_limit: GB to aim at, for machines on which a transformer block with its scores does not fit. The result
            is the same.
        revision: of a hub id: a branch, tag or commit; by default its main branch.
        upload_repo: a hub repository to upload the result to.
        resume: go on with an interrupted conversion to `mlx_path`, if there is one; the result is the same.
        progress: report progress on standard error.

    Raises:
        UsageError: bad arguments or source; `mlx_path` exists; an interrupted conversion is in the way.
        ZoError: a download, a write or an upload failed.
        Interrupted: by Ctrl-C; the conversion can be resumed.
    """
    started = time.perf_counter()
    mx.reset_peak_memory()
    check_range("--num-samples", num_samples, 1)
    check_range("--sequence-length", sequence_length, 2)
    check_range("--seed", seed, 0)
    if memory_limit is not None:
        check_range("--memory-limit", memory_limit, 1e-3, **GB)
    limit = int(memory_limit * 1e9) if memory_limit else None
    check_choice(density, scope)
    check_option("--mask", mask, Mask)
    if isolate and mask == "all":
        raise UsageError("--isolate leaves nothing to quantize with --mask all")
    density = 1.0 if mask == "all" else density
    quantization = Quantization(q_bits, q_group_size, q_mode, quant_predicate)
    text_path = Path(calibration_data) if calibration_data else DEFAULT_TEXT
    text = _read_text(text_path)
    measured = _read_text(Path(perplexity_data)) if perplexity_data else None

    out = Path(mlx_path)
    with workspace(out, resume) as work, bounded_cache():
        source = open_source(hf_path, dtype, work.directory, revision)
        if source.quantized and (isolate or not quantization.is_default):
            raise UsageError(
                f"{hf_path} is already quantized: --q-bits, --q-group-size, --q-mode, --quant-predicate and --isolate "
                "do not apply"
            )
        copied = model_files(source.directory) if source.quantized else []
        if sequence_length > (most := context_length(source.config)):
            raise UsageError(f"{hf_path} was made for at most {most} tokens: give a smaller --sequence-length")
        sequences = calibration_sequences(source.tokenizer, text, num_samples, sequence_length, seed)
        if sequences.max() >= (vocabulary := vocabulary_size(source.config)):
            raise UsageError(f"{hf_path}: the tokenizer has token {sequences.max()}, the model only {vocabulary}")
        windows = perplexity_windows(source.tokenizer, measured) if measured is not None else None
        settings = {
            "files": {file.name: sha256(file) for file in source.files},
            "q_bits": q_bits,
            "q_group_size": q_group_size,
            "q_mode": q_mode,
            "quant_predicate": quant_predicate,
            "dtype": dtype,
            "density": density,
            "scope": scope,
            "mask": mask,
            "isolate": isolate,
            "calibration": {
                "name": text_path.name,
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "num_samples": num_samples,
                "sequence_length": sequence_length,
                "seed": seed,
            },
            "zo_mlx": __version__,
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "device": str(mx.default_device()),
        }
        work.begin({**settings, "tokens": hashlib.sha256(sequences.tobytes()).hexdigest()})
        model, config = source.open_model(), source.config
        if not source.quantized:
            model, config = quantization.apply(model, config)
        work.check_space(model_bytes(model) + checkpoint_bytes(source, sequences))
        del model
        watch = Stopwatch()
        if mask == "sensitive":
            ranking = rank(source, sequences, density, scope, limit, Checkpoint(work.scoring), watch, progress)
        else:
            ranking = rank_unscored(source, mask, density, scope, seed, progress)
        index = SensitiveIndex(gather(source.open_model(), ranking.chosen, progress))
        watch.lap("select")
        if source.quantized:
            copy_model(work.result, copied)
            watch.lap("write")
        else:
            model, _ = quantization.apply(source.open_model(), source.config)
            if isolate:
                clip_sensitive(model, source.open_model(), {p: indices for p, (indices, _) in ranking.chosen.items()})
            write_model(
                work.result, source.directory, source.hub_id, model, source.tokenizer, config, watch.lap, progress
            )
        index.metadata = {
            "density": density,
            "scope": scope,
            "mask": mask,
            "size": index.size,
            "candidates": ranking.candidates,
            "coverage": ranking.coverage,
            "calibration": settings["calibration"],
            "base_model": fingerprint(work.result),
            "zo_mlx": __version__,
        }
        write_index(index, work.result)
        measurements = None
        if windows is not None:
            measurements = before_and_after(source, work.result, index, windows, progress)
            watch.lap("perplexity")
        done = Conversion(
            str(out),
            index.size,
            ranking.candidates,
            ranking.coverage,
            time.perf_counter() - started,
            watch.seconds,
            mx.get_peak_memory(),
            measurements,
        )
        outcome = {k: v for k, v in dataclasses.asdict(done).items() if k not in ("mlx_path", "trainable")}
        report = {
            "source": source.hub_id or Path(hf_path).name,
            "revision": revision,
            **settings,
            **index.metadata,
            "quantization": config["quantization"],
            "memory_limit": memory_limit,
            **outcome,
            "layers": ranking.layers(),
        }
        (work.result / REPORT).write_text(json.dumps(report, indent=2))
    if upload_repo:
        upload(out, upload_repo)
    return done


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"text {path} cannot be read: {e}") from None
