"""Ways to lay out the sparse part of a layer for many branches, each with its time and memory.

    python tests/benchmarks/layouts.py [--model demo/model|tinyllama|llama2-7b] [--rows 32] [--length 26] [--json FILE]

For one layer of each kind, the one whose sensitive weights have the median number of columns, and for the one with the
most columns of all: milliseconds above the layer without its sparse part, median of the differences of neighbours, and
the peak in MB above what was held before. `columns` is what `SparseLinear` does, part by part of the product.

    added       the same with a product and a sum instead of `addmm`
    rows        D has only the rows that sensitive weights lie in; the product is added to those of y
    one         one product for all branches: each row of x is zero in the other branches' columns
    entries     no D: inputs times values, added up by rows
    weights     W + D for each branch, and a product for each
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from shapes import model_directory

from zo_mlx import estimator
from zo_mlx.index import SensitiveTensor, read_index
from zo_mlx.memory import bounded_cache
from zo_mlx.model import load_sparse
from zo_mlx.product import dequantized
from zo_mlx.sparse import SparseLinear

BRANCHES = 16


def layouts(
    layer: SparseLinear, tensor: SensitiveTensor, values: mx.array
) -> dict[str, Callable[[mx.array], mx.array]]:
    """The layer with its branches' values, (P, n), in every layout; and without them."""
    base = layer.base
    weight = dequantized(base)
    out, width = weight.shape
    rows, columns = np.divmod(tensor.indices, width)
    used, column = np.unique(columns, return_inverse=True)
    touched, row = np.unique(rows, return_inverse=True)
    before = weight.reshape(-1)[mx.array(tensor.indices)]
    del weight
    mx.eval(before)
    count = len(values)

    def gather(x: mx.array, at: np.ndarray) -> mx.array:
        return mx.take_along_axis(x, mx.broadcast_to(mx.array(at), (*x.shape[:-1], len(at))), axis=-1)

    def difference(slots: np.ndarray, size: int) -> mx.array:
        slot = mx.broadcast_to(mx.array(slots.astype(np.uint32)), values.shape)
        return mx.put_along_axis(mx.zeros((count, size)), slot, values - before, axis=1)

    def own(x: mx.array) -> mx.array:
        return gather(x, used).reshape(count, -1, len(used))

    def columns_only(x: mx.array) -> mx.array:
        layer.set_values(values)
        return layer(x)

    def added(x: mx.array) -> mx.array:
        y = base(x)
        d = difference(column * out + rows, len(used) * out).reshape(count, len(used), out)
        return y + (own(x) @ d).reshape(y.shape)

    def rows_too(x: mx.array) -> mx.array:
        y = base(x)
        d = difference(column * len(touched) + row, len(used) * len(touched)).reshape(count, len(used), len(touched))
        new = gather(y, touched) + (own(x) @ d).reshape(*y.shape[:-1], len(touched))
        return mx.put_along_axis(y, mx.broadcast_to(mx.array(touched), new.shape), new, axis=-1)

    def one(x: mx.array) -> mx.array:
        y = base(x).reshape(-1, out)
        d = difference(column * out + rows, len(used) * out).reshape(count * len(used), out)
        wide = mx.expand_dims(own(x), 2) * mx.eye(count)[:, None, :, None]
        return mx.addmm(y, wide.reshape(-1, count * len(used)), d).reshape(*x.shape[:-1], out)

    def entries(x: mx.array) -> mx.array:
        y = base(x)
        terms = gather(x, columns).reshape(count, -1, len(columns)) * (values - before)[:, None]
        return y.at[..., mx.array(rows)].add(terms.reshape(*y.shape[:-1], -1))

    def weights(x: mx.array) -> mx.array:
        dense, parts = dequantized(base).reshape(-1), []
        for branch, part in zip(values, x.reshape(count, -1, width), strict=True):
            own_weight = mx.put_along_axis(dense, mx.array(tensor.indices), branch, axis=0)
            parts.append(part @ own_weight.reshape(out, width).T)
        return mx.stack(parts).reshape(*x.shape[:-1], out)

    return {
        "base": base, "columns": columns_only, "added": added, "rows": rows_too, "one": one, "entries": entries,
        "weights": weights,
    }  # fmt: skip


def measure(arms: dict[str, Callable[[mx.array], mx.array]], x: mx.array, repeats: int) -> dict[str, Any]:
    """Milliseconds above those of `base`, and peaks in MB, of all arms in alternation."""
    seconds: dict[str, list[float]] = defaultdict(list)
    peak: dict[str, int] = {}
    expected = arms["columns"](x)
    for _ in range(repeats):
        for name, arm in arms.items():
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            started = time.perf_counter()
            y = arm(x)
            mx.eval(y)
            seconds[name].append(time.perf_counter() - started)
            peak[name] = mx.get_peak_memory() - held
            assert name == "base" or mx.allclose(y, expected, rtol=1e-3, atol=1e-3), name
            del y
    above = {
        name: 1e3 * statistics.median(a - b for a, b in zip(times, seconds["base"], strict=True))
        for name, times in seconds.items()
    }
    above["base"] = 1e3 * statistics.median(seconds["base"])
    return {"milliseconds": above, "peak_mb": {name: p / 1e6 for name, p in peak.items()}}


def run(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    sparse, _, _, _ = load_sparse(path)
    tensors = read_index(path).tensors
    modules = dict(sparse.model.named_modules())
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in tensors:
        kinds[name.rsplit(".", 1)[-1]].append((modules[name]._columns.size, name))
    chosen = [sorted(kind)[len(kind) // 2] for kind in kinds.values()]
    chosen = sorted({*chosen, max(pair for kind in kinds.values() for pair in kind)}, key=lambda c: c[1])
    found = []
    for columns, name in chosen:
        layer, tensor = modules[name], tensors[name]
        z = estimator.directions(0, 1, BRANCHES // 2, tensor.size)
        branches = estimator.TwoSided().branches(mx.array(tensor.values), z, 1e-3)
        values = branches.part(0, tensor.size)
        x = mx.random.normal((args.rows, args.length, layer.base.scales.shape[-1] * layer.base.group_size))
        mx.eval(values, x)
        result = measure(layouts(layer, tensor, values), x, args.repeats)
        found.append({"layer": name, "weights": tensor.size, "columns": columns, **result})
        layer.set_values(None)
        ms = {k: f"{t:.2f}" for k, t in result["milliseconds"].items()}
        mb = {k: f"{p:.1f}" for k, p in result["peak_mb"].items()}
        print(f"{name} ({tensor.size} weights in {columns} columns)\n  ms {ms}\n  MB {mb}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model", help="a model directory, or the name of a shape")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=26)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with model_directory(args.model) as path, bounded_cache():
        found = run(path, args)
    print(f"{args.model}, {BRANCHES} branches, {args.rows} x {args.length} tokens, {mx.default_device()}")
    if args.json:
        Path(args.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
