"""Checkpoints are complete or not there, and only the run that wrote one resumes from it."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from training import make_pairs, make_trainer, same_weights, weights_of

from preference.integrity import MANIFEST, fault, write_manifest
from preference.models.hardware import same_step
from preference.train import checkpoints
from preference.train.checkpoints import (
    WRITING,
    CheckpointError,
    check_disk,
    checkpoint_folders,
    prune,
    recover,
)
from preference.train.identity import differences, weights_sample
from preference.train.resuming import finish, resolve_start, resume_after_restart
from preference.train.run_record import RUN_FILE
from tiny import tiny_model

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 6}
IDENTITY = {"loss": "orpo", "learning_rate": 0.01}


def make(folder: Path, **changes):
    return make_trainer("packed", folder, make_pairs(16), **SAVING | changes)


def run(folder: Path, how: str = "auto", identity=IDENTITY, stop_at: int | None = None, anyway=False, **changes):
    """A run in `folder`, which dies after writing the checkpoint of step `stop_at` if that is given."""
    trainer = make(folder, **changes)
    start = resolve_start(trainer, how, identity, anyway=anyway)
    if stop_at:

        class Death(Exception):
            pass

        from transformers import TrainerCallback

        class Dies(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                if state.global_step == stop_at:
                    raise Death

        trainer.add_callback(Dies())
        with pytest.raises(Death):
            trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
    else:
        trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
    return trainer, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights of the uninterrupted run."""
    return weights_of(run(tmp_path_factory.mktemp("whole"))[0].model)


def small_checkpoint(folder: Path, run: str = "r") -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(100)))
    (folder / "inner").mkdir()
    (folder / "inner" / "state").write_text("state")
    write_manifest(folder, {"run": run})
    return folder


# ---- folders


def test_every_kind_of_damage_is_seen_and_named(tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint-1")
    assert fault(folder) is None
    weights, inner = folder / "weights", folder / "inner" / "state"
    good = weights.read_bytes()
    for damage, words in (
        (lambda: weights.write_bytes(good[:-1] + b"x"), "weights is damaged"),
        (lambda: weights.write_bytes(good[:50]), "weights has 50 bytes instead of 100"),
        (weights.unlink, "weights is missing"),
    ):
        damage()
        assert words in fault(folder)
        weights.write_bytes(good)
    inner.unlink()
    assert "inner/state is missing" in fault(folder)
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text()[:30])
    assert "manifest.json cannot be relied on: it is damaged" in fault(folder)
    manifest.write_text('{"run": "r", "files": {}}')
    assert "written by an earlier version" in fault(folder)
    manifest.unlink()
    assert "incomplete" in fault(folder)
    assert "not there" in fault(tmp_path / "checkpoint-9")


def test_what_a_death_leaves_behind_is_mended(tmp_path):
    """Dead between the manifest and the new name: it counts. Dead earlier, or while deleting: it goes."""
    small_checkpoint(tmp_path / WRITING / "checkpoint-4")
    half = small_checkpoint(tmp_path / WRITING / "checkpoint-6")
    (half / MANIFEST).unlink()
    small_checkpoint(tmp_path / WRITING / "removed-checkpoint-2")
    recover(tmp_path)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-4"]
    assert fault(tmp_path / "checkpoint-4") is None and not (tmp_path / WRITING).exists()


