"""Prepared data on disk: one prepares, everybody else reads, and nobody waits for the dead."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from test_datasets import QWEN, build, row

from conversation import get_conv_template
from preference.data.report import DataError, DataReport
from preference.integrity import MANIFEST
from preference.tokens import cache
from preference.tokens.datasets import OUTCOME, PAIRS, build_dataset
from preference.tokens.pairs import PairBatcher
from tiny import tiny_tokenizer


def test_cached_dataset_and_its_report_are_the_same_again(tmp_path, monkeypatch):
    rows = [row(line=1), row("?", "Rest. " * 300, "No", line=2), row("", "A", "B", line=3, prompt="plain")]
    first, again, memory = DataReport(), DataReport(), DataReport()
    dataset = build(rows, first, cache_dir=tmp_path)
    monkeypatch.setattr(PairBatcher, "__call__", lambda *_: pytest.fail("prepared a second time"))
    assert build(iter(rows), again, cache_dir=tmp_path).to_list() == dataset.to_list()
    monkeypatch.undo()
    assert build(rows, memory).to_list() == dataset.to_list()
    assert first.to_dict() == again.to_dict() == memory.to_dict()
    assert first.dropped == {"too_long": 1} and len(first.warnings) == 1
    assert len(prepared(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [row(chosen="Rest!")]},
        {"rows": [row(line=2)]},
        {"rows": [row(system="Be brief.")]},
        {"conv": get_conv_template("qwen2_5")},
        {"source": 201},
        {"truncate": True},
        {"prompt_is_rendered": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_cache_knows_what_its_content_depends_on(tmp_path, change):
    build([row()], cache_dir=tmp_path)
    build(change.pop("rows", [row()]), cache_dir=tmp_path, **change)
    assert len(prepared(tmp_path)) == 2


def test_cache_knows_the_tokenizer(tmp_path):
    build([row()], cache_dir=tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Rest"])
    limits = {"max_source_length": 200, "max_target_length": 200}
    (pair,) = build_dataset([row()], QWEN, tokenizer, **limits, report=DataReport(), cache_dir=tmp_path)
    assert tokenizer.convert_tokens_to_ids("Rest") in pair["chosen_ids"]


def slow_make(calls: list[int], seconds: float = 0.3):
    def make(work):
        calls.append(1)
        time.sleep(seconds)
        (work / "numbers").write_bytes(bytes(range(256)))

    return make


def prepared(cache_dir) -> list[str]:
    """What a cache holds but for its locks."""
    return [path.name for path in cache_dir.iterdir() if path.name != cache.LOCKS]


def test_of_many_that_ask_at_once_one_prepares(tmp_path):
    calls: list[int] = []
    found = []
    ask = threading.Thread
    threads = [
        ask(target=lambda: found.append(cache.get_or_prepare(tmp_path, "key", slow_make(calls)))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "key"] * 5 and len(calls) == 1
    assert prepared(tmp_path) == ["key"]


PROGRAM = """
import os, signal, sys, time
from preference.tokens import cache
folder, die = sys.argv[1:]
def make(work):
    with open(folder + ".calls", "a") as calls:
        calls.write("x")
    (work / "half").write_text("x")
    if die == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
print(cache.get_or_prepare(folder, "key", make))
"""


def test_processes_share_one_preparation_and_none_waits_for_a_dead_one(tmp_path, root):
    """The first is killed while it prepares; of three others one clears up and prepares."""

    def start(die: str):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), die]
        return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)

    assert start("die").wait(60) == -9 and len(prepared(tmp_path / "cache")) == 1
    others = [start("live") for _ in range(3)]
    assert {other.communicate(timeout=60)[0].strip() for other in others} == {str(tmp_path / "cache" / "key").encode()}
    assert (tmp_path / "cache.calls").read_text() == "xx" and prepared(tmp_path / "cache") == ["key"]


def test_damage_is_named_thrown_away_and_prepared_again(tmp_path, caplog):
    rows = [row(line=1), row(chosen="Rest!", line=2)]
    whole = build(rows, cache_dir=tmp_path).to_list()
    [key] = prepared(tmp_path)
    good = {path.name: path.read_bytes() for path in (tmp_path / key).iterdir()}
    assert set(good) == {PAIRS, OUTCOME, MANIFEST}
    draw = random.Random(0)
    for name, content in good.items():
        for damage in ("flip", "cut", "gone"):
            path, at = tmp_path / key / name, draw.randrange(len(content))
            flipped = bytes([content[at] ^ 1 << draw.randrange(8)])
            if damage == "gone":
                path.unlink()
            else:
                path.write_bytes(content[:at] + (flipped + content[at + 1 :] if damage == "flip" else b""))
            caplog.clear()
            assert build(rows, cache_dir=tmp_path).to_list() == whole
            [warning] = [record.getMessage() for record in caplog.records if record.name == cache.__name__]
            assert name in warning and "thrown away and prepared again" in warning
            assert {path.name: path.read_bytes() for path in (tmp_path / key).iterdir()} == good


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(work):
        (work / "half").write_text("x")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        cache.get_or_prepare(tmp_path, "key", fail)
    assert not prepared(tmp_path)
    calls: list[int] = []
    assert cache.get_or_prepare(tmp_path, "key", slow_make(calls)) == tmp_path / "key"


def test_a_cached_run_that_keeps_nothing_fails_each_time_alike(tmp_path):
    for _ in range(2):
        report = DataReport()
        with pytest.raises(DataError, match="no pair is left of 1"):
            build([row()], report, source=1, target=1, cache_dir=tmp_path)
        assert report.dropped == {"too_long": 1}


def test_scores_that_make_a_margin_are_part_of_what_was_prepared(tmp_path):
    """The same texts with other scores are other data: the margin of a pair is made of the scores of its answers."""
    margins = []
    for score in (2.0, 5.0):
        scored = replace(row(), extra={"score_chosen": score, "score_rejected": 1.0})
        margins.append(build([scored], cache_dir=tmp_path)[0]["score_margin"])
    assert margins == [1.0, 4.0]
