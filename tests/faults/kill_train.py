"""Kill training runs at random moments, resume each until it ends, and compare with an uninterrupted one.

    python tests/faults/kill_train.py [--kills 200] [--seed 0]
    python tests/faults/kill_train.py --model DIR --data DIR --kills 20

Runs write a snapshot every second step and validate every third one. Each process gets SIGKILL some milliseconds after
a random number of steps that it said were done, while it starts, or when it then writes a snapshot. Then the journal
must be the uninterrupted run's, cut off after the last step that was said to be done, or later; and when the run has
ended, all files must be the same, byte by byte, but for the report, which must be whole and know all validations.
Returns 1 if not.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runs import KINDS, OFTEN, contents, prepare, settings_in, validations

import zo_mlx
from zo_mlx import adapter
from zo_mlx.adapter import REPORT
from zo_mlx.journal import FILE_NAME as JOURNAL
from zo_mlx.journal import Journal, record_size

# Processes begin as copies of this one, which has imported everything and must not compute anything.
PROCESSES = get_context("fork")


def train(settings: dict[str, Any], events: Connection) -> None:
    """Begin the run, or go on with it, and tell what happens."""
    zo_mlx.train(resume=adapter.has_run(Path(settings["adapter_path"])), report=events.send, **settings)


def killed(settings: dict[str, Any], steps: float, wait: float, writing: bool = False) -> list[dict[str, Any]] | None:
    """Run a process and kill it so many seconds after it has said so many steps are done.

    Args:
        writing: and after a file is seen that is being written beside the one it will replace.

    Returns:
        Its events, or None if it came to its end. Raises RuntimeError if it failed.
    """
    events, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=train, args=(settings, theirs))
    process.start()
    theirs.close()
    found: list[dict[str, Any]] = []
    try:
        while sum(e["event"] == "train" for e in found) < steps:
            found.append(events.recv())
        while writing and process.is_alive() and not list(Path(settings["adapter_path"]).rglob(".*")):
            time.sleep(1e-4)
        time.sleep(wait)
        process.kill()
        while True:
            found.append(events.recv())
    except EOFError:
        process.join()
    if process.exitcode == -9:
        return found
    if process.exitcode != 0:
        raise RuntimeError(f"a run failed with exit code {process.exitcode}")
    return None


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its files; the bytes of a journal's record; seconds to the first step, and of a step."""

    files: dict[str, bytes]
    validations: list[dict[str, Any]]
    steps: int
    record: int
    start: float
    step: float

    @classmethod
    def run(cls, settings: dict[str, Any], out: Path) -> "Whole":
        """Run it, and remove its directory."""
        started = time.monotonic()
        killed(settings, 1, 0)
        shutil.rmtree(out)
        start = time.monotonic() - started
        killed(settings, float("inf"), 0)
        each = max(0.0, time.monotonic() - started - 2 * start) / settings["iters"]
        size = record_size(Journal.read(out / JOURNAL).header)
        found = cls(contents(out), validations(out), settings["iters"], size, start, each)
        shutil.rmtree(out)
        print(f"uninterrupted: {start:.2f} s to the first step, {each:.3f} s a step", flush=True)
        return found

    def is_reported(self, out: Path) -> bool:
        """Whether a run's report is whole, and all validations are there for it."""
        page, known = (out / REPORT).read_text(encoding="utf-8"), validations(out)
        return page.endswith("</html>") and all(v in known for v in self.validations)

    def has(self, journal: bytes, least: int) -> bool:
        """Whether a journal is this run's up to some point after so many steps."""
        whole = self.files[JOURNAL]
        missing = self.steps - least
        return whole.startswith(journal) and (least == 0 or len(journal) >= len(whole) - missing * self.record)


def place(directory: Path, events: list[dict[str, Any]]) -> str:
    """Where a process died, as far as can be seen."""
    if list(directory.glob("best/.*")):
        return "writing best values"
    if list(directory.glob(".*")):
        return "writing a snapshot or journal"
    done = max((e["iteration"] for e in events if e["event"] == "train"), default=None)
    if done is None:
        return "starting"
    validated = done in {e["iteration"] for e in events if e["event"] == "validation"}
    return "validating, or before" if done % OFTEN["steps_per_eval"] == 0 and not validated else "in a step"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="default: a tiny random model")
    parser.add_argument("--data", help="of the model")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    places: Counter[str] = Counter()
    kills = runs = wrong = acknowledged = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if args.model:
            paths = {"model": args.model, "data": args.data, "adapter_path": str(work / "adapter")}
            settings = {**OFTEN, **paths, "iters": 8, "directions": 2}
        else:
            settings = {**settings_in(work), "iters": 40}
            maker = PROCESSES.Process(target=prepare, args=(work,))
            maker.start()
            maker.join()
        out = work / "adapter"
        whole = {kind: Whole.run({**settings, **own}, out) for kind, own in KINDS.items()}
        while kills < args.kills:
            kind = list(KINDS)[runs % len(KINDS)]
            runs += 1
            died = 0
            while True:
                steps = rng.randrange(settings["iters"] // 4) if kills < args.kills else float("inf")
                writing = kills < args.kills and rng.random() < 0.4
                wait = rng.uniform(0, 5e-4 if writing else whole[kind].start if steps == 0 else whole[kind].step)
                events = killed({**settings, **KINDS[kind]}, steps, wait, writing)
                if events is None:
                    break
                kills += 1
                died += 1
                places[place(out, events)] += 1
                said = max((e["iteration"] for e in events if e["event"] == "train"), default=0)
                acknowledged += said
                if not whole[kind].has(contents(out).get(JOURNAL, b""), said):
                    wrong += 1
                    print(f"kill {kills}, {kind}: after step {said} the journal is not the uninterrupted run's")
            different = sorted({name for name, _ in contents(out).items() ^ whole[kind].files.items()})
            if not whole[kind].is_reported(out):
                different.append(REPORT)
            wrong += bool(different)
            print(f"run {runs}, {kind}, killed {died} times: {different or 'the same files'}", flush=True)
            shutil.rmtree(out)
    print(f"{kills} kills: " + ", ".join(f"{n} {where}" for where, n in places.most_common()))
    print(f"{runs} runs resumed to their end; {acknowledged} acknowledged steps looked for; wrong: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
