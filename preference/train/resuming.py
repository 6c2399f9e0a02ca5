"""Where a run starts: from nothing, or from a checkpoint of its own.

`resolve_start` is called once on every rank, before training. All ranks decide alike; with disks that are not shared
between nodes a checkpoint counts if every node has a good copy.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from preference.engine.forward import causal_lm
from preference.integrity import fault, read_manifest
from preference.models.hardware import same_step
from preference.train.checkpoints import (
    CheckpointError,
    check_disk,
    checkpoint_folders,
    checkpoint_step,
    recover,
)
from preference.train.identity import differences
from preference.train.run_record import read_run, write_run


@dataclass(frozen=True)
class Start:
    """Where training starts (None: at step 0), and what the user should know about it."""

    checkpoint: Path | None
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


def _ours(ask: Any) -> Any:
    """What the first rank finds, on every rank."""
    from accelerate import PartialState

    answer = [ask() if PartialState().is_main_process else None]
    return broadcast_object_list(answer)[0]


def _fault_anywhere(folder: Path, keeper: bool) -> str | None:
    faults = gather_object([fault(folder) if keeper else None])
    return next((text for text in faults if text), None)


def resume_after_restart(args: Any, restarts: int) -> bool:
    """Whether torchrun has started the processes anew, by the `restarts` that any of them counts.

    There may be more or fewer processes than before: `args` (TrainingArguments) are then changed so that a step has as
    many pairs as it had.

    Raises:
        CheckpointError: that many processes cannot share the pairs of a step evenly.
    """
    if not any(gather_object([restarts > 0])):  # nodes that have joined since count none
        return False
    run, _ = _ours(lambda: read_run(Path(args.output_dir)))
    pairs = run.get("identity", {}).get("pairs per optimizer step")
    if pairs and not run.get("finished"):
        try:
            plan = same_step(pairs, args.per_device_train_batch_size, args.world_size)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        args.per_device_train_batch_size, args.gradient_accumulation_steps = plan
    return True


def _as_asked(is_main_process: bool) -> bool:
    return is_main_process


def _see_disks(trainer: Any, output_dir: Path) -> None:
    """Let one process of each node write checkpoints where the nodes share no disk."""
    token = f".disk-{uuid.uuid4().hex}"
    token = _ours(lambda: ((output_dir / token).touch(), token)[1])
    shared = all(gather_object([(output_dir / token).exists()]))
    if trainer.is_world_process_zero():
        (output_dir / token).unlink()
    if shared:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CheckpointError(
            f"the nodes do not share {output_dir}, and strategies that share the weights out write one checkpoint "
            "together: put output_dir on a shared file system, or use strategy=ddp"
        )
    trainer.args.save_on_each_node = True
    # save_pretrained of transformers 5.23 writes weights on rank 0 alone, whatever the Trainer asks of it
    causal_lm(trainer.model).should_save_on_this_rank = _as_asked


def _latest(output_dir: Path, run: str | None, keeper: bool, notes: list[str]) -> Path | None:
    """The latest good checkpoint of `run` (None: of any run); those passed over are named in `notes`."""

    def steps() -> list[int]:
        folders = checkpoint_folders(output_dir)
        return [
            checkpoint_step(path)
            for path in folders
            if run is None or (read_manifest(path) or {"run": run}).get("run") == run
        ]

    for step in _ours(steps):
        folder = output_dir / f"checkpoint-{step}"
        reason = _fault_anywhere(folder, keeper)
        if reason is None:
            return folder
        notes.append(f"warning: {folder} is passed over: {reason}")
    return None


def _check(folder: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any], launch: Mapping[str, Any],
           anyway: bool, notes: list[str]) -> None:  # fmt: skip
    was = manifest.get("launch", launch)
    if was["strategy"] != launch["strategy"]:
        raise CheckpointError(
            f"{folder} was written under strategy={was['strategy']}, whose optimizer state strategy="
            f"{launch['strategy']} cannot read: use the former, or start anew with resume=never"
        )
    if was["world_size"] != launch["world_size"]:
        if launch["strategy"].startswith("zero"):
            raise CheckpointError(
                f"{folder} holds optimizer shards of {was['world_size']} processes, which DeepSpeed cannot deal to "
                f"{launch['world_size']}: start as many as before, or anew with resume=never"
            )
        notes.append(
            f"note: {was['world_size']} processes wrote {folder.name}, {launch['world_size']} resume: weights, "
            "optimizer and place in the data carry over exactly; dropout draws other numbers"
        )
    if "identity" not in manifest:
        changed = ["it does not say which run wrote it"]
    else:
        changed = differences(manifest["identity"], identity)
    if changed and not anyway:
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Set these back; or start anew with resume=never "
            "or another output_dir; or resume from it as it is with resume_anyway=true"
        )
    notes += [f"warning: resuming although it has changed: {text}" for text in changed]


def resolve_start(
    trainer: Any, how: str, identity: Mapping[str, Any], *, strategy: str = "ddp", anyway: bool = False
) -> Start:
    """Find where to start, and make the trainer write this run's identity into its checkpoints.

    Args:
        how: "auto": the latest good checkpoint in output_dir if the run there is not finished; "last": the same, and
            there must be one; "never": step 0; or a checkpoint's folder.
        anyway: resume under a changed identity too.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another run, or the disk is too small.
    """
    args, output_dir, notes = trainer.args, Path(trainer.args.output_dir), []
    if args.load_best_model_at_end:
        raise CheckpointError("load_best_model_at_end would pick a checkpoint by itself: export the one that you want")
    output_dir.mkdir(parents=True, exist_ok=True)
    _see_disks(trainer, output_dir)
    keeper = args.should_save
    if keeper:
        recover(output_dir)
    trainer.accelerator.wait_for_everyone()
    before, warning = _ours(lambda: read_run(output_dir))
    notes += [warning] if warning else []
    checkpoint = None
    if how == "auto" and before.get("finished"):
        notes.append(f"the run in {output_dir} is finished; this is a new one")
    elif how in ("auto", "last"):
        checkpoint = _latest(output_dir, before.get("run"), keeper, notes)
        if checkpoint is None and how == "last":
            raise CheckpointError(f"{output_dir} holds no checkpoint to resume from. {' '.join(notes)}".rstrip())
        if checkpoint is None and notes:
            raise CheckpointError(
                f"no checkpoint of the run in {output_dir} can be resumed from. {'. '.join(notes)}. Give another "
                "output_dir, or start anew here with resume=never"
            )
    elif how != "never":
        checkpoint = Path(how)
        reason = _fault_anywhere(checkpoint, keeper)
        if reason and not (anyway and "incomplete" in reason):
            raise CheckpointError(f"{checkpoint} cannot be resumed from: {reason}")
    launch = {"strategy": strategy, "world_size": args.world_size}
    manifest = _ours(lambda: (read_manifest(checkpoint) or {}) if checkpoint else {})
    if checkpoint:
        _check(checkpoint, manifest, identity, launch, anyway, notes)
        notes.append(f"resuming from {checkpoint}")
        if trainer.budget is not None and "micro_batches" in manifest:
            trainer.budget.take_up(manifest["micro_batches"])
    same_run = checkpoint and how in ("auto", "last")  # from a folder by name the later ones are another branch
    run = manifest.get("run") if same_run else None
    run = run or _ours(lambda: uuid.uuid4().hex)
    kept = {name: manifest[name] for name in ("micro_batches",) if name in manifest}
    trainer.checkpoints.run = {"run": run, "identity": dict(identity), "launch": launch, **kept}
    _check_disks(trainer, output_dir)
    if keeper:
        write_run(output_dir, trainer.checkpoints.run, finished=False)
    return Start(checkpoint, tuple(notes))


def _check_disks(trainer: Any, output_dir: Path) -> None:
    args = trainer.args
    steps = args.max_steps
    if steps <= 0:
        pairs = trainer.get_total_train_batch_size(args)
        steps = int(args.num_train_epochs * -(-len(trainer.train_dataset) // pairs))
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps"
    every = (
        args.save_steps if args.save_steps >= 1 else max(1, math.ceil(steps * args.save_steps))
    )  # a share of the run
    planned = steps // int(every) if saves else 0
    error = None
    try:
        if args.should_save:
            check_disk(output_dir, trainer.model, args, planned, trainer.checkpoints.besides)
    except CheckpointError as caught:
        error = str(caught)
    if faults := [text for text in gather_object([error]) if text]:
        raise CheckpointError(faults[0])


def finish(trainer: Any) -> None:
    """The model is saved: the next run in output_dir is a new one."""
    if trainer.args.should_save:
        write_run(Path(trainer.args.output_dir), trainer.checkpoints.run, finished=True)
