"""What an answer is worth: accuracy, exact match, F1, or a function of the user's own.

A metric is a function `score(prompt, output, example) -> float`: of the prompt's text, the text of the model's answer,
and the line of the data file as a dictionary. Higher is better.
"""

import contextlib
import copy
import importlib
import inspect
import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from .errors import UsageError, ZoError
from .progress import redirected_to_stderr

Record = dict[str, Any]

CROSS_ENTROPY = "cross-entropy"
_MOST = 3.4e38  # scores are averaged in float32
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def right_answer(example: Record) -> str:
    """The completion, or the last message."""
    return str(example["completion"] if "completion" in example else example["messages"][-1]["content"])


def question(example: Record) -> str:
    """The prompt, or the text of the message before the last; empty if there is none."""
    if "prompt" in example:
        return str(example["prompt"])
    asked = example["messages"][-2:-1]
    return (asked[0].get("content") or "") if asked and isinstance(asked[0].get("content"), str | None) else ""


def exact_match(prompt: str, output: str, example: Record) -> float:
    """1 if the answer is the right one, but for space around it; else 0."""
    return float(output.strip() == right_answer(example).strip())


def f1(prompt: str, output: str, example: Record) -> float:
    """F1 of the words that answer and right answer have in common; case, punctuation and articles do not count.

    Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1.
    """
    found, right = _words(output), _words(right_answer(example))
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else float(found == right)


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in text.split() if w not in ("a", "an", "the")]


# `accuracy` is for choices only, whose texts are compared as they are.
METRICS: dict[str, Callable[[str, str, Record], float]] = {
    "accuracy": lambda prompt, output, example: float(output == right_answer(example)),
    "exact-match": exact_match,
    "f1": f1,
}


def check_objective(objective: str) -> None:
    """Raise UsageError for what cannot be the name of an objective."""
    if objective not in (CROSS_ENTROPY, *METRICS) and not is_function(objective):
        names = ", ".join((CROSS_ENTROPY, *METRICS))
        raise UsageError(f"objective must be one of {names}, or module:function, not {objective}")


def is_function(objective: str) -> bool:
    """Whether an objective names a function of the user's own."""
    return _FUNCTION.fullmatch(objective) is not None


_sources: WeakKeyDictionary[ModuleType, bytes] = WeakKeyDictionary()  # of the user's modules, when imported


def _as_it_is_now(name: str) -> ModuleType:
    """A module, imported again if its file has changed: the journal has the checksum of the file."""
    module = importlib.import_module(name)
    if file := getattr(module, "__file__", None):
        source = Path(file).read_bytes()
        if _sources.setdefault(module, source) != source:
            module = importlib.reload(module)
            _sources[module] = source
    return module


class Metric:
    """A metric by its name; `module:function` is imported, from the working directory if it is there.

    Attributes:
        path: the file with a user's function, or None.

    Raises:
        UsageError: there is no such function.
    """

    def __init__(self, objective: str):
        check_objective(objective)
        self.name = objective
        self.path: Path | None = None
        self._function = METRICS.get(objective) or self._imported(*objective.split(":"))

    def _imported(self, module: str, name: str) -> Callable[[str, str, Record], float]:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # for good: the function may import more when it is called
        try:
            with redirected_to_stderr():
                function = getattr(_as_it_is_now(module), name, None)
        except (Exception, SystemExit) as e:  # the module is a program
            raise UsageError(f"objective {self.name}: importing {module} fails: {type(e).__name__}: {e}") from None
        if not callable(function):
            raise UsageError(f"objective {self.name}: {module} has no function {name}")
        with contextlib.suppress(TypeError, OSError):  # a function without a file
            file = Path(inspect.getsourcefile(function) or "")
            self.path = file if file.is_file() else None
        return function  # type: ignore[no-any-return]

    def __call__(self, example: Record, output: str) -> float:
        """The score of an answer to an example. Raises ZoError if the user's function fails."""
        prompt = question(example)
        try:
            with redirected_to_stderr():
                score = float(self._function(prompt, output, copy.deepcopy(example)))
        except (Exception, SystemExit) as e:  # whatever the user's function does
            raise ZoError(
                f"objective {self.name} fails on the prompt {prompt[:60]!r}: {type(e).__name__}: {e}"
            ) from None
        if not abs(score) <= _MOST:
            raise ZoError(f"objective {self.name} gives {score} for the prompt {prompt[:60]!r}")
        return score
