"""What a run's folder says right now, as one JSON-ready snapshot for the live view; finished runs say the same."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preference.files import LOGS, NEXT, log_file
from preference.report.hints import hints
from preference.report.run_folder import INPUTS, Run
from preference.report.story import story

CURVES = (
    ("loss", "Loss", False),
    ("nll_loss", "NLL of chosen", False),
    ("preference/accuracies", "Preference accuracy", True),
    ("rewards/margins", "Reward margin", False),
    ("logps/chosen", "Log-probability of chosen", False),
    ("logps/rejected", "Log-probability of rejected", False),
    ("grad_norm", "Gradient norm", False),
    ("learning_rate", "Learning rate", False),
    ("tokens_per_second", "Tokens per second", False),
    ("memory_gib", "Memory, GiB", False),
)
LATEST = ("loss", "preference/accuracies", "tokens_per_second", "mfu", "memory_gib")
POINTS = 500  # of a curve at most
HARMLESS = {"below_half", "both_fall"}  # hints that ask for nothing


def thinned(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    """At most about POINTS of them, the first and the last among them; what is not finite is left out."""
    finite = [[x, y] for x, y in points if math.isfinite(y)]
    stride = math.ceil(len(finite) / POINTS)
    return finite if stride <= 1 else [*finite[:-1:stride], finite[-1]]


def snapshot(folder: Path) -> dict[str, Any]:
    """One run. A folder that is not there yet is a run that is waited for."""
    if not folder.is_dir():
        return {"name": folder.name, "folder": str(folder), "status": "waiting", "curves": {}, "alerts": []}
    run = Run.read(folder)
    finished = "all_results.json" in run.files and not (folder / NEXT).is_dir()
    if not finished:
        run.files.pop("all_results.json", None)  # of the run before, in the same folder
    arguments, records = run.get("run.json").get("arguments", {}), run.get("metrics.jsonl", [])
    train = [record for record in records if "loss" in record]
    began: dict[str, Any] = next((record for record in records[::-1] if record.get("event") == "train_begin"), {})
    steps = began.get("max_steps") or run.get("trainer_state.json").get("max_steps") or 0
    step = max((int(record.get("step") or 0) for record in records), default=0)
    data = run.get("data_report.json")
    return {
        "name": run.title,
        "folder": str(folder),
        "status": "finished" if finished else "running" if records else "waiting",
        "step": step,
        "max_steps": steps,
        "left": None if finished else _left(train, steps),
        "heard": _heard(folder),
        "model": arguments.get("model_name_or_path", ""),
        "loss": arguments.get("loss", ""),
        "hardware": run.get("run.json").get("hardware", ""),
        "latest": {name: train[-1].get(name) for name in LATEST} if train else {},
        "curves": {name: _curve(run, name) for name, _, _ in CURVES},
        "alerts": [[name not in HARMLESS, text] for name, text in hints(run.records, steps)],
        "story": story(run) if finished else "",
        "data": {"read": data.get("rows_read"), "kept": data.get("rows_kept"), "dropped": data.get("dropped", {})},
        "answers": _answers(run),
        "report": (folder / "report.html").is_file() and finished,
    }


def _left(train: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """Seconds of training that are left, at the speed so far."""
    if not train or not steps or not train[-1].get("step"):
        return None
    return float(train[-1].get("seconds") or 0.0) / train[-1]["step"] * (steps - train[-1]["step"])


def _heard(folder: Path) -> float | None:
    """When the run was last heard of, in seconds since 1970."""
    path = log_file(folder, "metrics.jsonl")
    return path.stat().st_mtime if path.is_file() else None


def _curve(run: Run, name: str) -> dict[str, Any]:
    held_out = {prefix: thinned(run.points(name, prefix)) for prefix in run.sets}
    return {
        "training": thinned(run.points(name)),
        "held_out": {prefix: points for prefix, points in held_out.items() if points},
    }


def _answers(run: Run) -> list[dict[str, Any]]:
    """Each sample question with its answers in the order they were given: base, those by step, tuned."""
    found: dict[str, dict[str, Any]] = {}
    for sample in run.get("samples.json", []):
        found[sample.get("source", "")] = {"question": sample.get("question", ""), "given": [], "ends": sample}
    for record in run.get("answers.jsonl", []):
        entry = found.setdefault(record.get("source", ""), {"question": record.get("question", ""), "given": []})
        entry["given"].append([f"step {record.get('step')}", record.get("answer", "")])
    for entry in found.values():
        ends = entry.pop("ends", {})
        entry["given"] = [
            *([["base", ends["base"]]] if "base" in ends else []),
            *entry["given"],
            *([[name, ends[name]] for name in ("tuned", "model") if name in ends]),
        ]
    return list(found.values())


class Watched:
    """Several runs; what they say is read again only when a file of theirs has changed."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.lock = threading.Lock()
        self.seen: tuple[Any, ...] = ()
        self.version, self.state = 0, dict[str, Any]()

    def look(self) -> tuple[int, dict[str, Any]]:
        """(a number that grows with every change, the snapshots of all runs)."""
        with self.lock:
            seen = tuple(self._stamp(path) for folder in self.folders for path in self._files(folder))
            if seen != self.seen or not self.version:
                curves = [{"name": name, "title": title, "percent": percent} for name, title, percent in CURVES]
                self.state = {"curves": curves, "runs": [snapshot(folder) for folder in self.folders]}
                self.seen, self.version = seen, self.version + 1
            return self.version, self.state

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        names = [*INPUTS, "report.html"]
        return [log_file(folder, name) if name in LOGS else folder / name for name in names]

    @staticmethod
    def _stamp(path: Path) -> tuple[str, int, int]:
        try:
            stat = path.stat()
        except OSError:
            return str(path), 0, 0
        return str(path), stat.st_mtime_ns, stat.st_size
