import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from test_train import _train

import zo_mlx
from zo_mlx import adapter
from zo_mlx.cli import main
from zo_mlx.errors import UsageError


@pytest.fixture(scope="module")
def trained(tiny: Path, choice_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "a"
    _train(tiny, choice_data, out)
    return out


@pytest.mark.parametrize("name", [adapter.VALUES, adapter.OPTIMIZER, f"{adapter.BEST}/{adapter.VALUES}"])
def test_the_checksum_is_the_documented_one(name: str, trained: Path) -> None:
    with safe_open(trained / name, framework="numpy") as f:
        metadata = f.metadata()
        recorded = metadata.pop("sha256")
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        for key in sorted(f.keys()):
            digest.update(key.encode() + f.get_tensor(key).tobytes())
    assert (metadata["version"], recorded) == ("2", digest.hexdigest())


def test_a_flipped_bit_is_one_clear_line_that_says_how_to_rebuild(
    tiny: Path, trained: Path, choice_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one of the metadata, which would give the values to another step."""
    content = (trained / adapter.VALUES).read_bytes()
    shutil.copy(trained / "journal", tmp_path)
    for at in (content.index(b'"step":"6"') + 8, len(content) - 4):  # 6 becomes 7; the last bit of a mantissa
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / adapter.VALUES).write_bytes(changed)
        message = "values.safetensors is damaged: it fails its checksum; from its journal, zo-mlx replay or"
        with pytest.raises(UsageError, match=message):
            zo_mlx.load(tiny, tmp_path)
        where = ["--model", str(tiny), "--adapter-path", str(tmp_path)]
        for command in (["generate", "--prompt", "x"], ["evaluate", "--data", str(choice_data)]):
            assert main([*command, *where]) == 2
            assert message in capsys.readouterr().err.splitlines()[-1]