def test_old_checkpoints_go_by_step_and_only_ones_own_and_never_the_last_good(tmp_path):
    for step in (2, 10, 8):
        small_checkpoint(tmp_path / f"checkpoint-{step}")
    small_checkpoint(tmp_path / "checkpoint-1", run="another")
    broken = small_checkpoint(tmp_path / "checkpoint-12")
    (broken / MANIFEST).unlink()
    prune(tmp_path, "r", 2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == [f"checkpoint-{n}" for n in (12, 10, 8, 1)]
    prune(tmp_path, "r", 1)
    assert fault(tmp_path / "checkpoint-10") is None


# ---- runs


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_a_run_that_died_resumes_to_the_same_weights(tmp_path, engine):
    pairs = make_pairs(16)

    def train(folder, steps_then_die=None):
        trainer = make_trainer(engine, folder, pairs, **SAVING)
        start = resolve_start(trainer, "auto", IDENTITY)
        if steps_then_die:
            trainer.args.max_steps = steps_then_die
        trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
        return weights_of(trainer.model), start

    expected, _ = train(tmp_path / "whole")
    train(tmp_path / "parts", 4)
    resumed, start = train(tmp_path / "parts")
    assert start.step == 4 and same_weights(resumed, expected)
    kept = checkpoint_folders(tmp_path / "parts")
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-4"]
    assert all(fault(path) is None for path in kept) and not (tmp_path / "parts" / WRITING / "checkpoint-6").exists()


def test_resuming_after_the_last_step_trains_no_further(tmp_path, whole):
    """Training was done, and the process died before the model was saved."""
    run(tmp_path)
    trainer, start = run(tmp_path)
    assert start.step == 6 and trainer.state.global_step == 6 and same_weights(weights_of(trainer.model), whole)


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, whole):
    run(tmp_path, stop_at=4)
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    trainer, start = run(tmp_path)
    assert start.step == 2 and same_weights(weights_of(trainer.model), whole)
    assert any("checkpoint-4 is passed over: model.safetensors is damaged" in note for note in start.notes)
    assert fault(tmp_path / "checkpoint-4") is None  # written anew


def test_a_flipped_bit_in_the_records_never_restarts_a_run_unsaid(tmp_path):
    """In a manifest: the checkpoint before it. In the run's file: by the checkpoints. In all of them: refused."""
    run(tmp_path, stop_at=4)
    files = [tmp_path / "checkpoint-4" / MANIFEST, tmp_path / "checkpoint-2" / MANIFEST, tmp_path / RUN_FILE]
    good = [path.read_bytes() for path in files]
    draw = random.Random(0)
    trainer = make(tmp_path)

    def flip(i: int) -> None:
        at = draw.randrange(len(good[i]))
        files[i].write_bytes(good[i][:at] + bytes([good[i][at] ^ 1 << draw.randrange(8)]) + good[i][at + 1 :])

    def mend() -> None:
        for path, content in zip(files, good, strict=True):
            path.write_bytes(content)

    for _ in range(20):
        flip(0)
        start = resolve_start(trainer, "auto", IDENTITY)
        assert start.step == 2 and "checkpoint-4 is passed over: manifest.json cannot be relied on" in start.notes[0]
        mend()
        flip(2)
        start = resolve_start(trainer, "auto", IDENTITY)
        assert start.step == 4 and f"{RUN_FILE} is passed over: it is damaged" in start.notes[0]
        flip(0)
        flip(1)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="no checkpoint .* can be resumed from.*-4 .*-2 .*resume=never"):
                resolve_start(trainer, "auto", IDENTITY)
        mend()
    flip(2)
    assert resolve_start(trainer, "never", IDENTITY).step == 0


def test_changed_settings_are_refused_by_name_unless_wanted(tmp_path):
    run(tmp_path, stop_at=4)
    changed = IDENTITY | {"loss": "dpo"}
    with pytest.raises(CheckpointError, match="loss: was orpo, is dpo.*resume_anyway=true"):
        resolve_start(make(tmp_path), "auto", changed)
    start = resolve_start(make(tmp_path), "auto", changed, anyway=True)
    assert start.step == 4 and any("loss: was orpo" in note for note in start.notes)
    assert resolve_start(make(tmp_path), "never", changed).step == 0


def test_another_strategy_is_refused(tmp_path):
    run(tmp_path, stop_at=2)
    with pytest.raises(CheckpointError, match="strategy=ddp.*strategy=fsdp.* cannot read"):
        resolve_start(make(tmp_path), "auto", IDENTITY, strategy="fsdp", anyway=True)


def test_a_finished_run_begins_anew_and_old_checkpoints_are_not_taken_for_its_own(tmp_path):
    trainer, _ = run(tmp_path)
    assert resolve_start(make(tmp_path), "auto", IDENTITY).step == 6  # not finished: the model was not saved yet
    finish(trainer)
    _, start = run(tmp_path, identity=IDENTITY | {"loss": "dpo"}, stop_at=2)
    assert start.step == 0 and "finished" in start.notes[0]
    again = resolve_start(make(tmp_path), "auto", IDENTITY | {"loss": "dpo"})
    assert again.step == 2, "checkpoint-6 belongs to the run before"


