"""Conversions that are stopped and go on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import write_hf_llama
from test_files import run_on_full_disk
from test_gguf import TOKENS, write_gguf
from zo_mlx.convert import checkpoint, write
from zo_mlx.convert.workspace import workspace

import zo_mlx
from zo_mlx import files, index
from zo_mlx.blocks import BlockwiseModel
from zo_mlx.errors import Interrupted, UsageError, ZoError

SMALL = {"num_samples": 2, "sequence_length": 16, "density": 0.02, "progress": False}


def _contents(directory: Path) -> dict[str, bytes]:
    """The files of a model directory but for the report, which has times in it."""
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "convert.json"}


class Stops:
    """Interrupts the n-th file that is written, before or after it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.at, self.after, self.count = -1, False, 0
        for module in (checkpoint, write, index):
            monkeypatch.setattr(module, "write_atomically", self._write)

    def _write(self, path: Path, write: object) -> None:
        self.count += 1
        if self.count == self.at and not self.after:
            raise KeyboardInterrupt
        files.write_atomically(path, write)  # type: ignore[arg-type]
        if self.count == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("scope", "after"), [("global", False), ("tensor", True)])
def test_a_conversion_stopped_anywhere_goes_on_to_the_same_output(
    scope: str, after: bool, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = Stops(monkeypatch)
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "whole"), scope=scope, **SMALL)
    expected, writes = _contents(tmp_path / "whole"), stops.count
    assert writes == 2 * (4 + 4) + 1 + 1  # inputs and gradients of blocks and head, listed; a shard; the index
    stops.after = after
    for at in range(1, writes + 1):
        stops.at, stops.count = at, 0
        out = tmp_path / f"out{at}"
        with pytest.raises(Interrupted, match="go on with --resume"):
            zo_mlx.convert(str(tiny_hf), str(out), scope=scope, **SMALL)
        assert not out.exists()
        stops.at = -1
        zo_mlx.convert(str(tiny_hf), str(out), scope=scope, resume=True, **SMALL)
        assert _contents(out) == expected
    assert {p.name for p in tmp_path.iterdir()} == {"whole", *(f"out{at}" for at in range(1, writes + 1))}


