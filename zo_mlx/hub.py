"""Names on the Hugging Face hub."""

import re
from pathlib import Path


def is_hub_id(name: str) -> bool:
    """Whether a name is one on the hub, like name/model: what is there on the disk, or written as a path, is none."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and name[0] != "." and not Path(name).exists()


def reason(error: Exception) -> str:
    """The first line of what the hub's libraries raise, which are a dozen kinds with long texts."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
