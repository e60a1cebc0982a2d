"""Services that follow a run, as mlx-lm reports to them: wandb, swanlab, trackio."""

import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK, TrainingCallback, get_reporting_callbacks

from .config import TrainConfig
from .errors import UsageError, ZoError
from .progress import redirected_to_stderr

Report = Callable[[dict[str, Any]], None]


class _Trackio(TrainingCallback):  # type: ignore[misc]
    """What mlx-lm's callbacks are for the others, with the same arguments."""

    def __init__(
        self, project_name: str, log_dir: str, config: dict[str, Any], wrapped_callback: TrainingCallback | None
    ):
        try:
            self._trackio = importlib.import_module("trackio")
        except ImportError:
            raise ImportError("trackio is not installed") from None
        self._others = wrapped_callback or TrainingCallback()
        self._trackio.init(project=project_name, name=Path(log_dir).name, config=config)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._trackio.log(train_info, step=train_info["iteration"])
        self._others.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self._trackio.log(val_info, step=val_info["iteration"])
        self._others.on_val_loss_report(val_info)


def followed(report: Report, config: TrainConfig) -> Report:
    """What hands a run's events on to `report`, and under mlx-lm's names to the services of `config.report_to`.

    The run's name there is that of its adapter directory; its project is that of the working directory, unless
    `project_name` says otherwise.

    Raises:
        UsageError: there is no such service, or its package is not installed.
        ZoError: the service does not begin. If it fails later, a warning says so, and it hears no more.
    """
    if not config.report_to:
        return report
    SUPPORT_CALLBACK.setdefault("trackio", _Trackio)  # type: ignore[arg-type]
    problem = f"--report-to {config.report_to}"
    project = config.project_name or Path.cwd().name
    try:
        settings: Any = asdict(config)
        with redirected_to_stderr():
            services = get_reporting_callbacks(config.report_to, project, config.adapter_path, settings)
    except ImportError as e:
        raise UsageError(f"{problem}: {str(e).split('.')[0]}; install it with pip") from None
    except ValueError as e:
        raise UsageError(f"{problem}: {e}") from None
    except Exception as e:  # no account, no network, whatever the services' libraries raise
        raise ZoError(f"{problem}: {type(e).__name__}: {e}") from None

    def tell(event: dict[str, Any]) -> None:
        nonlocal services
        report(event)
        numbers = {key: value for key, value in event.items() if type(value) in (int, float)}
        prefix = {"validation": "val", "test": "test"}.get(event["event"])
        try:
            with redirected_to_stderr():
                if services and event["event"] == "train":
                    services.on_train_loss_report(numbers)
                elif services and prefix:
                    named = {key if key == "iteration" else f"{prefix}_{key}": value for key, value in numbers.items()}
                    services.on_val_loss_report(named)
        except Exception as e:  # a run does not fail because those who follow it do
            services = None
            report({"event": "warning", "message": f"{problem}: not followed any further: {type(e).__name__}: {e}"})

    return tell
