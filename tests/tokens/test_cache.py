"""Prepared data on disk: one prepares, everybody else reads, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_datasets import QWEN, build, row

from conversation import get_conv_template
from preference.data.report import DataError, DataReport
from preference.tokens import cache
from preference.tokens.datasets import build_dataset
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
    (folder,) = tmp_path.iterdir()  # no lock and no work folder is left
    assert {path.name for path in folder.iterdir()} == {"pairs.arrow", cache.DONE}


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
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_knows_the_tokenizer(tmp_path):
    build([row()], cache_dir=tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Rest"])
    limits = {"max_source_length": 200, "max_target_length": 200}
    (pair,) = build_dataset([row()], QWEN, tokenizer, **limits, report=DataReport(), cache_dir=tmp_path)
    assert tokenizer.convert_tokens_to_ids("Rest") in pair["chosen_ids"]


def slow_make(calls: list[int], seconds: float = 0.3):
    def make(work, progress):
        calls.append(1)
        for step in range(3):
            time.sleep(seconds / 3)
            progress(step)
        (work / cache.DONE).write_text("done")

    return make


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
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_ranks_in_processes_of_their_own_share_one_preparation(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from preference.tokens import cache\n"
        "def make(work, progress):\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write('x'); time.sleep(0.5)\n"
        "    (work / cache.DONE).write_text('done')\n"
        f"print(cache.get_or_prepare({str(tmp_path / 'cache')!r}, 'key', make))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    ranks = [subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE) for _ in range(3)]
    assert {rank.communicate(timeout=60)[0].strip() for rank in ranks} == {str(tmp_path / "cache" / "key").encode()}
    assert (tmp_path / "calls").read_text() == "x"


@pytest.mark.parametrize("dead", [True, False])
def test_a_lock_whose_holder_died_or_stands_still_is_taken_over(tmp_path, dead):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    holder = {"token": "x", "host": socket.gethostname(), "pid": gone.pid if dead else os.getpid(), "rows": 5}
    (tmp_path / "key.lock").write_text(json.dumps(holder))
    (tmp_path / "key.work-left").mkdir()
    if not dead:  # it did make progress once
        late = json.dumps(holder | {"rows": 6})
        threading.Timer(0.5, lambda: (tmp_path / "key.lock").write_text(late)).start()
    calls: list[int] = []
    start = time.monotonic()
    cache.get_or_prepare(tmp_path, "key", slow_make(calls), stall_seconds=600 if dead else 1.0)
    assert len(calls) == 1 and time.monotonic() - start < 30
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_holder_that_makes_progress_is_waited_for(tmp_path):
    calls: list[int] = []
    holder = threading.Thread(target=cache.get_or_prepare, args=(tmp_path, "key", slow_make(calls, 3.0)))
    holder.start()
    while not (tmp_path / "key.lock").exists():
        time.sleep(0.01)
    cache.get_or_prepare(tmp_path, "key", slow_make(calls), stall_seconds=2.0)  # each step takes one
    holder.join()
    assert len(calls) == 1


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(work, progress):
        (work / "half").write_text("x")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        cache.get_or_prepare(tmp_path, "key", fail)
    assert not list(tmp_path.iterdir())
    calls: list[int] = []
    assert cache.get_or_prepare(tmp_path, "key", slow_make(calls)) == tmp_path / "key"


def test_a_cached_run_that_keeps_nothing_fails_each_time_alike(tmp_path):
    for _ in range(2):
        report = DataReport()
        with pytest.raises(DataError, match="no pair is left of 1"):
            build([row()], report, source=1, target=1, cache_dir=tmp_path)
        assert report.dropped == {"too_long": 1}