def test_finished_blocks_are_not_repeated(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = Stops(monkeypatch)
    ran: list[int] = []
    block = BlockwiseModel.block

    def spy(self: BlockwiseModel, number: int, tokens: mx.array, x: mx.array) -> mx.array:
        ran.append(number)
        return block(self, number, tokens, x)

    monkeypatch.setattr(BlockwiseModel, "block", spy)
    for at, left in ((6, [2, 2, 2, 2, 1, 1, 0, 0]), (12, [1, 1, 0, 0]), (18, [])):
        stops.at, stops.count, stops.after = at, 0, True
        with pytest.raises(Interrupted):
            zo_mlx.convert(str(tiny_hf), str(tmp_path / f"{at}"), **SMALL)
        ran.clear()
        zo_mlx.convert(str(tiny_hf), str(tmp_path / f"{at}"), resume=True, **SMALL)
        assert ran == left


@pytest.mark.parametrize("name", ["gradient-2.safetensors", "files.json"])
def test_damaged_files_are_not_gone_on_with(
    name: str, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stops = Stops(monkeypatch)
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "whole"), **SMALL)
    stops.at, stops.count, stops.after = 12, 0, True
    with pytest.raises(Interrupted):
        zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), **SMALL)
    file = tmp_path / ".out.partial/scoring" / name
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), resume=True, **SMALL)
    assert "is damaged: beginning again" in capsys.readouterr().err
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_an_interrupted_conversion_is_not_mistaken_for_another(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = Stops(monkeypatch)
    stops.at, out = 6, str(tmp_path / "out")
    with pytest.raises(Interrupted):
        zo_mlx.convert(str(tiny_hf), out, **SMALL)
    with pytest.raises(UsageError, match="was interrupted: go on with --resume, or remove .*.out.partial"):
        zo_mlx.convert(str(tiny_hf), out, **SMALL)
    with pytest.raises(UsageError, match="had other density, seed|had other density, calibration"):
        zo_mlx.convert(str(tiny_hf), out, resume=True, **{**SMALL, "density": 0.01, "seed": 1})
    other = write_hf_llama(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="had other files"):
        zo_mlx.convert(str(other), out, resume=True, **SMALL)
    with files.locked(tmp_path / ".out.partial"), pytest.raises(UsageError, match="in use by another process"):
        zo_mlx.convert(str(tiny_hf), out, resume=True, **SMALL)
    zo_mlx.convert(str(tiny_hf), out, resume=True, **SMALL)
    assert json.loads((tmp_path / "out/convert.json").read_text())["density"] == 0.02


def test_a_source_that_goes_away_loses_nothing(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of a late failure may look like those of bad input."""
    block = BlockwiseModel.block

    def fail(self: BlockwiseModel, number: int, tokens: mx.array, x: mx.array) -> mx.array:
        if number == 2:
            raise UsageError("no such model")
        return block(self, number, tokens, x)

    monkeypatch.setattr(BlockwiseModel, "block", fail)
    with pytest.raises(UsageError, match="no such model; what is finished is kept in .*: go on with --resume"):
        zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), **SMALL)
    monkeypatch.setattr(BlockwiseModel, "block", block)
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), resume=True, **SMALL)


def test_an_output_that_appears_meanwhile_loses_nothing(tiny_hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZoError, match="go on with --resume"), workspace(out, resume=False) as work:
        work.begin({"a": 1})
        (work.result / "model").write_text("hours of work")
        out.mkdir()
        (out / "of-others").write_text("x")
    assert (tmp_path / ".out.partial/result/model").read_text() == "hours of work"
    shutil.rmtree(out)
    with workspace(out, resume=True) as work:
        work.begin({"a": 1})
    assert (out / "model").read_text() == "hours of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_of_others_are_not_touched(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/letters").write_text("dear ...")
    with pytest.raises(UsageError, match="is no conversion's: it holds letters; move it away"):
        zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), resume=True, **SMALL)
    assert (tmp_path / ".out.partial/letters").exists()


def test_resuming_nothing_begins(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial/gguf").mkdir(parents=True)  # left by a process that was killed before it had begun
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), resume=True, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tiny_hf: Path, tmp_path: Path) -> None:
    settings = f"{str(tiny_hf)!r}, {str(tmp_path / 'out')!r}, num_samples=2, sequence_length=16, density=0.02"
    code = f"""
try:
    zo_mlx.convert({settings}, progress=False)
except ZoError as e:
    print("ZoError", e)
"""
    message = run_on_full_disk(code, 20000)
    assert message.startswith("ZoError cannot write")
    assert message.endswith("go on with --resume")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "out"), resume=True, **SMALL)
    zo_mlx.convert(str(tiny_hf), str(tmp_path / "whole"), **SMALL)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_too_little_space_is_said_before_the_work(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a GGUF file as well, whose dequantized tensors take space of their own."""
    source = write_hf_llama(tmp_path / "hf", vocab_size=len(TOKENS))
    write_gguf(source, tmp_path / "m.gguf")
    zo_mlx.convert(str(source), str(tmp_path / "whole"), **SMALL)
    size = (tmp_path / "whole/model.safetensors").stat().st_size
    for name, before in (("hf", 0), ("m.gguf", 1)):
        for free, enough in ((size // 2, False), (2 * size, True)):
            answers = [1 << 40] * before + [free] * 9
            monkeypatch.setattr(files.shutil, "disk_usage", lambda path, a=answers: SimpleNamespace(free=a.pop(0)))
            out = tmp_path / f"{name}-{free}"
            if enough:
                zo_mlx.convert(str(tmp_path / name), str(out), **SMALL)
                continue
            with pytest.raises(UsageError, match="needs 0.00 GB more, but its disk has 0.00 GB free"):
                zo_mlx.convert(str(tmp_path / name), str(out), **SMALL)
            assert {p.name for p in tmp_path.iterdir() if p.name.startswith((".", out.name))} == set()
