"""Score a source's weights, rank them, and look the chosen ones up."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..blocks import opened
from ..errors import UsageError
from ..index import SensitiveTensor
from ..product import dequantized, weight_shape
from ..progress import Progress
from .blockwise import blockwise_fisher_scores
from .checkpoint import Candidates, Checkpoint
from .select import Scope, Selector
from .sensitivity import fisher_scores, scored_layers
from .sources import Source


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


@dataclass
class Ranking:
    """The chosen weights and what they were chosen from.

    Attributes:
        chosen: for each layer with chosen weights, their flat positions and scores.
        sizes: for each layer, how many weights it has.
        masses: for each layer, the sum of its scores; of none if there are no scores.
    """

    chosen: dict[str, tuple[np.ndarray, np.ndarray]]
    sizes: dict[str, int]
    masses: dict[str, float]

    @property
    def candidates(self) -> int:
        """The number of weights that were ranked."""
        return sum(self.sizes.values())

    @property
    def coverage(self) -> float | None:
        """The chosen weights' share of the sum of all scores, if there are any."""
        if not self.masses:
            return None
        covered = sum(float(scores.sum(dtype=np.float64)) for _, scores in self.chosen.values())
        return covered / (sum(self.masses.values()) or 1.0)

    def layers(self) -> dict[str, dict[str, float | None]]:
        """For each layer, its weights, how many are chosen, and the share of the layer's scores that they hold."""
        none = np.empty(0, np.uint32), np.empty(0, np.float32)
        found: dict[str, dict[str, float | None]] = {}
        for path, size in self.sizes.items():
            indices, scores = self.chosen.get(path, none)
            share = float(scores.sum(dtype=np.float64)) / (self.masses[path] or 1.0) if self.masses else None
            found[path] = {"weights": size, "trainable": len(indices), "coverage": share}
        return found


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """How many weights each layer has that can be chosen from."""
    modules = dict(model.named_modules())
    return {path: math.prod(weight_shape(modules[path])) for path in scored_layers(model)}


def rank(
    source: Source,
    sequences: np.ndarray,
    density: float,
    scope: Scope,
    memory_limit: int | None,
    checkpoint: Checkpoint,
    watch: Stopwatch,
    progress: bool,
) -> Ranking:
    """Score the weights of all linear layers and rank them; block by block where the model allows it."""
    model = source.open_model()
    sizes = layer_sizes(model)
    selector, masses = Selector(sizes, density, scope), {}
    blocks, chain = len(model.layers), source.is_chain
    del model
    if not chain:
        _warn_of_memory(source)
    for path, found in checkpoint.candidates().items():
        selector.restore(path, found.positions, found.scores)
        masses[path] = found.mass
    rounds, done = len(sequences), 0
    if chain:
        rounds, done = 2 * blocks * len(sequences), checkpoint.finished(blocks) * len(sequences)
    with Progress("Scoring weights", rounds, "block" if chain else "sequence", progress, done) as bar:

        def advance(phase: str) -> None:
            watch.lap(phase)
            bar.advance()

        scores = (
            blockwise_fisher_scores(source.open_model, sequences, checkpoint, memory_limit, advance)
            if chain
            else fisher_scores(source.open_model(), sequences, advance)
        )
        with computing(source, checkpoint):
            for path, layer_scores in scores:
                watch.lap("backward")
                # Summed by numpy: MLX adds one after the other on CPUs, which loses some per cent of large layers.
                own = np.array(layer_scores, copy=False)
                masses[path] = float(own.sum(dtype=np.float64))
                if not math.isfinite(masses[path]):
                    checkpoint.clear()
                    raise UsageError(f"{source.name}: the model's gradients are not finite in {path}: damaged weights?")
                positions, highest = selector.add(path, own)
                checkpoint.note(path, Candidates(positions, highest, masses[path]))
                watch.lap("select")
    return Ranking(selector.result(), sizes, {path: masses[path] for path in sizes})


@contextlib.contextmanager
def computing(source: Source, checkpoint: Checkpoint | None = None) -> Iterator[None]:
    """Turn what a model raises whose config loads but does not compute into a UsageError; forget what is finished."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as e:
        if checkpoint is not None:
            checkpoint.clear()
        raise UsageError(f"{source.name}: the model cannot be computed: {type(e).__name__}: {str(e)[:200]}") from e


def _warn_of_memory(source: Source) -> None:
    chain = "a plain chain, each fed by the one before"
    if source.quantized:
        raise UsageError(
            f"the blocks of {source.config['model_type']} are not {chain}; such a model cannot be converted once it is "
            "quantized: use the full-precision one"
        )
    print(
        f"Warning: the blocks of {source.config['model_type']} are not {chain}: the whole model and all its gradients "
        "are held in memory",
        file=sys.stderr,
    )


def checkpoint_bytes(source: Source, sequences: np.ndarray) -> int:
    """Bytes on disk of what goes into and comes back from each block, for all sequences, if it is to be kept."""
    if not source.is_chain:
        return 0
    with computing(source), opened(source.open_model) as model:
        return (len(model.blocks) + 1) * len(sequences) * model.inputs(mx.array(sequences[:1, :-1]), 0).nbytes


def gather(
    model: nn.Module, chosen: dict[str, tuple[np.ndarray, np.ndarray]], progress: bool
) -> dict[str, SensitiveTensor]:
    """Look the chosen weights up, reading one layer at a time."""
    modules = dict(model.named_modules())
    tensors = {}
    with Progress("Looking them up", len(chosen), "layer", progress) as bar:
        for path, (indices, scores) in chosen.items():
            module = modules[path]
            weight = dequantized(module) if "scales" in module else module.weight
            values = weight.reshape(-1)[mx.array(indices)]
            mx.eval(values)
            forget(module)
            del weight
            tensors[path] = SensitiveTensor(indices, values, scores)
            bar.advance()
    return tensors


def forget(layer: nn.Module) -> None:
    """Let go of a layer's weight."""
    for name in ("weight", "scales", "biases", "global_scale"):
        layer.pop(name, None)
