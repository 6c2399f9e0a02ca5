"""`ranks.py WORLD RUNS RESULTS`, run in tests: trains the runs of a JSON list on all ranks, writes what each logged.

The ranks are forks of one process that has imported everything: torchrun would import it once for each. torchrun
itself is what tests/launch starts; under it `ranks.py RUNS RESULTS` is one rank.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/models"), str(ROOT)]

OVER_4_BITS = "over 4 bits"
if __name__ == "__main__":
    gc.disable()
if __name__ == "__main__" and OVER_4_BITS in Path(sys.argv[-2]).read_text():
    sys.modules.pop("bitsandbytes", None)  # tests/conftest.py keeps it from programs that need none

import torch.distributed as dist  # noqa: E402
from training import lora, make_pairs, make_trainer, pairs_of, poison, single_answers  # noqa: E402

from preference.arguments import parse_arguments  # noqa: E402
from preference.models.hardware import Hardware  # noqa: E402
from preference.models.loading import load_base  # noqa: E402
from preference.models.sources import find_model  # noqa: E402
from preference.train.sharding import join_deepspeed, strategy_options  # noqa: E402
from preference.train.watchdog import TrainingError  # noqa: E402
from tiny import tiny_model  # noqa: E402


def four_bits(folder: Path) -> Any:
    """The tiny model with its linear layers in 4 bits, alike on every rank."""
    from handed_in import make_plain

    together = dist.is_initialized()  # then only the first rank writes what is saved
    folder = folder / ("whole" if together else f"whole-{os.environ.get('RANK', 0)}")
    if not together or dist.get_rank() == 0:
        make_plain(folder)
    if together:
        dist.barrier()
    return load_base(find_model(str(folder)), parse_arguments(["--qlora", "true"]), Hardware("cpu", "CPU", 0, False))


def train_one(output: Path, run: dict) -> dict:
    """One run: `pairs` and `eval_pairs` are (count, seed), `arch` and `adapter` a kind of model, the rest is for
    make_trainer.

    With `single_answers`, the pairs are rows of one answer.
    Runs under strategy=fsdp come last: accelerate keeps the first it sees of it for the process.
    """
    run = dict(run)
    make = single_answers if run.pop("single_answers", False) else make_pairs
    pairs = make(*run.pop("pairs"))
    if "poisoned_row" in run:
        rows = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in pairs]
        rows[run["poisoned_row"]][1][0] = 509
        pairs = pairs_of(rows)
    evaluation = run.pop("eval_pairs", None)
    model = tiny_model(run.pop("arch", "llama"))
    if run.pop("poisoned_row", None) is not None:
        model = poison(model)
    if (adapter := run.pop("adapter", False)) == OVER_4_BITS:
        model = lora(four_bits(output))
    elif adapter:
        model = lora(model)
    evaluation = make(*evaluation) if evaluation else None
    before = run.pop("evaluate_before", False)
    if (strategy := run.pop("strategy", "ddp")) != "ddp":
        run |= strategy_options(strategy, int(os.environ["WORLD_SIZE"]))
        join_deepspeed(strategy)
    trainer = make_trainer(run.pop("engine", "packed"), output, pairs, model=model, eval_pairs=evaluation, **run)
    if before:
        trainer.evaluate()
        if before == "and leave it so":
            trainer.prepare_anew = lambda: None
    try:
        trainer.train()
    except TrainingError as stopped:
        return {"stopped": str(stopped), "rows": stopped.rows, "step": trainer.state.global_step}
    metrics = trainer.evaluate() if evaluation else {}
    return {"log": trainer.state.log_history, "metrics": metrics}


def train_all(runs: str, results: str) -> None:
    """What one rank does."""
    output = Path(results).parent / "runs"
    answers = [train_one(output / str(i), run) for i, run in enumerate(json.loads(Path(runs).read_text()))]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, answers)
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(everyone))
    sys.stderr.flush()
    os._exit(0)  # see end_process of orpo_train.py


def begin_rank(rank: int, world: int, port: int, *words: str) -> None:
    """A process that was just forked, in the environment that torchrun's agent gives one."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    train_all(*words)


def main(world: int, *words: str) -> None:
    """Fork the ranks and keep the store where they meet; one that fails ends the others."""
    gc.freeze()  # tests/conftest.py says why
    gc.enable()
    ports, ranks = os.pipe(), []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            try:
                begin_rank(rank, world, int(os.read(ports[0], 5)), *words)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        ranks.append(pid)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # its threads must not be forked
    os.write(ports[1], f"{store.port:5}".encode() * world)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    if "RANK" in os.environ:
        gc.enable()
        train_all(*sys.argv[1:])
    main(int(sys.argv[1]), *sys.argv[2:])
