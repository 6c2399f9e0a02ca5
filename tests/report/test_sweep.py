"""A sweep: the grid, the order of its runs, what is repeated, halving; the runs themselves are stood in for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from preference.report import sweep as module
from preference.report.sweep import Run, SweepError, parse_grid, parse_words, rank, sweep


def test_the_grid_is_checked_before_anything_runs():
    assert parse_grid(["learning_rate=1e-4,2e-4", "loss=dpo,[dpo:0.8,bco_pair:0.2]"]) == {
        "learning_rate": ["1e-4", "2e-4"],
        "loss": ["dpo", "dpo:0.8,bco_pair:0.2"],
    }
    for words, message in (
        (["learning_rate=fast"], "a number"),
        (["lr=1"], "flag of orpo_train.py"),
        (["output_dir=a,b"], "flag of orpo_train.py"),
        (["learning_rate"], "with its values"),
        ([], "at least one flag"),
    ):
        with pytest.raises(SweepError, match=message):
            parse_grid(words)


def test_best_first():
    runs = [Run({"n": str(i)}, Path(str(i)), {"eval_preference/accuracies": a, "eval_nll_loss": n})
            for i, (a, n) in enumerate([(0.5, 2.0), (0.8, 3.0), (0.8, 2.5)])]  # fmt: skip
    runs.append(Run({"n": "3"}, Path("3"), failure="out of memory"))
    assert [run.values["n"] for run in rank(runs, "eval_preference/accuracies")] == ["2", "1", "0", "3"]
    assert [run.values["n"] for run in rank(runs, "eval_nll_loss")] == ["0", "2", "1", "3"]


@pytest.fixture
def runs_made(tmp_path, monkeypatch):
    """Runs that write what orpo_train.py would: accuracy grows with the rate; a rate of 1 fails. The commands made."""
    commands: list[list[str]] = []

    def stand_in(command, stdout, **_):
        commands.append(command)
        flags = dict(word[2:].split("=", 1) for word in command[2:])
        folder, rate = Path(flags["output_dir"]), float(flags["learning_rate"])
        if rate == 1:
            stdout.write("loss is not finite\n")
            return subprocess.CompletedProcess(command, 1)
        (folder / "all_results.json").write_text(
            json.dumps({"eval_preference/accuracies": 0.5 + rate, "eval_loss": 2.0})
        )
        (folder / "run.json").write_text(json.dumps({"arguments": flags}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", stand_in)
    monkeypatch.setattr(module, "write_comparison", lambda folders, path: Path(path))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return commands


def test_a_sweep_ends_in_the_best_command_and_repeats_nothing(runs_made):
    said: list[str] = []
    args, common = parse_words(["learning_rate=0.1,0.3,0.2", "--seed=7"])
    assert sweep(args, common, said.append) == 0 and len(runs_made) == 3
    assert said[-1] == "the best by eval_preference/accuracies: sh run_orpo.sh --learning_rate=0.3 --seed=7"
    assert sweep(args, common, said.append) == 0 and len(runs_made) == 3
    assert sweep(args, ["--seed=8"], said.append) == 0 and len(runs_made) == 6


def test_a_run_that_fails_is_named_and_makes_the_sweep_fail(runs_made):
    said: list[str] = []
    args, common = parse_words(["learning_rate=0.1,1"])
    assert sweep(args, common, said.append) == 1
    assert any("failed: loss is not finite" in line for line in said)
    assert "--learning_rate=0.1" in said[-1]


def test_halving_gives_the_better_half_more(runs_made):
    args, common = parse_words(["learning_rate=0.1,0.2,0.3,0.4", "--halving", "--num_train_epochs=2"])
    said: list[str] = []
    assert sweep(args, common, said.append) == 0
    epochs = [word for command in runs_made for word in command if "epochs" in word]
    assert epochs == ["--num_train_epochs=1"] * 4 + ["--num_train_epochs=2"] * 2
    assert said[-1].endswith("--learning_rate=0.4 --num_train_epochs=2")
    for words in (["max_steps=1,2", "--halving"], ["learning_rate=1,2", "--learning_rate=3"]):
        with pytest.raises(SweepError):
            sweep(*parse_words(words), said.append)
