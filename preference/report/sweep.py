"""A grid of runs and what came of it: `sh sweep_orpo.sh learning_rate=1e-4,2e-4 orpo_beta=0.05,0.1`.

Each run is `sh run_orpo.sh` with its own values and folder; the prepared data are those of the first. A run that has
ended already is not repeated, so that a sweep that was stopped goes on where it was. At the end stand a table, a page
that compares the runs, and the command line of the best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from preference.arguments import FLAGS, ArgumentError
from preference.errors import PreferenceError
from preference.files import save_json
from preference.report.page import write_comparison
from preference.screen import shown

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {  # of all_results.json -> (heading, format)
    "eval_preference/accuracies": ("preference accuracy", "{:.1%}"),
    "eval_preference/margins": ("margin per token", "{:+.3f}"),
    "eval_nll_loss": ("NLL of chosen", "{:.4f}"),
    "eval_loss": ("loss", "{:.4f}"),
    "train_runtime": ("seconds", "{:.0f}"),
}
LOWER_IS_BETTER = ("loss", "runtime")
NOT_SWEPT = ("output_dir", "resume", "resume_from_checkpoint", "dry_run", "do_train", "do_eval")


class SweepError(PreferenceError, ValueError):
    """A grid that cannot be run; the message says what to write instead."""


@dataclass
class Run:
    """One point of the grid: its values, its folder, what it left."""

    values: dict[str, str]
    folder: Path
    results: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def name(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items())

    def words(self) -> list[str]:
        return [f"--{name}={value}" for name, value in self.values.items()]


def parse_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """Values by flag, from words like learning_rate=1e-4,2e-4.

    Raises:
        SweepError: a word that is none, an unknown flag, a value that the flag does not take, no word at all.
    """
    grid: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or name not in FLAGS or name in NOT_SWEPT:
            known = "a flag of orpo_train.py with its values, as in learning_rate=1e-4,2e-4"
            raise SweepError(f"{word!r} is not {known}; flags for every run follow as --name=value")
        # a comma inside a value stands in brackets: loss=dpo,[dpo:0.8,bco_pair:0.2]
        grid[name] = _split(values)
        for value in grid[name]:
            try:
                FLAGS[name].parse(value)
            except ArgumentError as error:
                raise SweepError(f"{word}: {error}") from None
    if not grid:
        raise SweepError("a sweep needs at least one flag with several values, as in learning_rate=1e-4,2e-4")
    return grid


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append("")
        elif char not in "[]":
            parts[-1] += char
    return parts


def points(grid: dict[str, list[str]], folder: Path) -> list[Run]:
    """Every combination, each with a folder of its own."""
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = ["_".join(f"{n}={v}".replace("/", "-").replace(",", "+") for n, v in c.items()) for c in combinations]
    return [Run(values, folder / name) for values, name in zip(combinations, names, strict=True)]


def rank(runs: Sequence[Run], metric: str) -> list[Run]:
    """Best first; failed runs last. Of equal ones that with the lower NLL of the chosen answers."""
    sign = 1 if metric.endswith(LOWER_IS_BETTER) else -1

    def key(run: Run) -> tuple[float, float]:
        if run.failure:
            return math.inf, math.inf
        return sign * run.results.get(metric, sign * math.inf), run.results.get("eval_nll_loss", math.inf)

    return sorted(runs, key=key)


def perform(runs: Sequence[Run], common: Sequence[str], say: Callable[[str], None]) -> None:
    """Run each point that has not ended yet, with the flags that are common to all; output goes to its run.log."""
    for i, run in enumerate(runs, start=1):
        command = ["sh", str(ROOT / "run_orpo.sh"), *run.words(), *common, f"--output_dir={run.folder.resolve()}"]
        done = run.folder / "sweep.json"
        if done.is_file() and json.loads(done.read_text())["command"] == command:
            run.results = json.loads((run.folder / "all_results.json").read_text())
            say(f"{i} of {len(runs)}: {run.name}: there already")
            continue
        say(f"{i} of {len(runs)}: {run.name}")
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "run.log"
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if status:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            run.failure = last[-1] if last else f"exit status {status}"
            say(f"    failed: {run.failure} ({log})")
            continue
        run.results = json.loads((run.folder / "all_results.json").read_text())
        save_json(done, {"command": command, "values": run.values})


def halve(runs: list[Run], common: Sequence[str], epochs: float, metric: str, say: Callable[[str], None]) -> list[Run]:
    """Successive halving (Jamieson and Talwalkar 2016): all for a part of the epochs, the better half for twice that.

    Every round is a run of its own, whose learning rate falls to 0 within it. Returns the runs of the last round.
    """
    rounds = max(1, math.ceil(math.log2(len(runs))))
    for i in range(rounds):
        part = epochs / 2 ** (rounds - 1 - i)
        say(f"round {i + 1} of {rounds}: {len(runs)} runs of {part:g} epochs")
        runs = [Run(run.values, run.folder.parent / f"{run.folder.name.split('@')[0]}@{part:g}") for run in runs]
        perform(runs, [*common, f"--num_train_epochs={part:g}"], say)
        if i < rounds - 1:
            runs = rank(runs, metric)[: max(1, math.ceil(len(runs) / 2))]
    return runs


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A heading and a line for each run, best first."""
    shown_columns = {key: column for key, column in COLUMNS.items() if any(key in run.results for run in runs)}
    lines = [["run", *(heading for heading, _ in shown_columns.values())]]
    for run in runs:
        cells = [form.format(run.results[k]) if k in run.results else "" for k, (_, form) in shown_columns.items()]
        lines.append([run.name, *([f"failed: {run.failure}"] if run.failure else cells)])
    return lines


