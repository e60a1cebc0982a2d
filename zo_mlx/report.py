"""`report.html`: a run as one page, which needs no network and runs no script.

What happened comes from the journal and from `events.jsonl`, so that the page of a resumed run is whole.
"""

import dataclasses
import json
import math
import shlex
import time
from array import array
from functools import cache
from pathlib import Path

import jinja2
import mlx.core as mx
import numpy as np
import yaml
from mlx.utils import tree_reduce

from . import adapter, figures
from .config import TrainConfig
from .errors import ZoError
from .events import Event, EventLog
from .files import write_atomically
from .index import in_order
from .journal import Journal
from .model import load_stock_model
from .product import weight_shape
from .samples import Sample, samples
from .setup import Setup


class Report:
    """Writes the page of a run, as often as it is asked to. A run does not fail because that does: it is a warning.

    Args:
        run: its model, data and settings.
        directory: of the run.
        journal: its journal.
        log: its events.

    Attributes:
        shown: the data that examples are taken from, and what it is called.
    """

    def __init__(self, run: Setup, directory: Path, journal: Journal, log: EventLog):
        self._run, self._directory, self._journal, self._log = run, directory, journal, log
        self._steps = array("f")  # of each: loss, root mean square and largest of the slopes
        self._samples: list[Sample] = []
        self._template = _template()  # read when the run begins: a later version may lie there when it ends
        named = {"validation": run.valid_set, "test": run.test_set, "training": run.train_set}
        self.shown = next((name, found) for name, found in named.items() if found is not None)
        # Of a model that is spread, each rank has a part.
        whole = load_stock_model(Path(run.config.model), lazy=True)[0] if run.split.together else run.sparse.model
        modules = dict(whole.named_modules())
        weights = {path: math.prod(weight_shape(modules[path].get("base", modules[path]))) for path in run.sizes}
        self._layers = figures.layers(run.sizes, weights, run.depth.spans)
        # What sparse layers add is not among a model's parameters.
        self._model_bytes = tree_reduce(lambda n, array: n + array.nbytes, run.sparse.model.parameters(), 0)

    def show_samples(self, values: mx.array, at_once: int) -> None:
        """Put on the page what the model makes of some examples with the initial values, and with others (K,).

        Args:
            at_once: the most examples in a forward pass.
        """
        run = self._run
        both = [run.trainable.initial, values]
        try:
            self._samples = samples(run.sparse, run.head, run.tokenizer, run.judge, self.shown[1], both, at_once)
        except (ZoError, RuntimeError, MemoryError) as e:  # as in a validation
            run.warn(f"the report shows no examples: {e}")

    def write(self, values: mx.array, best: int | None, held: int, peak: int) -> None:
        """Write the page of the steps so far, of which there is a snapshot.

        Args:
            values: (K,) float32.
            best: the step of the best validation.
            held: bytes that MLX held before this process's first step.
            peak: the most that it held in a step of this process.
        """
        for record in self._journal.records(len(self._steps) // 3):
            slopes = np.abs(record.projected.astype(np.float64))
            self._steps.extend((record.loss, np.sqrt((slopes**2).mean()), slopes.max()))
        page = self._page(values, best, held, peak)
        content = page.encode(errors="backslashreplace")  # names of files need not be text
        try:
            write_atomically(self._directory / adapter.REPORT, lambda beside: beside.write_bytes(content))
        except ZoError as e:
            self._run.warn(f"no report is written: {e}")

    def _page(self, values: mx.array, best: int | None, held: int, peak: int) -> str:
        run, config, events = self._run, self._run.config, self._log.events
        steps = np.frombuffer(self._steps, np.float32).reshape(-1, 3)
        validations, reports, tests = (figures.rows(events, kind) for kind in ("validation", "train", "test"))
        peak = max([held, peak, *(int(1e9 * row.get("peak_memory", 0)) for row in reports)])
        before, after = run.trainable.everything, run.trainable.among_all(values)
        layers = figures.moved(self._layers, np.asarray(before), np.asarray(after))
        return self._template.render(
            config=config,
            model=Path(config.model).resolve().name,
            data=Path(config.data).resolve().name if config.hf_dataset is None else "datasets of the hub",
            done=len(steps),
            stopped=any(e["event"] == "stopped" and e.get("iteration") == len(steps) for e in events),
            best=best,
            results=figures.results(validations, tests, steps, run.judge is not None),
            note=figures.note(validations, best),
            seconds=figures.seconds(events),
            rate=reports[-1].get("tokens_per_second") if reports else None,
            memory={
                "model": self._model_bytes,
                "sparse": max(0, held - self._model_bytes),
                "step": peak - held,
            },
            bytes=adapter.size_bytes(self._directory),
            trained=values.size,
            charts=figures.curves(validations, reports, steps, run.judge is not None, best),
            slopes=figures.slopes(steps),
            sampled=self.shown[0],
            samples=self._samples,
            layers=sorted(layers, key=lambda layer: in_order(layer.path)),
            maps=figures.maps(layers),
            begun=[(e, *command(e)) for e in events if e["event"] == "begun"],
            notes=[e for e in events if e["event"] in ("warning", "returned", "restarted", "stopped")],
            validations=validations,
            metrics=figures.METRICS,
            settings=_settings(config),
            journal=self._journal.identity,
            fingerprints=run.fingerprints,
        )


@cache
def _template() -> jinja2.Template:
    """Everything that it is given is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "percent": figures.percent,
        "size": _size,
        "duration": _duration,
        "moment": _moment,
        "quoted": shlex.quote,
    }
    return environment.from_string(Path(__file__).with_name(adapter.REPORT).read_text(encoding="utf-8"))


def command(begun: Event) -> tuple[str, str]:
    """The command line that does what was asked for; and the settings file that it needs, or nothing."""
    settings = begun["settings"] if isinstance(begun.get("settings"), dict) else {}
    in_file = {name: value for name, value in settings.items() if isinstance(value, (dict, list))}
    words = ["zo-mlx", "train", *(["--config", "run.yaml"] if in_file else [])]
    flags = {**settings, **{name: begun.get(name) for name in ("resume", "changed_data")}}
    if "lr_schedule" in in_file:
        flags.pop("learning_rate", None)  # it had no effect, and as a flag it would
    for name, value in flags.items():
        if name not in in_file and value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words), yaml.safe_dump(in_file, sort_keys=False) if in_file else ""


def _settings(config: TrainConfig) -> list[tuple[str, str, bool]]:
    """Name, value, and whether it is another than the default's."""
    found = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        text = value if isinstance(value, str) else json.dumps(value)
        found.append((f.name, "not set" if value is None else text, value != f.default))
    return found


def _size(count: float) -> str:
    """Bytes."""
    number, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{number:.2f} {unit}" if number < 10 else f"{number:.0f} {unit}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # no time of this calendar
        return "?"
