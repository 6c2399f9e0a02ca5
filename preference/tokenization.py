"""Checked rows -> prompt, chosen and rejected ids: render, encode, filter by length, keep on disk.

    dataset = build_dataset(rows, conv, tokenizer, max_source_length=1024, max_target_length=1024, report=report)

Columns: `prompt`, `chosen`, `rejected` (text), `prompt_ids`, `chosen_ids`, `rejected_ids` (int32 lists; answers end
in the stop token), `source` ("file:line"). Every engine reads exactly these ids. Prompts are encoded as a whole and
without added special tokens, answers as a continuation that depends neither on the other answer nor on the prompt's
content.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import marshal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import tokenizers
from datasets import Dataset
from datasets.table import InMemoryTable, MemoryMappedTable

from preference import prepared
from preference.data_report import DataError, DataReport
from preference.encoding import Encoder, Ids, flatten, free_sentinel
from preference.rendering import Renderer, render
from preference.splitting import split_by_prompt
from preference.token_stats import TokenStats
from preference.triples import Row

__all__ = ["build_dataset", "describe_pair", "render", "split_by_prompt"]

ROWS_PER_BATCH = 2048
CHARS_PER_BATCH = 16_000_000  # a batch of very long rows is cut sooner, so that memory stays flat
SIDES = ("prompt", "chosen", "rejected")
IDS = pa.list_(pa.int32())
Write = Callable[[pa.RecordBatch], None]
Progress = Callable[[int], None]
SCHEMA = pa.schema(
    [(side, pa.string()) for side in SIDES] + [(f"{side}_ids", IDS) for side in SIDES] + [("source", pa.string())]
)


def build_dataset(
    rows: Iterable[Row],
    conv: Any,
    tokenizer: Any,
    *,
    max_source_length: int,
    max_target_length: int,
    report: DataReport,
    truncate: bool = False,
    cache_dir: str | Path | None = None,
    prompt_is_rendered: bool = False,
    section: str = "tokens",
) -> Dataset:
    """Tokenized pairs of `rows` as a dataset; what happened to them goes to `report` (figures under `section`).

    A pair is kept whole if prompt + chosen and prompt + rejected, stop text included, each fit in
    max_source_length + max_target_length tokens, else dropped (`too_long`). With `truncate` it is cut instead: the
    prompt to its last max_source_length tokens (what the answer follows stays; a BOS in front stays too), the answers
    to their first max_target_length, without a stop token where something was cut.

    With `cache_dir` the result is memory-mapped from disk, and found there by the next call with the same rows,
    template, tokenizer and lengths. All ranks of a run may call this at once: one prepares, the others wait for its
    file, without any communication. Without `cache_dir` each caller prepares for itself, in memory. At a million rows,
    give a cache_dir and `rows` that can be iterated twice without holding them all.

    Raises DataError with the numbers if no pair is left.
    """
    plan = _Plan(Renderer(conv, prompt_is_rendered), tokenizer, max_source_length, max_target_length, truncate)
    if cache_dir is None:
        batches: list[pa.RecordBatch] = []
        outcome = _prepare(rows, plan, batches.append)
        table = InMemoryTable(pa.Table.from_batches(batches, SCHEMA))
        fingerprint = uuid.uuid4().hex
    else:
        rows = list(rows) if iter(rows) is rows else rows  # it is read twice: for its key, and to be tokenized
        fingerprint = _key(rows, plan)
        folder = prepared.get_or_prepare(cache_dir, fingerprint, functools.partial(_write, rows, plan))
        table = MemoryMappedTable.from_file(str(folder / "pairs.arrow"))
        outcome = json.loads((folder / prepared.DONE).read_text(encoding="utf-8"))
    for drop in outcome["drops"]:
        report.drop(*drop)
    for warning in outcome["warnings"]:
        report.warn(warning)
    report.add_section(section, outcome["section"])
    if table.num_rows == 0:
        raise DataError(outcome["nothing_left"], reason="nothing_left")
    return Dataset(table, fingerprint=fingerprint)


@dataclass(frozen=True)
class _Plan:
    renderer: Renderer
    tokenizer: Any
    max_source_length: int
    max_target_length: int
    truncate: bool

    @property
    def max_length(self) -> int:
        return self.max_source_length + self.max_target_length


@dataclass
class _Batch:
    """Rows on their way: their texts, then their ids."""

    rows: list[Row]
    texts: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})
    marked: dict[int, tuple[str, dict[str, str]]] = field(default_factory=dict)  # row -> sentinel, marked texts
    rendered: list[bool] = field(default_factory=list)
    look_alikes: dict[int, list[str]] = field(default_factory=dict)
    ids: dict[str, list[Ids]] = field(default_factory=dict)


def _prepare(rows: Iterable[Row], plan: _Plan, write: Write, progress: Progress | None = None) -> dict[str, Any]:
    """Tokenizes all rows, hands them to `write` in batches, and returns what happened as a JSON-ready dict."""
    encoder = Encoder(plan.tokenizer, plan.renderer.template_text)
    stats = TokenStats(plan.max_source_length, plan.max_target_length, plan.truncate)
    for batch in _ahead(_batches(rows), lambda batch: _encode(_rendered(batch, plan, encoder), encoder)):
        write(_record_batch(batch, plan, encoder, stats))
        if progress is not None:
            progress(stats.rows)
    return stats.outcome()


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += len(row.question) + len(row.chosen) + len(row.rejected)
        if len(batch) == ROWS_PER_BATCH or chars > CHARS_PER_BATCH:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _ahead(items: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """work(item) for each item in order, one item ahead of its consumer: the tokenizer leaves Python's lock alone."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None
        for item in items:
            following = pool.submit(work, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _rendered(rows: list[Row], plan: _Plan, encoder: Encoder) -> _Batch:
    batch = _Batch(rows)
    renderer, control = plan.renderer, encoder.control
    for i, row in enumerate(rows):
        texts = renderer.render(row)
        for side in SIDES:
            batch.texts[side].append(texts[side])
        rendered = renderer.is_rendered(row)
        batch.rendered.append(rendered)
        if row.prompt is not None:
            row = replace(row, chosen=renderer.without_stop(row.chosen), rejected=renderer.without_stop(row.rejected))
        data = _data_strings(row, rendered)
        found = [token for text in data for token in control.found_in(text)]
        if found:
            sentinel = free_sentinel([*data, *texts.values()])
            marked_row = _map_data(row, rendered, lambda text: control.mark(text, sentinel))  # noqa: B023 (used at once)
            batch.marked[i] = sentinel, renderer.render(marked_row)
            batch.look_alikes[i] = found
    return batch


def _data_strings(row: Row, prompt_is_rendered: bool) -> list[str]:
    """The strings of a row in which control text is not meant."""
    strings = [row.question, row.chosen, row.rejected, row.system or ""]
    strings += itertools.chain.from_iterable(row.history)
    if row.prompt is not None and not prompt_is_rendered:
        strings.append(row.prompt)
    return strings


def _map_data(row: Row, prompt_is_rendered: bool, change: Callable[[str], str]) -> Row:
    keep_prompt = row.prompt is None or prompt_is_rendered
    return replace(
        row,
        question=change(row.question),
        chosen=change(row.chosen),
        rejected=change(row.rejected),
        system=None if row.system is None else change(row.system),
        history=tuple((change(user), change(assistant)) for user, assistant in row.history),
        prompt=row.prompt if keep_prompt else change(row.prompt),
    )


def _encode(batch: _Batch, encoder: Encoder) -> _Batch:
    """Three calls to the tokenizer for the whole batch, and three for each sentinel that rows with look-alikes need."""
    ids = {"prompt": encoder.encode_prompts(batch.texts["prompt"])}
    for side in ("chosen", "rejected"):
        ids[side] = encoder.encode_answers(batch.texts[side], ids["prompt"])
    for sentinel in {sentinel for sentinel, _ in batch.marked.values()}:
        where = [i for i, (other, _) in batch.marked.items() if other == sentinel]
        texts = {side: [batch.marked[i][1][side] for i in where] for side in SIDES}
        prompts = encoder.encode_prompts(texts["prompt"], sentinel)
        answers = {side: encoder.encode_answers(texts[side], prompts, sentinel) for side in ("chosen", "rejected")}
        for j, i in enumerate(where):
            ids["prompt"][i] = prompts[j]
            ids["chosen"][i] = answers["chosen"][j]
            ids["rejected"][i] = answers["rejected"][j]
    batch.ids = ids
    return batch


def _record_batch(batch: _Batch, plan: _Plan, encoder: Encoder, stats: TokenStats) -> pa.RecordBatch:
    """Drops or cuts what does not fit, and lays out the rest as Arrow."""
    kept: list[int] = []
    for i, row in enumerate(batch.rows):
        prompt, chosen, rejected = (batch.ids[side][i] for side in SIDES)
        stats.count_row(row, batch.rendered[i], batch.look_alikes.get(i, ()), len(prompt), len(chosen), len(rejected))
        longest = len(prompt) + max(len(chosen), len(rejected))
        if not prompt:
            stats.drop("empty_prompt", row, "the prompt has no token")
        elif longest > plan.max_length and not plan.truncate:
            answer = longest - len(prompt)
            stats.drop("too_long", row, f"prompt {len(prompt)} + answer {answer} = {longest} > {plan.max_length}")
        else:
            if longest > plan.max_length:
                _cut(batch, i, plan, encoder, stats)
            if batch.ids["chosen"][i] == batch.ids["rejected"][i]:
                stats.drop("identical_answers", row, "both answers are the same tokens")
            else:
                stats.keep(*(len(batch.ids[side][i]) for side in SIDES))
                kept.append(i)
    columns: list[pa.Array] = [pa.array([batch.texts[side][i] for i in kept], pa.string()) for side in SIDES]
    for side in SIDES:
        flat, offsets = flatten([batch.ids[side][i] for i in kept])
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=IDS))
    columns.append(pa.array([f"{batch.rows[i].file}:{batch.rows[i].line}" for i in kept], pa.string()))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _cut(batch: _Batch, i: int, plan: _Plan, encoder: Encoder, stats: TokenStats) -> None:
    """Cuts row i of the batch, ids and text, in place."""
    prompt = batch.ids["prompt"][i]
    if len(prompt) > plan.max_source_length:
        bos = prompt[:1] if prompt[0] == plan.tokenizer.bos_token_id else []
        tail = plan.max_source_length - len(bos)
        _replace(batch, "prompt", i, bos + prompt[len(prompt) - tail :], plan, stats)
    stop_tokens = len(encoder.encode_answers([plan.renderer.conv.stop_str], [prompt])[0])
    for side in ("chosen", "rejected"):
        answer = batch.ids[side][i]
        if len(answer) > plan.max_target_length:
            _replace(batch, side, i, answer[: min(plan.max_target_length, len(answer) - stop_tokens)], plan, stats)