def parse_words(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="sweep_orpo.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("grid", nargs="*", help="flag=value,value,...")
    parser.add_argument("--halving", action="store_true", help="successive halving over num_train_epochs")
    parser.add_argument("--metric", default="eval_preference/accuracies", help="of all_results.json; what best means")
    parser.add_argument("--sweep_dir", default="outputs/sweep", help="where the runs' folders go")
    args, rest = parser.parse_known_args(words)
    stray = [word for word in rest if not (word.startswith("--") and "=" in word)]
    if stray:
        parser.error(f"write flags for every run as --name=value; got {' '.join(stray)}")
    return args, rest


def sweep(args: argparse.Namespace, common: list[str], say: Callable[[str], None]) -> int:
    """All runs and their comparison; the exit status: 1 where a run failed."""
    given = {word[2:].partition("=")[0]: word.partition("=")[2] for word in common}
    grid, given_words = parse_grid(args.grid), list(common)
    for name in {"output_dir", *grid} & given.keys():
        raise SweepError(f"--{name} is set by the sweep; drop it" if name == "output_dir" else f"{name} is given twice")
    if args.halving and {"max_steps", "num_train_epochs"} & grid.keys() | {"max_steps"} & given.keys():
        raise SweepError("--halving shares out num_train_epochs: sweep neither that nor max_steps")
    folder = (ROOT / args.sweep_dir).resolve()
    runs = points(grid, folder)
    if args.halving:
        epochs = float(given.pop("num_train_epochs", 1.0))
        common = [word for word in common if not word.startswith("--num_train_epochs=")]
        runs = halve(runs, common, epochs, args.metric, say)
    else:
        perform(runs, common, say)
    runs = rank(runs, args.metric)
    ended = [run for run in runs if not run.failure]
    if ended and args.metric not in ended[0].results:
        raise SweepError(f"the runs have no {args.metric}; they have {', '.join(sorted(ended[0].results))}")
    best = shlex.join(["sh", "run_orpo.sh", *runs[0].words(), *given_words]) if ended else "none: every run failed"
    say("")
    lines = table(runs)
    filled = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip())
    if ended:
        say(f"\nthe page: {write_comparison([run.folder for run in ended], folder / 'comparison.html')}")
    say(f"the best by {args.metric}: {best}")
    return 0 if len(ended) == len(runs) else 1


def main() -> None:
    args, common = parse_words()
    try:
        status = sweep(args, common, lambda text: print(shown(text), flush=True))
    except PreferenceError as error:
        sys.exit(shown(f"sweep_orpo.sh: {error}"))
    sys.exit(status)


if __name__ == "__main__":
    main()
