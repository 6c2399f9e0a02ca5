"""A signal ends a run after its step, on all ranks, with a checkpoint and an exit code; the same command resumes."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launched import alone, launch, wait_for_log, wait_for_step, workers
from safetensors.torch import load_file
from training import make_pairs, make_trainer, same_weights, weights_of
from transformers import TrainerState

from preference.files import read_lines
from preference.integrity import fault
from preference.launch.agreement import AgreementError, compare_ranks, on_every_rank
from preference.launch.process import leave_after_signal
from preference.launch.signals import EXIT_STOPPED, SIGNALS, StoppedBySignal, StopSignals
from preference.train.checkpoints import checkpoint_folders
from preference.train.stopping import StopTogether
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield StopSignals().install()
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- one process, within this one


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_step_is_finished_and_saved(tmp_path, signals, number):
    trainer = make_trainer("packed", tmp_path, make_pairs(16), max_steps=20)
    stop = StopTogether(trainer, signals)
    trainer.add_callback(stop)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert stop.stopping and trainer.state.global_step == 3
    [checkpoint] = checkpoint_folders(tmp_path)
    assert checkpoint.name == "checkpoint-3" and fault(checkpoint) is None
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in weights_of(trainer.model).items() if name in saved)


def test_a_stopped_run_resumes_to_the_weights_of_an_undisturbed_one(tmp_path, signals):
    def make(folder):
        return make_trainer("packed", folder, make_pairs(16), max_steps=6)

    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path / "stopped")
    stopped.add_callback(StopTogether(stopped, signals))
    signals.received = "SIGTERM"
    stopped.train()
    assert stopped.state.global_step == 1
    signals.received = None
    resumed = make(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-1"))
    assert same_weights(weights_of(resumed.model), weights_of(whole.model))


def test_an_evaluation_is_broken_off(tmp_path, signals):
    """During training a checkpoint is written then; before it there is nothing to write."""
    evaluation = make_pairs(12, seed=1)
    trainer = make_trainer(
        "packed", tmp_path, make_pairs(16), max_steps=6, eval_pairs=evaluation, eval_strategy="steps", eval_steps=2
    )
    trainer.add_callback(StopTogether(trainer, signals))
    prediction_step, batches = trainer.prediction_step, []

    def counted(*args, **kwargs):
        batches.append(1)
        signals.received = "SIGUSR1"
        return prediction_step(*args, **kwargs)

    trainer.prediction_step = counted
    trainer.train()
    assert len(batches) == 1 and [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-2"]
    with pytest.raises(StoppedBySignal):
        trainer.evaluate()
    signals.phase = "finishing"
    assert "eval_loss" in trainer.evaluate()


def test_one_process_of_a_machine_says_it(capfd):
    for silent in (True, False):
        signals = StopSignals(silent)
        signals._handle(signal.SIGINT, None)
        assert signals.received == "SIGINT" and ("SIGINT: " in capfd.readouterr().err) != silent


def test_a_run_that_is_stopped_before_its_first_step_has_nothing_to_resume(capsys):
    for step, said in ((0, "there is nothing to resume"), (3, "resumes from the checkpoint of step 3")):
        with pytest.raises(SystemExit) as end:
            leave_after_signal(step)
        assert end.value.code == EXIT_STOPPED and said in capsys.readouterr().out


def test_a_system_that_lacks_signals_has_the_others(monkeypatch):
    """Windows."""
    for name in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    names = runpy.run_path(str(ROOT / "preference" / "launch" / "signals.py"))
    assert names["SIGNALS"] == (signal.SIGTERM, signal.SIGINT)


def test_a_second_signal_stops_at_once_but_an_echo_does_not():
    code = (
        "import os, signal, sys\nfrom preference.launch import signals\n"
        "clock = [7.0]; signals.time.monotonic = lambda: clock[0]\n"
        "s = signals.StopSignals().install()\ns.phase = sys.argv[1]\n"
        "os.kill(os.getpid(), signal.SIGTERM); clock[0] += signals.ECHO\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('working', flush=True); clock[0] += 0.1\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('still', flush=True)\n"
    )
    for phase, said in (("training", "stopping after this step"), ("evaluating", "no new checkpoint to resume from")):
        done = subprocess.run([sys.executable, "-c", code, phase], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 128 + signal.SIGTERM and done.stdout == "working\n"
        assert said in done.stderr and "at once" in done.stderr


# ---- several processes, through the wrapper


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"question": f"{i}: name fresh juices", "response_chosen": "apple and mint", "response_rejected": "juices"}
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


LAUNCHERS = """
import os, sys
from torch.distributed import run  # once for all of them
import launch

def started(script):
    if (pid := os.fork()) == 0:
        sys.argv = ["launch.py", "--standalone", "--nproc_per_node", "2", script]
        os._exit(launch.main())
    return pid

def ended(pid, name):
    print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

ended(started("fails.py"), "fails.py")
os.mkfifo("ready")
ready = os.open("ready", os.O_RDWR)
for number in launch.SIGNALS:
    pid = started("waits.py")
    for rank in "01":
        os.read(ready, 1)
    os.kill(pid, number)
    ended(pid, number.name)
"""
WAITS = """
import os, time
from preference.launch.process import leave_after_signal
from preference.launch.signals import StopSignals
signals = StopSignals().install()
with open("ready", "w") as ready:
    ready.write("x")
