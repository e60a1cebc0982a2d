"""What training takes of memory, found out before anything is downloaded or loaded.

Weights are counted: they follow from the model's config. What a step takes above them is measured on a model of zeros
(see `miniature`), so that an estimate is of the machine, and of the MLX, that it is made with.
"""

import bisect
import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import TrainConfig, check_range, filled, resolved
from .errors import UsageError, ZoError
from .index import SensitiveIndex
from .memory import GPU_AHEAD_BYTES, bounded_cache
from .miniature import LoraMiniature, Miniature, Steps
from .model import context_length, load_sparse
from .plot import PARTS, WAYS
from .progress import Progress
from .skeleton import bytes_of, read_config, skeleton

# A step of one example is measured, and one of so many that they take about so many bytes: of fewer, what a block's
# weights need would hide what examples do.
ENOUGH = 500_000_000
MOST_ROWS = 32
# Larger batches than this are not looked for.
MOST_BATCH = 256

MACS = (8, 16, 24, 32)
# Of a Mac's memory, what its GPU is given unless that is changed: Metal's recommendedMaxWorkingSetSize, as users' logs
# have it, is 10,922.67 of 16,384 MiB (abetlen/llama-cpp-python#687) and 21,845.34 of 32,768 (ollama/ollama#434). Others
# have seen more: 11.84 of 16 GiB (AlexsJones/llmfit#754), 17.76 of 24 (sgl-project/sglang#29949), 48 of 64
# (ggml-org/llama.cpp#1870).
GPU_SHARE = 2 / 3


@dataclass(frozen=True)
class Need:
    """Bytes that a way to train takes.

    Attributes:
        weights: of the model.
        trained: of what is trained, with the optimizer's state.
        trainable: how many weights that is.
        activations: from the number of examples, what a step takes above these where few tokens are targets.
        texts: the same while the logits of all tokens are made; None where `activations` has them.
        least: what a step takes above these an example at a time, or None where that cannot be asked for.
    """

    weights: int
    trained: int
    trainable: int
    activations: Callable[[int], int]
    texts: Callable[[int], int] | None
    least: int | None

    def total(self, rows: int) -> int:
        """Of a step of some examples all of whose tokens are targets."""
        above = self.activations(rows)
        return self.weights + self.trained + (max(above, self.texts(rows)) if self.texts else above)

    def largest(self, limit: int) -> int:
        """The largest batch within a limit in bytes; 0 for none, `MOST_BATCH` for so many or more."""
        room = limit - self.weights - self.trained
        most = bisect.bisect_right(range(1, MOST_BATCH + 1), room, key=self.activations)
        if most == 0 or self.total(most) <= limit:  # logits may have to be measured for each number
            return most
        return bisect.bisect_right(range(1, most), limit, key=self.total)

    def as_dict(self, rows: int) -> dict[str, Any]:
        """Of a step of some examples; JSON-ready. Weights, trained part, activations and logits make up the total."""
        above, total = self.activations(rows), self.total(rows)
        return {
            "batch_size": rows,
            "trainable": self.trainable,
            "weights": self.weights,
            "trained": self.trained,
            "activations": above,
            "logits": total - self.weights - self.trained - above if self.texts else None,
            "total": total,
            "least": None if self.least is None else self.weights + self.trained + self.least,
        }

    def within(self, limit: int) -> dict[str, Any]:
        """The largest batch within a limit, and whether steps fit that are taken an example at a time."""
        least = self.total(1) if self.least is None else self.weights + self.trained + self.least
        return {"batch_size": self.largest(limit), "in_parts": least <= limit}


