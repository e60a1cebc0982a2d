"""Fill the disk at every write of a training run: a clear error, nothing lost, and resuming ends as if it had not been.

    python tests/faults/disk_full.py [--steps 4] [--every N]

Everything that asks the system for space is counted: files made, written, synced, renamed, cut, directories. A run per
such call fails there: once, or for good, so that whatever it does next fails, too. What is written fails half-way, by a
limit on the size of files, which the system itself enforces. Prints the counts, and returns 1 if anything is wrong.
"""

import zo_mlx  # isort: skip  (first, so that MLX gets a fast BLAS)

import argparse
import errno
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from runs import KINDS, contents, prepare, settings_in

from zo_mlx import adapter
from zo_mlx.errors import UsageError, ZoError
from zo_mlx.journal import FILE_NAME as JOURNAL
from zo_mlx.journal import Journal

# What is made of a run beside its result is no reason for it to fail.
WARNINGS = (
    "no adapter for stock mlx-lm is written: cannot write",
    "no report is written: cannot write",
    "what happens is not kept for the report: cannot write",
)


class FullDisk:
    """Lets calls that take space fail, from the `at`-th on; only that one if `once`."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, once: bool):
        self.at, self.once, self.count = at, once, 0
        for owner, name in ((os, "mkdir"), (os, "replace"), (os, "fsync"), (os, "ftruncate")):
            patch.setattr(owner, name, self.failing(getattr(owner, name), half=False))
        for owner, name in ((os, "write"), (mx, "save_safetensors"), (Path, "write_bytes")):
            patch.setattr(owner, name, self.failing(getattr(owner, name), half=True))

    def failing(self, call: Callable[..., Any], half: bool) -> Callable[..., Any]:
        def attempt(*args: Any) -> Any:
            if call.__name__ == "mkdir" and Path(args[0]).is_dir():
                return call(*args)  # which takes no space
            self.count += 1
            full = self.count == self.at if self.once else self.count >= self.at > 0
            if full and not half:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not full:
                return call(*args)
            before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            size = os.fstat(args[0]).st_size if isinstance(args[0], int) else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, most))
            try:
                return call(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))

        return attempt


def what_is_wrong(out: Path, whole: dict[str, bytes]) -> str | None:
    """Of what a run left that could not write: its files must be whole ones of this run, and nothing else."""
    left = contents(out) if out.exists() else {}
    if left.keys() - whole.keys():
        return f"it left {sorted(left.keys() - whole.keys())}"
    try:
        if JOURNAL in left:
            Journal.read(out / JOURNAL)
            if not whole[JOURNAL].startswith(left[JOURNAL]):
                return "its journal is another"
        for name in left.keys() - {JOURNAL, adapter.OPTIMIZER}:
            adapter.read_snapshot((out / name).parent)
    except UsageError as e:
        return str(e)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th of the calls fails")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of run; default: all")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        prepare(work)
        out = work / "adapter"
        for kind in args.kind or KINDS:
            settings = {**settings_in(work), **KINDS[kind], "iters": args.steps}
            with pytest.MonkeyPatch.context() as patch:
                writes = FullDisk(patch, 0, False)
                zo_mlx.train(**settings)
            whole = contents(out)
            counts: Counter[str] = Counter()
            for at in range(1, writes.count + 1, args.every):
                for once in (True, False):
                    shutil.rmtree(out)
                    problem: str | None
                    told: list[dict[str, Any]] = []
                    with pytest.MonkeyPatch.context() as patch:
                        FullDisk(patch, at, once)
                        try:
                            zo_mlx.train(report=told.append, **settings)
                            warned = any(str(event.get("message")).startswith(WARNINGS) for event in told)
                            problem = None if warned else "no error"
                        except ZoError as e:
                            problem = None if str(e).startswith("cannot write ") else f"unclear: {e}"
                        except (OSError, RuntimeError) as e:
                            problem = f"raised: {e!r}"
                    problem = problem or what_is_wrong(out, whole)
                    if not out.exists() or contents(out) != whole:
                        zo_mlx.train(resume=adapter.has_run(out), **settings)
                    if contents(out) != whole:
                        problem = "the resumed run is another"
                    counts["wrong" if problem else "clear errors, resumed to the same files"] += 1
                    if problem:
                        print(f"{kind}, write {at}, {'once' if once else 'for good'}: {problem}", flush=True)
            shutil.rmtree(out)
            wrong += counts["wrong"]
            print(f"{kind}, {writes.count} writes: {', '.join(f'{n} {k}' for k, n in counts.items())}", flush=True)
    print(f"wrong: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
