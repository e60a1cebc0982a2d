"""Kill one of several ranks at random moments, resume with other numbers of ranks, compare with one process.

    python tests/faults/kill_ranks.py [--kills 30] [--seed 0] [--timeout 20]

The ranks are processes on this machine that share the directions of a step, over MLX's ring on loopback. One of them
gets SIGKILL at a random moment, or is stopped for good (SIGSTOP, as if its network were gone). All others must end with
exit code 1 within the time-out, and what they have on the disk must be enough: sometimes the first one's journal is
removed, as if its machine were gone. In the end journal and values must be those of one process that was not
interrupted, byte by byte. Returns 1 if not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kill_train import PROCESSES
from runs import prepare, settings_in

import zo_mlx
from zo_mlx.journal import FILE_NAME as JOURNAL
from zo_mlx.journal import Journal

MOST = 4
# Seconds beyond the time-out in which a rank has to end: this machine has other things to do.
SLACK = 10.0


def train(settings: dict[str, Any], rank: int = 0, hosts: Path | None = None) -> None:
    """One rank, or the only process."""
    if hosts:
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts))
        os.dup2(os.open(hosts.with_name(f"stderr-{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    try:
        zo_mlx.train(**settings)
    except zo_mlx.ZoError:
        os._exit(1)


def started(settings: dict[str, Any], count: int, work: Path) -> list[BaseProcess]:
    """So many ranks."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = work / "hosts"
    hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
    for s in sockets:
        s.close()
    ranks = [PROCESSES.Process(target=train, args=(settings, rank, hosts)) for rank in range(count)]
    for process in ranks:
        process.start()
    return list(ranks)


def steps(out: Path) -> int:
    """In the longest journal."""
    found = [
        len(Journal.read(path, cut=True)) for path in (out / JOURNAL, *out.glob(f"rank-*/{JOURNAL}")) if path.exists()
    ]
    return max(found, default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds that ranks wait for each other")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills = runs = wrong = late = 0
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        # An example at a time: then what a rank computes does not depend on how many ranks there are.
        settings = {
            **settings_in(work), "iters": 60, "batch_size": 2, "directions": 5, "split": "directions",
            "tokens_at_once": 1, "rank_timeout": args.timeout, "num_layers": -1,
        }  # fmt: skip
        for target, given in ((prepare, work), (train, settings)):
            process = PROCESSES.Process(target=target, args=(given,))
            process.start()
            process.join()
        (work / "adapter").rename(work / "whole")
        out = work / "adapter"
        while kills < args.kills or out.exists():
            count = rng.randint(2, MOST)
            begun = bool(list(out.rglob(JOURNAL)))
            ranks = started({**settings, "resume": begun}, count, work)
            aim = rng.randrange(steps(out), max(steps(out) + 1, settings["iters"] - 2))
            while steps(out) < aim and all(p.is_alive() for p in ranks):
                time.sleep(1e-3)
            victim = rng.randrange(count)
            time.sleep(rng.uniform(0, 0.05))
            # Some are left to end, so that kills are not all of one run's last steps.
            if kills < args.kills and rng.random() < 0.75 and all(p.is_alive() for p in ranks):
                kills += 1
                is_silent = rng.random() < 0.3
                os.kill(ranks[victim].pid or 0, signal.SIGSTOP if is_silent else signal.SIGKILL)
                died = time.monotonic()
                for rank, process in enumerate(ranks):
                    if rank != victim:
                        process.join(died + args.timeout + SLACK - time.monotonic())
                        if process.is_alive():
                            late += 1
                            process.kill()
                longest = max(longest, time.monotonic() - died)
                if is_silent:
                    ranks[victim].kill()
            for process in ranks:
                process.join()
            codes = [process.exitcode for process in ranks]
            if codes == [0] * count:
                runs += 1
                same = all(
                    (out / name).read_bytes() == (work / "whole" / name).read_bytes()
                    for name in (JOURNAL, "values.safetensors")
                )
                wrong += not same
                print(f"run {runs}: {'the same' if same else 'other'} journal and values", flush=True)
                shutil.rmtree(out)
                continue
            if any(code not in (0, 1, -signal.SIGKILL) for code in codes):
                wrong += 1
                print(f"exit codes {codes}")
            others = list(out.glob(f"rank-*/{JOURNAL}"))
            if (out / JOURNAL).exists() and others and rng.random() < 0.3:
                (out / JOURNAL).unlink()
    print(f"{kills} kills, {runs} runs ended, wrong: {wrong}")
    print(f"ranks alive {args.timeout + SLACK:g} s after: {late}; the others took {longest:.1f} s at most to end")
    return int(wrong or late)


if __name__ == "__main__":
    sys.exit(main())
