"""The page that a run leaves, read as a browser or any other reader of HTML has it."""

import json
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_jsonl
from PIL import Image
from test_resume import _interrupt_at
from test_train import _train

import zo_mlx
from zo_mlx import cli
from zo_mlx.commands import train as command_module
from zo_mlx.config import TrainConfig
from zo_mlx.errors import Interrupted
from zo_mlx.index import read_index
from zo_mlx.journal import Journal, Record
from zo_mlx.ranks import Ranks
from zo_mlx.report import command
from zo_mlx.run import Run

# Elements without an end.
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements, as (tag, attributes), and the text in each: `within[tag]`."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.within: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "what is opened is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.within.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.within[tag][-1] += data

    def charts(self) -> dict[str, "Chart"]:
        """By title."""
        found: dict[str, Chart] = {}
        texts = iter(self.within["text"])
        for tag, attributes in self.elements:
            if tag == "svg":
                label = attributes.get("aria-label") or ""
                current = found.setdefault(label.removesuffix(" by step"), Chart())
            elif tag == "text":
                current.ticks.append((attributes["text-anchor"] or "", attributes, next(texts)))
            elif tag == "polyline":
                points = np.array([p.split(",") for p in (attributes["points"] or "").split()], float)
                current.lines[attributes["class"] or ""] = points
        return found


class Chart:
    def __init__(self) -> None:
        self.ticks: list[tuple[str, dict[str, str | None], str]] = []
        self.lines: dict[str, np.ndarray] = {}

    def values(self, kind: str) -> np.ndarray:
        """Step and value of a curve's points, read off the axes."""
        read = []
        for side, axis in (("middle", "x"), ("end", "y")):
            ticks = [(float(a[axis] or 0), t) for anchor, a, t in self.ticks if anchor == side]
            at = np.array([place for place, _ in ticks]) - (4 if axis == "y" else 0)  # of the text's middle
            labels = [float(t.replace(",", "").rstrip("%")) for _, t in ticks]
            slope, start = np.polyfit(at, labels, 1)
            read.append(slope * self.lines[kind][:, "xy".index(axis)] + start)
        return np.stack(read, axis=1)


