"""The trackers that a run reports its metrics to besides its own files: report_to.

transformers' callbacks do the reporting. Settled here is what they leave open: a name or package that is missing is
said before anything is loaded; each tracker is begun before the model is, so that a missing login shows then; its files
lie in output_dir; and what a run prints (rows of the data, answers) stays here.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from preference.errors import PreferenceError

TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio")
OFFLINE = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=local"}


class ReportingError(PreferenceError, RuntimeError):
    """A tracker that cannot be used; str() says the way out."""


def trackers(report_to: str) -> list[str]:
    """The names in `report_to`, separated by commas; empty for "none".

    Raises:
        ReportingError: a name is unknown, or its package is not installed.
    """
    names = [] if report_to == "none" else report_to.split(",")
    for name in names:
        if name not in TRACKERS:
            raise ReportingError(f"report_to={report_to}: {name!r} is none of {', '.join(TRACKERS)} (or none, alone)")
        try:
            distribution(name)  # unlike a look for a module it does not take a folder that a tracker left for one
        except PackageNotFoundError:
            raise ReportingError(f"report_to={name} needs its package: pip install {name}") from None
    return names


def begin_reporting(
    names: Sequence[str], output_dir: Path, run_name: str, environment: MutableMapping[str, str]
) -> None:
    """Begin the run with each tracker; call it on the first rank alone.

    Their settings go to `environment`, os.environ, where those that are there already have precedence.

    Raises:
        ReportingError: a tracker refuses, for instance because nobody is logged in.
    """
    places: dict[str, dict[str, str | Path]] = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": output_dir / "runs" / run_name},
        "wandb": {"WANDB_DIR": output_dir, "WANDB_CONSOLE": "off"},
        "swanlab": {"SWANLAB_LOGDIR": output_dir / "swanlog", "SWANLAB_TERMINAL_PROXY_TYPE": "none"},
    }
    for name in names:
        for variable, value in places.get(name, {}).items():
            environment.setdefault(variable, str(value))
        try:
            _begin(name, run_name, environment)
        except Exception as error:  # of packages that may not be imported here
            raise ReportingError(
                f"report_to={name}: {error} To keep it on this machine set {OFFLINE.get(name, 'report_to=none')}"
            ) from error


def _begin(name: str, run_name: str, environment: Mapping[str, str]) -> None:
    """transformers begins those two with the first metrics, and goes on with a run that is there."""
    if name == "wandb":
        import wandb

        wandb.init(project=environment.get("WANDB_PROJECT", "huggingface"), name=run_name)
    if name == "swanlab":
        import swanlab

        swanlab.init(project=environment.get("SWANLAB_PROJECT"), experiment_name=run_name)
