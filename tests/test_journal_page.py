"""A reader of journals written from docs/journal.md alone: it shares no code with zo_mlx, and needs no MLX."""

import hashlib
import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_estimator import threefry
from test_train import _train

F = np.float32


@dataclass
class Found:
    header: dict[str, Any]
    records: list[tuple[int, int, bytes, float, float, np.ndarray]]


def read(content: bytes) -> Found:
    """Raises ValueError for what a reader refuses."""
    if len(content) < 12 or content[:8] != b"ZOMLXJ1\n":
        raise ValueError("not a journal")
    (length,) = struct.unpack_from("<I", content, 8)
    if length > 1 << 20 or len(content) < 12 + length + 4:
        raise ValueError("header cut short")
    (crc,) = struct.unpack_from("<I", content, 12 + length)
    if crc != zlib.crc32(content[: 12 + length]):
        raise ValueError("header damaged")
    header = json.loads(content[12 : 12 + length])
    if header["version"] != 11:
        raise ValueError("other rules")
    trained = sum(end - start for start, end in header["trained"])
    exact = header["config"]["gradient"] == "exact"
    body = 2 * trained if exact else 4 * header["config"]["directions"]
    size, at, records = 24 + body + 4, 12 + length + 4, []
    while at + size <= len(content):
        record = content[at : at + size]
        step, tokens, data, loss, initial = struct.unpack_from("<QI4sff", record)
        if struct.unpack("<I", record[-4:])[0] != zlib.crc32(record[:-4], crc) or step != len(records) + 1:
            break
        slopes = np.frombuffer(record[24:-4], "<u2" if exact else "<f4")
        slopes = (slopes.astype(np.uint32) << 16).view(F) if exact else slopes
        records.append((step, tokens, data, loss, initial, slopes))
        at += size
    if len(content) - at > size:
        raise ValueError(f"damaged at record {len(records) + 1}")
    return Found(header, records)


def tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The float tensors of a safetensors file, as float32, and its metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    listing = json.loads(content[8 : 8 + length])
    metadata = listing.pop("__metadata__")
    found = {}
    for name, tensor in listing.items():
        start, end = (8 + length + offset for offset in tensor["data_offsets"])
        if tensor["dtype"] == "BF16":
            found[name] = (np.frombuffer(content[start:end], "<u2").astype(np.uint32) << 16).view(F)
        elif tensor["dtype"] == "F32":
            found[name] = np.frombuffer(content[start:end], "<f4")
    return found, metadata


def estimate(seed: int, step: int, slopes: np.ndarray, size: int) -> np.ndarray:
    q = len(slopes)
    rows = -(-q // 8)
    n = -(-rows * size // 8)
    key = int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, step), digest_size=8).digest(), "little")
    words = threefry(key, np.arange(2 * n, dtype=np.uint32).reshape(2, n))
    content = np.frombuffer(words.astype("<u4").tobytes(), np.uint8)[: rows * size].reshape(rows, size)
    total = None
    for first, row in zip(range(0, q, 8), content, strict=True):
        table = np.zeros(256, F)
        for b in range(256):
            for bit, slope in enumerate(slopes[first : first + 8]):
                table[b] = table[b] + (slope if b >> bit & 1 else -slope)
        part = (table / F(q))[row]
        total = part if total is None else total + part
    assert total is not None
    return total


