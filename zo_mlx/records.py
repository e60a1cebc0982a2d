"""Where examples come from: JSON lines, a dataset of the Hugging Face hub, or mlx-lm's `hf_dataset` blocks.

A record is a line of a file or a row of a dataset, as a dictionary. Whatever its fields are called where it comes from,
those of mlx-lm's formats are found under mlx-lm's default names: `prompt`, `completion`, `messages`, `text`.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_lm.tuner.datasets import load_custom_hf_dataset, load_hf_dataset

from .errors import UsageError, ZoError
from .files import is_text
from .hub import is_hub_id, reason
from .progress import redirected_to_stderr

Record = dict[str, Any]
Records = list[tuple[str, Record]]  # where each one is, for errors; and the record

# mlx-lm's settings that rename the fields, and the default names.
FEATURES = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
}
SPLITS = ("train", "valid", "test")


def read_splits(
    data: str | Path,
    splits: Collection[str],
    features: Mapping[str, str] = FEATURES,
    hf_dataset: list[dict[str, Any]] | None = None,
) -> dict[str, Records]:
    """Read some of the splits `train`, `valid` and `test`; `valid` is left out if it is not there.

    Args:
        data: a directory with a `.jsonl` file for each, or the hub id of a dataset, which mlx-lm's loader fetches.
        features: mlx-lm's settings `prompt_feature`, `completion_feature`, `chat_feature` and `text_feature`.
        hf_dataset: mlx-lm's blocks, each with a `path`, and maybe with splits and features of its own: then `data` and
            `features` do not matter.

    Raises:
        UsageError: no such data, or no `train` or `test` among them; damaged lines; the package `datasets` is missing.
        ZoError: a dataset cannot be fetched.
    """
    directory = Path(data)
    if hf_dataset is None and directory.is_dir():
        files = {split: directory / f"{split}.jsonl" for split in splits}
        return {split: read_file(file, features) for split, file in files.items() if split != "valid" or file.exists()}
    if hf_dataset is not None:
        parts = [_block(number, block, splits) for number, block in enumerate(hf_dataset, 1)]
        found = {split: [record for part in parts for record in part[split]] for split in splits}
    else:
        found = _of_hub(str(data), features)
    if missing := [split for split in splits if split != "valid" and not found[split]]:
        raise UsageError(f"{data}: the dataset has no {' and no '.join(missing)} split")
    return {split: found[split] for split in splits if found[split]}


def place(record: tuple[str, Record]) -> str:
    """The file, or the dataset and split, that a record is from."""
    return record[0].rpartition(",")[0]


def read_file(path: Path, features: Mapping[str, str] = FEATURES) -> Records:
    """The records of a `.jsonl` file. Raises UsageError that names the file and the line."""
    found = []
    try:
        with path.open(encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise UsageError(f"{where}: not JSON: {e}") from None
                if not is_text(json.dumps(record, ensure_ascii=False)):
                    raise UsageError(f"{where}: holds half a surrogate pair, which is no character")
                if not isinstance(record, dict):
                    raise UsageError(f"{where}: must be a JSON object, not {type(record).__name__}")
                found.append((where, _renamed(record, features)))
    except FileNotFoundError:
        raise UsageError(f"no such data file: {path}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as UTF-8 text, which it must be: {e}") from None
    if not found:
        raise UsageError(f"{path} is empty")
    return found


def _of_hub(name: str, features: Mapping[str, str]) -> dict[str, Records]:
    if Path(name).is_file():
        raise UsageError(f"{name} is a file: give the directory that has it as train.jsonl, valid.jsonl or test.jsonl")
    if name.endswith((".json", ".jsonl")):
        raise UsageError(f"no such data file: {name}")
    if not is_hub_id(name):
        raise UsageError(f"no such data: {name} is neither a directory nor the hub id of a dataset like name/dataset")
    load = partial(load_hf_dataset, name, None, SimpleNamespace(**features))  # type: ignore[arg-type]
    return _loaded(name, load, features, "there is no such directory, and ")


def _block(number: int, block: dict[str, Any], splits: Collection[str]) -> dict[str, Records]:
    """The splits of one `hf_dataset` block."""
    name = f"hf_dataset {number}, {block.get('path')}"
    if not isinstance(block.get("path"), str):
        raise UsageError(f"hf_dataset {number} needs a path, the name of a dataset; it has {', '.join(block)}")
    if not isinstance(arguments := block.get("config") or {}, dict):
        raise UsageError(f"{name}: config must be a block of arguments, not {arguments!r}")
    if "trust_remote_code" in arguments:
        raise UsageError(f"{name}: trust_remote_code is not possible: zo-mlx runs no code of a dataset")
    if "test" in splits and "test_split" not in block:
        raise UsageError(f"{name}: there is no test_split, which --test needs")
    asked = SimpleNamespace(hf_dataset=dict(block), train="train" in splits, test="test" in splits)
    features = {name: block.get(name, default) for name, default in FEATURES.items()}
    return _loaded(name, lambda: load_custom_hf_dataset(asked, None), features)  # type: ignore[arg-type]


def _loaded(
    name: str, load: Callable[[], Iterable[Any]], features: Mapping[str, str], also: str = ""
) -> dict[str, Records]:
    try:
        with redirected_to_stderr():
            parts = dict(zip(SPLITS, load(), strict=True))
    except ImportError:
        raise UsageError(f"{name}: this needs the package datasets: pip install datasets") from None
    except Exception as e:  # the hub's and the dataset's libraries raise dozens of kinds
        raise ZoError(f"{name}: {also}the dataset cannot be loaded: {reason(e)}") from None
    return {
        split: [(f"{name}, {split}, row {i}", _renamed(rows[i], features)) for i in range(len(rows))]
        for split, rows in parts.items()
    }


def _renamed(record: Record, features: Mapping[str, str]) -> Record:
    renamed = dict(record)
    for feature, name in FEATURES.items():
        if (own := features[feature]) != name:
            renamed.pop(name, None)  # a field that happens to be called so
            if own in record:
                renamed[name] = record[own]
    return renamed
