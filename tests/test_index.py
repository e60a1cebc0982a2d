import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from zo_mlx.errors import UsageError
from zo_mlx.index import FILE_NAME, SensitiveIndex, SensitiveTensor, read_index, write_index


def _index() -> SensitiveIndex:
    def tensor(*indices: int) -> SensitiveTensor:
        n = len(indices)
        return SensitiveTensor(
            np.array(indices, np.uint32), mx.arange(n).astype(mx.bfloat16) / 2, np.arange(n, dtype=np.float32)
        )

    return SensitiveIndex({"z.proj": tensor(0, 5, 9), "a.proj": tensor(2)}, {"density": 0.01, "base_model": "ab"})


def test_an_index_is_read_back_in_its_order(tmp_path: Path) -> None:
    write_index(_index(), tmp_path)
    index = read_index(tmp_path)
    assert list(index.tensors) == ["z.proj", "a.proj"]
    assert index.metadata == {"density": 0.01, "base_model": "ab"}
    assert index.tensors["z.proj"].indices.tolist() == [0, 5, 9]
    assert index.tensors["z.proj"].values.dtype == mx.bfloat16
    assert index.initial_values().tolist() == [0, 0.5, 1, 0]
    assert index.size == 4


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    write_index(_index(), tmp_path)
    arrays, metadata = mx.load(str(tmp_path / FILE_NAME), return_metadata=True)
    assert metadata["format"] == "zo-mlx-sensitive"
    assert metadata["version"] == "1"
    assert json.loads(metadata["density"]) == 0.01
    types = {name: array.dtype for name, array in arrays.items()}
    assert types["z.proj.indices"] == mx.uint32
    assert types["z.proj.values"] == mx.bfloat16
    assert types["z.proj.scores"] == mx.float32


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a, m: m.update(format="other"), "not a sensitive index"),
        (lambda a, m: m.update(version="2"), "has version 2"),
        (lambda a, m: m.update(tensors="[1"), "is damaged"),
        (lambda a, m: m.update(tensors='["z.proj"]'), "does not match"),
        (lambda a, m: a.pop("z.proj.scores"), "does not match"),
        (lambda a, m: a.update({"z.proj.indices": mx.array([5, 0, 9], mx.uint32)}), "not strictly increasing"),
        (lambda a, m: a.update({"z.proj.indices": mx.array([1, 1, 2], mx.uint32)}), "not strictly increasing"),
        (lambda a, m: a.update({"z.proj.indices": mx.array([0, 5, 9])}), "must be a non-empty vector of uint32"),
        (lambda a, m: a.update({"z.proj.values": mx.ones(2)}), "of length 3"),
        (lambda a, m: a.update({"z.proj.values": mx.array([1, 2, float("nan")])}), "not all finite"),
        (lambda a, m: a.update({"z.proj.scores": mx.ones(3, dtype=mx.int32)}), "must be a float32 vector"),
    ],
)
def test_damaged_indices_are_refused(change: object, problem: str, tmp_path: Path) -> None:
    write_index(_index(), tmp_path)
    arrays, metadata = mx.load(str(tmp_path / FILE_NAME), return_metadata=True)
    change(arrays, metadata)
    mx.save_safetensors(str(tmp_path / FILE_NAME), arrays, metadata)
    with pytest.raises(UsageError, match=problem) as e:
        read_index(tmp_path)
    assert FILE_NAME in str(e.value)


def test_a_missing_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="make one with: zo-mlx convert --hf-path"):
        read_index(tmp_path)
