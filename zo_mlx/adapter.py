"""The adapter directory: the journal of a run, its values, and the optimizer's state for a quick resume.

`values.safetensors` is the result. `optimizer.safetensors` only saves time: without it, or where the two are not of the
same step, a resume replays the journal from the start. `best/` is an adapter of its own: the values that had the lowest
validation loss. What stock mlx-lm loads is made of the values when a run ends.
"""

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from .errors import UsageError
from .events import FILE_NAME as EVENTS
from .files import load_safetensors, reporting_disk_errors, write_atomically
from .journal import FILE_NAME as JOURNAL

VALUES = "values.safetensors"
OPTIMIZER = "optimizer.safetensors"
BEST = "best"
REPORT = "report.html"
# Written by `lora`, named as mlx-lm names them.
LORA_CONFIG, LORA_TENSORS = "adapter_config.json", "adapters.safetensors"
FORMAT = "zo-mlx-values"
VERSION = 2


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after `step` steps. `fingerprints` are those of the model and index it belongs to."""

    step: int
    journal: str
    fingerprints: dict[str, str]
    values: mx.array
    validation_loss: float | None = None


@dataclass(frozen=True)
class Best:
    """The validation with the lowest loss: after how many steps, and that loss."""

    iteration: int
    loss: float


def has_run(directory: Path) -> bool:
    """Whether an adapter directory holds a run, or files that are named as those of one."""
    names = (JOURNAL, VALUES, OPTIMIZER, LORA_CONFIG, LORA_TENSORS, EVENTS, REPORT)
    return any((directory / name).exists() for name in names)


def would_replace(directory: Path, ranks: int) -> bool:
    """Whether a new run, of so many ranks, would replace or remove files that are there."""
    best = any((directory / BEST / name).exists() for name in (VALUES, LORA_CONFIG, LORA_TENSORS))
    return has_run(directory) or best or bool(_of_other_ranks(directory, ranks))


def _of_other_ranks(directory: Path, ranks: int) -> set[Path]:
    """Journals of ranks that a run of so many does not have."""
    return {*directory.glob(f"rank-*/{JOURNAL}")} - {directory / f"rank-{rank}" / JOURNAL for rank in range(ranks)}


def run_directory(directory: Path) -> Path:
    """The directory of the run that an adapter is of: its best values are in one within."""
    return directory.parent if directory.name == BEST and has_run(directory.parent) else directory


def remove_run(directory: Path, ranks: int = 1) -> None:
    """Remove a run's files but for the journals, its own and of so many ranks, which a new run replaces."""
    for name in (VALUES, OPTIMIZER, f"{BEST}/{VALUES}", EVENTS, REPORT):
        (directory / name).unlink(missing_ok=True)
    for other in _of_other_ranks(directory, ranks):
        other.unlink()
    remove_lora(directory)


def remove_later(directory: Path, step: int) -> None:
    """Remove values of later steps than this, the last one that a journal has: where it goes on, it may lead to others.

    Without values, an optimizer's state is of no use to anybody.
    """
    for place in (directory, directory / BEST):
        with contextlib.suppress(UsageError):
            if read_snapshot(place).step > step:
                (place / VALUES).unlink()


def remove_lora(directory: Path) -> None:
    """Remove what stock mlx-lm would load, which goes out of date as soon as a run goes on."""
    for place in (directory, directory / BEST):
        for name in (LORA_CONFIG, LORA_TENSORS):
            (place / name).unlink(missing_ok=True)


def size_bytes(directory: Path) -> int:
    """What it takes to keep or share the result: values and journal."""
    return sum((directory / name).stat().st_size for name in (JOURNAL, VALUES) if (directory / name).exists())


