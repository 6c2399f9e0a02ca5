"""The end of a run: what changed, as files in its folder and on the screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from preference.arguments import Arguments
from preference.files import save_json
from preference.report.answers import Samples
from preference.report.evaluation import Evaluation, table
from preference.report.page import write_report
from preference.report.tables import comparison, model_card, side_by_side


def write_results(
    args: Arguments,
    source: str,
    facts: Mapping[str, Any],
    training: Mapping[str, float],
    evaluation: Evaluation,
    samples: Samples,
    say: Callable[[str], None],
) -> None:
    """Figures and answers as files, report.html, the model card; the same on the screen. For one process.

    Args:
        source: the base model. facts: what run.json holds. training: the metrics that the training returned.
    """
    output_dir = Path(args.run.output_dir)
    before, after = (evaluation.metrics.get(who, {}) for who in ("base", "tuned"))
    analysis, compared = evaluation.analysis(), comparison(before, after)
    base = {f"base_{name}": value for name, value in before.items()}
    save_json(output_dir / "all_results.json", {**training, **base, **after})
    save_json(output_dir / "samples.json", samples.records)
    if analysis:
        save_json(output_dir / "evaluation.json", analysis)
        save_json(output_dir / "worst_pairs.json", evaluation.worst("tuned"))
    if args.run.do_train:
        (output_dir / "README.md").write_text(model_card(source, facts, training, compared), encoding="utf-8")
    for record in samples.records:
        answers = {name: record[name] for name in ("base", "tuned") if name in record}
        say("\n" + side_by_side(record["question"], answers))
    say(f"\n{compared}")
    if analysis:
        say(f"\n{table(analysis)}")
    say(f"\nsaved in {output_dir}" + (f"; read {write_report(output_dir)}" if args.run.html_report else ""))
