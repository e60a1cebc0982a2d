"""Write a quantized model as mlx-lm does, but one tensor at a time: what is quantized is written and let go."""

import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import create_model_card, get_total_parameters, make_shards, save_config, upload_to_hub

from ..errors import UsageError, ZoError
from ..files import write_atomically
from ..index import FILE_NAME as INDEX
from ..progress import Progress, redirected_to_stderr

REPORT = "convert.json"

_DTYPES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.uint32: "U32",
    mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
}  # fmt: skip

# Of a model that is copied as it is. Tokenizers are in files that transformers and mlx-lm call so.
_COPIED = (
    "model*.safetensors", "*.json", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja", "README.md",
    "LICENSE*",
)  # fmt: skip


def write_model(
    out: Path,
    source: Path,
    hub_id: str | None,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    lap: Callable[[str], None],
    progress: bool,
) -> None:
    """Write a model directory: shards and their index, config, tokenizer, and what mlx-lm copies from the source.

    Args:
        out: an existing directory; shards that are there are not written again.
        source: the directory the model comes from.
        hub_id: what the model card is to name as the base model.
        model: its weights may be unread and unquantized yet; they are taken out of it.
        tokenizer, config: to be stored.
        lap: called with `quantize` and `write` after each tensor's part of the work.
        progress: report progress on standard error.
    """
    weights = dict(tree_flatten(model.parameters()))
    index: dict[str, Any] = {
        "metadata": {
            "total_size": sum(w.nbytes for w in weights.values()),
            "total_parameters": get_total_parameters(model),
        }
    }
    shards = make_shards(weights)
    weights.clear()
    has_vision = "vision_tower" in getattr(model, "model", {})
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    names = {}
    with Progress("Quantizing and writing", sum(map(len, shards)), "tensor", progress) as bar:
        for i, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            names.update(dict.fromkeys(shard, name))
            if not (out / name).exists():
                write_atomically(out / name, partial(_write_shard, tensors=shard, lap=lap, bar=bar))
    index["weight_map"] = dict(sorted(names.items()))
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))

    save_config(config, config_path=out / "config.json", keep_vision_config=has_vision)
    tokenizer.save_pretrained(out)
    if (generation := source / "generation_config.json").exists():
        shutil.copy(generation, out)
    try:
        create_model_card(out, hub_id)
    except Exception:  # the hub's own card is not to be had: no network any more, or there is none
        create_model_card(out, None)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(weight.nbytes for weight in dict(tree_flatten(model.parameters())).values())


def upload(directory: Path, repo: str) -> None:
    """Upload a model directory to the hub as mlx-lm does. Raises ZoError if that fails."""
    try:
        if not (directory / "README.md").exists():
            create_model_card(directory, None)
        with redirected_to_stderr():
            upload_to_hub(str(directory), repo)
    except Exception as e:  # the hub client raises a dozen kinds, from several libraries
        raise ZoError(f"{directory} is made, but cannot be uploaded to {repo}: {str(e)[:300]}") from None


def model_files(source: Path) -> list[Path]:
    """What makes up a model directory: weights, configuration, tokenizer, card and license; not its code or index.

    Raises UsageError for a link to elsewhere: what it leads to may not be meant for those who get the copy.
    """
    directory = source.resolve()
    inside = [directory]
    if directory.parent.name == "snapshots":  # of the hub's cache, where all files are links
        inside.append(directory.parents[1] / "blobs")
    files = sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()})
    files = [file for file in files if file.name not in (INDEX, REPORT)]
    for file in files:
        if not any(file.resolve().is_relative_to(place) for place in inside):
            raise UsageError(f"{file} is a link that leads out of the directory: put the file itself there")
    return files


def copy_model(out: Path, files: list[Path]) -> None:
    """Copy `model_files`."""
    for file in files:
        shutil.copyfile(file, out / file.name)


def _write_shard(path: Path, tensors: dict[str, mx.array], lap: Callable[[str], None], bar: Progress) -> None:
    """Write a safetensors file, emptying `tensors` on the way."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for name in list(tensors):
            tensor = tensors.pop(name)
            mx.eval(tensor)
            lap("quantize")
            file.write(np.array(mx.contiguous(tensor).reshape(-1).view(mx.uint8), copy=False).data)
            del tensor
            lap("write")
            bar.advance()
