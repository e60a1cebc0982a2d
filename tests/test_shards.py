"""A model that is spread over several processes by mlx-lm."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_linear
from test_ranks import _launched, _records
from test_stop import _words
from test_train import _train, _values

from zo_mlx.product import dequantized
from zo_mlx.shards import numbered, part_of


@pytest.mark.parametrize("settings", [{}, {"objective": "accuracy", "estimator": "one-sided"}])
def test_a_model_spread_over_ranks_gives_the_sums_of_the_whole_one(
    settings: dict[str, Any], spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    settings = {"split": "model", "iters": 10, **settings}
    one = _train(spread, choice_data, tmp_path / "one", **settings)
    out, _ = _launched(2, [*_words(spread, choice_data, tmp_path / "all", **settings), "--json"], tmp_path)
    assert _records(tmp_path / "all")[0] == pytest.approx(_records(tmp_path / "one")[0], rel=1e-2, abs=1e-5)
    assert np.allclose(_values(tmp_path / "all"), _values(tmp_path / "one"), rtol=1e-2, atol=1e-4)
    result = json.loads(out.splitlines()[-1])
    assert one.after is not None
    assert result["after"]["loss"] == pytest.approx(one.after.loss, rel=1e-3)
    assert result["weights_memory"] < 0.9 * one.weights_memory  # the embedding is not cut
    assert (tmp_path / "all/rank-1/journal").read_bytes() == (tmp_path / "all/journal").read_bytes()


@dataclass
class Group:
    """In the place of MLX's."""

    own: int

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("segments", [1, 3, [1 / 2, 3 / 4]])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_part_that_mlx_cuts_out_is_found(quantized: bool, segments: Any, rank: int) -> None:
    mx.random.seed(0)
    whole = nn.Linear(768, 192, bias=False)
    layer = whole.to_quantized(32, 4) if quantized else whole
    weight = np.array(dequantized(layer))
    indices = np.sort(np.random.default_rng(0).choice(weight.size, 500, replace=False))
    for way in ("all-to-sharded", "sharded-to-all"):
        twin = numbered(copy.deepcopy(layer))
        cut, twin = (shard_linear(m, way, segments=segments, group=Group(rank)) for m in (layer, twin))
        part = part_of(twin, 768)
        own, local = part.of(indices, 768)
        assert 200 < len(own) < 300
        assert (np.diff(local.astype(int)) > 0).all()
        assert (np.array(dequantized(cut)).reshape(-1)[local] == weight.reshape(-1)[indices[own]]).all()
