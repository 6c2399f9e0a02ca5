"""A batch of checked rows -> a batch of tokenized pairs in Arrow, and the counts of what happened to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from preference.data.formats.base import PAIR_NUMBERS
from preference.data.row import Dialogue, Row
from preference.templates.conversation import ConversationError
from preference.templates.wholes import Part
from preference.tokens.encoding import Encoder, Ids, flatten, free_sentinel
from preference.tokens.mismatched import mismatch
from preference.tokens.rendering import Renderer
from preference.tokens.statistics import TokenStats

SIDES = ("prompt", "chosen", "rejected")
RUNS = ("chosen_runs", "rejected_runs")
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [(side, pa.string()) for side in SIDES]
    + [(f"{side}_ids", _IDS) for side in SIDES]
    + [("source", pa.string())]
    + [(name, pa.float32()) for name in (*PAIR_NUMBERS, "desirable")]  # null where a row has none
    # tokens that are learned, that are not, that are, ...: null where all of an answer are
    + [(name, _IDS) for name in RUNS]
)


@dataclass
class _Batch:
    """Rows on their way: their texts, then their ids. All lists are parallel to `rows`."""

    rows: list[Row] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})
    rendered: list[bool] = field(default_factory=list)  # whether the row brought its prompt rendered
    look_alikes: dict[int, list[str]] = field(default_factory=dict)
    marked: dict[int, tuple[str, dict[str, str]]] = field(default_factory=dict)  # row -> sentinel, marked texts
    ids: dict[str, list[Ids]] = field(default_factory=dict)
    parts: dict[int, dict[str, list[Part]]] = field(default_factory=dict)  # of rows of whole conversations
    runs: dict[str, dict[int, list[int]]] = field(default_factory=lambda: {side: {} for side in SIDES})


def pair_number(row: Row, name: str) -> float | None:
    """A number that the row brings for the loss; the margin, where none is written, from the scores of its answers."""
    chosen, rejected = row.extra.get("score_chosen"), row.extra.get("score_rejected")
    if name == "score_margin" and name not in row.extra and chosen is not None and rejected is not None:
        return float(chosen) - float(rejected)
    return row.extra.get(name)


class PairBatcher:
    """Turns lists of rows into Arrow batches with the columns of `build_dataset`; independent from call to call."""

    def __init__(
        self, renderer: Renderer, tokenizer: Any, max_source_length: int, max_target_length: int, truncate: bool
    ) -> None:
        self.renderer = renderer
        self.tokenizer = tokenizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.truncate = truncate
        self.encoder = Encoder(tokenizer, renderer.template_text)

    def new_stats(self) -> TokenStats:
        return TokenStats(self.max_source_length, self.max_target_length, self.truncate)

    def __call__(self, rows: list[Row]) -> tuple[pa.RecordBatch, TokenStats]:
        stats = self.new_stats()
        batch = self._render(rows, stats)
        self._encode(batch)
        return self._filter(batch, stats), stats

    def _render(self, rows: list[Row], stats: TokenStats) -> _Batch:
        batch = _Batch()
        for row in rows:
            try:
                if row.dialogue is not None:
                    self._render_whole(row, batch)
                    continue
                texts = self.renderer.render(row)
                rendered = self.renderer.is_rendered(row)
                marked = self._marked(row, rendered, texts)
            except ConversationError as error:
                stats.drop("template_refused", row, str(error))
                continue
            if marked is not None:
                sentinel, marked_texts, found = marked
                texts = {side: text.replace(sentinel, "") for side, text in marked_texts.items()}
                batch.marked[len(batch.rows)] = sentinel, marked_texts
                batch.look_alikes[len(batch.rows)] = found
            for side in SIDES:
                batch.texts[side].append(texts[side])
            batch.rows.append(row)
            batch.rendered.append(rendered)
        return batch

    def _render_whole(self, row: Row, batch: _Batch) -> None:
        """Raises ConversationError for a conversation that the template cannot write, or that spells control tokens."""
        found = [token for text in _leaves(row.dialogue) for token in self.encoder.control.found_in(text)]
        if found:
            raise ConversationError(f"{found[0]} stands as text in a conversation of several answers or with tools")
        parts = batch.parts[len(batch.rows)] = self.renderer.parts(row)
        for side in SIDES:
            batch.texts[side].append("".join(text for text, _ in parts[side]))
        batch.rows.append(row)
        batch.rendered.append(False)

    def _marked(self, row: Row, rendered: bool, texts: dict[str, str]) -> tuple[str, dict[str, str], list[str]] | None:
        """(sentinel, texts rendered from marked strings, look-alikes) of a row with look-alikes, None for others."""
        if row.prompt is not None:  # a stop text that its answers end in already is meant as such
            without_stop = self.renderer.without_stop
            row = replace(row, chosen=without_stop(row.chosen), rejected=without_stop(row.rejected))
        control = self.encoder.control
        data = [row.question, row.chosen, row.rejected, row.system or "", *itertools.chain.from_iterable(row.history)]
        if row.prompt is not None and not rendered:
            data.append(row.prompt)
        found = [token for text in data for token in control.found_in(text)]
        if not found:
            return None
        sentinel = free_sentinel([*data, *texts.values()])
        consumed = self.renderer.consumed(frozenset(found))

        def mark(text: str) -> str:
            return control.mark(text, sentinel)

        def mark_reply(text: str) -> str:
            return control.mark(text, sentinel, consumed)

        marked_row = replace(
            row,
            question=mark(row.question),
            chosen=mark_reply(row.chosen),
            rejected=mark_reply(row.rejected),
            system=None if row.system is None else mark(row.system),
            history=tuple((mark(user), mark_reply(assistant)) for user, assistant in row.history),
            prompt=row.prompt if row.prompt is None or rendered else mark(row.prompt),
        )
        return sentinel, self.renderer.render(marked_row), found

    def _encode(self, batch: _Batch) -> None:
        """Three calls to the tokenizer for the whole batch, and three for each sentinel that its look-alikes need."""
        encoder, ids = self.encoder, batch.ids
        ids["prompt"] = encoder.encode_prompts(batch.texts["prompt"])
        for side in ("chosen", "rejected"):
            ids[side] = encoder.encode_answers(batch.texts[side], ids["prompt"])
        for sentinel in {sentinel for sentinel, _ in batch.marked.values()}:
            where = [i for i, (other, _) in batch.marked.items() if other == sentinel]
            texts = {side: [batch.marked[i][1][side] for i in where] for side in SIDES}
            again = {"prompt": encoder.encode_prompts(texts["prompt"], sentinel)}
            for side in ("chosen", "rejected"):
                again[side] = encoder.encode_answers(texts[side], again["prompt"], sentinel)
            for side in SIDES:
                for i, row_ids in zip(where, again[side], strict=True):
                    ids[side][i] = row_ids
        for i, parts in batch.parts.items():
            for side in ("chosen", "rejected"):
                self._encode_parts(batch, i, side, parts[side])

    def _encode_parts(self, batch: _Batch, i: int, side: str, parts: Sequence[Part]) -> None:
        """Each part as the continuation of what stands before it, as a model that is served meets it."""
        ids: Ids = list(batch.ids["prompt"][i])
        start = len(ids)
        runs: list[int] = []
        for text, learned in parts:
            (found,) = self.encoder.encode_answers([text], [ids])
            ids += found
            if len(runs) % 2 != (not learned):  # two parts of one kind
                runs[-1] += len(found)
            else:
                runs.append(len(found))
        batch.ids[side][i] = ids[start:]
        if len(runs) > 1:  # else all of it is learned
            batch.runs[side][i] = runs

    def _filter(self, batch: _Batch, stats: TokenStats) -> pa.RecordBatch:
        """Drops or cuts what does not fit, and lays out the rest as Arrow."""
        limit = self.max_source_length + self.max_target_length
        kept: list[int] = []
        prompts, chosens, rejecteds = (batch.ids[side] for side in SIDES)
        for i, row in enumerate(batch.rows):
            prompt, answer = len(prompts[i]), max(len(chosens[i]), len(rejecteds[i]))
            stats.count_row(row, batch.rendered[i], batch.look_alikes.get(i, ()))
            stats.count_lengths(prompt, len(chosens[i]), len(rejecteds[i]))
            if not prompt:
                stats.drop("empty_prompt", row, "the prompt has no token")
                continue
            if prompt + answer > limit:
                if not self.truncate or row.dialogue is not None:
                    sizes = f"prompt {prompt} + longer answer {answer} = {prompt + answer}"
                    stats.drop("too_long", row, f"{sizes} tokens > {limit}")
                    continue
                self._cut(batch, i, stats)
            if row.label is None and chosens[i] == rejecteds[i]:
                stats.drop("identical_answers", row, "both answers are the same tokens")
                continue
            stats.keep(len(prompts[i]), len(chosens[i]), len(rejecteds[i]), row.label)
            kept.append(i)
        mismatch(batch.rows, kept, batch.texts, batch.ids, limit)
        columns: list[pa.Array] = [pa.array([batch.texts[side][i] for i in kept], pa.string()) for side in SIDES]
        for side in SIDES:
            flat, offsets = flatten([batch.ids[side][i] for i in kept])
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=_IDS))
        columns.append(pa.array([f"{batch.rows[i].file}:{batch.rows[i].line}" for i in kept], pa.string()))
        columns += [pa.array([pair_number(batch.rows[i], name) for i in kept], pa.float32()) for name in PAIR_NUMBERS]
        labels = (batch.rows[i].label for i in kept)
        columns.append(pa.array([None if label is None else float(label) for label in labels], pa.float32()))
        columns += [pa.array([batch.runs[name.split("_")[0]].get(i) for i in kept], _IDS) for name in RUNS]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)

    def _cut(self, batch: _Batch, i: int, stats: TokenStats) -> None:
        """Cuts row i of the batch, ids and text, in place."""
        prompt = batch.ids["prompt"][i]
        if len(prompt) > self.max_source_length:
            bos = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
            tail = self.max_source_length - len(bos)
            self._replace(batch, "prompt", i, bos + prompt[len(prompt) - tail :], stats)
        stop_tokens = len(self.encoder.encode_answers([self.renderer.conv.stop_str], [prompt])[0])
        for side in ("chosen", "rejected"):
            answer = batch.ids[side][i]
            if len(answer) > self.max_target_length:
                end = min(self.max_target_length, len(answer) - stop_tokens)
                self._replace(batch, side, i, answer[:end], stats)

    def _replace(self, batch: _Batch, side: str, i: int, ids: Ids, stats: TokenStats) -> None:
        batch.ids[side][i] = ids
        batch.texts[side][i] = decode(self.tokenizer, ids)
        stats.cut[side] += 1


def _leaves(value: Any) -> Iterator[str]:
    """Every text inside of a dialogue, names of arguments included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Dialogue):
        yield from _leaves([value.chosen, value.rejected, value.tools])
    elif isinstance(value, Mapping):
        yield from _leaves([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def decode(tokenizer: Any, ids: Ids) -> str:
    """The text of ids, every token and space of it."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
