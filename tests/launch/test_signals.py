"""A signal ends a run after its step, on all ranks, with a checkpoint and an exit code; the same command resumes."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import launch, wait_for_log, wait_for_step, workers
from safetensors.torch import load_file
from training import make_pairs, make_trainer, same_weights, weights_of

from preference.integrity import fault
from preference.launch.agreement import AgreementError, compare_ranks, on_every_rank
from preference.launch.signals import EXIT_STOPPED, StoppedBySignal, StopSignals
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


def test_a_system_that_lacks_signals_has_the_others(monkeypatch):
    """Windows."""
    for name in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    names = runpy.run_path(str(ROOT / "preference" / "launch" / "signals.py"))
    assert names["SIGNALS"] == (signal.SIGTERM, signal.SIGINT)


def test_a_second_signal_stops_at_once_but_an_echo_does_not():
    code = (
        "import os, signal, sys, time\nfrom preference.launch import signals\nsignals.ECHO = 0.2\n"
        "s = signals.StopSignals().install()\ns.phase = sys.argv[1]\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); print('working', flush=True)\n"
        "time.sleep(0.4); os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still', flush=True)\n"
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


@pytest.mark.slow
def test_one_rank_gets_the_signal_and_all_stop_and_the_same_command_resumes(folder, tmp_path):
    output = tmp_path / "out"
    process = launch(folder, output)
    wait_for_step(output, process, 3)
    _first, second = workers(process.pid)
    os.kill(second, signal.SIGUSR1)
    assert process.wait(60) == EXIT_STOPPED, output.with_suffix(".log").read_text()[-3000:]
    [checkpoint] = checkpoint_folders(output)
    assert fault(checkpoint) is None and not (output / "model.safetensors").exists()
    step = int(checkpoint.name.partition("-")[2])
    process = launch(folder, output)
    wait_for_step(output, process, step + 2)
    os.kill(process.pid, signal.SIGTERM)  # to the launcher, which hands it on
    assert process.wait(60) == EXIT_STOPPED
    log = output.with_suffix(".log").read_text()
    assert f"resuming from {checkpoint}" in log and "Traceback" not in log


@pytest.mark.slow
def test_a_run_with_a_dead_rank_starts_again_by_itself_and_the_second_time_ends(folder, tmp_path):
    output, log = tmp_path / "dead", tmp_path / "dead.log"
    process = launch(folder, output, "--save_steps", "2", MAX_RESTARTS="1")
    wait_for_step(output, process, 3)  # the checkpoint of step 2 is there
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    wait_for_log(output, process, "resuming from", 1)
    resumed = int(log.read_text().rpartition("resuming from ")[2].split("checkpoint-")[1].split()[0])
    assert resumed >= 2
    wait_for_step(output, process, resumed + 3)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    assert process.wait(120) == 1
    assert "torchrun: rank 1 ended first, with SIGKILL" in log.read_text() and "Traceback" not in log.read_text()


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
