"""Checkpoints that are either complete or not there, whatever happens to the machine while they are written.

A checkpoint is written to a temporary folder in output_dir, every file is flushed to the disk, a manifest of sizes
and checksums (preference/integrity.py) is written last, and only then the folder gets its name. Reading goes by the
manifest: a folder without one, or that no longer agrees with it, is not a checkpoint.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError

from preference.errors import PreferenceError
from preference.files import LOGS, NEXT
from preference.integrity import MANIFEST, fault, read_manifest, sync, write_manifest
from preference.models.parameters import full_size

WRITING = ".writing"  # folder in output_dir for what is not complete yet, and for what is being deleted
RESULT = "result"  # folder in WRITING: a model that is complete, on its way to output_dir
# what is written of a model after it is saved, and says nothing of the next one
DESCRIPTIONS = (
    "README.md", "report.html", "all_results.json", "evaluation.json", "samples.json", "worst_pairs.json",
    "best_pairs.json", "changes.json",
)  # fmt: skip
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


def publish_result(temporary: Path, output_dir: Path) -> None:
    """Move the files of a complete model from its folder into output_dir, in place of an earlier one's."""
    committed = output_dir / WRITING / RESULT
    shutil.rmtree(committed, ignore_errors=True)
    if (output_dir / NEXT).is_dir():
        for name in LOGS:  # an empty one takes the place of the earlier result's
            (output_dir / NEXT / name).touch()
    temporary.rename(committed)
    sync(committed.parent)
    finish_result(output_dir)


def finish_result(output_dir: Path) -> None:
    """Do what is left of `publish_result` once the new model is complete; after a death in between it is done again.

    What describes the earlier model goes first, its weights and the manifest last.
    """
    committed = output_dir / WRITING / RESULT
    if (new := read_manifest(committed)) is None:  # nothing is left to move
        shutil.rmtree(committed, ignore_errors=True)
        return
    before = (read_manifest(output_dir) or {}).get("files", {})
    stale = {output_dir / name for name in [*before, *DESCRIPTIONS] if name not in new["files"]}
    stale |= {path for path in output_dir.glob("*.safetensors*") if path.name not in new["files"]}
    for path in stale:
        path.unlink(missing_ok=True)
    for name in LOGS:
        if (output_dir / NEXT / name).exists():
            (output_dir / NEXT / name).replace(output_dir / name)
    shutil.rmtree(output_dir / NEXT, ignore_errors=True)
    for name in sorted(new["files"], key=lambda name: (".safetensors" in name, name)):
        if (committed / name).exists():
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (committed / name).replace(output_dir / name)
    sync(output_dir)
    (committed / MANIFEST).replace(output_dir / MANIFEST)
    sync(output_dir)
    shutil.rmtree(committed)


def recover(output_dir: Path) -> None:
    """Clean up after a run that died while writing: what was complete gets its name or place, the rest goes."""
    finish_result(output_dir)
    writing = output_dir / WRITING
    for folder in checkpoint_folders(writing):
        if fault(folder) is None:
            publish(folder, output_dir / folder.name)
    shutil.rmtree(writing, ignore_errors=True)


def prune(output_dir: Path, run: str, keep: int | None, wanted: Collection[int] = ()) -> None:
    """Keep the latest `keep` checkpoints of a run, and those of the steps `wanted`.

    Incomplete ones do not count, so that good ones outlive them.
    """
    own = [path for path in checkpoint_folders(output_dir) if (read_manifest(path) or {}).get("run") == run]
    for folder in own[max(keep, 1) :] if keep else ():
        if checkpoint_step(folder) not in wanted:
            remove(folder)


# ---- the disk


