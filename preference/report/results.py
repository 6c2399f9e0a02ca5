"""The end of a run: what changed, as files in its folder and on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preference.arguments import Arguments
from preference.files import save_json
from preference.report.answers import Samples
from preference.report.evaluation import Evaluation, table
from preference.report.outcome import show_next, show_outcome
from preference.report.page import write_report
from preference.report.run_folder import Run
from preference.report.story import story
from preference.report.tables import comparison, model_card, side_by_side
from preference.terminal.console import Terminal


def write_results(
    args: Arguments,
    source: str,
    facts: Mapping[str, Any],
    training: Mapping[str, float],
    evaluation: Evaluation,
    samples: Samples,
    terminal: Terminal,
) -> None:
    """Figures and answers as files, report.html, the model card; the same on the screen. For one process.

    Args:
        source: the base model. facts: what run.json holds. training: the metrics that the training returned.
    """
    output_dir = Path(args.run.output_dir)
    before, after = (evaluation.metrics.get(who, {}) for who in ("base", "tuned"))
    analysis, changes = evaluation.analysis(), evaluation.changes()
    base = {f"base_{name}": value for name, value in before.items()}
    save_json(output_dir / "all_results.json", {**training, **base, **after})
    save_json(output_dir / "samples.json", samples.records)
    if analysis:
        save_json(output_dir / "evaluation.json", analysis)
        save_json(output_dir / "changes.json", changes)
        save_json(output_dir / "worst_pairs.json", evaluation.worst("tuned"))
        save_json(output_dir / "best_pairs.json", evaluation.best("tuned"))
    if args.run.do_train:
        card = model_card(source, facts, training, comparison(before, after))
        (output_dir / "README.md").write_text(card, encoding="utf-8")
    report = write_report(output_dir) if args.run.html_report else None
    terminal.stop_bar()
    for record in samples.records:
        answers = {name: record[name] for name in ("base", "tuned") if name in record}
        terminal.say("\n" + side_by_side(record["question"], answers, terminal.width if terminal.coloured else None))
    if after:
        show_outcome(before, after, changes, terminal)
    if analysis and not terminal.coloured:
        terminal.say(f"\n{table(analysis)}")
    if told := story(Run.read(output_dir)):
        terminal.say(f"\n{told}")
    show_next(output_dir, report, terminal, trained=args.run.do_train)
