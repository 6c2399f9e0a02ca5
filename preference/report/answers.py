"""A few evaluation questions, answered greedily by the base and by the tuned model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preference.arguments import Arguments
from preference.data.text_stats import script_of
from preference.report.tables import greedy_answers
from preference.templates.resolve import stop_token_ids
from preference.tokens.datasets import sets_of
from preference.train.sharding import takes_all_ranks


def _of_the_commonest_script(texts: Sequence[str]) -> list[int]:
    """Which of the texts are in the script that most are in: a model is shown in what it is mostly asked in."""
    scripts = [script_of(text) for text in texts]
    commonest = Counter(scripts).most_common(1)[0][0]
    return [i for i, script in enumerate(scripts) if script == commonest]


def _good(eval_set: Any) -> Iterator[float]:
    """Of each row whether its chosen answer is a good one: single answers may be bad."""
    for rows in sets_of(eval_set).values():
        yield from rows["desirable"] if "desirable" in rows.column_names else [1.0] * len(rows)


class Samples:
    """The questions, drawn with the run's seed from those in the set's commonest script, and what each model answered.

    Args:
        eval_set: one set, several by name, or None: then nothing is asked.
        questions: of the evaluation pairs by their source.

    Attributes:
        rows: the pairs asked about. records: {source, question, chosen, base, tuned} of each, JSON-ready.
    """

    def __init__(
        self, args: Arguments, trainer: Any, conversation: Any, eval_set: Any, questions: Mapping[str, str]
    ) -> None:
        places = [(rows, i) for rows in sets_of(eval_set).values() for i in range(len(rows))]
        sources = [source for rows in sets_of(eval_set).values() for source in rows["source"]]
        asked = _of_the_commonest_script([questions[source] for source in sources]) if sources else []
        bad = {at for at, good in enumerate(_good(eval_set)) if not good}
        asked = [at for at in asked if at not in bad] or asked  # a good answer is shown beside them
        count = min(args.run.sample_answers, len(asked))
        picked = sorted(random.Random(args.run.seed).sample(asked, count))
        self.rows = [rows[i] | {"question": questions[sources[at]]} for at in picked for rows, i in [places[at]]]
        self.records = [{key: row[key] for key in ("source", "question", "chosen")} for row in self.rows]
        self.trainer, self.tokens = trainer, args.run.sample_tokens
        self.stop_ids = stop_token_ids(conversation, trainer.processing_class)

    def answer(self, who: str) -> None:
        """The first rank generates; all of them do where the model's weights are shared out."""
        if not (self.trainer.is_world_process_zero() or takes_all_ranks(self.trainer)):
            return
        self.trainer.shard()
        prompts = [row["prompt_ids"] for row in self.rows]
        tokenizer = self.trainer.processing_class
        answers = greedy_answers(self.trainer.model, tokenizer, prompts, self.stop_ids, self.tokens)
        for record, answer in zip(self.records, answers, strict=True):
            record[who] = answer
