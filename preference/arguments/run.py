"""Flags of the run: steps, checkpoints, hardware, reports."""

from __future__ import annotations

from dataclasses import dataclass

from preference.arguments.unused import NO_CHECKPOINTS, NO_EVALUATION, NO_TRAINING
from preference.flags.declaration import Unused, flag
from preference.optimization.keywords import keywords
from preference.optimization.optimizers import is_projected, optimizer_names
from preference.optimization.schedules import NO_KEYWORDS, NO_WARMUP, schedule_names

STRATEGIES = ("ddp", "fsdp", "zero2", "zero3", "zero3_offload")

WITHOUT_WARMUP = Unused(lambda a: a.run.lr_scheduler_type in NO_WARMUP, "this lr_scheduler_type has no warm-up")
WITHOUT_METRIC = Unused(
    lambda a: not (a.run.load_best_model_at_end or a.run.early_stopping_patience),
    "neither load_best_model_at_end nor early_stopping_patience asks for the best",
)
WITHOUT_KEYWORDS = Unused(lambda a: a.run.lr_scheduler_type in NO_KEYWORDS, "this lr_scheduler_type takes none")


def _whole_from_1(text: str) -> None:
    if float(text) >= 1 and float(text) % 1:
        raise ValueError("from 1 on it is a whole number of steps, below 1 a share of them")


def steps_or_share(text: str) -> None:
    """Raises ValueError for a number that is neither a whole number of steps nor a share of the run."""
    value = float(text)
    if value >= 1 and value != int(value):
        raise ValueError("a whole number of steps, or a share of the run below 1")


