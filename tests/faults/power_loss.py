"""Cut or change what a stopped run left, as a power cut or a bad disk may; it must be noticed, and made good.

    python tests/faults/power_loss.py [--records 3] [--places 1000] [--seed 0]

The journal is cut, and a bit of it flipped, at every byte of its last records; the other files at every byte; and all
in several ways at random places. Each time what is read must be an error or what was written; and the resumed run must
end with the same files as an uninterrupted one, or refuse to begin because the journal's header is damaged. Then bits
of the model and its index are flipped. Prints the counts, and returns 1 if anything is wrong.
"""

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from runs import KINDS, contents, prepare, settings_in

import zo_mlx
from zo_mlx import adapter
from zo_mlx.errors import Interrupted, UsageError
from zo_mlx.files import load_safetensors
from zo_mlx.index import FILE_NAME as INDEX
from zo_mlx.journal import FILE_NAME as JOURNAL
from zo_mlx.journal import Journal, record_size

STEPS, STOPPED = 9, 8
Damage = Callable[[bytes], bytes]


def cut(at: int) -> Damage:
    return lambda content: content[:at]


def flip(at: int, bit: int = 0) -> Damage:
    return lambda content: content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def anywhere(size: int, rng: random.Random) -> Damage:
    """What happens to files: cut off, a bit flipped, bytes of something else, nothing written from there on."""
    at = rng.randrange(size)
    other = rng.randbytes(rng.choice([1, 8, 512]))
    return rng.choice(
        [
            cut(at),
            flip(at, rng.randrange(8)),
            lambda content: (content[:at] + other + content[at + len(other) :])[:size],
            lambda content: content[:at] + bytes(size - at),
        ]
    )


