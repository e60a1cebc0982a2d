"""Each example runs as it is, on tiny models where it does not matter which."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import demo
import mlx_lm
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from safetensors.numpy import load_file

import zo_mlx

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run in, with a model where the demo would have made one, and the examples."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/model").symlink_to(tiny)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo(
    smollm2_gguf: Path,
    here: Path,
    choice_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "DATA", choice_data)
    demo.main()
    text = capsys.readouterr().out
    assert re.search(r"\n  step 60: loss [\d.]+\n", text)
    assert re.search(r"\n6 messages it never trained on +before +after\naccuracy +[\d.]+% +[\d.]+%\n", text)
    assert re.search(r"\ntrainable weights +[\d,]+\nsteps +60\n", text)
    readme = (EXAMPLES.parent / "README.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("$ zo-mlx")]
    assert len(commands) == 3
    for line in commands:
        assert f"    {line.replace(str(choice_data), 'examples/support')}\n" in readme


def test_within(
    here: Path, choice_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def peaks(memory: float) -> list[float]:
        place = f"adapter-{memory}"
        _run(monkeypatch, "within.py", "--memory", memory, "--data", choice_data, "--iters", 3, "--adapter-path", place)
        sizes = re.findall(r"([\d.,]+) MB$", capsys.readouterr().out, re.M)[-4:]
        return [float(size.replace(",", "")) for size in sizes]

    limit, weights, peak, process = peaks(8)
    assert limit == 5333.3
    assert 0 < weights < peak < process < limit
    less = weights + (peak - weights) / 2  # of which the script takes two thirds
    limit, _, smaller, _ = peaks(1.5 * less / 1000)
    assert limit == pytest.approx(less, abs=0.1)
    assert weights < smaller < min(peak, 1.1 * limit)


def test_share(
    here: Path, choice_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(monkeypatch, "share.py", "--data", choice_data, "--iters", 20)
    text = capsys.readouterr().out
    assert "the adapters are the same, bit for bit" in text
    values = [load_file(here / "share" / place / "values.safetensors")["values"] for place in ("anna", "ben/adapter")]
    assert np.array_equal(*values)
    assert (here / "share/ben/from-anna").stat().st_size == int(re.search(r"([\d,]+) bytes", text)[1].replace(",", ""))  # type: ignore[index]
    with pytest.raises(SystemExit, match="is there already"):
        _run(monkeypatch, "share.py", "--data", choice_data, "--iters", 20)


def test_convert_folder(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, out = tmp_path / "models", tmp_path / "converted"
    shutil.copytree(tiny_hf, models / "good")
    (models / "broken").mkdir()
    (models / "broken/config.json").write_text("{}")
    (models / "notes.txt").write_text("no model")
    (models / "bad").mkdir()
    (models / "bad/config.json").write_text("{}")
    convert = zo_mlx.convert

    def failing(source: str, *args: Any, **more: Any) -> Any:
        if source.endswith("bad"):
            raise zo_mlx.ZoError("no room")
        return convert(source, *args, **more)

    monkeypatch.setattr(zo_mlx, "convert", failing)
    for said in ("sensitive weights", "there already"):
        with pytest.raises(SystemExit) as e:
            _run(monkeypatch, "convert_folder.py", models, out, "--num-samples", 2)
        both = rf"{models}/bad: no room\n{models}/broken: .*config.json has no model_type"
        assert re.fullmatch(rf"not converted:\n{both}", str(e.value.code))
        assert re.fullmatch(rf"{out}/good: .*{said}.*\n", capsys.readouterr().out)
    mlx_lm.load(str(out / "good"))
    assert [path.name for path in out.iterdir()] == ["good"]


def test_footprint(
    here: Path, choice_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(monkeypatch, "footprint.py", "footprint.png", "--data", choice_data, "--rows", 8)
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 5
    assert all(weights < peak for weights, peak in found.values())
    assert (here / "footprint.png").read_bytes().startswith(b"\x89PNG")


def test_notebook(here: Path) -> None:
    stored = nbformat.read(EXAMPLES / "classify.ipynb", as_version=4)
    notebook = nbformat.reads(nbformat.writes(stored).replace("STEPS = 60", "STEPS = 3"), 4)
    NotebookClient(notebook, resources={"metadata": {"path": str(here)}}).execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "3 steps" in text
    assert (EXAMPLES / "classify.ipynb").stat().st_size < 100_000
