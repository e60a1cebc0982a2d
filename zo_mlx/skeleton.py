"""A model of which nothing is there but its shape: from its config alone, with zeros for weights."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import hf_hub_download
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes

from .errors import UsageError, ZoError
from .files import read_json
from .hub import is_hub_id, reason
from .index import FILE_NAME as INDEX
from .index import SensitiveIndex, SensitiveTensor, read_index
from .model import check_vocabulary
from .product import prepare, weight_shape

# Sensitive weights lie in about this share of their layer's input columns (SmolLM2 at a density of 1e-3: 2.2%).
COLUMNS = 0.022
# More blocks than any model has: an absurd config is refused, not built.
MOST_BLOCKS = 1024


def read_config(model: str) -> tuple[dict[str, Any], SensitiveIndex | None]:
    """A model's config.json, and its sensitive index if it is a directory that has one.

    Args:
        model: a directory, or a hub id, of which config.json alone is fetched.

    Raises:
        UsageError: neither of them, or damaged.
        ZoError: the hub does not have it, or cannot be reached.
    """
    directory = Path(model)
    if directory.is_dir():
        index = read_index(directory) if (directory / INDEX).exists() else None
        return read_json(directory / "config.json"), index
    if not is_hub_id(model):
        raise UsageError(f"no such model: {model} is neither a directory nor a hub id like name/model")
    try:
        file = hf_hub_download(model, "config.json")
    except Exception as e:
        raise ZoError(f"no such directory, and the hub does not give the config of {model}: {reason(e)}") from None
    return read_json(Path(file)), None


def skeleton(config: dict[str, Any], bits: int = 4, group_size: int = 64, float32: bool = False) -> nn.Module:
    """The model that `zo-mlx convert` would make, ready for the default device, of zeros that are made when first used.

    Args:
        config: the content of config.json; its own quantization by MLX comes before `bits` and `group_size`.
        float32: as for `product.prepare`.

    Raises:
        UsageError: mlx-lm cannot make a model of it.
    """
    own = config.get("quantization") or {"bits": bits, "group_size": group_size}
    plain = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    try:
        if "model_file" in config:
            raise ValueError("it needs code that comes with the model, which zo-mlx does not run")
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if isinstance(count := config.get(key), int) and count > MOST_BLOCKS:
                raise ValueError(f"{key} = {count}")
        check_vocabulary(config)
        kind, arguments = _get_classes(plain)
        model = kind(arguments.from_dict(plain))
        model.set_dtype(getattr(mx, str(config.get("dtype") or config.get("torch_dtype")), mx.bfloat16))
        wanted = getattr(model, "quant_predicate", lambda path, module: True)

        def how(path: str, module: nn.Module) -> Any:
            possible = hasattr(module, "to_quantized") and module.weight.shape[-1] % own["group_size"] == 0
            return own.get(path, possible and wanted(path, module))

        nn.quantize(model, own["group_size"], own["bits"], mode=own.get("mode", "affine"), class_predicate=how)
        model.update(tree_map(lambda a: mx.zeros(a.shape, a.dtype), model.parameters()))
    except Exception as e:  # whatever an architecture raises on a config that it does not expect
        raise UsageError(f"mlx-lm cannot make a model of this config: {str(e)[:300] or type(e).__name__}") from None
    return prepare(model, float32)


def bytes_of(module: nn.Module) -> int:
    """What the parameters of a module take."""
    return sum(a.nbytes for a in _parameters(module).values())


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))  # type: ignore[arg-type]


def shortened(model: nn.Module, count: int) -> list[nn.Module]:
    """Let only some last blocks of each kind do their work, and read their parameters and those outside of blocks.

    The others hand on what they get, and their parameters, which are never used, take no memory.

    Args:
        count: blocks of each kind, that is of a class with parameters of the same shapes.

    Returns:
        The blocks that are left.
    """
    kinds: dict[Any, list[nn.Module]] = {}
    for block in model.layers:
        shapes = tuple((path, a.shape) for path, a in _parameters(block).items())
        kinds.setdefault((type(block), shapes), []).append(block)
    skipped = [block for blocks in kinds.values() for block in blocks[:-count]]
    unread = {id(a) for block in skipped for a in _parameters(block).values()}
    mx.eval([a for a in _parameters(model).values() if id(a) not in unread])
    for block in skipped:
        kind = type(block)
        block.__class__ = type(kind.__name__, (kind,), {"__call__": lambda self, x, *args, **kwargs: x})
    return [block for blocks in kinds.values() for block in blocks[-count:]]


def made_up(layer: nn.Module, density: float) -> SensitiveTensor:
    """As many weights of a layer, zeros, as a share of all, in as many columns as sensitive ones have."""
    *rest, width = weight_shape(layer)
    rows, columns = int(np.prod(rest)), max(1, round(COLUMNS * width))
    count = min(max(1, round(density * rows * width)), rows * columns)
    number = np.arange(count)
    place = np.sort(number * rows // count * width + number % columns)
    zeros = np.zeros(count, np.float32)
    return SensitiveTensor(place.astype(np.uint32), mx.array(zeros), zeros)
