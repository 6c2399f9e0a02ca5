"""A finished run's folder, made up but true to what a run writes; its texts are as hostile as data can be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ARABIC = "\u0645\u0631\u062d\u0628\u0627"  # written from right to left
HOSTILE = f'<script>document.title="owned"</script></style></svg>{{{{ 7 * 7 }}}} & "quoted" {ARABIC} 🙂'
CHINESE = "感冒发烧应该怎么办？"
STEPS = 60


def figures(step: int, prefix: str = "") -> dict[str, float]:
    """The metrics of an orpo run at a step."""
    done = step / STEPS
    nll, odds = 3.4 - 1.2 * done, -0.3 + 1.5 * done
    values = {
        "loss": nll + 0.1 * math.log1p(math.exp(-odds)),
        "nll_loss": nll,
        "log_odds_ratio": -math.log1p(math.exp(-odds)),
        "log_odds_chosen": odds,
        "logps/chosen": -3.5 + 1.1 * done,
        "logps/rejected": -3.2 - 0.4 * done,
        "rewards/chosen": -0.35 + 0.11 * done,
        "rewards/rejected": -0.32 - 0.04 * done,
        "rewards/margins": -0.03 + 0.15 * done,
        "preference/accuracies": 0.25 + 0.5 * done,
    }
    return {f"{prefix}{name}": value for name, value in values.items()}


def log(sets: tuple[str, ...] = ("eval",)) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"event": "train_begin", "step": 0, "peak_tflops": 0.25}]
    for step in range(2, STEPS + 1, 2):
        speed = {"pairs_per_second": 2.0, "tokens_per_second": 410.0 + step, "mfu": 0.61, "memory_gib": 2.5}
        schedule = {"grad_norm": 4.0 + step % 3, "learning_rate": 5e-6 * (1 - step / STEPS)}
        records.append({"step": step, "seconds": 4.0 * step, "epoch": step / 30, **figures(step), **schedule, **speed})
        if step % 20 == 0:
            records += [{"step": step, "seconds": 4.0 * step, **figures(step, f"{name}_")} for name in sets]
    return records


def analysed(accuracy: float) -> dict[str, Any]:
    interval = {name: [accuracy - 0.1, accuracy + 0.1] for name in ("accuracy", "length_controlled_accuracy")}
    return {
        "pairs": 64,
        "accuracy": accuracy,
        "margin": -0.01,
        "length_controlled_accuracy": accuracy + 0.001,
        "interval": interval,
    }


def make_run(folder: Path, **changed: Any) -> Path:
    """Write the folder; `changed` replaces the content of a file by its stem, None leaves the file out."""
    histogram = [
        {"from": 20 * i, "to": 20 * i + 20, "prompt": 9 - i, "chosen": 5 + i, "rejected": 12 - i} for i in range(8)
    ]
    spread = {"min": 3, "p50": 52, "p90": 93, "p99": 150, "max": 159}
    contents = {
        "run.json": {
            "arguments": {
                "model_name_or_path": "models/starter",
                "loss": "orpo",
                "engine": "packed",
                "max_steps": STEPS,
                "train_file_dir": HOSTILE,
                "columns": None,
            },
            "beta": 0.1,
            "learning_rate": 5e-06,
            "template": "qwen2",
            "hardware": "CPU (2 threads), 24 GiB, bfloat16",
            "world_size": 1,
            "pairs_per_step": 8,
            "parameters": 134515008,
            "trainable": 134515008,
            "started": "2026-01-02T03:04:05+00:00",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        },
        "all_results.json": {
            "train_runtime": 240.5,
            "train_samples_per_second": 2.0,
            "train_loss": 2.9,
            "train_steps": STEPS,
            **figures(0, "base_eval_"),
            **figures(STEPS, "eval_"),
            "eval_runtime": 9.5,
        },
        "trainer_state.json": {"max_steps": STEPS, "log_history": [each for each in log() if "event" not in each]},
        "data_report.json": {
            "rows_read": 324,
            "rows_kept": 320,
            "dropped": {"empty_answer": 3, "identical_answers": 1},
            "examples": {
                "empty_answer": [{"file": HOSTILE, "line": 7, "detail": HOSTILE}],
                "identical_answers": [{"file": "data/train/a.jsonl", "line": 9, "detail": ""}],
            },
            "files": {
                "data/train/a.jsonl": {"format": "triples", "rows_read": 324, "rows_kept": 320, "dropped": {}}
                | {"share": 1.0, "unread": {"remark": HOSTILE}}
            },
            "languages": {"en": 0.685, "zh": 0.315},
            "train_text": {"rows": 260, "contradicting_pairs": 2, "repeated_prompts": 0},
            "notes": {"one_sided_space": 2},
            "warnings": [f"a warning with {HOSTILE}"],
            "train": {
                "pairs": 260,
                **dict.fromkeys(("prompt", "chosen", "rejected"), spread),
                "histogram": histogram,
                "length_bias": {"chosen_longer": 0.61, "accuracy_of_length_alone": 0.62},
            },
        },
        "samples.json": [
            {"source": "a.jsonl:1", "question": CHINESE, "chosen": "多喝水。", "base": "感冒", "tuned": "多休息。"},
            {"source": "a.jsonl:2", "question": HOSTILE, "chosen": HOSTILE, "base": HOSTILE, "tuned": HOSTILE * 9},
        ],
        "worst_pairs.json": [
            {"source": "a.jsonl:3", "question": HOSTILE, "chosen": HOSTILE, "rejected": "W" * 400, "margin": -0.4},
            {"source": "a.jsonl:4", "question": CHINESE, "chosen": "好", "rejected": "坏", "margin": -0.9},
        ],
        "changes.json": {
            "preference/accuracies": {"change": 0.5, "interval": [0.3, 0.7], "significant": True},
            "preference/margins": {"change": 0.1, "interval": [-0.01, 0.2], "significant": False},
        },
        "best_pairs.json": [
            {"source": "a.jsonl:5", "question": HOSTILE, "chosen": "broken \ufffd", "rejected": "no", "margin": 1.25},
        ],
        "evaluation.json": {
            "all": {"base": analysed(0.25), "tuned": analysed(0.75)},
            "source": {HOSTILE: {"base": analysed(0.125), "tuned": analysed(0.625)}},
        },
        "metrics.jsonl": log(),
        "answers.jsonl": [
            {"step": step, "source": "a.jsonl:1", "question": CHINESE, "answer": f"第{step}步 {HOSTILE}"}
            for step in (20, 40, 60)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        content = changed.get(name.partition(".")[0], content)
        if content is not None:
            lines = name.endswith(".jsonl")
            text = "".join(json.dumps(each) + "\n" for each in content) if lines else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return folder
