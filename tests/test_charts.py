import numpy as np
import pytest

from zo_mlx.charts import chart, layer_map, line, step_lines, thinned, ticks, trend


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 0.52, [0.35, 0.4, 0.45, 0.5]), (-7, 13, [-5, 0, 5, 10]),
     (2e-7, 9e-7, [2e-7, 4e-7, 6e-7, 8e-7]), (0, 4e5, [0, 1e5, 2e5, 3e5, 4e5])],
)  # fmt: skip
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_steps_are_whole() -> None:
    assert ticks(0, 1, whole=True) == [0, 1]
    assert ticks(0, 9, whole=True) == [0, 2, 4, 6, 8]


def test_a_thinned_curve_keeps_its_peaks() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=9999)
    values[4321], values[7000], values[50:100] = 50, -50, np.nan
    found = thinned(values)
    assert len(found) < 600
    assert {4322, 7001} <= set(found[:, 0])
    assert (np.diff(found[:, 0]) > 0).all()
    assert (found[:, 1] == values[found[:, 0].astype(int) - 1]).all()
    assert thinned(values[200:300]).tolist() == [[i + 1, v] for i, v in enumerate(values[200:300])]


def test_a_trend_is_the_mean_around_each_point() -> None:
    values = np.random.default_rng(0).normal(size=240)
    found = trend(values)
    assert found[100] == pytest.approx([101, values[90:111].mean()])
    assert found[0] == pytest.approx([1, values[:11].mean()])
    assert found[-1] == pytest.approx([240, values[-11:].mean()])
    assert trend(np.array([3.0, np.inf, 5.0])) == pytest.approx(np.array([[1, 3.0], [2, 4.0], [3, 5.0]]))
    assert trend(np.zeros(0)).shape == (0, 2)


@pytest.mark.parametrize("value", [0.0, 0.7, -3e20, 1e-300])
def test_flat_curves_are_in_the_middle(value: float) -> None:
    made = chart("", [line("", np.array([[0, value], [1, value]]), "dots")], 1, "{:.2g}".format)
    assert made is not None
    assert {y for _, y, _, _ in made.dots} == {103.0}
    assert made.y_ticks


def test_what_is_not_finite_is_left_out_and_what_explodes_stays_inside() -> None:
    losses = np.ones(200, np.float32)
    losses[::2], losses[5], losses[6], losses[7] = 2, np.nan, np.inf, 1e30
    each, _ = step_lines("", losses)
    made = chart("", [each], 200, "{:.2g}".format)
    assert made is not None
    ((_, _, points),) = made.lines
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 198
    assert min(heights) == 10
    assert max(heights) < 196
    assert [text for _, text in made.y_ticks] == ["1", "1.2", "1.5", "1.8", "2"]
    assert step_lines("", losses[5:7]) == [None, None]
    assert chart("", [None], 200, str) is None


def test_a_map_has_a_place_for_each_layer() -> None:
    paths = ["model.layers.1.mlp.up", "model.layers.0.mlp.up", "model.layers.2.attn.q", "lm_head"]
    made = layer_map("", "", paths, [0.01, 1.0, None, 0.0], paths, "{:g}".format)
    assert made.blocks == 3
    cells = {text: (name, block, strength) for name, row in made.rows for block, strength, text in row}
    assert cells == {
        "model.layers.1.mlp.up": ("mlp.up", 1, pytest.approx(0.1)),
        "model.layers.0.mlp.up": ("mlp.up", 0, pytest.approx(1.0)),
        "model.layers.2.attn.q": ("attn.q", 2, None),
        "lm_head": ("lm_head", 0, 0.0),
    }
    assert (made.low, made.high) == ("0.01", "1")
