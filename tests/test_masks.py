"""Choices of weights to compare the sensitive ones with."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_train import _train

import zo_mlx
from zo_mlx.errors import UsageError
from zo_mlx.index import SensitiveIndex, read_index

SETTINGS = {"density": 0.02, "q_group_size": 32, "num_samples": 2, "sequence_length": 16, "progress": False}


def _index(source: Path, out: Path, **settings: object) -> SensitiveIndex:
    zo_mlx.convert(str(source), str(out), **{**SETTINGS, **settings})  # type: ignore[arg-type]
    return read_index(out)


def _weights(source: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, mx.array] = {}
    for file in source.glob("*.safetensors"):
        arrays |= mx.load(str(file))  # type: ignore[arg-type]
    names = [n for n, a in arrays.items() if ".layers." in n and a.ndim == 2]
    return {n.removesuffix(".weight"): np.abs(np.array(arrays[n].astype(mx.float32))).reshape(-1) for n in names}


@pytest.mark.parametrize("mask", ["largest", "smallest"])
def test_magnitude_masks_take_the_extremes_of_all_layers(mask: str, tiny_hf: Path, tmp_path: Path) -> None:
    index = _index(tiny_hf, tmp_path / "a", mask=mask)
    weights = _weights(tiny_hf)
    chosen, others = [], []
    for path, magnitudes in weights.items():
        taken = index.tensors[path].indices if path in index.tensors else np.empty(0, np.uint32)
        chosen.append(magnitudes[taken])
        others.append(np.delete(magnitudes, taken))
    in_all, out_all = np.concatenate(chosen), np.concatenate(others)
    assert len(in_all) == round(0.02 * (len(in_all) + len(out_all)))
    assert in_all.min() >= out_all.max() if mask == "largest" else in_all.max() <= out_all.min()
    assert (index.metadata["mask"], index.metadata["coverage"]) == (mask, None)


def test_a_random_mask_depends_on_the_seed_alone(tiny_hf: Path, tmp_path: Path) -> None:
    first, again, other = (
        _index(tiny_hf, tmp_path / name, mask="random", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    same = [np.array_equal(first.tensors[p].indices, again.tensors[p].indices) for p in first.tensors]
    assert all(same)
    assert first.size == again.size == other.size
    sets = [{(p, i) for p, t in index.tensors.items() for i in t.indices.tolist()} for index in (first, other)]
    assert len(sets[0] & sets[1]) < 0.1 * first.size


def test_all_weights_can_be_trained(tiny_hf: Path, choice_data: Path, tmp_path: Path) -> None:
    index = _index(tiny_hf, tmp_path / "m", mask="all")
    assert index.size == index.metadata["candidates"] == sum(map(len, _weights(tiny_hf).values()))
    result = _train(tmp_path / "m", choice_data, tmp_path / "a", num_layers=-1)
    assert result.trainable == index.size
    assert result.train_loss is not None


def test_weights_chosen_without_scores_cannot_scale_directions(
    tiny_hf: Path, choice_data: Path, tmp_path: Path
) -> None:
    _index(tiny_hf, tmp_path / "model", mask="random")
    with pytest.raises(UsageError, match=r"^--precondition 0\.5: the model's index has no Fisher scores"):
        _train(tmp_path / "model", choice_data, tmp_path / "run", precondition=0.5)


def test_wrong_masks_are_refused(tiny_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mask must be one of sensitive, random"):
        _index(tiny_hf, tmp_path / "a", mask="best")
    with pytest.raises(UsageError, match="--isolate leaves nothing"):
        _index(tiny_hf, tmp_path / "a", mask="all", isolate=True)
    assert not list(tmp_path.iterdir())