def write_snapshot(directory: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
    """Write values and optimizer state, each whole or not at all."""
    flat = dict(tree_flatten(state))
    write_atomically(directory / OPTIMIZER, partial(_save, arrays=flat, metadata=_metadata(snapshot)))
    _write_values(directory, snapshot)


def write_best(directory: Path, snapshot: Snapshot) -> None:
    """Write the values with the lowest validation loss, in place of those before, if there are any."""
    with reporting_disk_errors(directory / BEST):
        (directory / BEST).mkdir(exist_ok=True)
    _write_values(directory / BEST, snapshot)


def read_best(directory: Path, journal: str) -> Best | None:
    """The best validation of the run with this journal, or None if its values are not there to be read."""
    try:
        found = read_snapshot(directory / BEST)
    except UsageError:
        return None
    if found.journal != journal or found.validation_loss is None:
        return None
    return Best(found.step, found.validation_loss)


def _write_values(directory: Path, snapshot: Snapshot) -> None:
    save = partial(_save, arrays={"values": snapshot.values}, metadata=_metadata(snapshot))
    write_atomically(directory / VALUES, save)


def _metadata(snapshot: Snapshot) -> dict[str, str]:
    found = {"format": FORMAT, "version": str(VERSION), "step": str(snapshot.step), "journal": snapshot.journal}
    if snapshot.validation_loss is not None:
        found["validation_loss"] = repr(snapshot.validation_loss)
    return {**found, **snapshot.fingerprints}


def read_snapshot(directory: Path) -> Snapshot:
    """Read and check an adapter's values. Raises UsageError if they are missing or damaged."""
    if not directory.is_dir():
        raise UsageError(f"no such adapter: {directory} is not a directory")
    path = directory / VALUES
    try:
        arrays, metadata = _load(path)
    except UsageError as e:
        if (run_directory(directory) / JOURNAL).exists():
            raise UsageError(f"{e}; from its journal, zo-mlx replay or zo-mlx train --resume make it again") from None
        if (directory / LORA_CONFIG).exists() and not path.exists():
            raise UsageError(f"{e}; an adapter that mlx-lm has trained runs with mlx-lm's commands") from None
        raise
    values = arrays.get("values")
    if values is None or values.ndim != 1 or values.dtype != mx.float32 or not mx.isfinite(values).all().item():
        raise UsageError(f"{path} is damaged: it must hold one finite float32 vector named values")
    own = ("format", "version", "step", "journal", "validation_loss", "sha256")
    prints = {k: v for k, v in metadata.items() if k not in own}
    try:
        loss = float(metadata["validation_loss"]) if "validation_loss" in metadata else None
    except ValueError:
        raise UsageError(f"{path} is damaged: its validation loss is no number") from None
    return Snapshot(int(metadata["step"]), metadata["journal"], prints, values, loss)


def read_optimizer_state(directory: Path, snapshot: Snapshot, like: dict[str, Any]) -> dict[str, Any] | None:
    """The optimizer state that goes with a snapshot, or None if there is none of the same run, step and form.

    Args:
        like: a state with the names, shapes and dtypes to expect.
    """
    path = directory / OPTIMIZER
    try:
        arrays, metadata = _load(path)
    except UsageError:
        return None
    same_moment = (metadata["step"], metadata["journal"]) == (str(snapshot.step), snapshot.journal)
    if not same_moment or _form(arrays) != _form(dict(tree_flatten(like))):
        return None
    return tree_unflatten(list(arrays.items()))  # type: ignore[return-value]


def _form(arrays: dict[str, mx.array]) -> dict[str, Any]:
    """Names, shapes and dtypes; and that all is finite."""
    return {k: (a.shape, a.dtype, bool(mx.isfinite(a).all().item())) for k, a in arrays.items()}


def _save(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    arrays = dict(sorted(arrays.items()))  # MLX's order follows from theirs: the same bytes from a resumed run
    mx.save_safetensors(str(path), arrays, {**metadata, "sha256": _checksum(arrays, metadata)})


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    arrays, metadata = load_safetensors(path)
    step = metadata.get("step", "")
    if metadata.get("format") != FORMAT or not re.fullmatch("[0-9]{1,18}", step) or "journal" not in metadata:
        raise UsageError(f"{path} is not part of a zo-mlx adapter: its metadata lacks format = {FORMAT}")
    if metadata.get("version") != str(VERSION):
        raise UsageError(f"{path} has version {metadata.get('version')}, this zo-mlx reads version {VERSION}")
    if metadata.get("sha256") != _checksum(arrays, {k: v for k, v in metadata.items() if k != "sha256"}):
        raise UsageError(f"{path} is damaged: it fails its checksum")
    return arrays, metadata


def _checksum(arrays: dict[str, mx.array], metadata: dict[str, str]) -> str:
    """Of what a file holds: safetensors have no checksum, and a flipped bit mostly leaves a finite number."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(memoryview(arrays[name].reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
    return digest.hexdigest()
