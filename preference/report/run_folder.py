"""What a run leaves in its folder, read back. Nothing here is certain to be there: `Run.missing` says what is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from preference.files import LOGS, evaluation_sets, log_file, read_lines

# file, what the page lacks without it
INPUTS = {
    "run.json": "arguments, versions and hardware",
    "all_results.json": "the results before and after",
    "evaluation.json": "accuracy by source and by script",
    "metrics.jsonl": "speed and memory over time",
    "trainer_state.json": "the log of a finished run",
    "data_report.json": "what happened to the data",
    "samples.json": "answers of the base and the tuned model",
    "answers.jsonl": "answers during training (they need an evaluation during training)",
    "changes.json": "how sure the changes are",
    "worst_pairs.json": "pairs that are still judged wrongly",
    "best_pairs.json": "pairs that are judged rightly by most",
}
SUMMARIES = {
    "pairs_per_second": median,
    "tokens_per_second": median,
    "mfu": median,
    "memory_gib": max,
    "peak_tflops": max,
}


@dataclass
class Run:
    """What a run's folder holds; `missing` says what it does not."""

    folder: Path
    files: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        run = cls(Path(folder))
        if not run.folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a run's folder")
        for name, purpose in INPUTS.items():
            path = log_file(run.folder, name) if name in LOGS else run.folder / name
            try:
                if path.suffix == ".jsonl":
                    content = read_lines(path) or None
                else:
                    content = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                content = None
            except ValueError as error:
                run.missing.append(f"{name} cannot be read ({error}): no {purpose}")
                continue
            if content is not None:
                run.files[name] = content
            else:
                run.missing.append(f"no {name}: no {purpose}")
        return run

    def get(self, name: str, default: Any = None) -> Any:
        return self.files.get(name, {} if default is None else default)

    @property
    def title(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Log records in order, the results of the evaluations before and after among them."""
        log = self.get("metrics.jsonl", []) or self.get("trainer_state.json").get("log_history", [])
        results = self.get("all_results.json")
        before = {name.removeprefix("base_"): value for name, value in results.items() if name.startswith("base_")}
        after = {name: value for name, value in results.items() if name.startswith("eval_")}
        last = max((record.get("step", 0) for record in log), default=results.get("train_steps", 0))
        return [{"step": 0, **before}, *log, {"step": last, **after}]

    @property
    def likelihood_weight(self) -> float:
        arguments = self.get("run.json").get("arguments", {})
        return arguments.get("cpo_alpha", 1.0) if arguments.get("loss") == "cpo" else 1.0

    def points(self, metric: str, prefix: str = "") -> list[tuple[float, float]]:
        """(step, value), one a step, the last that was logged; `prefix` names an evaluation set."""
        head = f"{prefix}_" if prefix else ""
        found = {}
        for record in self.records:
            if prefix or "loss" in record:
                value = record.get(head + metric)
                loss, nll = record.get(f"{head}loss"), record.get(f"{head}nll_loss")
                if metric == "preference_part" and loss is not None and nll is not None:
                    value = loss - self.likelihood_weight * nll
                if value is not None:
                    found[record["step"]] = value
        return sorted(found.items())

    @property
    def sets(self) -> list[str]:
        return sorted({prefix for record in self.records for prefix in evaluation_sets(record)})

    @cached_property
    def speed(self) -> dict[str, float]:
        """The figures of all_results.json, and those of SUMMARIES over the training log."""
        figures = {name: value for name, value in self.get("all_results.json").items() if value is not None}
        for name, summary in SUMMARIES.items():
            logged = [record[name] for record in self.records if record.get(name) is not None]
            figures |= {name: summary(logged)} if logged else {}
        if "pairs_per_second" not in figures and "train_samples_per_second" in figures:
            figures["pairs_per_second"] = figures["train_samples_per_second"]
        return figures
