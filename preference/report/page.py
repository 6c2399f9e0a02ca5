"""The report of a run: one self-contained HTML file that needs no network, and its plots as PNG files beside it.

    python -m preference.report OUTPUT_DIR             OUTPUT_DIR/report.html again
    python -m preference.report --compare DIR DIR ...  comparison.html of several runs

It reads what a run leaves in its folder. What is missing or unreadable is said in the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from preference.data.headline import told_of
from preference.report.drawing import draw
from preference.report.figures import SERIES, Curve, Plot
from preference.report.hints import hints
from preference.report.run_folder import Run
from preference.report.story import story
from preference.report.tables import ROWS, Compared, compared
from preference.screen import shown

# name, title, how to read it, [(metric, its label)], percent
CURVES = (
    ("loss", "Loss", "What training lowers: the likelihood part plus the preference part.", [("loss", "")], False),
    (
        "nll",
        "Likelihood part: NLL of the chosen answers",
        "Falls while the model learns to write the chosen answers. Rising: beta or learning rate too high.",
        [("nll_loss", "")],
        False,
    ),
    (
        "preference",
        "Preference part of the loss",
        "The loss without its likelihood part. Falls as chosen answers pull ahead of rejected ones.",
        [("preference_part", "")],
        False,
    ),
    (
        "accuracy",
        "Preference accuracy",
        "Share of pairs whose chosen answer has the higher log-probability per token; 50% is chance.",
        [("preference/accuracies", "")],
        True,
    ),
    (
        "logps",
        "Log-probability of the answers",
        "Per token for orpo and simpo, per answer for other losses. Both may fall; what counts is the gap.",
        [("logps/chosen", "chosen"), ("logps/rejected", "rejected")],
        False,
    ),
    (
        "margin",
        "Reward margin",
        "Reward of chosen less reward of rejected, as the loss defines it, beta included. Grows while preferences are "
        "learned.",
        [("rewards/margins", "")],
        False,
    ),
    (
        "odds",
        "Log odds ratio",
        "How much likelier chosen is than rejected, as a log odds ratio. Above 0: chosen wins.",
        [("log_odds_chosen", "")],
        False,
    ),
    ("learning_rate", "Learning rate", "Warm-up, then decay.", [("learning_rate", "")], False),
    (
        "grad_norm",
        "Gradient norm",
        "Before clipping. Spikes point at odd rows; steady growth at a learning rate that is too high.",
        [("grad_norm", "")],
        False,
    ),
    (
        "speed",
        "Tokens per second",
        "Tokens through the model, evaluations and checkpoints not counted.",
        [("tokens_per_second", "")],
        False,
    ),
)
# key, label, how it is written
SPEED = (
    ("train_steps", "Optimizer steps", "{:,.0f}"),
    ("train_runtime", "Training time", "{:,.0f} s"),
    ("pairs_per_second", "Pairs per second, median", "{:,.2f}"),
    ("tokens_per_second", "Tokens per second, median", "{:,.0f}"),
    ("mfu", "MFU (of the measured peak), median", "{:.0%}"),
    ("peak_tflops", "Measured peak of one device", "{:,.2f} TFLOP/s"),
    ("memory_gib", "Peak memory", "{:,.2f} GiB"),
    ("eval_runtime", "One evaluation", "{:,.1f} s"),
)


def write_report(output_dir: str | Path) -> Path:
    """Write OUTPUT_DIR/report.html and OUTPUT_DIR/report_figures/*.png; returns the page's path.

    Raises:
        NotADirectoryError: there is no such folder. Files missing in it are said in the page.
    """
    run = Run.read(output_dir)
    plots, absent = _split(_curve_plots([run]))
    data = run.get("data_report.json")
    lengths = [plot for name in data if (plot := _length_plot(run, name))]
    page = {
        "run": run,
        "facts": run.get("run.json"),
        "story": story(run),
        "tiles": _tiles(run),
        "results": _before_after(run),
        "notes": [text for _, text in hints(run.records, run.get("trainer_state.json").get("max_steps", 0))],
        "samples": _samples(run),
        "groups": _groups(run.get("evaluation.json")),
        "worst": sorted(run.get("worst_pairs.json", []), key=lambda pair: pair.get("margin", 0.0))[:20],
        "best": run.get("best_pairs.json", [])[:5],
        "data": data,
        "sections": {name: value for name, value in data.items() if _is_length_section(value)},
        "told": {name: list(told_of(texts)) for name in data if isinstance(texts := data.get(f"{name}_text"), dict)},
        "speed": [(label, form.format(run.speed[name])) for name, label, form in SPEED if name in run.speed],
    }
    return _write(Path(output_dir) / "report.html", "report.html.jinja", plots, absent, lengths=lengths, **page)


def write_comparison(folders: Sequence[str | Path], path: str | Path = "comparison.html") -> Path:
    """Write one page over several runs, which it calls A, B, ..., and its plots as PNG files.

    Raises:
        ValueError: too many runs to tell apart in a plot, or too few.
        NotADirectoryError: one of the folders is missing.
    """
    if not 2 <= len(folders) <= len(SERIES):
        raise ValueError(f"2 to {len(SERIES)} runs can be compared; got {len(folders)}")
    runs = {chr(ord("A") + i): Run.read(folder) for i, folder in enumerate(folders)}
    plots, absent = _split(_curve_plots(list(runs.values())))
    arguments = {letter: _flat(run.get("run.json")) for letter, run in runs.items()}
    names = list(dict.fromkeys(name for values in arguments.values() for name in values))
    table = [(name, [values.get(name) for values in arguments.values()]) for name in names]
    prefixes = sorted({prefix for run in runs.values() for prefix in run.sets})
    page = {
        "runs": runs,
        "differences": [(name, values) for name, values in table if any(value != values[0] for value in values)],
        "results": [(prefix, _side_by_side(runs.values(), prefix)) for prefix in prefixes],
        "speed": [
            (label, [form.format(run.speed[name]) if name in run.speed else "" for run in runs.values()])
            for name, label, form in SPEED
        ],
        "questions": _shared_samples(runs),
    }
    return _write(Path(path), "comparison.html.jinja", plots, absent, **page)


def _write(path: Path, template: str, plots: list[Plot], absent: list[str], **page: Any) -> Path:
    folder = path.with_name(f"{path.stem}_figures")
    folder.mkdir(parents=True, exist_ok=True)
    for plot in [*plots, *page.get("lengths", ())]:
        plot.save_png(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda plot: Markup(draw(plot))
    text = environment.get_template(template).render(plots=plots, absent=absent, **page)
    # Of broken data: a lone surrogate cannot be written as UTF-8, and U+FFFD is no character of anybody
    path.write_text(shown(text.replace("\ufffd", "\\ufffd")), encoding="utf-8", errors="backslashreplace")
    return path


def _curve_plots(runs: Sequence[Run]) -> Iterable[Plot]:
    alone = len(runs) == 1
    for name, title, reading, metrics, percent in CURVES:
        curves = []
        for i, run in enumerate(runs):
            letter = "" if alone else chr(ord("A") + i)
            for j, (metric, label) in enumerate(metrics):
                words = ", ".join(filter(None, (letter, label)))
                if alone or not j:  # compared runs: the first metric of a plot, a colour a run
                    marks = {_set_name(prefix, k): run.points(metric, prefix) for k, prefix in enumerate(run.sets)}
                    curves.append(Curve(words, run.points(metric), marks, j if alone else i))
        yield Plot(name, title, reading, curves, percent=percent)


def _split(plots: Iterable[Plot]) -> tuple[list[Plot], list[str]]:
    """Plots that show something, and the titles of those that do not."""
    plots = list(plots)
    return [plot for plot in plots if not plot.empty], [plot.title for plot in plots if plot.empty]


def _set_name(prefix: str, number: int) -> str:
    """A name that every font can write."""
    name = prefix.removeprefix("eval").strip("_")
    return "evaluation" if not name else name if name.isascii() and name.isprintable() else f"set {number + 1}"


def _is_length_section(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("chosen"), dict) and "p50" in value["chosen"]


def _length_plot(run: Run, section: str) -> Plot | None:
    found = run.get("data_report.json")[section]
    bins = found.get("histogram") if isinstance(found, dict) else None
    if not bins:
        return None
    return Plot(
        f"lengths_{section}",
        f"Lengths, {section.replace('_', ' ', 1)} set",
        "Rows by tokens, stop text included. Chosen far to the right of rejected: length alone tells them apart.",
        bars={side: [each[side] for each in bins] for side in ("chosen", "rejected", "prompt")},
        edges=[bins[0]["from"], *(each["to"] for each in bins)],
        x="tokens",
        y="rows",
    )


def _before_after(run: Run) -> list[tuple[str, list[Compared]]]:
    """(evaluation set, rows of its table)."""
    results = {name: value for name, value in run.get("all_results.json").items() if value is not None}
    before = {name.removeprefix("base_"): value for name, value in results.items() if name.startswith("base_eval_")}
    after = {name: value for name, value in results.items() if name.startswith("eval_")}
    return list(compared(before, after, run.get("changes.json")))


def _groups(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of report/evaluation.py's figures: one for each group of pairs and model."""
    rows = []
    for way, groups in analysis.items():
        for name, models in ({"all": groups} if way == "all" else groups).items():
            for model, figures in models.items():
                row = {"name": name, "model": model, "pairs": figures["pairs"], "first": model == next(iter(models))}
                for key in ("accuracy", "length_controlled_accuracy"):
                    low, high = figures["interval"][key]
                    row[key] = f"{figures[key]:.1%} ({100 * low:.0f} to {high:.0%})"
                rows.append(row | {"margin": f"{figures['margin']:+.3f}"})
    return rows


def _side_by_side(runs: Iterable[Run], prefix: str) -> list[tuple[str, list[str]]]:
    """Rows of the table of several runs: label, the first run's base, then each run's result."""
    results = [run.get("all_results.json") for run in runs]
    rows = []
    for key, label, form, _ in ROWS:
        name = prefix + key.removeprefix("eval")
        values = [results[0].get(f"base_{name}"), *(result.get(name) for result in results)]
        if any(value is not None for value in values):
            rows.append((label, ["" if value is None else form.format(value) for value in values]))
    return rows


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The figures at the head of the page."""
    tiles: list[tuple[str, str]] = []
    for _, rows in _before_after(run)[:1]:
        for row in rows:
            if row.label in ("preference accuracy", "loss"):
                arrow = f"{row.before} → " if row.before else ""
                tiles.insert(0, (f"{row.label}, held out", arrow + row.after))
    facts, speed = run.get("run.json"), run.speed
    if "train_steps" in speed and facts.get("pairs_per_step"):
        tiles.append(("training", f"{speed['train_steps']:,.0f} steps of {facts['pairs_per_step']} pairs"))
    if "train_runtime" in speed:
        tiles.append(("time", _minutes(speed["train_runtime"])))
    if facts.get("trainable") and facts.get("parameters"):
        tiles.append(("trained", f"{facts['trainable'] / 1e6:,.1f} of {facts['parameters'] / 1e6:,.1f} M parameters"))
    return tiles


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:,.0f} s"


def _samples(run: Run) -> list[dict[str, Any]]:
    """Sample questions with their answers by model, and those given during training by step."""
    during: dict[Any, list[dict[str, Any]]] = {}
    for record in run.get("answers.jsonl", []):
        during.setdefault(record.get("source"), []).append(record)
    samples = run.get("samples.json", [])
    known = {sample.get("source") for sample in samples}
    samples = [*samples, *({**records[0]} for source, records in during.items() if source not in known)]
    names = ("base", "tuned", "model")
    return [
        {
            "source": sample.get("source", ""),
            "question": sample.get("question", ""),
            "chosen": sample.get("chosen"),
            "answers": {name: sample[name] for name in names if name in sample},
            "during": during.get(sample.get("source"), []),
        }
        for sample in samples
    ]


def _shared_samples(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Questions that more than one run answered, with the answers of the first base and of every run."""
    answers: dict[str, dict[str, Any]] = {}
    for letter, run in runs.items():
        for sample in run.get("samples.json", []):
            known = answers.setdefault(sample.get("question", ""), {})
            known.setdefault("base", sample.get("base", ""))
            known[letter] = sample.get("tuned", sample.get("model", ""))
    return [{"question": q, "answers": known} for q, known in answers.items() if len(known) > 2]


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """run.json without its levels; what differs between any two runs is left out."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in ("output_dir", "started")}


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m preference.report", description="Write the report of a run.")
    parser.add_argument("output_dir", nargs="?", help="the run's folder; report.html is written into it")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="folders of several runs, for one page over them")
    parser.add_argument("--output", metavar="FILE", help="the page that --compare writes (comparison.html)")
    options = parser.parse_args(arguments)
    if bool(options.output_dir) == bool(options.compare):
        parser.error("give a run's folder, or --compare and several")
    if options.output and not options.compare:
        parser.error("--output is for --compare; the report of a run is OUTPUT_DIR/report.html")
    try:
        if options.compare:
            path = write_comparison(options.compare, options.output or "comparison.html")
        else:
            path = write_report(options.output_dir)
    except (NotADirectoryError, ValueError) as error:
        parser.error(str(error))
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