@dataclass
class RunArguments:
    """the run"""

    output_dir: str = flag("outputs/orpo", "where everything is written", peers=("out_dir", "save_dir"))
    overwrite_output_dir: bool = flag(
        False, "replace the result of a finished run in output_dir, once this run has one", topic="checkpoints"
    )
    dry_run: bool = flag(
        False,
        "load no weights and train nothing: say what the run would do, need and take",
        unused=(NO_TRAINING,),
        soft=False,
    )
    do_train: bool = flag(True, "train; false only evaluates")
    do_eval: bool = flag(True, "evaluate before, during (eval_steps) and after training")
    per_device_train_batch_size: int = flag(
        0,
        "pairs per micro-batch on each device (0: from the hardware)",
        topic="steps",
        auto=True,
        least=0,
        most=10**5,
        unused=(NO_TRAINING,),
        peers=("micro_batch_size", "batch_size", "train_batch_size"),
    )
    per_device_eval_batch_size: int = flag(
        0,
        "pairs per evaluation batch on each device (0: as for training)",
        auto=True,
        least=0,
        most=10**5,
        unused=(NO_EVALUATION,),
        peers=("eval_batch_size",),
    )
    gradient_accumulation_steps: int = flag(
        0,
        "micro-batches per optimizer step (0: so that a device sees 8 pairs a step)",
        topic="steps",
        auto=True,
        least=0,
        most=10**6,
        unused=(NO_TRAINING,),
        peers=("grad_accum", "grad_accumulation_steps", "accumulation_steps"),
    )
    num_train_epochs: float = flag(
        1.0,
        "passes over the data",
        topic="steps",
        above=0,
        most=10**5,
        unused=(NO_TRAINING, Unused(lambda a: a.run.max_steps > 0, "max_steps decides the length of this run")),
        peers=("num_epochs", "epochs"),
    )
    max_steps: int = flag(
        -1,
        "stop after that many optimizer steps (-1: num_train_epochs decides)",
        topic="steps",
        least=1,
        also=(-1,),
        unused=(NO_TRAINING,),
        peers=("num_steps", "total_steps", "train_steps"),
    )
    learning_rate: float | None = flag(
        None,
        "peak learning rate (unset: by loss, LoRA or all weights, and size; the run says which and why)",
        topic="steps",
        auto=True,
        above=0,
        most=100,
        unused=(NO_TRAINING,),
        peers=("lr",),
    )
    lr_scheduler_type: str = flag(
        "cosine",
        "shape of the learning rate, by its name in transformers: cosine, linear, constant_with_warmup, ...",
        topic="steps",
        choices=schedule_names,
        unused=(NO_TRAINING,),
        identity=True,
        peers=("lr_scheduler", "scheduler"),
    )
    lr_scheduler_kwargs: str | None = flag(
        None,
        "the schedule's own arguments: num_decay_steps=100,min_lr_ratio=0.1 or JSON",
        topic="steps",
        check=keywords,
        unused=(NO_TRAINING, WITHOUT_KEYWORDS),
        identity=True,
    )
    warmup_steps: float = flag(
        0.1,
        "warm-up from above 0: below 1 a share of all steps, else a number of steps",
        topic="steps",
        least=0,
        check=_whole_from_1,
        unused=(NO_TRAINING, WITHOUT_WARMUP),
        identity=True,
        peers=("warmup_ratio", "num_warmup_steps"),
    )
    weight_decay: float = flag(
        0.0,
        "weight decay of AdamW",
        topic="steps",
        least=0,
        most=100,
        unused=(NO_TRAINING,),
        identity=True,
        peers=("wd",),
    )
    optim: str = flag(
        "adamw_torch_fused",
        "optimizer, by its name in transformers: adamw_torch, adafactor, sgd, paged_adamw_8bit, ...",
        topic="steps",
        choices=optimizer_names,
        unused=(NO_TRAINING,),
        identity=True,
        peers=("optimizer",),
    )
    optim_args: str | None = flag(
        None,
        "the optimizer's own arguments: momentum=0.9",
        topic="steps",
        check=keywords,
        unused=(NO_TRAINING,),
        identity=True,
    )
    optim_target_modules: str | None = flag(
        None,
        "layers whose gradients GaLore and APOLLO project: all-linear or q_proj,v_proj,...",
        topic="steps",
        unused=(NO_TRAINING, Unused(lambda a: not is_projected(a.run.optim), "this optim projects no gradients")),
        identity=True,
    )
    max_grad_norm: float = flag(
        1.0,
        "gradients are scaled down to this norm (0: never)",
        topic="steps",
        least=0,
        unused=(NO_TRAINING,),
        identity=True,
        peers=("gradient_clipping", "grad_clip", "max_norm"),
    )
    eval_steps: float = flag(
        0.0,
        "evaluate every that many steps (below 1: every such share of the run; 0: only before and after)",
        least=0,
        check=steps_or_share,
        unused=(NO_EVALUATION, NO_TRAINING),
        peers=("eval_strategy", "evaluation_strategy", "evals_per_epoch"),
    )
    save_steps: float = flag(
        0.0,
        "write a checkpoint every that many steps (below 1: every such share of the run; 0: none; the final model is "
        "always saved)",
        topic="checkpoints",
        least=0,
        check=steps_or_share,
        unused=(NO_TRAINING,),
        peers=("save_strategy", "saves_per_epoch"),
    )
    save_total_limit: int = flag(
        2,
        "checkpoints kept, besides those that the result is made of",
        topic="checkpoints",
        least=1,
        unused=(NO_TRAINING, NO_CHECKPOINTS),
    )
    logging_steps: int = flag(5, "log every that many steps", least=1, peers=("log_every", "logging_strategy"))
    load_best_model_at_end: bool = flag(
        False,
        "end with the checkpoint that was evaluated best, instead of the last weights",
        topic="checkpoints",
        unused=(NO_TRAINING, NO_EVALUATION),
        identity=True,
        peers=("load_best",),
    )
    metric_for_best_model: str = flag(
        "loss",
        "the evaluations' figure that says which is best: loss, nll_loss, preference/accuracies, ...; of a named set "
        "NAME_loss",
        topic="checkpoints",
        unused=(NO_TRAINING, NO_EVALUATION, WITHOUT_METRIC),
        identity=True,
        peers=("best_metric",),
    )
    greater_is_better: bool | None = flag(
        None,
        "whether more of it is better (unset: unless it is a loss)",
        topic="checkpoints",
        unused=(NO_TRAINING, NO_EVALUATION, WITHOUT_METRIC),
        identity=True,
    )
    early_stopping_patience: int = flag(
        0,
        "stop after so many evaluations in a row without a gain in metric_for_best_model (0: never)",
        topic="steps",
        least=0,
        unused=(NO_TRAINING, NO_EVALUATION),
        identity=True,
        peers=("early_stopping_steps", "early_stopping"),
    )
    early_stopping_threshold: float = flag(
        0.0,
        "a gain is more than that",
        topic="steps",
        least=0,
        unused=(
            NO_TRAINING,
            NO_EVALUATION,
            Unused(lambda a: a.run.early_stopping_patience == 0, "early_stopping_patience=0 never stops early"),
        ),
        identity=True,
    )
    average_checkpoints: int = flag(
        0,
        "end with the mean of the weights of the last so many checkpoints; of the best so many with "
        "load_best_model_at_end (0: none)",
        topic="checkpoints",
        least=2,
        also=(0,),
        unused=(NO_TRAINING, NO_CHECKPOINTS),
        identity=True,
    )
    ema_decay: float = flag(
        0.0,
        "end with the exponential moving average of the weights, by this decay: 0.99, 0.999 (0: none)",
        topic="steps",
        least=0,
        below=1,
        unused=(NO_TRAINING,),
        identity=True,
        peers=("ema",),
    )
    resume: str = flag(
        "auto",
        "auto = resume from the latest checkpoint of an unfinished run in output_dir; never; or a checkpoint",
        topic="checkpoints",
        unused=(NO_TRAINING,),
        peers=("auto_resume_from_checkpoints",),
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "resume under another name: a checkpoint folder, or last",
        topic="checkpoints",
        unused=(NO_TRAINING,),
    )
    resume_anyway: bool = flag(
        False,
        "resume although settings or data have changed since the checkpoint",
        topic="checkpoints",
        unused=(NO_TRAINING,),
    )
    strategy: str = flag(
        "ddp",
        "how processes share a model (torchrun/README.md): ddp = each holds all of it",
        topic="hardware",
        choices=STRATEGIES,
        peers=("deepspeed", "fsdp", "distributed_type"),
    )
    lost_after: int = flag(
        60,
        "seconds without a heartbeat after which another node counts as lost and the run ends (0: never)",
        topic="hardware",
        least=0,
    )
    bf16: bool | None = flag(
        None,
        "bfloat16 autocast over the weights (unset: where the hardware has it)",
        topic="hardware",
        auto=True,
        peers=("mixed_precision", "pure_bf16"),
    )
    fp16: bool | None = flag(
        None,
        "float16 autocast over the weights, with a gradient scaler (unset: on GPUs that have no bfloat16)",
        topic="hardware",
        auto=True,
        peers=("half", "float16"),
    )
    gradient_checkpointing: bool = flag(
        False,
        "recompute activations in the backward pass: less memory, a third slower",
        topic="hardware",
        unused=(NO_TRAINING,),
        peers=("activation_checkpointing", "use_gradient_checkpointing"),
    )
    torch_compile: bool = flag(
        False,
        "compile each layer of the model, for rows of any length: a minute at the start, faster steps on a GPU",
        topic="hardware",
        peers=("compile",),
    )
    dataloader_num_workers: int = flag(
        0,
        "processes that pack batches ahead of the training step",
        topic="hardware",
        least=0,
        most=256,
        peers=("num_workers",),
    )
    report_to: str = flag("none", "none, tensorboard, wandb, swanlab, trackio; several with commas")
    run_name: str | None = flag(
        None,
        "name of the run for report_to",
        unused=(Unused(lambda a: a.run.report_to == "none", "report_to=none reports to nobody"),),
        peers=("wandb_run_name", "wandb_name", "experiment_name"),
    )
    use_cpu: bool = flag(False, "train on the CPU even if there is a GPU", topic="hardware", peers=("no_cuda", "cpu"))
    sample_answers: int = flag(
        3, "evaluation prompts answered by the base and the tuned model, side by side (0: none)", least=0, most=10**4
    )
    sample_tokens: int = flag(
        96,
        "longest sample answer, in tokens",
        least=1,
        most=10**6,
        unused=(Unused(lambda a: a.run.sample_answers == 0, "sample_answers=0 writes no sample answers"),),
        peers=("max_new_tokens",),
    )
    html_report: bool = flag(True, "write report.html with its plots at the end", peers=("plot_loss",))
    lang: str = flag(
        "auto",
        "language of the screen (auto: Chinese where LC_ALL or LANG says zh)",
        topic="screen",
        choices=("auto", "en", "zh"),
        local=True,
    )
    watch: bool = flag(
        False,
        "show the run live in a browser of this machine: curves, answers, alerts, time left; the run says where",
        unused=(Unused(lambda a: a.run.dry_run, "dry_run=true trains nothing"),),
        peers=("live",),
    )
    window_title: bool = flag(False, "say in the title of the terminal's window how far the run is", topic="screen")
    seed: int = flag(
        42,
        "seed of the split, the order of the data, adapters and dropout",
        least=0,
        below=2**32,
        identity=True,
        peers=("random_seed", "data_seed"),
    )
