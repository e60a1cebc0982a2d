from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tuner import callbacks

import zo_mlx
from zo_mlx.errors import UsageError, ZoError


def _service(calls: list[Any]) -> SimpleNamespace:
    return SimpleNamespace(
        init=lambda **arguments: calls.append(arguments), log=lambda info, step: calls.append((step, info))
    )


def _train(tiny: Path, data: Path, out: Path, **more: Any) -> None:
    settings = {"iters": 2, "batch_size": 4, "steps_per_report": 1, "val_batches": 1, "progress": False, **more}
    zo_mlx.train(model=str(tiny), data=str(data), adapter_path=str(out), report=lambda _: None, **settings)


def test_services_get_what_mlx_lm_sends_them(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb and swanlab through mlx-lm's own callbacks, trackio beside them; all see the same."""
    calls: dict[str, list[Any]] = {"wandb": [], "swanlab": [], "trackio": []}
    for name in ("wandb", "swanlab"):
        monkeypatch.setattr(callbacks, name, _service(calls[name]))
    monkeypatch.setitem(__import__("sys").modules, "trackio", _service(calls["trackio"]))
    out = tmp_path / "my-run"
    _train(tiny, choice_data, out, test=True, report_to="wandb, swanlab,trackio", project_name="p")
    begun = {name: own.pop(0) for name, own in calls.items()}
    assert all(arguments["project"] == "p" for arguments in begun.values())
    assert [begun[n].get("name") or begun[n]["experiment_name"] for n in calls] == ["my-run"] * 3
    assert begun["wandb"]["config"]["iters"] == 2
    assert calls["wandb"] == calls["swanlab"] == calls["trackio"]
    assert [step for step, _ in calls["wandb"]] == [0, 1, 2, 2, 2]  # validation, two steps, validation, test
    val, first, *_, test = [info for _, info in calls["wandb"]]
    assert {"val_loss", "val_accuracy"} < val.keys()
    assert {"train_loss", "learning_rate", "iterations_per_second", "tokens_per_second", "peak_memory"} < first.keys()
    assert "test_loss" in test
    _train(tiny, choice_data, out, resume=True, iters=3)  # a journal may be a stranger's
    assert len(calls["wandb"]) == 5


def test_what_services_print_is_no_result(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chatty = SimpleNamespace(init=lambda **_: print("initialized"), log=lambda *_, **__: print("logged"))
    monkeypatch.setitem(__import__("sys").modules, "trackio", chatty)
    _train(tiny, choice_data, tmp_path / "a", report_to="trackio")
    out, err = capsys.readouterr()
    assert (out, "initialized" in err, "logged" in err) == ("", True, True)


def test_a_service_that_fails_later_ends_no_run(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def log(info: dict[str, Any], step: int) -> None:
        calls.append(step)
        if step == 1:
            raise TimeoutError("no network")

    service = SimpleNamespace(init=lambda **arguments: None, log=log)
    monkeypatch.setitem(__import__("sys").modules, "trackio", service)
    events: list[dict[str, Any]] = []
    zo_mlx.train(
        model=str(tiny), data=str(choice_data), adapter_path=str(tmp_path / "a"), iters=3, steps_per_report=1,
        val_batches=1, report_to="trackio", report=events.append, progress=False,
    )  # fmt: skip
    assert calls == [0, 1]
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert warnings == ["--report-to trackio: not followed any further: TimeoutError: no network"]
    assert [e["iteration"] for e in events if e["event"] == "train"] == [1, 2, 3]


def test_a_service_that_is_not_there_stops_a_run_before_it_begins(
    tiny: Path, choice_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    monkeypatch.setattr(callbacks, "wandb", SimpleNamespace(init=refuse))
    for name, error, problem in (
        ("trackio", UsageError, "trackio is not installed; install it with pip"),
        ("fax", UsageError, "fax callback doesn't exist choose from wandb, swanlab, trackio"),
        ("wandb", ZoError, "--report-to wandb: ConnectionError: no network"),
    ):
        with pytest.raises(error, match=problem):
            _train(tiny, choice_data, tmp_path / "a", report_to=name)
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(UsageError, match="follows a single run"):
        zo_mlx.train_seeds(2, report_to="wandb")
