"""TrainingArguments as the packed engine follows them: what it refuses, and what the Trainer's own loop is told."""

from __future__ import annotations

import copy
import logging

from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# TrainingArguments that would be ignored, or would mean something else here: (name, is it set?, why not)
REFUSED = (
    (
        "train_sampling_strategy",
        lambda v: v not in ("random", "sequential"),
        "pairs are dealt to micro-batches by length anyway",
    ),
    (
        "auto_find_batch_size",
        bool,
        "max_tokens_per_micro_batch bounds the memory of a micro-batch and keeps the objective",
    ),
    ("label_smoothing_factor", bool, "Objective.label_smoothing smooths the labels of preference losses"),
    (
        "neftune_noise_alpha",
        bool,
        "its noise depends on the length of the row, which here depends on how a batch is cut",
    ),
    ("torch_empty_cache_steps", bool, "micro-batches of bounded length do not fragment the memory"),
    ("torch_compile", bool, "it compiles the whole model, again for every length: PairTrainer(torch_compile=True)"),
    ("use_liger_kernel", bool, "the log-probabilities come from the packed engine's own head"),
)


def refuse_what_has_no_place(args: TrainingArguments) -> None:
    """Raises ValueError for an argument that would have no effect, with the reason."""
    for name, is_set, why in REFUSED:
        if is_set(getattr(args, name, None)):
            raise ValueError(f"{name}={getattr(args, name)} has no place in the packed engine: {why}")


def of_the_loop(args: TrainingArguments) -> TrainingArguments:
    """A copy for the Trainer's own loop, which sees one batch per optimizer step."""
    args = copy.copy(args)
    args.gradient_accumulation_steps = 1
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False  # it costs a sync a step, to hide from the log what the watchdog stops at
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible to one process: using one; torchrun/ starts a process for each", args.n_gpu)
        args._n_gpu = 1
    return args
