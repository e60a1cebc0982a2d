"""Run commands of zo-mlx in a process that notes what input must never make a program do.

    python audited.py SPEC    (JSON: `commands`, lists of arguments; `writable`, directories; `plant`, code to run)

Prints a JSON object: each command's exit code and the last line of its errors; what was noted; modules from elsewhere.
"""

import contextlib
import io
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

SPEC = json.loads(sys.argv[1])
HERE = Path(__file__).resolve().parents[1]
INSTALLED = tuple(
    os.path.realpath(p) + os.sep
    for p in [*(sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib")), HERE / "zo_mlx", HERE / "convert"]
)
WRITABLE = tuple(os.path.realpath(p) + os.sep for p in SPEC["writable"])
# Never, whatever the input.
FORBIDDEN = ("pickle.", "marshal.loads", "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")
# What changes directories, and how many paths it takes.
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.symlink": 2, "shutil.rmtree": 1}

noted: list[str] = []


def watch(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook."""
    if event.startswith(FORBIDDEN):
        caller = sys._getframe(1).f_code.co_filename
        if not (event == "marshal.loads" and caller.startswith("<frozen importlib")):  # compiled modules
            note(event, args)
    elif event in ("exec", "compile"):
        name = os.fsdecode(args[1] if event == "compile" else args[0].co_filename)
        if not is_in(name, INSTALLED) and not name.startswith("<frozen "):
            maker = sys._getframe(1).f_code.co_filename
            note(event, (name, "by", next((maker.removeprefix(p) for p in INSTALLED if maker.startswith(p)), maker)))
    elif event == "open" and isinstance(args[0], (str, bytes)):
        writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(args[2], int) else False
        if writes and not is_in(args[0], WRITABLE) and args[0] != "/dev/null":
            note("write", args[:1])
    elif event in CHANGES:
        paths, descriptors = args[: CHANGES[event]], args[CHANGES[event] :]
        # With a descriptor it is a part of a shutil.rmtree, which is an event of its own.
        if set(descriptors) <= {-1, None, 0o777, 0o700} and not all(is_in(p, WRITABLE) for p in paths):
            note(event, paths)


def is_in(path: Any, places: tuple[str, ...]) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and os.path.realpath(os.fsdecode(path)).startswith(places)


def note(event: str, args: Any) -> None:
    noted.append(f"{event}: " + " ".join(str(a)[:200] for a in args))


sys.addaudithook(watch)
sys.dont_write_bytecode = True
from zo_mlx.cli import main  # noqa: E402

runs = []
for command in SPEC["commands"]:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        code = main(command)
    runs.append([code, errors.getvalue().strip().splitlines()[-1:]])
if SPEC.get("plant"):
    exec(SPEC["plant"])
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if "__m" not in name}
strangers = sorted(name for name, file in files.items() if file and not is_in(file, INSTALLED))
print(json.dumps({"runs": runs, "noted": sorted(set(noted)), "strangers": strangers}))
