"""What a scoring pass has finished, in files, so that an interrupted one goes on with the next block.

For each of the model's blocks, `input-<number>` holds what goes into it; the number after the last stands for what
comes out. `gradient-<number>` holds the gradients with respect to the same, and the candidates of the block.
`files.json` lists the files that count, with their SHA-256.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import UsageError
from ..files import load_safetensors, read_json, sha256, write_atomically


@dataclass
class Candidates:
    """Of a layer, the weights that may be among the highest.

    Attributes:
        positions: (n,) uint32, flat positions, increasing.
        scores: (n,) float32.
        mass: the sum of the scores of all of the layer's weights.
    """

    positions: np.ndarray
    scores: np.ndarray
    mass: float


class Checkpoint:
    """Block inputs, gradients and candidates; each file is written whole or not at all.

    Args:
        directory: made if it does not exist; if it holds files that are not as they were written, it is emptied.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self._noted: dict[str, Candidates] = {}
        self._list = directory / "files.json"
        self._sha256: dict[str, str] = {}
        if self._list.exists():
            try:
                self._sha256 = read_json(self._list)
                there = {f.name: sha256(f) for f in directory.iterdir() if f.name in self._sha256}
                whole = there == self._sha256
            except (UsageError, OSError):
                whole = False
            if not whole:
                print(f"Warning: {directory} is damaged: beginning again", file=sys.stderr)
                self.clear()

    def _numbers(self, kind: str) -> list[int]:
        return sorted(int(n[1]) for name in self._sha256 if (n := re.fullmatch(kind + r"-(\d+)\.safetensors", name)))

    def _path(self, kind: str, number: int) -> Path:
        return self._directory / f"{kind}-{number}.safetensors"

    def _save(self, path: Path, arrays: dict[str, mx.array], **metadata: str) -> None:
        write_atomically(path, lambda p: mx.save_safetensors(str(p), arrays, metadata))
        self._sha256[path.name] = sha256(path)
        write_atomically(self._list, lambda p: p.write_text(json.dumps(self._sha256)))

    def _states(self, kind: str, number: int) -> list[mx.array]:
        arrays, _ = load_safetensors(self._path(kind, number))
        count = sum(name.isdigit() for name in arrays)
        return [arrays[str(n)] for n in range(count)]

    @property
    def forward(self) -> int | None:
        """The number of the last block whose inputs are there."""
        return max(self._numbers("input"), default=None)

    @property
    def backward(self) -> int | None:
        """The number of the first block whose candidates are there; that of the output, if its gradient is."""
        return min(self._numbers("gradient"), default=None)

    def finished(self, blocks: int) -> int:
        """How many of the passes through a block, forward and backward, need not be repeated."""
        return (self.forward or 0) if self.backward is None else 2 * blocks - self.backward

    def put_inputs(self, number: int, states: list[mx.array]) -> None:
        """Keep what goes into a block, by sequence."""
        self._save(self._path("input", number), {str(n): x for n, x in enumerate(states)})

    def inputs(self, number: int) -> list[mx.array]:
        """What goes into a block, by sequence; read from the file when it is first used."""
        return self._states("input", number)

    def gradients(self, number: int) -> list[mx.array]:
        """The gradients with respect to what goes into a block, by sequence."""
        return self._states("gradient", number)

    def note(self, path: str, candidates: Candidates) -> None:
        """Take the candidates of a layer into the file of the block that is being scored."""
        self._noted[path] = candidates

    def finish(self, number: int, gradients: list[mx.array]) -> None:
        """The block is scored: keep the gradients with respect to its inputs, and what was noted, not the inputs."""
        arrays = {str(n): x for n, x in enumerate(gradients)}
        for path, found in self._noted.items():
            if len(found.positions):
                arrays[f"{path}.positions"] = mx.array(found.positions.astype(np.uint32))
                arrays[f"{path}.scores"] = mx.array(found.scores)
        masses = {path: found.mass for path, found in self._noted.items()}
        used = self._path("input", number)
        self._sha256.pop(used.name, None)
        self._save(self._path("gradient", number), arrays, masses=json.dumps(masses))
        self._noted.clear()
        used.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything: there is nothing to go on with."""
        for file in self._directory.iterdir():
            file.unlink()
        self._sha256.clear()

    def candidates(self) -> dict[str, Candidates]:
        """Those of all finished blocks, by layer, from the last block to the first."""
        found = {}
        none = mx.zeros(0)
        for number in reversed(self._numbers("gradient")):
            arrays, metadata = load_safetensors(self._path("gradient", number))
            for path, mass in json.loads(metadata["masses"]).items():
                positions, scores = (np.array(arrays.get(f"{path}.{part}", none)) for part in ("positions", "scores"))
                found[path] = Candidates(positions.astype(np.uint32), scores, mass)
        return found
