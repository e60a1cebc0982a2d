import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import _train, _values

import zo_mlx
from zo_mlx import adapter
from zo_mlx.cli import main
from zo_mlx.errors import UsageError
from zo_mlx.index import read_index
from zo_mlx.journal import Journal


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "one-sided", "directions": 9, "num_layers": 2, "iters": 12},
        {"optimizer": "adam", "learning_rate": 1e-3, "law": "gaussian", "precondition": 0.5},
        {"structure": "low-rank", "num_layers": 1},
        {"gradient": "exact"},
    ],
)
def test_a_journal_and_the_model_give_the_adapter_bit_by_bit(
    settings: dict[str, Any], spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    _train(spread, choice_data, tmp_path / "a", **settings)
    shutil.copy(tmp_path / "a/journal", tmp_path / "sent")
    done = zo_mlx.replay(spread, tmp_path / "sent", tmp_path / "b", progress=False)
    assert done.steps == done.recorded == settings.get("iters", 6)
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"journal", adapter.VALUES, adapter.OPTIMIZER}
    for name in ("journal", adapter.VALUES, adapter.OPTIMIZER):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    zo_mlx.load(spread, tmp_path / "b")


def test_an_earlier_moment_is_that_of_a_shorter_run_and_can_be_gone_on_from(
    tiny: Path, choice_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"directions": 4, "iters": 9}
    _train(tiny, choice_data, tmp_path / "whole", **settings)
    _train(tiny, choice_data, tmp_path / "short", **{**settings, "iters": 5})
    words = ["replay", str(tmp_path / "whole"), "--model", str(tiny), "--adapter-path", str(tmp_path / "a")]
    assert main([*words, "--until", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["recorded"]) == (5, 9)
    assert (_values(tmp_path / "a") == _values(tmp_path / "short")).all()
    _train(tiny, choice_data, tmp_path / "a", **settings, resume=True)
    assert (_values(tmp_path / "a") == _values(tmp_path / "whole")).all()
    start = zo_mlx.replay(tiny, tmp_path / "whole", tmp_path / "start", until=0, progress=False)
    assert start.steps == 0
    assert (_values(tmp_path / "start") == np.array(read_index(tiny).initial_values())).all()
    assert not (_values(tmp_path / "start") == _values(tmp_path / "short")).all()


def test_what_cannot_be_replayed_is_refused(
    tiny: Path, spread: Path, choice_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _train(tiny, choice_data, tmp_path / "a")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="a already exists"):
        zo_mlx.replay(tiny, tmp_path / "a", tmp_path / "a")
    with pytest.raises(UsageError, match=r"since it was made, the sensitive index \(sensitive.safetensors\) changed"):
        zo_mlx.replay(spread, tmp_path / "a", out)
    for until in (-1, 7):
        with pytest.raises(UsageError, match=f"--until {until}: .*journal has steps 0 to 6"):
            zo_mlx.replay(tiny, tmp_path / "a", out, until=until)
    content = bytearray((tmp_path / "a/journal").read_bytes())
    content[-60] ^= 1  # in the record before the last
    (tmp_path / "a/journal").write_bytes(content)
    with pytest.raises(UsageError, match="damaged at record 5, which is not the last"):
        zo_mlx.replay(tiny, tmp_path / "a", out)
    with pytest.raises(UsageError, match="--until 5: .*damaged at record 5, which is not the last has steps 0 to 4"):
        zo_mlx.replay(tiny, tmp_path / "a", out, until=5)
    assert not out.exists()
    assert zo_mlx.replay(tiny, tmp_path / "a", out, until=4, progress=False).steps == 4
    assert main(["replay", str(tmp_path / "none"), "--model", str(tiny), "--adapter-path", str(tmp_path / "b")]) == 2
    assert "none is missing" in capsys.readouterr().err


def test_a_journal_whose_weights_are_not_the_indexs_is_refused(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path / "a", iters=1)
    header = Journal.read(tmp_path / "a/journal").header
    ((start, end),) = header["trained"]
    Journal.create(tmp_path / "other", {**header, "trained": [[start, end + 1]]})
    with pytest.raises(UsageError, match=f"is of more weights than the index's {end}"):
        zo_mlx.replay(tiny, tmp_path / "other", tmp_path / "b")
