"""report_to: what is missing is said at once; each tracker gets the metrics and nothing else, on this machine."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from tuned import make_base

import orpo_train
from preference.report import trackers as reporting
from preference.report.trackers import TRACKERS, ReportingError, trackers

QUESTION = "What helps against a cold"
FOLDERS = {"tensorboard": "out/runs", "wandb": "out/wandb", "swanlab": "out/swanlog", "trackio": "trackio"}
ROOT = Path(orpo_train.__file__).parent
LOCALLY = {"WANDB_MODE": "offline", "SWANLAB_MODE": "local"}


def installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def test_names() -> None:
    assert trackers("none") == [] and trackers("tensorboard") == ["tensorboard"]
    for wrong in ("tensorbord", "none,tensorboard", "all", "tensorboard,"):
        with pytest.raises(ReportingError, match="is none of tensorboard, wandb"):
            trackers(wrong)


def test_a_missing_package_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_is_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(reporting, "distribution", none_is_installed)
    words = ["--model_name_or_path=nowhere", "--train_file_dir=nowhere", f"--output_dir={tmp_path}", "--use_cpu=true"]
    monkeypatch.setattr(sys, "argv", ["orpo_train.py", *words, "--report_to=wandb"])
    with pytest.raises(ReportingError, match="report_to=wandb needs its package: pip install wandb"):
        orpo_train.main()


def test_a_folder_is_not_taken_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tracker").mkdir()  # as an earlier run leaves it
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reporting, "TRACKERS", ("tracker",))
    assert find_spec("tracker")
    with pytest.raises(ReportingError, match="pip install tracker"):
        trackers("tracker")


def words_of(folder: Path, name: str) -> list[str]:
    """A run of three steps that reports to `name`."""
    flags = dict(
        model_name_or_path=folder / "base", train_file_dir=folder / "rows.jsonl", output_dir=folder / "out",
        template_name="qwen", cache_dir=folder / "cache", max_steps=3, logging_steps=1, use_cpu="true", bf16="false",
        html_report="false", sample_tokens=4, report_to=name, validation_split_percentage=25,
    )  # fmt: skip
    return [f"--{flag}={value}" for flag, value in flags.items()]


def start(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """A program that is started from an empty folder."""
    for place in ("cwd", "home"):
        (folder / place).mkdir()
    make_base(folder / "base")
    answers = {"response_chosen": "Rest.", "response_rejected": "Who knows."}
    rows = [json.dumps({"question": f"{QUESTION}, case {i}?"} | answers) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    homes = {"HOME": str(folder / "home"), "TRACKIO_DIR": str(folder / "trackio")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "SWANLAB"))}
    environment = inherited | homes | environment
    return subprocess.run(
        [sys.executable, *command], cwd=folder / "cwd", env=environment, capture_output=True, text=True
    )


def shown_runs(name: str, folder: Path) -> int:
    if name == "trackio":
        with sqlite3.connect(next(folder.glob("*.db"))) as database:
            return database.execute("select count(distinct run_name) from metrics").fetchone()[0]
    return len([path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()])


@pytest.fixture(scope="module")
def reported(
    outside: tuple[socket.socket, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder of a run that reports to all trackers that are here, and what it said."""
    folder = tmp_path_factory.mktemp("reported")
    words = words_of(folder, ",".join(filter(installed, TRACKERS)))
    return folder, start(folder, orpo_train.__file__, *words, **LOCALLY, **outside[1])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_the_metrics_and_nothing_leaves(
    name: str, reported: tuple[Path, subprocess.CompletedProcess], outside: tuple[socket.socket, dict[str, str]]
) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed: pip install {name}")
    folder, done = reported
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.raises(BlockingIOError):
        outside[0].accept()
    kept = [path.read_bytes() for path in (folder / FOLDERS[name]).rglob("*") if path.is_file()]
    assert any(b"train/loss" in file for file in kept) and any(b"eval/loss" in file for file in kept)
    assert QUESTION in done.stdout  # what is printed is not sent
    assert not any(QUESTION.encode() in file for file in kept)
    assert not list((folder / "cwd").iterdir())
    assert shown_runs(name, folder / FOLDERS[name]) == 1
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((folder / "out" / "runs").iterdir()))).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
        assert {event.step for event in events.Scalars("eval/loss")} == {0, 3}  # before and after


ONE_BY_ONE = """
import json, sys
import orpo_train
from preference.launch.process import run_script
for words in json.loads(sys.argv[1]):
    sys.argv = ["orpo_train.py", *words]
    try:
        run_script(orpo_train.main, "orpo_train.py")
    except SystemExit as end:
        print("ended:", str(end.code).splitlines()[-1], file=sys.stderr, flush=True)
"""


def test_without_a_login_it_says_how_to_stay_here(tmp_path: Path) -> None:
    names = [name for name in ("wandb", "swanlab") if installed(name)]
    if not names:
        pytest.skip("neither wandb nor swanlab is installed: pip install wandb swanlab")
    runs = json.dumps([words_of(tmp_path, name) for name in names])
    done = start(tmp_path, "-c", ONE_BY_ONE, runs, PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert "Traceback" not in done.stderr
    ends = [line for line in done.stderr.splitlines() if line.startswith("ended:")]
    assert len(ends) == len(names), done.stderr
    for end, name in zip(ends, names, strict=True):
        assert end.endswith(f"To keep it on this machine set {reporting.OFFLINE[name]}")
    assert "template:" not in done.stdout  # nothing was loaded
