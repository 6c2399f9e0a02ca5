"""Checkpoints that are either complete or not there, whatever happens to the machine while they are written.

A checkpoint is written to a temporary folder in output_dir, every file is flushed to the disk, a manifest of sizes
and checksums (preference/integrity.py) is written last, and only then the folder gets its name. Reading goes by the
manifest: a folder without one, or that no longer agrees with it, is not a checkpoint.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError

from preference.errors import PreferenceError
from preference.integrity import fault, read_manifest, sync, write_manifest
from preference.models.parameters import full_size

WRITING = ".writing"  # folder in output_dir for what is not complete yet, and for what is being deleted
NAME = re.compile(r"checkpoint-(\d+)")
SMALL_FILES = 64 << 20  # tokenizer, configuration and states beside the weights of a checkpoint, at most


class CheckpointError(PreferenceError, RuntimeError):
    """A checkpoint that cannot be written, or that this run cannot continue; the message says what to do."""


# ---- folders


def checkpoint_step(folder: Path) -> int:
    """The optimizer step in a checkpoint's name; -1 for other names."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, latest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step, reverse=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; if that is cut short, what is left no longer has a checkpoint's name."""
    aside = folder.parent / WRITING / f"removed-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name. An older one of that name goes first; `recover` mends a death in between."""
    if final.exists():
        remove(final)
    temporary.rename(final)
    sync(final.parent)


def recover(output_dir: Path) -> None:
    """Clean up after a run that died while writing: a checkpoint that was complete gets its name, the rest goes."""
    writing = output_dir / WRITING
    for folder in checkpoint_folders(writing):
        if fault(folder) is None:
            publish(folder, output_dir / folder.name)
    shutil.rmtree(writing, ignore_errors=True)


def prune(output_dir: Path, run: str, keep: int | None) -> None:
    """Keep the latest `keep` checkpoints of a run. Incomplete ones do not count, so that good ones outlive them."""
    own = [path for path in checkpoint_folders(output_dir) if (read_manifest(path) or {}).get("run") == run]
    for folder in own[max(keep, 1) :] if keep else ():
        remove(folder)


# ---- the disk


def checkpoint_bytes(model: Any, optim: str) -> tuple[int, int]:
    """(bytes of the saved weights, bytes of a whole checkpoint), about; of the model before it is sharded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else model.parameters()
    weights = sum(full_size(p) * p.element_size() for p in saved)
    per_value = 0 if "adam" not in optim else 2 if "8bit" in optim else 8
    return weights, weights + per_value * sum(full_size(p) for p in trained) + SMALL_FILES


def check_disk(output_dir: Path, model: Any, args: Any, planned: int) -> None:
    """Whether the checkpoints to come and the final model will fit.

    Args:
        planned: checkpoints that training will write.

    Raises:
        CheckpointError: they will not; with the numbers.
    """
    weights, checkpoint = checkpoint_bytes(model, str(getattr(args.optim, "value", args.optim)))
    at_once = min(planned, args.save_total_limit + 1) if args.save_total_limit else planned  # old ones go last
    present = sum(f.stat().st_size for path in checkpoint_folders(output_dir) for f in path.rglob("*") if f.is_file())
    needed = max(0, at_once * checkpoint - present) + weights
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise CheckpointError(
            f"{output_dir} has {_gb(free)} free, and {at_once} checkpoints of {_gb(checkpoint)} and the model of "
            f"{_gb(weights)} are to come: free {_gb(needed - free)}, or take another output_dir, a larger save_steps "
            "or a smaller save_total_limit"
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


# ---- writing


class CheckpointWriter:
    """Writes the checkpoints of one run into its output_dir, on all ranks together.

    Args:
        args: TrainingArguments; whether this process writes is asked when a checkpoint is written.
        accelerator: of the run.
        gathers: the ranks gather the weights from each other (FSDP, DeepSpeed); where one fails, the others wait in a
            collective until torchrun ends them.

    Attributes:
        run: the run's id, identity and launch facts, written into each checkpoint (train/resuming.py sets it).
    """

    def __init__(self, args: Any, accelerator: Any, *, gathers: bool = False) -> None:
        self.args, self.accelerator, self.gathers = args, accelerator, gathers
        self.run: Mapping[str, Any] = {}
        self.writing: Path | None = None

    def place(self, output_dir: str) -> str:
        """Where a checkpoint folder is to be put: the temporary place while one is being written."""
        return output_dir if self.writing is None else str(self.writing)

    def write(self, step: int, save: Callable[[], None]) -> None:
        """Have `save` write the folder "checkpoint-STEP" into `place`, and give it its name once it is complete.

        Raises:
            CheckpointError: on all ranks; it could not be written. The checkpoints before stand.
        """
        output_dir = Path(self.args.output_dir)
        final = output_dir / f"checkpoint-{step}"
        temporary = output_dir / WRITING / final.name
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        error: Exception | None = None
        self.writing = temporary.parent
        try:
            save()
        except (OSError, RuntimeError, SafetensorError) as caught:  # torch reports a full disk as RuntimeError
            error = caught
        finally:
            self.writing = None
        self._all_wrote(error, final)
        if self.args.should_save:
            try:
                if not any(temporary.glob("*.safetensors")):
                    raise OSError(f"the Trainer wrote no weights into {temporary}")
                write_manifest(temporary, {"step": step, **self.run})
                publish(temporary, final)
                prune(output_dir, self.run.get("run"), self.args.save_total_limit)
            except OSError as caught:
                error = caught
        self._all_wrote(error, final)

    def _all_wrote(self, error: Exception | None, final: Path) -> None:
        """Raises on every rank what went wrong on any."""
        if error is not None and self.gathers:
            faults = [self._fault(error)]
        else:
            faults = [text for text in gather_object([error and self._fault(error)]) if text]
        if not faults:
            return
        if self.args.should_save:
            shutil.rmtree(final.parent / WRITING, ignore_errors=True)
        good = next((path for path in checkpoint_folders(final.parent) if fault(path) is None), None)
        kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        raise CheckpointError(f"{final.name} could not be written: {faults[0]}; {kept}") from error

    def _fault(self, error: Exception) -> str:
        free = shutil.disk_usage(self.args.output_dir).free
        full = f"; {_gb(free)} are free on the disk of {self.args.output_dir}"
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{full}"
