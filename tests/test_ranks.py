"""Several processes that train together, started as `mlx.launch` starts them, over real sockets."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_jsonl
from test_stop import _words
from test_train import _train, _values

from zo_mlx.config import TrainConfig, resolved
from zo_mlx.estimator import Branches, OneSided, directions
from zo_mlx.head import split_head
from zo_mlx.journal import Journal
from zo_mlx.model import load_sparse
from zo_mlx.rows import load_dataset
from zo_mlx.split import Split, portions
from zo_mlx.step import make_loss

# Processes with the environment that `mlx.launch` gives them, which load Python's modules only once.
RANKS = """
import json, os, sys
from zo_mlx.cli import main
directory, lists = sys.argv[1], json.loads(sys.argv[2])
pids = []
for rank, words in enumerate(lists):
    pids.append(os.fork())
    if not pids[-1]:
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=f"{directory}/hosts")
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{directory}/{rank}.{name}", os.O_CREAT | os.O_WRONLY), fd)
        try:
            code = main(words)
        except SystemExit as e:
            code = e.code
        sys.stdout.flush()
        os._exit(code)
print(json.dumps(pids), flush=True)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))
"""


class Ranks:
    """The processes of a run, each with its words of the command line."""

    def __init__(self, lists: Sequence[Sequence[str]], directory: Path):
        self.directory, self.count = Path(tempfile.mkdtemp(dir=directory)), len(lists)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in lists]
        hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
        (self.directory / "hosts").write_text(json.dumps(hosts))
        for s in sockets:
            s.close()
        command = [sys.executable, "-c", RANKS, str(self.directory), json.dumps(lists)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.pids: list[int] = json.loads(self._process.stdout.readline())

    def ended(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, and what was written to standard output and error."""
        codes = json.loads(self._process.communicate(timeout=200)[0])
        outs, errs = (
            [(self.directory / f"{r}.{name}").read_text() for r in range(self.count)] for name in ("out", "err")
        )
        return codes, outs, errs


def _launched(count: int, words: Sequence[str], directory: Path) -> list[str]:
    """The standard outputs of ranks that succeed."""
    codes, outs, errs = Ranks([words] * count, directory).ended()
    assert codes == [0] * count, errs
    return outs


