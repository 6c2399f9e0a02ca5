"""One short training of a tiny model on the CPU, for the harness: `train.py FOLDER`. Resumes by itself.

It says where it is (loading, step, writing, manifest, renaming, deleting), so that the harness can aim.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

STEPS, SAVE_STEPS = 12, 3


def weights_hash(model) -> str:
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode() + p.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def train(folder: Path, say=lambda phase: None) -> str:
    """Train in `folder`, from its latest checkpoint if there is one; the hash of the final weights."""
    from training import lora, make_pairs, make_trainer
    from transformers import TrainerCallback

    from preference.train import checkpoints
    from preference.train.resuming import resolve_start
    from tiny import tiny_model

    class Phases(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            say("step")

        def on_step_end(self, args, state, control, model=None, **kwargs):
            print(f"step {state.global_step}: {weights_hash(model)}", flush=True)

    def announced(name, phase, then):
        function = getattr(checkpoints, name)

        def call(*args):
            say(phase)
            result = function(*args)
            say(then)
            return result

        setattr(checkpoints, name, call)

    originals = {name: getattr(checkpoints, name) for name in ("write_manifest", "publish", "prune")}
    announced("write_manifest", "manifest", "written")
    announced("publish", "renaming", "renamed")
    announced("prune", "deleting", "deleted")
    try:
        say("loading")
        # dropout, so that the state of the random generators counts; shuffled epochs, so that the data's place does
        trainer = make_trainer(
            "packed", folder, make_pairs(20), model=lora(tiny_model(), dropout=0.2), max_steps=STEPS,
            save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=2, lr_scheduler_type="cosine",
            callbacks=[Phases()],
        )  # fmt: skip
        save = trainer._save_checkpoint
        trainer._save_checkpoint = lambda *args: (say("writing"), save(*args))
        start = resolve_start(trainer, "auto", {"test": 1})
        for note in start.notes:
            print(note, flush=True)
        trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
        say("done")
        return weights_hash(trainer.model)
    finally:
        for name, function in originals.items():
            setattr(checkpoints, name, function)


if __name__ == "__main__":
    print(train(Path(sys.argv[1]), lambda phase: print(phase, flush=True)))