def plan(
    model: str,
    config: TrainConfig,
    density: float = 1e-3,
    q_bits: int = 4,
    q_group_size: int = 64,
    measure: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Estimate what training takes, as JSON-ready data.

    Args:
        model: a directory, converted or not, or a hub id, of which config.json alone is fetched.
        config: batch size, longest sequence, number of trained blocks, directions and memory limit are read.
        density: the share of weights that `zo-mlx convert` is to make trainable; a directory's index goes before it.
        q_bits: of its quantization, and q_group_size as well; a model's own goes before them.
        measure: `zo` or `exact`: take such a step of the model itself, a converted directory, too.

    Raises:
        UsageError: no such model, none that can be planned for, settings out of range.
        ZoError: the hub cannot be reached.
    """
    config.check()
    check_range("density", density, 1e-9, 1)
    found, index = read_config(model)
    tokens = max(1, min(config.max_seq_length, context_length(found)))

    def make(float32: bool = False) -> Any:
        return skeleton(found, q_bits, q_group_size, float32)

    ways = {gradient: replace(config, gradient=gradient) for gradient in ("zo", "exact")}
    rows = {name: filled(resolved(own).batch_size) for name, own in ways.items()}
    rows["lora"] = rows["zo"]
    with bounded_cache(), _computing(model), Progress("Steps of a model of zeros", 3, "method", progress) as bar:
        peak = _measured(Path(model), ways[measure], rows[measure], tokens) if measure else None
        result: dict[str, Any] = {
            "model": model,
            "blocks": len(make().layers),
            "max_seq_length": tokens,
            "device": str(mx.default_device().type).removeprefix("DeviceType."),
            "index": "own" if index else "made up",
            "needs": {},
            "limits": [{"name": name, "bytes": limit} for name, limit in _limits(config.memory_limit)],
        }
        for name, count in rows.items():
            if name == "lora":
                need = _lora_need(make, config.num_layers, tokens)
            else:
                need = _need(make, index, density, ways[name], count, tokens)
            result["needs"][name] = need.as_dict(count)
            for limit in result["limits"]:
                limit[name] = need.within(limit["bytes"])
            del need
            gc.collect()  # its model's parts refer to each other, and are not to stay beside those of the next one
            bar.advance()
    if measure and peak:
        estimate = result["needs"][measure]["total"]
        result["measured"] = {"step": measure, "peak": peak, "estimate": estimate, "error": estimate / peak - 1}
    return result


@contextlib.contextmanager
def _computing(model: str) -> Iterator[None]:
    """Turn whatever an architecture raises on a config that it can be made of, but not computed, into a UsageError."""
    try:
        yield
    except (ZoError, OSError, RuntimeError, MemoryError):  # a full disk, say, is none of the config's
        raise
    except Exception as e:
        raise UsageError(f"{model}: a model of this config cannot be computed: {str(e)[:300]}") from None


def _need(
    make: Callable[..., nn.Module],
    index: SensitiveIndex | None,
    density: float,
    config: TrainConfig,
    rows: int,
    tokens: int,
) -> Need:
    float32 = config.gradient == "zo"
    small = Miniature(make(float32), index, density, config)
    return Need(
        bytes_of(make(float32)),
        small.trained_bytes,
        small.trainable,
        line(lambda rows: small.activations(rows, tokens), small.together(MOST_BATCH, tokens)),
        lambda rows: small.texts(rows, tokens),
        small.least(rows, tokens),
    )


def _lora_need(make: Callable[..., nn.Module], blocks: int | None, tokens: int) -> Need:
    small = LoraMiniature(make, blocks)
    above = line(lambda rows: small.activations(rows, tokens))
    return Need(bytes_of(make()), small.trained_bytes, small.trainable, above, None, None)


def line(peak: Callable[[int], int], most: int = MOST_BATCH) -> Callable[[int], int]:
    """A function of the number of examples, from two of its values: it grows by the same for each up to the `most`."""
    one = peak(1)
    some = min(most, MOST_ROWS, -(-ENOUGH // one))
    each = (peak(some) - one) / (some - 1) if some > 1 else one  # of so much, little is not the example's
    return lambda rows: int(one + (min(rows, most) - 1) * each)


def _limits(memory_limit: float | None) -> list[tuple[str, int]]:
    """Names of limits, and bytes."""
    limits = [(f"{gib} GB Mac", int(gib * GPU_SHARE * 2**30)) for gib in MACS]
    if own := mx.device_info().get("max_recommended_working_set_size"):
        limits.append(("this Mac", int(own)))
    if memory_limit is not None:
        limits.append(("--memory-limit", int(memory_limit * 1e9)))
    return limits


def _measured(directory: Path, config: TrainConfig, rows: int, tokens: int) -> int:
    """The most that MLX holds during a step of a converted model all of whose tokens are targets, weights included."""
    before = mx.get_active_memory()
    sparse, _, index, _ = load_sparse(directory, float32=config.gradient == "zo")
    steps = Steps(sparse, index, config)
    return mx.get_active_memory() - before + steps.peak(rows, tokens, texts=True)


def as_text(planned: dict[str, Any]) -> str:
    """`plan`'s result as a table for people."""
    needs, rows = planned["needs"], []
    rows.append(["", *WAYS.values()])
    rows.append(["examples of a step", *(f"{need['batch_size']}" for need in needs.values())])
    rows.append(["trainable weights", *(f"{need['trainable']:,}" for need in needs.values())])
    for part, name in {**PARTS, "total": "total", "least": "least, in parts"}.items():
        rows.append([name, *(_size(need[part]) for need in needs.values())])
    rows.append([])
    rows.append(["largest batch", *[""] * len(WAYS)])
    for limit in planned["limits"]:
        rows.append([f"{limit['name']}, {_size(limit['bytes'])}", *(_batch(limit[way]) for way in WAYS)])
    widths = [max(len(row[i]) for row in rows if row) for i in range(1 + len(WAYS))]
    lines = ["  ".join([f"{row[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
             if row else "" for row in rows]  # fmt: skip
    what = f"{planned['model']}: {planned['blocks']} blocks, {planned['max_seq_length']} tokens an example"
    notes = [
        f"Steps were measured on this machine's {planned['device'].upper()}; weights are counted.",
        "Logits are those of texts, where all tokens are targets; where few are, they take next to nothing.",
        "In parts: an example at a time, as --memory-limit takes steps where there is no more room.",
        "A Mac's limit is an estimate: two thirds of its memory, which is what its GPU is given at least; what other",
        "programs need is not looked at. Until it is restarted, sudo sysctl iogpu.wired_limit_mb=MB changes it.",
    ]
    if planned["device"] != "cpu":
        notes += [
            "On a GPU, where that was measured, runs held up to twice as much; --memory-limit was kept to within 5%.",
            f"Small steps may hold {GPU_AHEAD_BYTES / 1e6:.0f} MB beyond weights there.",
        ]
    if planned["index"] == "made up":
        notes.append("There is no sensitive index yet: one is made up.")
    if (found := planned.get("measured")) is not None:
        peak, error = _size(found["peak"]), found["error"]
        lines += ["", f"measured, {WAYS[found['step']]}: {peak}, estimate {_size(found['estimate'])} ({error:+.1%})"]
    return "\n".join([what, "", *lines, "", *notes])


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _batch(fit: dict[str, Any]) -> str:
    if fit["batch_size"] == 0:
        return "in parts" if fit["in_parts"] else "no"
    return f"{fit['batch_size']:,}" + (" or more" if fit["batch_size"] == MOST_BATCH else "")
