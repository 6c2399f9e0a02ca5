"""How fast rows become token ids: ours against TRL's ORPOTrainer, in one run, in turns.

    python benchmarks/bench_data.py                          # synthetic dialogues of HH-RLHF's shape
    python benchmarks/bench_data.py --data FILE              # real rows, in any format that training reads
    python benchmarks/bench_data.py --only_ours --rows 1000000 --turns 0 --cache_dir DIR     # speed and peak memory

Ours is the whole of build_dataset: rendering, encoding, length filter, Arrow. TRL's is what its constructor does to
rows that are rendered already, three maps of which one tokenizes; what the rest of the constructor takes is measured
and taken off. Rows per second are the best of the rounds. Memory is the peak resident set; with --cache_dir the
rows are generated twice and held by nobody.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

WORDS = """the a to and of you that it is for in I have can with be on are my not this do what your if they how would
want people about like know time person think feel really someone something help need make good way could sure right
children family doctor medicine kitchen water sugar school neighbour music history government money computer garden
question answer important different possible probably actually understand remember recommend suggest consider believe
because although however without between through against before after while during another several enough always never
small large better strange simple careful honest dangerous healthy expensive illegal private public early late quickly
house street window engine battery recipe vegetable chocolate temperature pressure symptom headache breathing insurance
letter account password program language country island river mountain winter summer morning evening yesterday tomorrow
sorry please thanks maybe okay well yes don't isn't I'm you're that's it's there's couldn't won't let's""".split()


class Dialogues:
    """`rows` synthetic triples, made anew each time they are iterated; `turns` pairs of history stand before each."""

    def __init__(self, rows: int, turns: int, seed: int = 0) -> None:
        self.rows, self.turns, self.seed = rows, turns, seed
        rng = random.Random(seed)
        weights = [1 / (rank + 3) for rank in range(len(WORDS))]
        self.sentences = [
            " ".join(rng.choices(WORDS, weights, k=rng.randint(4, 18))).capitalize() + rng.choice(".?!,")
            for _ in range(4000)
        ]

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator:
        from preference.data.row import Row

        rng = random.Random(self.seed + 1)
        size = len(self.sentences)

        def text(count: int) -> str:
            return " ".join([self.sentences[int(rng.random() * size)] for _ in range(count)])

        for line in range(1, self.rows + 1):
            history = tuple((text(1), text(3)) for _ in range(int(rng.random() * (2 * self.turns + 1))))
            chosen, rejected = text(1 + line % 4), text(1 + (line >> 2) % 4)
            yield Row(text(2), chosen, rejected, history=history, file="synthetic", line=line)


def prepare_ours(rows: Iterable, conv, tokenizer, max_length: int, cache_dir: str | None) -> int:
    from preference.data.report import DataReport
    from preference.tokens.datasets import build_dataset

    half = max_length // 2
    lengths = {"max_source_length": half, "max_target_length": max_length - half}
    return len(build_dataset(rows, conv, tokenizer, **lengths, report=DataReport(), cache_dir=cache_dir))


def prepare_trl(texts: list[dict[str, str]], model, tokenizer, max_length: int) -> None:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = ORPOConfig(folder, max_length=max_length, report_to="none", use_cpu=True, bf16=False)
        ORPOTrainer(model, args, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)


def compare(rows: list, conv, tokenizer, options: argparse.Namespace) -> None:
    from preference.tokens.rendering import Renderer
    from tiny import tiny_model

    renderer = Renderer(conv)
    texts = [renderer.render(row) for row in rows]
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ours, trl = [], []  # pairs of wall-clock and CPU seconds
    for _ in range(options.rounds):
        ours.append(timed(prepare_ours, rows, conv, tokenizer, options.max_length, None))
        fixed = timed(prepare_trl, texts[:2], model, tokenizer, options.max_length)
        whole = timed(prepare_trl, texts, model, tokenizer, options.max_length)
        trl.append((whole[0] - fixed[0], whole[1] - fixed[1]))
        print(f"  ours {speed(rows, ours[-1:])}    TRL {speed(rows, trl[-1:])}", flush=True)
    wall, cpu = (min(times[i] for times in trl) / min(times[i] for times in ours) for i in range(2))
    print(f"best: ours {speed(rows, ours)}, TRL {speed(rows, trl)}: {wall:.1f} times ({cpu:.1f} in CPU time)")


def speed(rows: list, times: list[tuple[float, float]]) -> str:
    wall, cpu = (len(rows) / min(seconds[i] for seconds in times) for i in range(2))
    return f"{wall:.0f} rows/s ({cpu:.0f} per CPU second)"


def timed(function, *arguments) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of all threads: the latter tell more where others use the machine too."""
    wall, cpu = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(rows: Iterable, count: int, conv, tokenizer, options: argparse.Namespace) -> None:
    generating, _ = timed(lambda: sum(1 for _ in rows))
    before = peak_mb()
    for name in ("first", "again"):
        wall, cpu = timed(prepare_ours, rows, conv, tokenizer, options.max_length, options.cache_dir)
        print(f"{name}: {count / wall:.0f} rows/s, {wall:.1f} s, {cpu:.1f} CPU seconds", flush=True)
        if not options.cache_dir:
            break
    at_start = f"{before:.0f} MB of it at the start"
    print(f"making the rows once took {generating:.1f} s; peak memory {peak_mb():.0f} MB, {at_start}")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts kilobytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="file or folder of real rows")
    parser.add_argument("--rows", type=int, default=2000, help="at most so many")
    parser.add_argument("--turns", type=int, default=2, help="mean number of history turns of synthetic rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--template", default="qwen")
    parser.add_argument("--tokenizer", default=str(ROOT / "models/SmolLM2-135M-Instruct"), help="folder, or tiny")
    parser.add_argument("--only_ours", action="store_true")
    parser.add_argument("--cache_dir", help="prepare on disk, below this folder, in a folder of its own")
    options = parser.parse_args()

    import datasets
    from transformers import AutoTokenizer

    from conversation import get_conv_template
    from preference.data.report import DataReport
    from preference.data.rows import load_rows

    datasets.disable_progress_bars()
    conv = get_conv_template(options.template)
    if options.tokenizer == "tiny":
        from tiny import tiny_tokenizer

        tokenizer = tiny_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    rows: Iterable = Dialogues(options.rows, options.turns)
    if options.data:
        rows = list(itertools.islice(load_rows([options.data], DataReport()), options.rows))
    sample = list(itertools.islice(rows, 1000))
    chars = sum(len(row.chosen) + len(row.rejected) + len(row.question) for row in sample) / len(sample)
    chars += sum(len(text) for row in sample for turn in row.history for text in turn) / len(sample)
    count = len(rows)
    print(f"{count} rows of {chars:.0f} characters, {options.template} template, {options.tokenizer}", flush=True)
    if not options.only_ours:
        compare(list(rows), conv, tokenizer, options)
        return
    if options.cache_dir:
        options.cache_dir = tempfile.mkdtemp(prefix="bench-", dir=options.cache_dir)
    try:
        measure(rows, count, conv, tokenizer, options)
    finally:
        if options.cache_dir:
            shutil.rmtree(options.cache_dir)


if __name__ == "__main__":
    main()
