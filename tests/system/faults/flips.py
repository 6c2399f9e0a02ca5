"""Flip single bits in every file that a run reads back: `flips.py --flips 10000`. Each must be noticed before use.

A checkpoint, the run's record, prepared data and reference log-probabilities, each as training writes them, are read
as training reads them; a flip is silent if what comes back passes for good.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "tokens"), str(ROOT)]

Target = tuple[str, Path, Callable[[], bool]]


def targets(work: Path) -> list[Target]:
    """(kind, file, whether its damage is noticed) for every file; `work` holds what two steps of a run leave."""
    from test_datasets import build, row
    from training import make_pairs, make_trainer

    from preference.integrity import fault
    from preference.tokens.cache import LOCKS
    from preference.train import reference
    from preference.train.resuming import resolve_start
    from preference.train.run_record import RUN_FILE, read_run

    pairs = make_pairs(8)
    options = {"loss": "dpo", "cache_dir": work / "reference", "max_steps": 2}
    trainer = make_trainer("packed", work / "run", pairs, save_strategy="steps", save_steps=2, **options)
    resolve_start(trainer, "auto", {"test": 1})
    trainer.train()
    build([row(line=1), row(chosen="Rest!", line=2)], cache_dir=work / "prepared")

    checkpoint = work / "run" / "checkpoint-2"
    [prepared] = [path for path in (work / "prepared").iterdir() if path.name != LOCKS]
    [numbers] = (work / "reference").iterdir()
    found: list[Target] = [
        (kind, path, lambda folder=folder: fault(folder) is not None)
        for kind, folder in (("checkpoint", checkpoint), ("prepared data", prepared))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    found.append(("run record", work / "run" / RUN_FILE, lambda: read_run(work / "run")[1] is not None))
    found.append(("reference", numbers, lambda: reference._read(numbers, 8) is None))
    return found


def campaign(flips: int, seed: int, work: Path) -> tuple[Counter[str], list[str]]:
    """(flips by kind of file, those that were silent); as many in each file, at random places."""
    logging.disable(logging.WARNING)
    draw, done, silent = random.Random(seed), Counter(), []
    files = targets(work)
    assert not any(noticed() for _, _, noticed in files), "something is damaged before any flip"
    for i in range(flips):
        kind, path, noticed = files[i % len(files)]
        at, bit = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        with path.open("r+b") as file:
            file.seek(at)
            good = file.read(1)
            file.seek(at)
            file.write(bytes([good[0] ^ bit]))
        if not noticed():
            silent.append(f"{path.name}, byte {at}, bit {bit}")
        with path.open("r+b") as file:
            file.seek(at)
            file.write(good)
        done[kind] += 1
    assert not any(noticed() for _, _, noticed in files), "a file was not put back"
    logging.disable(logging.NOTSET)
    return done, silent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        done, silent = campaign(args.flips, args.seed, Path(work))
    print(f"{done.total()} flips in {time.monotonic() - began:.0f} s: {dict(done)}; silent: {len(silent)}")
    sys.exit("\n".join(silent) if silent else 0)


if __name__ == "__main__":
    main()
