import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_train import _train

from zo_mlx.cli import main
from zo_mlx.index import SensitiveIndex, SensitiveTensor, read_index
from zo_mlx.info import _layer, info
from zo_mlx.journal import FILE_NAME, Journal


def test_columns_are_counted_by_expert() -> None:
    """Experts of (4, 8): column 0 of the first expert twice, column 1 of the second."""
    positions = np.array([0, 8, 32 + 1], np.uint32)
    index = SensitiveIndex({"experts": SensitiveTensor(positions, mx.zeros(3), np.ones(3, np.float32))})
    layer = _layer("experts", index.tensors["experts"], (2, 4, 8))
    assert (layer["density"], layer["columns"]) == (3 / 64, 2 / 16)


def test_a_layer_that_the_model_does_not_have_has_no_density() -> None:
    tensor = SensitiveTensor(np.array([3], np.uint32), mx.zeros(1), np.ones(1, np.float32))
    assert [_layer("m", tensor, shape)["density"] for shape in ((4, 8), (8,), (0,))] == [1 / 32, None, None]


def test_a_loss_that_is_not_finite_is_null(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path, iters=1)
    run = Journal.read(tmp_path / FILE_NAME)
    last = run.last()
    assert last
    assert info(tmp_path)["last_loss"] == pytest.approx(last.loss)
    with run.open():
        run.append(replace(last, step=2, loss=math.inf))
    assert info(tmp_path)["last_loss"] is None


def test_the_map_shows_every_layer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        save(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", spy)
    assert main(["info", str(tiny), "--plot", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
    panels = [axes for axes in figures[0].axes if axes.get_title(loc="left")]
    density, scores, columns = (np.array(axes.images[0].get_array().filled(np.nan)) for axes in panels)
    modules = [label.get_text() for label in panels[0].get_yticklabels()]
    index = read_index(tiny)
    total = sum(t.scores.sum() for t in index.tensors.values())
    widths = {"mlp.down_proj": 128}
    assert np.isfinite(density).sum() == len(index.tensors)
    for path, tensor in index.tensors.items():
        _, _, block, module = path.split(".", 3)
        at, width = (modules.index(module), int(block)), widths.get(module, 64)
        assert scores[at] == pytest.approx(tensor.scores.sum() / total)
        assert columns[at] == pytest.approx(len({*(tensor.indices % width)}) / width)
        rows = {"mlp.gate_proj": 128, "mlp.up_proj": 128, "self_attn.k_proj": 32, "self_attn.v_proj": 32}
        assert density[at] == pytest.approx(tensor.size / (rows.get(module, 64) * width))

    capsys.readouterr()
    for command, problem in (
        (["--plot", str(tmp_path / "map.png")], "already exists"),
        (["--plot", str(tmp_path / "map.txt")], "must end with one of .png"),
    ):
        assert main(["info", str(tiny), *command]) == 2
        assert problem in capsys.readouterr().err
