"""Rows and columns of trained weights, against matrices in which they are marked."""

import itertools
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import dense_weights

from zo_mlx.config import TrainConfig
from zo_mlx.errors import UsageError
from zo_mlx.estimator import directions
from zo_mlx.index import SensitiveIndex, SensitiveTensor, read_index
from zo_mlx.model import weight_shapes
from zo_mlx.trainable import Trainable


def test_shapes_are_those_without_quantization(spread: Path) -> None:
    model = mlx_lm.load(str(spread))[0]
    weights, found = dense_weights(model), weight_shapes(spread)
    assert found["model.norm"] == model.model.norm.weight.shape
    assert {path: found[path] for path in weights} == {path: w.shape for path, w in weights.items()}


@pytest.mark.parametrize("structure", ["low-rank", "row", "column"])
def test_directions_are_as_structured_in_each_matrix(structure: str, spread: Path) -> None:
    index, shapes = read_index(spread), weight_shapes(spread)
    trained = np.r_[7:200, 210 : index.size]
    found = Trainable(index, [(7, 200), (210, index.size)], TrainConfig(structure=structure), lambda: shapes)
    z = np.zeros((40, index.size))
    z[:, trained] = np.array(directions(0, 1, 40, len(trained), form=found.form).part(range(40), 0, len(trained)))
    numbers, start = list[np.ndarray](), 0
    for path, tensor in index.tensors.items():
        matrices = np.zeros((40, *shapes[path]))
        row, column = np.divmod(tensor.indices, shapes[path][1])
        matrices[:, row, column] = z[:, start : start + tensor.size]
        start += tensor.size
        if structure == "low-rank":  # signs of two rows of a matrix of rank one: the same throughout, or the opposite
            for upper, lower in itertools.pairwise(np.moveaxis(matrices, 1, 0)):
                products = upper * lower
                assert (products.max(axis=1) * products.min(axis=1) >= 0).all()
        else:
            lines = np.moveaxis(matrices, 2, 0) if structure == "column" else np.moveaxis(matrices, 1, 0)
            for line in lines:
                here = line[:, line.any(axis=0)]
                assert (here == here[:, :1]).all()
                numbers += [here[:, 0]] if here.size else []
    # 40 signs: hardly two rows or columns have the same ones by chance.
    assert len(np.unique(numbers, axis=0)) >= 0.99 * len(numbers)


def test_experts_have_rows_and_columns_of_their_own() -> None:
    """Of two experts of (2, 3): the same place in both is in different rows and columns."""
    zeros = np.zeros(12, np.float32)
    index = SensitiveIndex({"experts": SensitiveTensor(np.arange(12, dtype=np.uint32), mx.array(zeros), zeros)})
    found = Trainable(index, [(0, 12)], TrainConfig(structure="low-rank"), lambda: {"experts": (2, 2, 3)})
    rows, columns = (np.array(own).tolist() for own in found.form.groups)
    assert rows == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert columns == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    with pytest.raises(UsageError, match=r"^the sensitive index belongs to another model: it has no layer experts$"):
        Trainable(index, [(0, 12)], TrainConfig(structure="row"), lambda: {"experts": (8,)})