def test_curves_are_those_of_the_journal_and_the_validations(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    _train(tiny, choice_data, tmp_path / "a", iters=20, report=events.append, test=True, learning_rate=1e-3)
    page = Page(tmp_path / "a/report.html")
    charts = page.charts()
    records = list(Journal.read(tmp_path / "a/journal").records())
    losses = np.array([r.loss for r in records])
    every = charts["Loss"].values("every")
    assert np.abs(every[:, 0] - np.arange(1, 21)).max() < 0.1
    inside = (losses > np.quantile(losses, 0.01)) & (losses < np.quantile(losses, 0.99))
    assert np.abs(every[:, 1] - losses)[inside].max() < 0.02 * np.ptp(losses)
    validations = [e for e in events if e["event"] == "validation"]
    for chart, key, unit in (("Loss", "loss", 1), ("Accuracy", "accuracy", 100)):
        found = charts[chart].values("dots")
        expected = np.array([(e["iteration"], unit * e[key]) for e in validations])
        assert np.abs(found - expected).max(axis=0) == pytest.approx([0, 0], abs=0.03 * unit)
    slopes = charts["Projected gradients, root mean square"].values("every")[:, 1]
    expected_slopes = [np.sqrt(np.mean(r.projected.astype(float) ** 2)) for r in records]
    assert np.median(np.abs(slopes - expected_slopes)) < 0.02 * np.ptp(expected_slopes)
    text = " ".join(page.within["main"][0].split())
    test = next(e for e in events if e["event"] == "test")
    first, last = validations[0], validations[-1]
    for words in (
        f"{first['accuracy']:.1%} → {last['accuracy']:.1%}", f"before: {first['loss']:.3f}",
        f"test: {test['accuracy']:.1%}", "finished, 20 steps", "8 validation examples",
    ):  # fmt: skip
        assert words in text


def test_examples_are_what_the_plain_model_says(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    """Probabilities of the choices from logits at the prompt's last token, before and after."""
    _train(tiny, choice_data, tmp_path / "a", iters=20, learning_rate=1e-3)
    zo_mlx.replay(tiny, tmp_path / "a", tmp_path / "before", until=0, progress=False)
    models = [zo_mlx.load(tiny, tmp_path / name) for name in ("before", "a")]
    page = Page(tmp_path / "a/report.html")
    articles = page.within["article"]
    records = [json.loads(line) for line in (choice_data / "valid.jsonl").read_text().splitlines()]
    assert len(articles) == 6
    for article, record in zip(articles, [records[i * 8 // 6] for i in range(6)], strict=True):
        assert record["prompt"] in article
        assert f"{record['completion']} ✓" in article.replace("\n", "")
        chances = []
        for model, tokenizer in models:
            prompt = tokenizer.encode(record["prompt"])
            rows = mx.array([[*prompt, *tokenizer.encode(c)] for c in record["choices"]])
            logits = model(rows).astype(mx.float32)
            own = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            scores = [own[i, len(prompt) - 1 : -1][mx.arange(2), rows[i, len(prompt) :]].sum() for i in range(2)]
            chances.append(np.array(mx.softmax(mx.stack(scores))))
        for i, choice in enumerate(record["choices"]):
            assert choice in article
            if min(c[i] for c in chances) > 0.01:  # below, there are more digits
                assert f"{chances[0][i]:.1%} → {chances[1][i]:.1%}" in article


def test_texts_are_shown_token_by_token(tiny: Path, tmp_path: Path) -> None:
    texts = [f"the {w} is red" for w in ("cat", "dog", "hen", "cow", "ant", "bee", "owl", "fox")]
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", [{"text": t} for t in texts])
    _train(tiny, tmp_path / "data", tmp_path / "a", iters=20, learning_rate=1e-3)
    page = Page(tmp_path / "a/report.html")
    shown = [text for text in page.within["p"] if text.endswith("is red</s>")]
    assert len(shown) == 3 * 2  # of 8 texts, before and after
    model, tokenizer = zo_mlx.load(tiny, tmp_path / "a")
    tokens = [*tokenizer.encode(texts[0]), tokenizer.eos_token_id]
    probabilities = mx.softmax(model(mx.array([tokens[:-1]])).astype(mx.float32), axis=-1)[0]
    expected = np.array(probabilities[mx.arange(len(tokens) - 1), mx.array(tokens[1:])])
    titles = [a["title"] for tag, a in page.elements if tag == "span" and "title" in a][
        len(expected) : 2 * len(expected)
    ]
    assert [float((t or "").rstrip("%")) / 100 for t in titles] == pytest.approx(expected, abs=1e-3)
    predicted = tokenizer.decode(probabilities.argmax(axis=-1).tolist())
    assert predicted.strip() in [text.strip() for text in page.within["p"]]


def test_generated_texts_are_shown_where_they_are_the_objective(tiny: Path, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"prompt": f"the {i} is", "completion": "red"} for i in range(8)]
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", records)
    _train(tiny, tmp_path / "data", tmp_path / "a", iters=2, objective="exact-match", max_tokens=3)
    model, tokenizer = zo_mlx.load(tiny, tmp_path / "a")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the 0 is"}], add_generation_prompt=True)
    expected: list[int] = []
    while len(expected) < 3:
        expected.append(int(model(mx.array([prompt + expected]))[0, -1].argmax()))
    page = Page(tmp_path / "a/report.html")
    assert tokenizer.decode(expected) in page.within["article"][0]
    assert "Score" in page.within["h3"]


def test_layers_moved_as_far_as_their_values(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(spread, choice_data, tmp_path / "a", iters=10, learning_rate=1e-3, num_layers=1)
    before, after, start = read_index(spread), np.array(zo_mlx.adapter.read_snapshot(tmp_path / "a").values), 0
    page = Page(tmp_path / "a/report.html")
    rows = page.within["tr"]
    for path, tensor in before.tensors.items():
        own = np.array(tensor.values.astype(mx.float32))
        moved = np.linalg.norm(after[start : start + tensor.size] - own) / np.linalg.norm(own)
        start += tensor.size
        (row,) = [row for row in rows if row.startswith(path)]
        assert f"{tensor.size:,}" in row
        found = row[row.rindex("%", 0, -1) + 1 :] if row.count("%") == 2 else ""
        assert (float(found.rstrip("%")) / 100 if found else 0) == pytest.approx(moved, rel=0.05)
        assert bool(found) == path.startswith("model.layers.2")


def test_a_resumed_runs_page_is_whole(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(Interrupted):
        _train(tiny, choice_data, out, report=_interrupt_at(5), steps_per_report=1)
    page = Page(out / "report.html")
    assert "step 5 of 6" in page.within["main"][0]
    assert len(page.charts()["Loss"].lines["every"]) == 5
    assert "article" not in page.within
    _train(tiny, choice_data, out, resume=True)
    page = Page(out / "report.html")
    assert len(page.charts()["Loss"].lines["every"]) == 6
    assert len(page.charts()["Loss"].lines["dots"]) == 4  # 0, 4, 5 where it went on, 6
    commands = [text for text in page.within["pre"] if text.startswith("zo-mlx train")]
    assert [c.endswith("--resume") for c in commands] == [False, True]
    assert len(page.within["article"]) == 6


def test_the_command_line_asks_for_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "model": "a model's", "data": "d", "iters": 7, "learning_rate": 1e-05, "mask_prompt": True, "val_batches": -1,
        "test": False, "patience": None, "lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 100]},
    }  # fmt: skip
    line, settings = command({"settings": given, "changed_data": False})
    (tmp_path / "run.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(command_module, "train", lambda report, **settings: asked.update(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(shlex.split(line)[1:])
    del given["learning_rate"]  # the schedule's are used
    assert {k: v for k, v in asked.items() if v} == {k: v for k, v in given.items() if v}


EVIL = "</title></pre><script>document.title='pwned'</script>"
ALSO = "\"'><img src=x onerror=document.title='pwned'>"


@pytest.fixture(scope="module")
def evil_page(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with HTML wherever words may come from."""
    directory = tmp_path_factory.mktemp("evil")
    choices = [f"{ALSO}a", f"{ALSO}b"]
    records: list[dict[str, object]] = [
        {"prompt": f"{EVIL}{{{{ 7 * 7 }}}} {i}", "completion": choices[i % 2], "choices": choices} for i in range(4)
    ]
    for split in ("train", "valid"):
        write_jsonl(directory / f"data <b>/{split}.jsonl", records)
    out = directory / "a <img src=x onerror=alert(1)>"
    settings: dict[str, Any] = {"project_name": EVIL, "report": lambda event: None}
    _train(tiny, directory / "data <b>", out, iters=1, **settings)
    log = out / "events.jsonl"
    warning = {"event": "warning", "message": EVIL, "time": 1.0, "iteration": 1}
    forged = {"event": "begun", "time": 2.0, "device": EVIL, "settings": {"data": EVIL, EVIL: [EVIL]}}
    log.write_text(log.read_text() + "".join(json.dumps(e) + "\n" for e in (warning, forged)))
    _train(tiny, directory / "data <b>", out, resume=True, iters=2, report=lambda event: None)
    return out / "report.html"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def _browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """Open a page in Chromium; return the document that it then has, and what it says on its console."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={profile}", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in: apt-get install chromium")
def test_a_browser_shows_the_page_and_runs_nothing(evil_page: Path, tmp_path: Path) -> None:
    document, console = _browse(evil_page, tmp_path / "profile", "--dump-dom")
    assert console == []
    assert "<title>" in document and "pwned</title>" not in document
    # A page that did let it through would be noticed; and so would errors.
    (tmp_path / "open.html").write_text(f"<title>{EVIL}<script>undefined.x</script>")
    document, console = _browse(tmp_path / "open.html", tmp_path / "profile", "--dump-dom")
    assert "<title>pwned</title>" in document
    assert len(console) == 1
    # Screenshots stay here, to be looked at.
    shots = Path(__file__).parents[1] / "build/report"
    shots.mkdir(parents=True, exist_ok=True)
    for scheme, number, page, main in (("dark", 0, "121317", "8f99ff"), ("light", 1, "f7f7f5", "4b55c9")):
        shot = shots / f"{scheme}.png"
        flags = f"--blink-settings=preferredColorScheme={number}", f"--screenshot={shot}", "--window-size=1200,1000"
        assert _browse(evil_page, tmp_path / "profile", *flags)[1] == []
        with Image.open(shot) as image:
            pixels = np.array(image.convert("RGB"))
        background, ink = (np.array(list(bytes.fromhex(colour))) for colour in (page, main))
        assert (pixels[:, :4] == background).all(), scheme
        curves = (pixels[400:] == ink).all(axis=2)  # below the headline
        assert curves.any(axis=0).sum() > 300, "curves are drawn all over the page's width"


def test_words_from_data_and_files_are_words(evil_page: Path, tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    _train(tiny, choice_data, tmp_path / "a", iters=2)
    harmless, page = Page(tmp_path / "a/report.html"), Page(evil_page)
    known, met = (
        {(tag, name) for tag, attributes in page.elements for name in ("", *attributes)} for page in (harmless, page)
    )
    assert met - known <= {("li", ""), ("ul", ""), ("details", "open")}, "beside the notes, there is nothing new"
    assert not {tag for tag, _ in met} & {"script", "img", "link", "iframe", "object", "a"}
    assert not {name for _, name in met if name.startswith("on") or name in ("src", "href", "style")}
    for place, words in (("blockquote", EVIL), ("li", EVIL), ("pre", EVIL), ("td", EVIL), ("td", ALSO), ("h1", "<b>")):
        assert any(words in text for text in page.within[place]), place
    assert "{{ 7 * 7 }}" in page.within["blockquote"][0]
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert [(p or "").split(";")[0] for p in policy] == ["default-src 'none'"]


def test_the_page_of_a_long_run_is_small(spread: Path, choice_data: Path, tmp_path: Path) -> None:
    config = TrainConfig(model=str(spread), data=str(choice_data), adapter_path=str(tmp_path), iters=10_000)
    run = Run(config, lambda event: None, progress=False, ranks=Ranks())
    run.start({})
    rng = np.random.default_rng(0)
    for step in range(0, 10_001, 100):
        run.report({"event": "validation", "iteration": step, "loss": rng.random(), "accuracy": rng.random()})
        run.report({"event": "train", "iteration": step, "learning_rate": rng.random()})
    run.report({"event": "restarted", "iteration": 25, "steps": 25, "halvings": 1})
    run.report({"event": "returned", "iteration": 75, "step": 50, "halvings": 2})
    with pytest.MonkeyPatch.context() as patch, run.journal.open():
        patch.setattr("zo_mlx.journal.flush", lambda fd: None)
        for step in range(1, 10_001):
            run.journal.append(Record(step, float(rng.exponential()), rng.normal(size=7).astype(np.float32)))
    run.save()
    page = Page(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 150_000
    notes = page.within["li"]
    assert "Step 25: no clear gain in 25 steps; back to the values before training, at half the learning rate" in notes
    assert "Step 75: the loss rose too far; back to the values of step 50, at half the learning rate" in notes
    every = page.charts()["Loss"].values("every")
    losses = np.array([r.loss for r in run.journal.records()])
    assert len(every) < 1000
    assert every[:, 1].max() == pytest.approx(np.quantile(losses, 0.99), rel=0.15)  # and a margin


def test_a_page_that_cannot_be_written_is_a_warning(tiny: Path, choice_data: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def spoil(event: dict[str, Any]) -> None:
        told.append(event)
        (tmp_path / "a/report.html").mkdir(exist_ok=True)

    result = _train(tiny, choice_data, tmp_path / "a", report=spoil, learning_rate=1e-3)
    assert result.iterations == 6
    warnings = [e["message"] for e in told if e["event"] == "warning"]
    assert warnings and all(w.startswith("no report is written: cannot write ") for w in warnings)
    assert {p.name for p in (tmp_path / "a").iterdir() if p.name.startswith(".")} == set()
