"""Make MLX's CPU backend fast on Linux; on macOS, where MLX uses Accelerate and Metal, this does nothing.

The Linux wheel of MLX is linked to the reference BLAS, in which a float32 product takes about 50 times as long as in
OpenBLAS. The dynamic linker resolves MLX's calls to whichever library offered `cblas_sgemm` first, so opening OpenBLAS
(PyPI: cmeel-openblas) with global symbols *before* `mlx.core` is all it takes.

MLX's CPU backend allocates what each operation gives, and frees it soon after. glibc gives such memory back to the
system, and gets it again page by page, which is a sixth of the time of a step. So it is told to keep some.
"""

import ctypes
import importlib.metadata
import sys
import tempfile
import warnings
from pathlib import Path

# OpenBLAS's names of what a wheel was built for, where that dies on processors without AVX-512.
_NEEDS_AVX512 = {b"SKYLAKEX", b"COOPERLAKE", b"SAPPHIRERAPIDS"}
_CPUINFO = Path("/proc/cpuinfo")

# glibc's names and numbers (malloc.h): what is kept of freed memory, and what is too large for that (its maximum).
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 32 << 20


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back at once. A no-op where the C library is another."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def open_fast_blas() -> bool:
    """Open OpenBLAS for MLX; return whether MLX will use it. A no-op off Linux and when called again."""
    if sys.platform != "linux":
        return False
    openblas = _installed("cmeel-openblas", "libopenblas.so")
    if openblas is None:
        return False
    if "mlx.core" in sys.modules and not _is_open(openblas):
        warnings.warn(
            "zo-mlx: mlx was imported before zo_mlx, so float32 products on the CPU stay about 50 times "
            "slower than they need be; import zo_mlx first",
            stacklevel=3,
        )
        return False
    # OpenBLAS needs libgfortran.so.5, which a bare Linux does not have; MLX's wheel brings one.
    library = _opened(openblas)
    if library is None and _open_bundled_gfortran():
        library = _opened(openblas)
    if library is None:
        return False
    if not _runs_here(library):
        warnings.warn(
            "zo-mlx: the installed cmeel-openblas is for processors with AVX-512, which this one lacks, so float32 "
            "products on the CPU stay about 50 times slower than they need be: pip install cmeel-openblas==0.3.29",
            stacklevel=3,
        )
        return False
    ctypes.CDLL(str(openblas), mode=ctypes.RTLD_GLOBAL)
    return True


def _opened(library: Path) -> ctypes.CDLL | None:
    """Open a library for nobody else yet."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _runs_here(openblas: ctypes.CDLL) -> bool:
    openblas.openblas_get_corename.restype = ctypes.c_char_p
    return openblas.openblas_get_corename() not in _NEEDS_AVX512 or "avx512f" in _CPUINFO.read_text().split()


def _installed(distribution: str, prefix: str) -> Path | None:
    """The first file of an installed distribution whose name starts with `prefix`."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.name.startswith(prefix)), None)


def _is_open(library: Path) -> bool:
    return str(library.resolve()) in Path("/proc/self/maps").read_text()


def _open_bundled_gfortran() -> bool:
    """Open the libgfortran inside MLX's wheel under the name by which OpenBLAS asks for it.

    Wheel repair tools rename bundled libraries (libgfortran-f7379c93.so.5.0.0) and the linker compares names
    only, so a private copy gets its own name (DT_SONAME) changed back. The copy lives until it is open.
    """
    gfortran = _installed("mlx-cpu", "libgfortran")
    quadmath = _installed("mlx-cpu", "libquadmath")
    if gfortran is None:
        return False
    name, wanted = gfortran.name.encode() + b"\0", b"libgfortran.so.5"
    image = gfortran.read_bytes().replace(name, wanted.ljust(len(name), b"\0"))
    try:
        if quadmath is not None:
            ctypes.CDLL(str(quadmath))
        with tempfile.TemporaryDirectory() as private:
            copy = Path(private, wanted.decode())
            copy.write_bytes(image)
            ctypes.CDLL(str(copy))
    except OSError:
        return False
    return True
