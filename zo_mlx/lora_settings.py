"""Settings as they are written for `mlx_lm.lora`: its YAML files, and what becomes of options that are LoRA's own."""

import dataclasses
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from .config import OPTIMIZERS, TrainConfig
from .errors import UsageError
from .files import expanded
from .metric import is_function

# What mlx_lm.lora has, but nothing here can do anything with, and why. docs/mlx-lm.md has the same as a table.
NOT_HERE = {
    "fine_tune_type": "the sensitive weights are trained, not an adapter and not all weights",
    "lora_parameters": "the sensitive weights are trained, not an adapter",
    "grad_checkpoint": "forward passes keep nothing, and exact gradients no block but those of --keep-blocks",
    "grad_accumulation_steps": "a larger --batch-size goes through the model in parts where --memory-limit asks for it",
    "clear_cache_threshold": "MLX's cache is always kept small",
    "trust_remote_code": "code that comes with a model is never run",
}
# Besides what is false: these ask for what happens anyway. Of YAML they are numbers, as flags text.
HARMLESS = {"grad_accumulation_steps": "1", "clear_cache_threshold": "0"}
# Read, but only to see whether something else is wanted than `zo-mlx train` does.
CHECKED = ("train", "resume_adapter_file")
# Made for adapters and gradients; sensitive weights and estimates of gradients want others by orders of magnitude.
RATES = ("learning_rate", "lr_schedule")


def read_yaml(path: Path, flags: Collection[str] = ()) -> dict[str, Any]:
    """Settings from a YAML file with mlx-lm's keys, as `understood`.

    Args:
        flags: names of settings that are given beside it; like the file's keys, they tell whether it is made for LoRA.

    Raises:
        UsageError: the file is missing, not YAML, or not a mapping; or as `understood`.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UsageError(f"no such config file: {path}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UsageError(f"{path} is not readable YAML: {e}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of settings, not {type(content).__name__}")
    if is_function(str(content.get("objective"))):
        raise UsageError(f"{path}: a function as objective is taken from --objective only, as it runs code")
    settings = {str(key): value for key, value in content.items() if value is not None}
    for name in ("model", "data", "adapter_path"):
        if isinstance(settings.get(name), str):
            settings[name] = expanded(settings[name])
    made_for_lora = any(key in NOT_HERE or key in CHECKED for key in (*content, *flags))
    return understood(settings, str(path), RATES if made_for_lora else ())


class _Loader(yaml.SafeLoader):
    """YAML as mlx-lm reads it: 1e-5 is a number, which YAML 1.1 takes for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def understood(settings: Mapping[str, Any], source: str, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Those settings that `zo_mlx.train` takes. The others are named in one warning, mlx-lm's in another, with reasons.

    Args:
        source: what they are from, for warnings and errors.
        left_out: settings that are named, too, and left out.

    Raises:
        UsageError: what is asked for is not what `zo-mlx train` does.
    """
    if settings.get("train") is False:
        raise UsageError(f"{source}: train is false; to evaluate only, take zo-mlx evaluate")
    if file := settings.get("resume_adapter_file"):
        raise UsageError(
            f"{source}: resume_adapter_file {file} is none that a run can go on with; --resume goes on with the one in "
            "--adapter-path"
        )
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    taken = {key: value for key, value in settings.items() if key in known and key not in left_out}
    reasons = [
        f"{key} ({why})"
        for key, why in NOT_HERE.items()
        if settings.get(key) and str(settings[key]) != HARMLESS.get(key)
    ]
    if isinstance(optimizer := taken.get("optimizer"), str):
        taken["optimizer"] = optimizer.lower()  # as mlx-lm does
    if taken.get("optimizer") in ("muon", "adafactor"):
        reasons.append(f"optimizer {taken.pop('optimizer')} (it is for matrices; there are {', '.join(OPTIMIZERS)})")
    if rates := [key for key in left_out if key in settings]:
        said = " and ".join(f"{k} {settings[k]}" if k == "learning_rate" else k for k in rates)
        reasons.append(f"{said} (made for LoRA; zo-mlx finds its own, or give --learning-rate)")
    if unknown := sorted(settings.keys() - known - NOT_HERE.keys() - set(CHECKED)):
        _warn(f"{source}: zo-mlx has no settings {', '.join(unknown)}; they are ignored")
    if reasons:
        _warn(f"{source}: without effect are {'; '.join(reasons)}")
    return taken


def _warn(message: str) -> None:
    print(f"Warning: {message}", file=sys.stderr)