def test_without_checkpoints_every_run_is_a_first_one(tmp_path):
    for _ in range(2):
        _trainer, start = run(tmp_path, save_strategy="no")
        assert start.step == 0 and not start.notes
        # died before it was finished


def test_resuming_from_a_folder_begins_a_branch(tmp_path):
    run(tmp_path, stop_at=4)
    assert resolve_start(make(tmp_path), str(tmp_path / "checkpoint-2"), IDENTITY).step == 2
    assert resolve_start(make(tmp_path), "auto", IDENTITY).step == 0, "checkpoint-4 is of the run that was left"
    with pytest.raises(CheckpointError, match="checkpoint-9 cannot be resumed from: it is not there"):
        resolve_start(make(tmp_path), str(tmp_path / "checkpoint-9"), IDENTITY)


def test_after_a_restart_with_other_processes_a_step_has_the_same_pairs(tmp_path):
    trainer = make(tmp_path)
    resolve_start(trainer, "auto", IDENTITY | {"pairs per optimizer step": 24})
    assert not resume_after_restart(trainer.args, 0) and trainer.args.per_device_train_batch_size == 4
    assert resume_after_restart(trainer.args, 1)
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (4, 6)
    assert same_step(24, 5, 2) == (4, 3) and same_step(16, 8, 4) == (4, 1) and same_step(3, 4, 3) == (1, 1)
    with pytest.raises(ValueError, match="16 pairs per optimizer step cannot be dealt evenly to 3 processes"):
        same_step(16, 4, 3)


def test_last_wants_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_start(make(tmp_path), "last", IDENTITY)


# ---- the disk


def test_a_full_disk_stops_with_a_message_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, whole):
    """The disk is full when the optimizer's state of step 4 is written."""
    trainer = make(tmp_path)
    resolve_start(trainer, "auto", IDENTITY)
    save = torch.save

    def full(value, file, *args, **kwargs):
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="checkpoint-4 could not be written: OSError.*No space.*checkpoint-2"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert fault(tmp_path / "checkpoint-2") is None and not (tmp_path / WRITING).exists()
    monkeypatch.undo()
    trainer, start = run(tmp_path)
    assert start.step == 2 and same_weights(weights_of(trainer.model), whole)


def test_a_checkpoint_without_weights_is_none(tmp_path, monkeypatch):
    """transformers 5.23 writes none on nodes other than the first (preference/train/resuming.py sees to it)."""
    trainer = make(tmp_path)
    resolve_start(trainer, "auto", IDENTITY)
    monkeypatch.setattr(trainer.model, "save_pretrained", lambda *args, **kwargs: None)
    with pytest.raises(CheckpointError, match="checkpoint-2 could not be written: .* the Trainer wrote no weights"):
        trainer.train()
    assert not checkpoint_folders(tmp_path)


def test_a_disk_too_small_is_refused_with_the_numbers_before_training(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    check_disk(tmp_path, trainer.model, trainer.args, 3)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000_000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="0.10 GB free, and 3 checkpoints of 0.07 GB"):
        resolve_start(trainer, "auto", IDENTITY)
    check_disk(tmp_path, trainer.model, trainer.args, 0)  # no checkpoints, a small model
    usage = usage._replace(free=1_000_000)
    with pytest.raises(
        CheckpointError, match="0.00 GB free, and 0 checkpoints of 0.07 GB and the model of 0.00 GB are"
    ):
        check_disk(tmp_path, trainer.model, trainer.args, 0)  # the final save alone


# ---- identity


def test_differences_name_what_changed_appeared_and_went():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: was 2, is 3", "c: was not set, is 4"]
    assert differences({"a": 1}, {}) == ["a: was 1, is not set"]


def test_the_sample_of_weights_tells_models_apart():
    assert weights_sample(tiny_model()) == weights_sample(tiny_model()) != weights_sample(tiny_model(seed=1))


def test_the_file_of_the_run_says_what_it_is(tmp_path):
    resolve_start(make(tmp_path), "auto", IDENTITY)
    record = json.loads((tmp_path / RUN_FILE).read_text())
    assert record["identity"] == IDENTITY and record["finished"] is False and record["launch"]["world_size"] == 1
