"""Fine-tune 4-bit language models with forward passes only: sparse zeroth-order training in MLX."""

from ._blas import open_fast_blas

open_fast_blas()  # before anything imports mlx

__version__ = "0.1.0"

from .convert import Conversion, convert
from .errors import UsageError, ZoError

__all__ = ["Conversion", "UsageError", "ZoError", "convert"]