def _records(path: Path) -> list[Any]:
    return [(r.step, r.loss, *r.projected.tolist()) for r in Journal.read(path / "journal").records()]


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {"batch_size": 8}),
        (4, {"estimator": "one-sided", "directions": 5}),
        (2, {"estimator": "jvp", "directions": 5}),
    ],
)
def test_the_split_of_directions_gives_the_bits_of_one_machine(
    count: int, settings: dict[str, Any], tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    # An example at a time: matrices this small are multiplied in another order if they have more rows.
    settings = {"split": "directions", "tokens_at_once": 1, "learning_rate": 1e-3, **settings}
    _train(tiny, choice_data, tmp_path / "one", **settings)
    first, *others = _launched(count, _words(tiny, choice_data, tmp_path / "all", **settings), tmp_path)
    assert "Iter 6" in first
    assert not any(others)
    assert (_values(tmp_path / "all") == _values(tmp_path / "one")).all()
    assert _records(tmp_path / "all") == _records(tmp_path / "one")
    assert _values(tmp_path / "all/best").shape == _values(tmp_path / "one/best").shape
    for rank in range(1, count):
        own = tmp_path / f"all/rank-{rank}"
        assert [p.name for p in own.iterdir()] == ["journal"]
        assert (own / "journal").read_bytes() == (tmp_path / "all/journal").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "one-sided"},
        {"estimator": "jvp"},
        {"gradient": "exact", "batch_size": 8},
        {"gradient": "exact", "num_layers": 1},
        {"objective": "accuracy"},
        {"split": "auto"},
        {"texts": True},
        {"texts": True, "gradient": "exact"},
    ],
)
def test_the_split_of_data_gives_the_sums_of_one_machine(
    settings: dict[str, Any], spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    settings = {"split": "data", "iters": 8, **settings}
    data = choice_data
    if settings.pop("texts", False):
        lines = [json.loads(line) for line in (choice_data / "train.jsonl").read_text().splitlines()]
        texts: list[dict[str, object]] = [{"text": r["prompt"] * (1 + i % 3)} for i, r in enumerate(lines)]
        data = tmp_path / "text"
        for name in ("train", "valid"):
            write_jsonl(data / f"{name}.jsonl", texts)
    one = _train(spread, data, tmp_path / "one", **settings)
    words = _words(spread, data, tmp_path / "all", **settings)
    out, _ = _launched(2, [*words, "--json"], tmp_path)
    assert _records(tmp_path / "all")[0] == pytest.approx(_records(tmp_path / "one")[0], rel=1e-2, abs=1e-5)
    assert np.allclose(_values(tmp_path / "all"), _values(tmp_path / "one"), rtol=1e-2, atol=1e-4)
    result = json.loads(out.splitlines()[-1])
    assert one.after is not None
    assert result["after"]["examples"] == one.after.examples
    assert result["after"]["loss"] == pytest.approx(one.after.loss, rel=1e-3)
    assert result["after"].get("macro_f1") == one.after.macro_f1
    assert (tmp_path / "all/rank-1/journal").read_bytes() == (tmp_path / "all/journal").read_bytes()


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on_with_any_number_of_ranks(
    spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    settings = {"split": "directions", "tokens_at_once": 1, "learning_rate": 1e-3, "iters": 400, "rank_timeout": 9.0}
    words = _words(spread, choice_data, tmp_path / "all", **settings)
    running = Ranks([words] * 3, tmp_path)
    journal = tmp_path / "all/rank-2/journal"
    while not (journal.exists() and len(Journal.read(journal)) >= 20):
        time.sleep(0.01)
    os.kill(running.pids[1], signal.SIGKILL)
    codes, _, errs = running.ended()
    assert codes == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):  # of one of them, MLX may forget that it waits
        said = f"zo-mlx: error: rank {rank} (has lost the others|waited 9 s for the others).*--resume"
        assert re.search(said, errs[rank])
    (tmp_path / "all/journal").unlink()  # rank 0's machine is not there any more
    shutil.rmtree(tmp_path / "all/rank-1")
    done = len(Journal.read(journal))
    _launched(2, [*words, "--iters", str(done + 3), "--resume"], tmp_path)
    _train(spread, choice_data, tmp_path / "all", **{**settings, "iters": done + 6}, resume=True)
    _train(spread, choice_data, tmp_path / "one", **{**settings, "iters": done + 6})
    assert (_values(tmp_path / "all") == _values(tmp_path / "one")).all()


def test_a_rank_that_does_not_answer_is_waited_for_so_long_only(
    spread: Path, choice_data: Path, tmp_path: Path
) -> None:
    words = _words(spread, choice_data, tmp_path / "all", iters=100000, rank_timeout=3.0)
    running = Ranks([words] * 2, tmp_path)
    journal = tmp_path / "all/journal"
    while not (journal.exists() and len(Journal.read(journal)) >= 5):
        time.sleep(0.01)
    os.kill(running.pids[1], signal.SIGSTOP)
    expected = "zo-mlx: error: rank 0 waited 3 s for the others; the same command with --resume goes on"
    while expected not in (running.directory / "0.err").read_text():
        time.sleep(0.01)
    os.kill(running.pids[1], signal.SIGKILL)
    assert running.ended()[0] == [1, -signal.SIGKILL]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "1"], "rank 1 differs from rank 0: seed"),
        (["--data", "OTHER"], "rank 1 differs from rank 0: data, tokenized training set, train.jsonl"),
    ],
)
def test_ranks_that_differ_are_named(
    change: list[str], named: str, tiny: Path, choice_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(choice_data, tmp_path / "OTHER")
    lines = (choice_data / "train.jsonl").read_text().splitlines()
    (tmp_path / "OTHER/train.jsonl").write_text("\n".join(lines[1:] + lines[:1]))
    words = _words(tiny, choice_data, tmp_path / "all")
    change = [str(tmp_path / "OTHER") if w == "OTHER" else w for w in change]
    codes, _, errs = Ranks([words, [*words, *change]], tmp_path).ended()
    assert codes == [2, 2]
    assert [err.splitlines()[-1] for err in errs] == [f"zo-mlx: error: {named}"] * 2
    assert not (tmp_path / "all").exists()


def test_more_ranks_than_there_is_work_for_are_refused(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    words = _words(tiny, choice_data, tmp_path / "all", split="directions", directions=1)
    codes, _, errs = Ranks([words] * 3, tmp_path).ended()
    assert codes == [2] * 3
    assert all("3 ranks are too many for a step of 2 branches: raise --directions, or start fewer" in e for e in errs)


class Uneven:
    """In the place of `Ranks`: two of them, of which the second takes three times as long for a row."""

    count, rank = 2, 0

    def __init__(self, rows: Sequence[int]):
        self.rows = rows

    def gather(self, said: np.ndarray) -> np.ndarray:
        found = np.stack([said, said])
        found["seconds"] = [self.rows[0], 3 * self.rows[1]]
        return found


def test_slower_ranks_get_fewer_rows_by_and_by() -> None:
    config = resolved(TrainConfig(batch_size=8, directions=2))
    split = Split(Uneven([4, 4]), config)  # type: ignore[arg-type]
    batch: list[Any] = list(range(8))
    seen: list[list[int]] = []

    def losses(branches: Branches, shares: Sequence[Sequence[Any]], count: float | None = None) -> mx.array:
        seen.append(list(shares[0]))
        return mx.ones(len(branches))

    branches = OneSided().branches(mx.zeros(3), directions(0, 1, 2, 3), 1e-3)
    config.objective = "accuracy"  # rows are counted, not tokens
    for step in range(1, 18):
        total = split.loss(losses, None, step)(branches, [batch] * 3)
        assert total.tolist() == [2, 2, 2]
    assert seen[0] == seen[15] == [0, 1, 2, 3]
    assert seen[16] == [0, 1, 2, 3, 4, 5]
    assert split.examples(batch) == [0, 1, 2, 3, 4, 5]


def test_a_branch_alone_has_the_bits_that_it_has_beside_others(smollm2: Path) -> None:
    """Of a real model on this backend: what `--split directions` builds on."""
    sparse, tokenizer, index, _ = load_sparse(smollm2)
    data = load_dataset(Path(__file__).parents[1] / "examples/support/train.jsonl", tokenizer, 256)
    examples = sorted(data.examples, key=lambda e: e.length)[:4]  # 46 tokens a branch; of 30, bits differ
    loss, values = make_loss(sparse, split_head(sparse.model)), index.initial_values()
    branches = OneSided().branches(values, directions(0, 1, 7, values.size), 1e-3)
    whole = loss(branches, [examples] * 8)
    for count in (1, 3):
        parts = [loss(part, [examples] * len(part)) for part in (branches[i : i + count] for i in range(0, 8, count))]
        assert (mx.concatenate(parts) == whole).all()


def test_work_is_divided_so_that_all_are_done_soonest() -> None:
    assert portions(8, [1.0, 1.0]) == [4, 4]
    assert portions(8, [3.0, 1.0]) == [6, 2]
    assert portions(4, [1000.0, 1.0, 1.0]) == [2, 1, 1]
    for speeds in itertools.product([1.0, 1.7, 4.0], repeat=3):
        best = min(
            max(n / s for n, s in zip(way, speeds, strict=True))
            for way in itertools.product(range(1, 9), repeat=3)
            if sum(way) == 9
        )
        assert max(n / s for n, s in zip(portions(9, speeds), speeds, strict=True)) == pytest.approx(best)
