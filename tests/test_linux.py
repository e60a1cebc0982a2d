import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from zo_mlx import _linux

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate and Metal")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_mlx_products_run_in_openblas() -> None:
    """MLX's symbol resolves to OpenBLAS: the linker's global scope has its cblas_sgemm first."""
    done = _run(
        "import zo_mlx, ctypes, os\n"
        "address = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value\n"
        "for line in open('/proc/self/maps'):\n"
        "    low, high = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "    if low <= address < high: print(os.path.basename(line.split()[-1]))\n"
        "import mlx.core as mx\n"
        "print(float((mx.ones((64, 64)) @ mx.ones((64, 64))).sum()))\n"
    )
    library, result = done.stdout.split()
    assert library.startswith("libopenblas")
    assert float(result) == 64**3


def test_mlx_imported_first_is_one_warning() -> None:
    done = _run("import mlx.core, zo_mlx")
    assert done.returncode == 0
    assert done.stderr.count("mlx was imported before zo_mlx") == 1
    assert _run("import zo_mlx, mlx.core, zo_mlx").stderr == ""


def test_an_openblas_for_other_processors_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first product would end the process with an illegal instruction."""
    opened = []

    class Library:
        def __init__(self, name: str, mode: int = ctypes.DEFAULT_MODE) -> None:
            opened.append(mode)
            self.openblas_get_corename = lambda: b"SKYLAKEX"

    cpu = tmp_path / "cpuinfo"
    monkeypatch.setattr(_linux, "_CPUINFO", cpu)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    cpu.write_text("flags\t\t: fpu avx2 fma\n")
    with pytest.warns(UserWarning, match="pip install cmeel-openblas=="):
        assert not _linux.open_fast_blas()
    assert ctypes.RTLD_GLOBAL not in opened
    cpu.write_text("flags\t\t: fpu avx2 avx512f fma\n")
    assert _linux.open_fast_blas()
    assert opened[-1] == ctypes.RTLD_GLOBAL


def test_freed_memory_is_kept() -> None:
    """Page faults of ten rounds in which 78 MB are made and freed: 13,000 a round where they are given back."""
    done = _run(
        "import zo_mlx, resource\n"
        "import mlx.core as mx\n"
        "faults = []\n"
        "for _ in range(20):\n"
        "    mx.eval([mx.zeros(i << 18) + i for i in range(1, 13)])\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "print(faults[-1] - faults[9])\n"
    )
    assert int(done.stdout) < 1000