def replay(found: Found, model: Path) -> np.ndarray:
    """Signs, SGD without momentum, no schedule, cross-entropy: all weights of the index after the last record."""
    arrays, metadata = tensors(model / "sensitive.safetensors")
    everything = np.concatenate([arrays[f"{path}.values"] for path in json.loads(metadata["tensors"])])
    places = np.concatenate([np.arange(start, end) for start, end in found.header["trained"]])
    origin = everything[places]
    values = point = good = origin
    seen, square, halvings, window = 0, F(0), 0, [F(0), F(0), F(0)]
    lowest, spread = F(3.4028235e38), F(0)
    look, gains = 25 if found.header["config"]["estimator"] == "one-sided" else 0, [F(0), F(0), F(0)]
    for step, _, _, loss, initial, slopes in found.records:
        finite = math.isfinite(loss) and all(map(math.isfinite, slopes))
        q, m = len(slopes), float(square)
        if seen >= 16 and m > 0:
            limit = F(5 * math.sqrt(m))
            slopes = np.clip(slopes, -limit, limit)
        if all(map(math.isfinite, slopes)):
            seen += q
            square = F(m + (math.fsum(float(s) ** 2 for s in slopes) / q - m) * q / seen)
        else:
            slopes = np.zeros(q, F)
        rate = 0.0
        if seen >= 16 and square > 0:
            rate = 0.02 * q / float(square) / (1 + (step - 1) / 100) * 2.0**-halvings
        gradient = estimate(found.header["config"]["seed"], step, slopes, len(origin))
        point = origin + ((point - origin) - F(rate) * gradient)
        back = not finite
        if finite:
            count, total, squares = (float(w) + add for w, add in zip(window, (1, loss, loss**2), strict=True))
            window = [F(count), F(total), F(squares)]
            if count == (10 if lowest == F(3.4028235e38) else 25):
                mean = total / count
                variance = max(0.0, squares / count - mean * mean) / count
                margin = max(abs(float(lowest)) / 4, 6 * math.sqrt(float(spread) + variance))
                back = mean > float(lowest) + margin
                if not back and mean < float(lowest):
                    lowest, spread, good = F(mean), F(variance), point
                window = [F(0), F(0), F(0)]
        anew = False
        if not back and look and not math.isnan(initial):
            gain = float(initial) - loss
            late = float(gains[0]) + 1 > look // 2
            gains = [F(float(g) + add) for g, add in zip(gains, (1, late * gain, late * gain**2), strict=True)]
            if gains[0] == look:
                n = look - look // 2
                mean = float(gains[1]) / n
                error = math.sqrt(max(0.0, float(gains[2]) / n - mean * mean) / (n - 1))
                anew, gains = not mean > error, [F(0), F(0), F(0)]
                look = 2 * look if anew else 0
        values = values + F(5 / (step + 4)) * (point - values)
        if back:
            values = point = good
            halvings, window, gains = halvings + 1, [F(0), F(0), F(0)], [F(0), F(0), F(0)]
        if anew:
            values = point = good = origin
            halvings, window, lowest, spread = halvings + 1, [F(0), F(0), F(0)], F(3.4028235e38), F(0)
    everything[places] = values
    return everything


@pytest.mark.parametrize("directions", [7, 9])
def test_a_reader_written_from_the_page_replays_a_run_bit_by_bit(
    directions: int, spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    settings = {"estimator": "one-sided", "directions": directions, "num_layers": 2, "iters": 60, "val_batches": 0}
    _train(spread, choice_data, tmp_path / "a", **settings, seed=5)
    found = read((tmp_path / "a/journal").read_bytes())
    assert [r[0] for r in found.records] == [*range(1, 61)]
    values = replay(found, spread)
    assert np.array_equal(values, tensors(tmp_path / "a/values.safetensors")[0]["values"])
    start = replay(Found(found.header, []), spread)
    assert 0 < np.count_nonzero(values != start) <= sum(b - a for a, b in found.header["trained"]) < len(values)


def test_the_fingerprints_are_those_of_the_page(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(spread, choice_data, tmp_path / "a", iters=1, tokens_at_once=100)
    found = read((tmp_path / "a/journal").read_bytes())
    prints = found.header["fingerprints"]

    def sha256(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    def of_files(*paths: Path) -> str:
        return sha256("".join(f"{p.name} {sha256(p.read_bytes())}\n" for p in paths).encode())

    assert prints["base_model"] == of_files(spread / "config.json", *sorted(spread.glob("model*.safetensors")))
    assert prints["index"] == sha256((spread / "sensitive.safetensors").read_bytes())
    assert prints["tokenizer"] == of_files(spread / "tokenizer.json")
    assert prints["train.jsonl"] == sha256((choice_data / "train.jsonl").read_bytes())
    both = f"{prints['train.jsonl']} {prints['tokenized training set']}"
    assert [(r[1], r[2]) for r in found.records] == [(100, hashlib.sha256(both.encode()).digest()[:4])]


def test_the_reader_finds_any_damage(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """And so the page describes how: each changed byte is refused, or is in a last record that does not count."""
    _train(tiny, choice_data, tmp_path / "a", iters=3, val_batches=0)
    content = (tmp_path / "a/journal").read_bytes()
    size = 24 + 4 * 2 + 4
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        if at >= len(content) - size:
            assert len(read(bytes(changed)).records) == 2
        else:
            with pytest.raises(ValueError, match="damaged|cut short|not a journal"):
                read(bytes(changed))
    for length in range(len(content) - 3 * size, len(content)):
        assert len(read(content[:length]).records) == (length - len(content) + 3 * size) // size