class Victim:
    """A run that was stopped, to be damaged again and again, and what it would have become."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.out = {**settings, "iters": STEPS}, Path(settings["adapter_path"])
        zo_mlx.train(**self.settings)
        self.whole = contents(self.out)
        shutil.rmtree(self.out)
        with contextlib.suppress(Interrupted):
            zo_mlx.train(**{**self.settings, "report": stop})
        self.state = contents(self.out)
        journal = Journal.read(self.out / JOURNAL)
        self.record, self.optimizer = record_size(journal.header), load_safetensors(self.out / adapter.OPTIMIZER)[0]
        self.true = self.read()
        self.counts: Counter[str] = Counter()

    def read(self) -> dict[str, Any]:
        """What the files say, as bytes and numbers; None for those that are not to be read."""
        found: dict[str, Any] = dict.fromkeys(
            [JOURNAL, adapter.VALUES, adapter.OPTIMIZER, f"{adapter.BEST}/{adapter.VALUES}"]
        )
        with contextlib.suppress(UsageError):
            records = Journal.read(self.out / JOURNAL).records()
            found[JOURNAL] = [(r.step, r.loss, r.projected.tobytes()) for r in records]
        for name in (adapter.VALUES, f"{adapter.BEST}/{adapter.VALUES}"):
            with contextlib.suppress(UsageError):
                snapshot = adapter.read_snapshot((self.out / name).parent)
                found[name] = {**vars(snapshot), "values": np.array(snapshot.values).tobytes()}
                if name == adapter.VALUES:
                    state = adapter.read_optimizer_state(self.out, snapshot, self.optimizer)
                    found[adapter.OPTIMIZER] = state and [np.array(a).tobytes() for _, a in tree_flatten(state)]
        return found

    def strike(self, damages: dict[str, Damage], resume: bool) -> None:
        """Damage some files of the run, and see whether that is noticed and, if asked for, whether it can go on."""
        shutil.rmtree(self.out)
        for name, content in self.state.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(damages[name](content) if name in damages else content)
        before, found = contents(self.out), self.read()
        for name in damages:
            outcome = self.judge(found[name], self.true[name]) if before[name] != self.state[name] else "unchanged"
            self.counts[f"{name} {outcome}"] += 1
        if not resume:
            return
        try:
            Journal.read(self.out / JOURNAL, cut=True)
            beyond = False
        except UsageError:
            beyond = True
        try:
            zo_mlx.train(resume=True, **{**self.settings, "report": ignore})
        except UsageError as e:
            self.counts["refused" if beyond and "journal" in str(e) else "WRONG: refused"] += 1
            return
        after = {k: v for k, v in contents(self.out).items() if ".damaged-at-" not in k}
        self.counts["resumed" if after == self.whole else "WRONG: resumed to other files"] += 1

    def judge(self, found: Any, true: Any) -> str:
        """Of a changed file: a journal may have lost its end; all else must be what it was, or not to be read."""
        if found is None or (isinstance(found, list) and found == true[: len(found)] and len(found) < len(true)):
            return "noticed"
        return "the same" if found == true else "WRONG: read"

    def report(self, what: str) -> int:
        """Print the counts since the last report; return how many are wrong."""
        print(f"{what}: " + ", ".join(f"{n} {k}" for k, n in sorted(self.counts.items())), flush=True)
        wrong = sum(n for k, n in self.counts.items() if "WRONG" in k)
        self.counts.clear()
        return wrong


def stop(event: dict[str, Any]) -> None:
    if event["event"] == "train" and event["iteration"] == STOPPED:
        raise KeyboardInterrupt


def ignore(event: dict[str, Any]) -> None:
    """Warnings are expected."""


def strike_model(model: Path, out: Path, places: int, rng: random.Random) -> int:
    """Flip bits of the model that an adapter belongs to; return how many of them were not noticed."""
    missed = 0
    for name in (INDEX, "model.safetensors", "config.json"):
        content = (model / name).read_bytes()
        for _ in range(places):
            (model / name).write_bytes(flip(rng.randrange(len(content)), rng.randrange(8))(content))
            with contextlib.suppress(UsageError):
                zo_mlx.load(model, out)
                missed += 1
        (model / name).write_bytes(content)
    print(f"index, weights and config: {3 * places} bits flipped, {missed} not noticed", flush=True)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=3, help="damage each byte of this many last records")
    parser.add_argument("--every", type=int, default=1, help="damage each so-manieth byte of the other files")
    parser.add_argument("--places", type=int, default=1000, help="random damages")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of run; default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    wrong = 0
    kinds = args.kind or list(KINDS)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        prepare(work)
        for kind in kinds:
            shutil.rmtree(work / "adapter", ignore_errors=True)
            victim = Victim({**settings_in(work), **KINDS[kind]})
            size = len(victim.state[JOURNAL])
            each = max(1, victim.record // 40)  # a gradient's records are long: some bytes of them are enough to resume
            for at in range(size - args.records * victim.record, size):
                for damage in (cut(at), flip(at, at % 8)):
                    victim.strike({JOURNAL: damage}, resume=at % each == 0)
            wrong += victim.report(f"{kind}, each byte of the last {args.records} records")
            for name in victim.state.keys() - {JOURNAL}:
                for at in range(0, len(victim.state[name]), args.every):
                    for damage in (cut(at), flip(at, at % 8)):
                        victim.strike({name: damage}, resume=False)
            wrong += victim.report(f"{kind}, bytes of the other files")
            for _ in range(args.places // len(kinds)):
                names = rng.sample(sorted(victim.state), rng.choice([1, 1, 2, 4]))
                victim.strike({name: anywhere(len(victim.state[name]), rng) for name in names}, resume=True)
            wrong += victim.report(f"{kind}, {args.places // len(kinds)} random damages")
        shutil.rmtree(work / "adapter")
        zo_mlx.train(**{**settings_in(work), "iters": 1})
        wrong += strike_model(work / "model", work / "adapter", max(1, args.places // 10), rng)
    print(f"wrong: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
