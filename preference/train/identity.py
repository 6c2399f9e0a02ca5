"""What a run is: all that its weights at step N depend on, so that a checkpoint is continued by the same run only.

The identity is a dict of names that a user knows (flags mostly) and values that JSON keeps. What changes speed or
memory alone is not part of it: micro-batches under engine=packed, the number of processes, gradient checkpointing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from preference.arguments import FLAGS, Arguments
from preference.engine.batching import PAIR_COLUMNS
from preference.train.reference import data_fingerprint

SAMPLED = 64  # values of each tensor that go into the fingerprint of a model's weights


@torch.no_grad()
def weights_sample(model: torch.nn.Module) -> str:
    """A hash of a few values of every parameter: cheap, and different after any training. Before sharding only."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        flat = p.detach().reshape(-1)
        picked = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def numbers_fingerprint(dataset: Any) -> str:
    """A hash of the numbers that pairs bring for the loss (weights, margins); "none" where they bring none."""
    names = [name for name in PAIR_COLUMNS if name in dataset.column_names]
    if not names:
        return "none"
    values = [np.asarray(dataset[name], dtype=np.float32).tobytes() for name in names]
    return hashlib.sha256(b"".join([repr(names).encode(), *values])).hexdigest()[:16]


def run_identity(args: Arguments, trainer: Any, template: Any) -> dict[str, Any]:
    """The identity of the run that `args` (preference.arguments) and `trainer` describe.

    Called before the model is trained or sharded; `template` is the conversation template.
    """
    run, training = args.run, trainer.args
    values = args.values()
    identity = {name: values[name] for name, flag in FLAGS.items() if flag.identity and not flag.why_unused(args)}
    pairs = trainer.get_total_train_batch_size(training)
    identity |= {
        "beta": args.beta,
        "learning_rate": training.learning_rate,
        "length of training": f"max_steps {run.max_steps}" if run.max_steps > 0 else f"{run.num_train_epochs:g} epochs",
        "training pairs": len(trainer.train_dataset),
        "tokens of the training pairs": data_fingerprint(trainer.train_dataset)[:16],
        "numbers of the training pairs": numbers_fingerprint(trainer.train_dataset),
        "template": template.name,
        "stop text": template.stop_str,
        "tokenizer": f"{type(trainer.processing_class).__name__} of {len(trainer.processing_class)} tokens",
        "weights that training starts from": weights_sample(trainer.model),
        "bf16": training.bf16,
        "pairs per optimizer step": pairs,
    }
    chosen = run.load_best_model_at_end or run.average_checkpoints
    if chosen or run.early_stopping_patience:
        identity["eval_steps"] = run.eval_steps
    if chosen:
        identity["save_steps"] = run.save_steps
    if training.fp16:
        identity["fp16"] = True
    if args.run.warmup_steps:
        identity["first learning rate of the warm-up"] = "above 0"  # it was 0 once, in checkpoints that lack this line
    if args.objective.engine == "trl":  # TRL's objective depends on how a batch is cut
        identity["micro-batches"] = f"{training.per_device_train_batch_size} pairs on {training.world_size} processes"
    return identity


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One "name: was A, is B" for everything that is not the same. A flag that is missing had its default: it had no
    effect then, or was not there yet.
    """
    unset = {name: flag.default for name, flag in FLAGS.items()}
    names = [*before, *(name for name in now if name not in before)]
    pairs = {name: [side.get(name, unset.get(name, "not set")) for side in (before, now)] for name in names}
    return [f"{name}: was {was}, is {value}" for name, (was, value) in pairs.items() if was != value]
