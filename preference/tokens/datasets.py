"""Checked rows -> prompt, chosen and rejected ids: render, encode, filter by length, keep on disk.

    dataset = build_dataset(rows, conv, tokenizer, max_source_length=1024, max_target_length=1024, report=report)

Columns: `prompt`, `chosen`, `rejected` (text), `prompt_ids`, `chosen_ids`, `rejected_ids` (int32 lists; answers end
in the stop token), `source` ("file:line"). Rows of single answers have `desirable` besides (1 or 0); their answer is
`chosen`, and `rejected` is an answer to another prompt (tokens/mismatched.py). Every engine reads exactly these ids.
Prompts are encoded as a whole and without added special tokens, answers as a continuation that depends neither on the
other answer nor on the prompt's content. Where answers hold turns that are not learned, `chosen_runs` and
`rejected_runs` say which tokens are: so many that are learned, so many that are not, and so on; null where all are.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import marshal
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
from datasets import Dataset
from datasets.table import InMemoryTable, MemoryMappedTable

from preference.data.formats.base import PAIR_NUMBERS
from preference.data.report import DataError, DataReport
from preference.data.row import Row
from preference.data.splitting import split_by_prompt
from preference.templates.wholes import parts_of
from preference.tokens import cache
from preference.tokens.pairs import RUNS, SCHEMA, PairBatcher, pair_number
from preference.tokens.rendering import Renderer, render

__all__ = ["build_dataset", "render", "split_by_prompt"]

ROWS_PER_BATCH = 1024
CHARS_PER_BATCH = 16_000_000  # a batch of very long rows is cut sooner, so that memory stays flat
PAIRS, OUTCOME = "pairs.arrow", "outcome.json"  # the files of a prepared dataset
Write = Callable[[pa.RecordBatch], None]


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
    file, without any communication. Without `cache_dir` each caller prepares for itself, in memory. For many rows give
    a cache_dir, and `rows` that can be iterated twice without holding them all (KeptRows).

    Raises DataError with the numbers if no pair is left.
    """
    renderer = Renderer(conv, prompt_is_rendered)
    batcher = PairBatcher(renderer, tokenizer, max_source_length, max_target_length, truncate)
    if cache_dir is None:
        batches: list[pa.RecordBatch] = []
        outcome = _prepare(rows, batcher, batches.append)
        table = InMemoryTable(pa.Table.from_batches(batches, SCHEMA))
        fingerprint = uuid.uuid4().hex
    else:
        rows = list(rows) if iter(rows) is rows else rows  # it is read twice: for its key, and to be tokenized
        fingerprint = _key(rows, batcher)
        folder = cache.get_or_prepare(cache_dir, fingerprint, functools.partial(_write, rows, batcher))
        table = MemoryMappedTable.from_file(str(folder / PAIRS))
        outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    for drop in outcome["drops"]:
        report.drop(*drop)
    for warning in outcome["warnings"]:
        report.warn(warning)
    report.add_section(section, outcome["section"])
    if table.num_rows == 0:
        raise DataError(outcome["nothing_left"], reason="nothing_left")
    return Dataset(_with_numbers(table), fingerprint=fingerprint)


def _with_numbers(table: Any) -> Any:
    """The table without the columns of PAIR_NUMBERS that no row has; rows that lack one of the others get its rest."""
    for name, rest in PAIR_NUMBERS.items():
        at, column = table.column_names.index(name), table.column(name)
        if column.null_count == table.num_rows:
            table = table.remove_column(at)
        elif column.null_count:
            table = table.set_column(at, name, pc.fill_null(column, rest))
    at, pairs = table.column_names.index("desirable"), table.column("desirable").null_count
    if 0 < pairs < table.num_rows:
        raise ValueError(f"{pairs} of {table.num_rows} rows are pairs, the others single answers: data/singles.py")
    table = table.remove_column(at) if pairs else table
    if all(table.column(name).null_count == table.num_rows for name in RUNS):
        for name in RUNS:
            table = table.remove_column(table.column_names.index(name))
    return table


def _prepare(rows: Iterable[Row], batcher: PairBatcher, write: Write) -> dict[str, Any]:
    """Tokenizes all rows, hands them to `write` in batches, and returns what happened as a JSON-ready dict."""
    stats = batcher.new_stats()
    for record_batch, batch_stats in _map_ahead(batcher, _batches(rows)):
        write(record_batch)
        stats.add(batch_stats)
    return stats.outcome()


def _map_ahead(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """work(item) in the order of the items, holding three of them at a time.

    Two threads: while one is in the tokenizer, which uses all cores by itself and leaves Python's lock alone, the other
    does what Python has to do. More processes were measured and cost more than they brought (benchmarks/LOG.md).
    """
    with ThreadPoolExecutor(2) as pool:
        pending: deque[Future] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) == 3:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += len(row.prompt or row.question) + len(row.chosen) + len(row.rejected)
        if len(batch) == ROWS_PER_BATCH or chars > CHARS_PER_BATCH:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write(rows: Iterable[Row], batcher: PairBatcher, work: Path) -> None:
    """The dataset as an Arrow stream in the work folder, then what happened as JSON."""
    with pa.OSFile(str(work / PAIRS), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        outcome = _prepare(rows, batcher, stream.write_batch)
    (work / OUTCOME).write_text(json.dumps(outcome, ensure_ascii=False), encoding="utf-8")


def _key(rows: Iterable[Row], batcher: PairBatcher) -> str:
    """Hash of everything the prepared dataset depends on: code, template, tokenizer, lengths and every row."""
    digest = hashlib.blake2b(digest_size=16)
    renderer, tokenizer = batcher.renderer, batcher.tokenizer
    conv = renderer.conv
    here = Path(__file__).parent
    code = [here / f"{name}.py" for name in ("datasets", "pairs", "encoding", "rendering", "statistics", "mismatched")]
    code += [Path(inspect.getfile(made)) for made in (parts_of, type(conv))]
    for path in code:
        digest.update(path.read_bytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    settings = [
        tokenizers.__version__,
        vocabulary,
        sorted(tokenizer.special_tokens_map.items()),
        (renderer.template_text, conv.stop_str, conv.jinja(), renderer.prompt_is_rendered),
        (batcher.max_source_length, batcher.max_target_length, batcher.truncate),
    ]
    digest.update(repr(settings).encode("utf-8", "surrogatepass"))
    for row in rows:
        texts = (row.question, row.chosen, row.rejected, row.system, row.history, row.prompt, row.file, row.line)
        more = (row.label, *(pair_number(row, name) for name in PAIR_NUMBERS))
        whole = None if row.dialogue is None else json.dumps(asdict(row.dialogue))
        digest.update(marshal.dumps((*texts, *more, whole), 2))  # version 2 has no references: equal rows, equal bytes
    return digest.hexdigest()


def sets_of(rows: Dataset | Mapping[str, Dataset] | None) -> dict[str, Dataset]:
    """The sets of an evaluation by name: none, one without a name, or several."""
    return dict(rows) if isinstance(rows, Mapping) else {} if rows is None else {"": rows}
