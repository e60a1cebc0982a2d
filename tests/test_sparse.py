from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import dense_weights
from mlx.utils import tree_unflatten
from mlx_lm import load
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from zo_mlx.errors import UsageError
from zo_mlx.estimator import Branches, Vectors
from zo_mlx.head import split_head
from zo_mlx.index import SensitiveIndex, read_index
from zo_mlx.model import load_sparse
from zo_mlx.product import dequantized, prepare
from zo_mlx.rows import load_dataset
from zo_mlx.sparse import SparseLinear, SparseModel
from zo_mlx.step import make_loss
from zo_mlx.switch import SparseSwitchLinear

MODES = [("affine", 64, 4), ("affine", 32, 8), ("affine", 64, 2), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_branches_equal_dense_arithmetic(mode: tuple[str, int, int] | None, bias: bool) -> None:
    """Every branch of a stacked product equals float64 numpy with that branch's weights put in place."""
    rng = np.random.default_rng(0)
    layer: nn.Module = nn.Linear(128, 48, bias=bias)
    weight = np.array(layer.weight, np.float64)
    if mode is not None:
        layer = layer.to_quantized(group_size=mode[1], bits=mode[2], mode=mode[0])
        weight = np.array(
            mx.dequantize(layer.weight, layer.scales, layer.get("biases"), *mode[1:], mode[0], dtype=mx.float32),
            np.float64,
        )
    layer = prepare(nn.Sequential(layer)).layers[0]
    indices = np.sort(rng.choice(128 * 48, 40, replace=False)).astype(np.uint32)
    values = rng.normal(size=(3, 40)).astype(np.float32)
    x = rng.normal(size=(6, 5, 128)).astype(np.float32)

    sparse = SparseLinear(layer, indices)
    sparse.set_values(mx.array(values))
    got = np.array(sparse(mx.array(x)))

    for branch in range(3):
        changed = weight.copy()
        changed.reshape(-1)[indices] = values[branch]
        rows = slice(2 * branch, 2 * branch + 2)
        expected = x[rows].astype(np.float64) @ changed.T + (np.array(layer.bias) if bias else 0)
        assert np.abs(got[rows] - expected).max() < 1e-5 * np.abs(expected).max()


def test_whole_model_equals_a_dense_model_with_each_branchs_weights(tiny: Path) -> None:
    sparse, _, index, _ = load_sparse(tiny)
    values = index.initial_values() + 0.1 * mx.random.normal((2, index.size), key=mx.random.key(0))
    tokens = mx.random.randint(0, 256, (4, 20), key=mx.random.key(1))
    sparse.set_values(values)
    got = sparse.model(tokens)

    for branch in range(2):
        stock, _ = load(str(tiny))
        stock.set_dtype(mx.float32)
        dense = {path: np.array(w) for path, w in dense_weights(stock).items()}
        start = 0
        for path, tensor in index.tensors.items():
            dense[path].reshape(-1)[tensor.indices] = np.array(values[branch, start : start + tensor.size])
            start += tensor.size
        replaced = []
        for path, weight in dense.items():
            layer = nn.Linear(*weight.shape[::-1], bias=False)
            layer.weight = mx.array(weight)
            replaced.append((path, layer))
        stock.update_modules(tree_unflatten(replaced))
        rows = slice(2 * branch, 2 * branch + 2)
        expected = stock(tokens[rows])
        assert mx.abs(got[rows] - expected).max() < 1e-4 * mx.abs(expected).max()


def test_without_values_the_model_is_the_base_model(tiny: Path) -> None:
    sparse, *_ = load_sparse(tiny)
    stock, _ = load(str(tiny))
    stock.set_dtype(mx.float32)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert mx.abs(sparse.model(tokens) - stock(tokens)).max() < 1e-4


def test_an_index_of_another_model_is_refused(tiny: Path) -> None:
    model, _ = load(str(tiny))
    index = read_index(tiny)
    path, tensor = next(iter(index.tensors.items()))
    with pytest.raises(UsageError, match="no such layer"):
        SparseModel(model, SensitiveIndex({"model.nothing": tensor}))
    tensor.indices[-1] = 10**6
    with pytest.raises(UsageError, match="outside"):
        SparseModel(model, SensitiveIndex({path: tensor}))


def test_models_that_mix_the_rows_of_a_batch_are_computed_branch_by_branch(tiny: Path, choice_data: Path) -> None:
    """Their losses equal those of the same model without the mixing."""
    sparse, tokenizer, index, _ = load_sparse(tiny)
    examples = load_dataset(choice_data / "train.jsonl", tokenizer, 100).examples[:8]
    shares = [examples[p::4] for p in range(4)]
    points = index.initial_values() + 0.1 * mx.random.normal((4, index.size), key=mx.random.key(0))
    values = Branches(mx.zeros(index.size), Vectors(points), tuple((i, 1.0) for i in range(4)))
    sparse.check_branches(index.initial_values())
    assert sparse.stackable
    expected = make_loss(sparse, split_head(sparse.model))(values, shares)
    attention = type(sparse.model.layers[0].self_attn)

    class Mixing(attention):  # type: ignore[valid-type, misc]
        def __call__(self, x: mx.array, *args: object) -> mx.array:
            return super().__call__(x[::-1], *args)[::-1]

    sparse.model.layers[0].self_attn.__class__ = Mixing
    sparse.check_branches(index.initial_values())
    assert not sparse.stackable
    assert mx.allclose(make_loss(sparse, split_head(sparse.model))(values, shares), expected, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("many", [False, True])  # from 64 routed rows on, mlx-lm sorts them by expert
def test_experts_equal_dense_arithmetic(many: bool, quantized: bool) -> None:
    """A mixture-of-experts block with a sparse difference against one with those weights put in place."""
    rng = np.random.default_rng(0)
    mx.random.seed(0)
    stock, sparse = SwitchGLU(64, 96, 5), SwitchGLU(64, 96, 5)
    x = mx.array(rng.normal(size=(2, 20 if many else 3, 64)).astype(np.float32))
    experts = mx.array(rng.integers(0, 5, (*x.shape[:2], 2)))
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = SwitchLinear(*reversed(stock[name].weight.shape[1:]), 5, bias=False)
        layer = layer.to_quantized(32, 4) if quantized else layer
        weight = np.array(dequantized(layer))
        # Unequal numbers of columns per expert, one expert with none.
        chosen = np.sort(rng.choice(weight[:4].size, 60, replace=False))
        indices = np.append(chosen, np.arange(0, 20) + weight[:4].size - 40).astype(np.uint32)
        indices = np.unique(indices)
        values = rng.normal(size=len(indices)).astype(np.float32)
        weight.reshape(-1)[indices] = values
        sparse[name] = SparseSwitchLinear(layer, indices)
        sparse[name].set_values(mx.array(values)[None])
        stock[name].weight = mx.array(weight)
    assert mx.allclose(sparse(x, experts), stock(x, experts), atol=1e-4)


def test_models_that_look_into_their_layers_are_refused(tiny: Path) -> None:
    sparse, *_ = load_sparse(tiny)

    class Looking(type(sparse.model)):  # type: ignore[misc]
        def __call__(self, tokens: mx.array) -> mx.array:
            return super().__call__(tokens) + self.layers[0].self_attn.q_proj.weight.sum()

    sparse.model.__class__ = Looking
    with pytest.raises(UsageError, match="cannot be trained: AttributeError"):
        sparse.check_branches(mx.zeros(sparse.size))

    class Failing(Looking):
        def __call__(self, tokens: mx.array) -> mx.array:
            return mx.fast.rope("not an array")  # MLX's message about it has many lines

    sparse.model.__class__ = Failing
    with pytest.raises(UsageError, match="cannot be trained: TypeError") as e:
        sparse.check_branches(mx.zeros(sparse.size))
    assert "\n" not in str(e.value)