while not signals.received:
    time.sleep(0.01)
open(signals.received + os.environ["RANK"], "x").close()
leave_after_signal(3)
"""
FAILS = """
from preference.data.rows import DataError
from preference.launch.process import run_script
def main():
    raise DataError("nowhere is not there")
run_script(main, "orpo_train.py")
"""


def test_the_launcher_hands_every_signal_on_and_shows_once_what_is_wrong_on_all_ranks(tmp_path):
    """To both ranks, which tell it that they have stopped: none of torchrun's own handlers is in the way."""
    (tmp_path / "waits.py").write_text(WAITS)
    (tmp_path / "fails.py").write_text(FAILS)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "torchrun"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHERS], env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path, capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    names = [number.name for number in SIGNALS]
    said = done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "fails.py 1", said
    assert done.stderr.count("orpo_train.py: ") == done.stderr.count("nowhere is not there") == 1, said
    assert "Traceback" not in done.stderr, said
    assert [line for line in done.stdout.splitlines() if line[:3] == "SIG"] == [f"{n} {EXIT_STOPPED}" for n in names]
    assert {path.name for path in tmp_path.glob("SIG*")} == {f"{name}{rank}" for name in names for rank in "01"}


@pytest.mark.slow
def test_a_rank_that_stands_still_a_dead_rank_and_a_dead_launcher(folder, tmp_path):
    """One after the other in one folder: each ends all ranks, and what starts next resumes where that ended.

    The first restarts by itself, the second time that a rank is lost the run ends.
    """
    output, log = tmp_path / "out", tmp_path / "out.log"

    def resumed(process: subprocess.Popen, times: int) -> int:
        wait_for_log(output, process, "resuming from", times)
        step = int(log.read_text().rpartition("resuming from ")[2].split("checkpoint-")[1].split()[0])
        wait_for_step(output, process, step + 3)  # two more than a checkpoint every two steps may have left there
        return step

    process = launch(folder, output, "--save_steps", "2", "--lost_after", "8", MAX_RESTARTS="1",
                     TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")  # fmt: skip
    wait_for_step(output, process, 3)  # the checkpoint of step 2 is there
    os.kill(workers(process.pid)[1], signal.SIGSTOP)
    wait_for_log(output, process, "rank 1 has not been heard of by rank 0 for 8 s", 1)
    assert resumed(process, 1) >= 2 and log.read_text().count("setup: ") == 1
    one = three_losses_of_one(folder, tmp_path / "alone")
    assert len(one) == 3 and losses(output)[:3] == pytest.approx(one, rel=1e-5)  # two processes train as one does
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    assert process.wait(120) == 1
    assert "torchrun: rank 1 ended first, with SIGKILL" in log.read_text() and "Traceback" not in log.read_text()

    process = launch(folder, output)
    first = resumed(process, 2)
    ranks, end = workers(process.pid), time.monotonic() + 60
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)
    [newest, *_] = checkpoint_folders(output)
    assert fault(newest) is None and not (output / "model.safetensors").exists()
    assert int(newest.name.partition("-")[2]) > first, "the ranks saved when their launcher was gone"


def three_losses_of_one(folder: Path, output: Path) -> list[float]:
    """Of a run of one process whose step holds the pairs of two."""

    def look(self: StopTogether, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.stopping = state.global_step == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopTogether, "on_pre_optimizer_step", look)
        with pytest.raises(StoppedBySignal, match="step 3"):
            alone(folder, output, gradient_accumulation_steps="4")
    return losses(output)


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_lines(output / "metrics.jsonl") if "loss" in record]


# ---- the processes of a run are alike


def test_ranks_that_differ_are_named(monkeypatch):
    from preference.launch import agreement

    def everyone(values):
        [(host, facts)] = values
        other = facts | {"training data": "feed"}
        return [(host, facts), ("b", facts), ("c", other), ("d", facts)]

    monkeypatch.setattr(agreement, "gather_object", everyone)
    with pytest.raises(AgreementError, match=r"training data: rank 2 on c has 'feed'; 3 of 4 have 'cafe'") as error:
        compare_ranks({"training data": "cafe", "seed": 42})
    assert "seed" not in str(error.value)
    monkeypatch.setattr(agreement, "gather_object", lambda values: values * 4)
    compare_ranks({"training data": "cafe"})


def test_what_fails_on_one_rank_fails_on_all_by_name(monkeypatch):
    from preference.launch import agreement

    def everyone(values):
        return [None, *values, ("b", "TripleError: train.jsonl is not there"), None]

    monkeypatch.setattr(agreement, "gather_object", everyone)
    words = r"rank 2 on b failed: TripleError: train.jsonl is not there"
    with pytest.raises(AgreementError, match=words), on_every_rank():
        pass
    with pytest.raises(ValueError, match="this one's own"), on_every_rank():
        raise ValueError("this one's own")
    monkeypatch.setattr(agreement, "gather_object", lambda values: values)
    with on_every_rank():
        pass


def test_the_codes_fingerprint_follows_the_files(tmp_path, monkeypatch):
    from preference.launch import agreement

    (tmp_path / "preference").mkdir()
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "preference" / "launch" / "agreement.py"))
    (tmp_path / "orpo_train.py").write_text("a = 1\n")
    first = agreement.code_fingerprint()
    (tmp_path / "orpo_train.py").write_text("a = 2\n")
    assert agreement.code_fingerprint() != first