def checkpoint_bytes(model: Any, optim: str) -> tuple[int, int]:
    """(bytes of the saved weights, bytes of a whole checkpoint), about; of the model before it is sharded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else model.parameters()
    weights = sum(full_size(p) * p.element_size() for p in saved)
    per_value = 0 if "adam" not in optim else 2 if "8bit" in optim else 8
    return weights, weights + per_value * sum(full_size(p) for p in trained) + SMALL_FILES


def check_disk(output_dir: Path, model: Any, args: Any, planned: int, besides: int = 0) -> None:
    """Whether the checkpoints to come and the final model will fit.

    Args:
        planned: checkpoints that training will write. besides: those kept beyond save_total_limit.

    Raises:
        CheckpointError: they will not; with the numbers.
    """
    weights, checkpoint = checkpoint_bytes(model, str(getattr(args.optim, "value", args.optim)))
    at_once = (
        min(planned, args.save_total_limit + besides + 1) if args.save_total_limit else planned
    )  # old ones go last
    present = sum(f.stat().st_size for path in checkpoint_folders(output_dir) for f in path.rglob("*") if f.is_file())
    needed = max(0, at_once * checkpoint - present) + weights + SMALL_FILES
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
        wanted: the steps whose checkpoints are kept whatever their age.
        besides: how many of them there are at most.
    """

    def __init__(self, args: Any, accelerator: Any, *, gathers: bool = False) -> None:
        self.args, self.accelerator, self.gathers = args, accelerator, gathers
        self.run: Mapping[str, Any] = {}
        self.wanted: Callable[[], Collection[int]] = list
        self.besides = 0
        self.writing: Path | None = None

    def place(self, output_dir: str) -> str:
        """Where a checkpoint folder is to be put: the temporary place while one is being written."""
        return output_dir if self.writing is None else str(self.writing)

    def write(self, step: int, save: Callable[[], None]) -> None:
        """Have `save` write the folder "checkpoint-STEP" into `place`, and give it its name once it is complete.

        Raises:
            CheckpointError: on all ranks; it could not be written. The checkpoints before stand.
        """
        final = self.output_dir / f"checkpoint-{step}"

        def save_there(folder: Path) -> None:
            self.writing = folder.parent
            try:
                save()
            finally:
                self.writing = None

        def finish(temporary: Path) -> None:
            write_manifest(temporary, {"step": step, **self.run})
            publish(temporary, final)
            prune(self.output_dir, self.run.get("run"), self.args.save_total_limit, self.wanted())

        self._write(final.name, save_there, finish)

    def write_result(self, save: Callable[[Path], None]) -> None:
        """Have `save` write the final model into the folder that it is given, and move it to output_dir once complete.

        Raises:
            CheckpointError: on all ranks; it could not be written. What output_dir held before stands.
        """

        def finish(temporary: Path) -> None:
            write_manifest(temporary, self.run)
            publish_result(temporary, self.output_dir)

        self._write("the model", save, finish)

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def _write(self, name: str, save: Callable[[Path], None], finish: Callable[[Path], None]) -> None:
        temporary = self.output_dir / WRITING / name
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        error: Exception | None = None
        try:
            save(temporary)
        except (OSError, RuntimeError, SafetensorError) as caught:  # torch reports a full disk as RuntimeError
            error = caught
        self._all_wrote(error, name)
        if self.args.should_save:
            try:
                if not any(temporary.glob("*.safetensors")):
                    raise OSError(f"the Trainer wrote no weights into {temporary}")
                finish(temporary)
            except OSError as caught:
                error = caught
        self._all_wrote(error, name)

    def _all_wrote(self, error: Exception | None, name: str) -> None:
        """Raises on every rank what went wrong on any."""
        if error is not None and self.gathers:
            faults = [self._fault(error)]
        else:
            faults = [text for text in gather_object([error and self._fault(error)]) if text]
        if not faults:
            return
        if self.args.should_save:
            shutil.rmtree(self.output_dir / WRITING, ignore_errors=True)
        good = next((path for path in checkpoint_folders(self.output_dir) if fault(path) is None), None)
        kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        raise CheckpointError(f"{name} could not be written: {faults[0]}; {kept}") from error

    def _fault(self, error: Exception) -> str:
        free = shutil.disk_usage(self.output_dir).free
        full = f"; {_gb(free)} are free on the disk of {self.output_dir}"
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{full}"
