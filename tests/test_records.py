import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

import zo_mlx
from zo_mlx.cli import main
from zo_mlx.errors import UsageError, ZoError
from zo_mlx.journal import Journal
from zo_mlx.records import FEATURES, read_splits


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one dataset, some-one/questions; what is asked for is noted."""
    datasets = pytest.importorskip("datasets")
    asked: list[str] = []

    def load_dataset(name: str) -> Any:
        asked.append(name)
        if name != "some-one/questions":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        rows = [{"question": f"q {i}", "answer": f"a {i}", "text": "no"} for i in range(12)]
        splits = {"train": rows[:8], "valid": rows[8:10], "test": rows[10:]}
        return datasets.DatasetDict({s: datasets.Dataset.from_list(r) for s, r in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_dataset_of_the_hub_is_trained_on_and_evaluated(
    tiny: Path, tmp_path: Path, hub: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same tokens as from a directory: same losses, to the last bit."""
    names = ["--prompt-feature", "question", "--completion-feature", "answer", "--model", str(tiny), "--json"]
    rows: list[dict[str, object]] = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(12)]
    for split, part in (("train", rows[:8]), ("valid", rows[8:10]), ("test", rows[10:])):
        write_jsonl(tmp_path / f"data/{split}.jsonl", part)
    (tmp_path / "strange").mkdir()
    results = []
    for number, data in enumerate((str(tmp_path / "data"), "some-one/questions")):
        out = str(tmp_path / str(number))
        words = ["--data", data, *names, "--adapter-path", out]
        assert main(["train", *words, "--iters", "2", "--val-batches", "1", "--test"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert main(["train", *words, "--iters", "3", "--val-batches", "1", "--resume"]) == 0
        capsys.readouterr()
        if number == 1:  # the journal may be a stranger's: on its own it makes nothing go to the network
            assert main(["train", "--adapter-path", out, "--iters", "4", "--resume"]) == 2
            assert "give --data some-one/questions to go on" in capsys.readouterr().err
            for written in ("some-one/questions/", "some-one//questions", "./some-one/questions"):
                journal = Journal.read(Path(out, "journal"))
                header = {**journal.header, "config": {**journal.header["config"], "data": written}}
                Journal.create(tmp_path / "strange/journal", header)
                assert main(["train", "--adapter-path", str(tmp_path / "strange"), "--resume"]) == 2
                assert "no such data" in capsys.readouterr().err
        assert main(["evaluate", *words]) == 0
        results.append([result["train_loss"], result["after"], result["test"], json.loads(capsys.readouterr().out)])
    assert results[0] == results[1]
    assert set(hub) == {"some-one/questions"}


def test_the_network_is_asked_only_for_what_can_be_a_hub_id(hub: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data file: data/tset.jsonl"):
        read_splits("data/tset.jsonl", ["test"])
    written = "data", "./some/where", "/some/where", "a/b/c", "~/data", "some-one/"
    for name in (*written, str(tmp_path / "none")):
        with pytest.raises(UsageError, match="no such data: .* is neither a directory nor the hub id"):
            read_splits(name, ["train"])
    assert hub == []
    why = "there is no such directory, and the dataset cannot be loaded: Not found Hugging Face dataset"
    with pytest.raises(ZoError, match=f"no-one/none: {why}"):
        read_splits("no-one/none", ["train"])


def test_a_byte_order_mark_is_none_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert [record for _, record in read_splits(tmp_path, ["train"])["train"]] == [{"text": "a"}]


def test_what_is_missing_is_said(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = {**FEATURES, "prompt_feature": "question", "completion_feature": "answer"}
    assert read_splits("some-one/questions", ["valid"], features)["valid"][1] == (
        "some-one/questions, valid, row 1",
        {"question": "q 9", "answer": "a 9", "text": "no", "prompt": "q 9", "completion": "a 9"},
    )
    datasets = sys.modules["datasets"]
    empty = datasets.DatasetDict({"validation": datasets.Dataset.from_list([{"text": "a"}])})
    monkeypatch.setattr(datasets, "load_dataset", lambda _: empty)
    with pytest.raises(UsageError, match="some-one/questions: the dataset has no train and no test split"):
        read_splits("some-one/questions", ["train", "valid", "test"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"this needs the package datasets: pip install datasets"):
        read_splits("some-one/questions", ["train"])
    with pytest.raises(UsageError, match="no such settings: prompt_featur"):
        zo_mlx.evaluate(None, None, tmp_path, prompt_featur="x")  # type: ignore[arg-type]