def _replace(batch: _Batch, side: str, i: int, ids: Ids, plan: _Plan, stats: TokenStats) -> None:
    batch.ids[side][i] = ids
    batch.texts[side][i] = plan.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stats.cut[side] += 1


def _write(rows: Iterable[Row], plan: _Plan, work: Path, progress: Progress) -> None:
    """The dataset as an Arrow stream in the work folder, then what happened as JSON."""
    with pa.OSFile(str(work / "pairs.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        outcome = _prepare(rows, plan, stream.write_batch, progress)
    (work / prepared.DONE).write_text(json.dumps(outcome, ensure_ascii=False), encoding="utf-8")


def _key(rows: Iterable[Row], plan: _Plan) -> str:
    """Hash of everything the prepared dataset depends on: code, template, tokenizer, lengths and every row."""
    digest = hashlib.blake2b(digest_size=16)
    conv = plan.renderer.conv
    here = Path(__file__).parent
    code = [here / f"{name}.py" for name in ("tokenization", "encoding", "rendering", "token_stats")]
    code.append(Path(sys.modules[type(conv).__module__].__file__ or ""))
    for path in code:
        digest.update(path.read_bytes())
    backend = getattr(plan.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(plan.tokenizer.get_vocab().items()))
    limits = plan.max_source_length, plan.max_target_length, plan.truncate, plan.renderer.prompt_is_rendered
    settings = (plan.renderer.template_text, conv.stop_str, vocabulary, repr(plan.tokenizer.special_tokens_map), limits)
    digest.update(repr((settings, tokenizers.__version__)).encode("utf-8", "surrogatepass"))
    for row in rows:
        fields = (row.question, row.chosen, row.rejected, row.system, row.history, row.prompt, row.file, row.line)
        digest.update(marshal.dumps(fields, 2))  # version 2 has no references, so equal rows give equal bytes
    return digest.hexdigest()


def describe_pair(row: dict[str, Any], tokenizer: Any, max_chars: int = 2000) -> str:
    """One pair of `build_dataset` for the eye: the prompt, the learned tokens between ⟦ and ⟧, and their ends."""
    prompt, chosen, rejected = (len(row[f"{side}_ids"]) for side in SIDES)
    head = f"{row['source']}: {prompt} prompt tokens; learned: {chosen} tokens of chosen, {rejected} of rejected"
    lines = [head, "prompt", _shortened(_decode(tokenizer, row["prompt_ids"]), max_chars)]
    for side in ("chosen", "rejected"):
        ids = [int(i) for i in row[f"{side}_ids"]]
        lines += [f"{side} (learned between ⟦ and ⟧)", f"⟦{_shortened(_decode(tokenizer, ids), max_chars)}⟧"]
        ends = ids[:3] + ids[-2:] if len(ids) > 5 else ids
        shown = [f"{_decode(tokenizer, [i])!r}={i}" for i in ends]
        if len(ids) > 5:
            shown.insert(3, "…")
        lines.append(f"  tokens: {' '.join(shown)}")
    return "\n".join(lines)


def _decode(tokenizer: Any, ids: Iterable[int]) -> str:
    ids = [int(i) for i in ids]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters) … {text[-half:]}"
