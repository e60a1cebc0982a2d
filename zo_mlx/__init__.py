"""Fine-tune 4-bit language models with forward passes only: sparse zeroth-order training in MLX."""

from ._linux import keep_freed_memory, open_fast_blas

open_fast_blas()  # before anything imports mlx
keep_freed_memory()

__version__ = "0.1.0"

from .classify import classify
from .config import TrainConfig
from .convert import Conversion, convert
from .errors import Interrupted, UsageError, ZoError
from .evaluate import Evaluation, evaluate
from .fuse import Fused, fuse
from .generate import generate
from .lora import Fit, export
from .model import load
from .replay import Replay, replay
from .result import TrainResult
from .seeds import SeedsResult, train_seeds
from .train import train

__all__ = [
    "Conversion",
    "Evaluation",
    "Fit",
    "Fused",
    "Interrupted",
    "Replay",
    "SeedsResult",
    "TrainConfig",
    "TrainResult",
    "UsageError",
    "ZoError",
    "classify",
    "convert",
    "evaluate",
    "export",
    "fuse",
    "generate",
    "load",
    "replay",
    "train",
    "train_seeds",
]
