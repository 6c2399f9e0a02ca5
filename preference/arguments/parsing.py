"""From words to the arguments of a run, checked: every value by its flag, then what flags mean together."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preference.arguments.data import DataArguments
from preference.arguments.help import help_text
from preference.arguments.model import ModelArguments
from preference.arguments.objective import ObjectiveArguments
from preference.arguments.run import RunArguments
from preference.data.formats import choose
from preference.data.inputs import parse_sets
from preference.flags.declaration import ArgumentError, flags_of, quoted
from preference.flags.words import Given, read_words
from preference.losses.defaults import Recipe, orpo_beta, recipe
from preference.losses.specs import default_beta, default_nll_weight
from preference.optimization.keywords import OptimizationError, keywords
from preference.optimization.optimizers import check_optimizer, is_projected
from preference.optimization.schedules import BY_EVALUATION, check_schedule, warmup_length

GROUPS = {"model": ModelArguments, "data": DataArguments, "objective": ObjectiveArguments, "run": RunArguments}
FLAGS = flags_of(GROUPS)
UNKNOWN = 10**6  # optimizer steps, before the data is read
LARGE = 10**10  # parameters, before the model is loaded: the lowest of the default learning rates
TRL_HAS = ("orpo", "dpo", "kto")
TRL_HAS_NOT = tuple(
    (name, FLAGS[name].default)
    for name in ("label_smoothing", "orpo_temperature", "orpo_stages", "orpo_beta_schedule", "ld_alpha", "f_divergence")
)


@dataclass
class Arguments:
    """All flags of a run, by group, and the names of those that the user gave, here or in a config file."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    run: RunArguments
    given: frozenset[str] = frozenset()
    beta_from: str = ""  # where beta comes from, once the model is known

    def values(self) -> dict[str, Any]:
        """The value of every flag, by name."""
        return {name: getattr(getattr(self, flag.group), name) for name, flag in FLAGS.items()}

    @property
    def quantized(self) -> bool:
        return self.model.qlora or self.model.load_in_4bit

    @property
    def adapter(self) -> str | None:
        """The adapter that is handed in besides the model."""
        return self.model.adapter_name_or_path or self.model.peft_path

    @property
    def evaluation_files(self) -> bool:
        return self.data.validation_file_dir is not None

    def reading(self) -> dict[str, Any]:
        """The choices about reading files; single answers, labelled good or bad, are for loss=kto alone."""
        return self.data.reading() | {"unpaired": self.objective.loss == "kto"}

    @property
    def evaluation_sets(self) -> dict[str, str]:
        """The inputs of each evaluation set by its name; the only one may have none, which is ""."""
        return parse_sets(self.data.validation_file_dir or "") if self.evaluation_files else {}

    @property
    def beta(self) -> float:
        """The strength of the preference term, whatever its flag is called.

        Of loss=orpo without --orpo_beta it is that of a large model until `settle_beta` knows the model's size.
        """
        choice = self.objective
        given = choice.orpo_beta if choice.loss == "orpo" else choice.beta
        if given is not None:
            return given
        return orpo_beta(LARGE).value if choice.loss == "orpo" else default_beta(choice.loss)

    def settle_beta(self, parameters: int) -> str:
        """Set orpo_beta for a model of so many parameters where it is to be chosen; returns why it is what it is."""
        choice = self.objective
        if choice.loss != "orpo":
            return "the loss' default" if choice.beta is None else "given"
        if choice.orpo_beta is not None:
            return "given"
        found = orpo_beta(parameters)
        choice.orpo_beta = found.value
        return found.source

    @property
    def nll_weight(self) -> float:
        """The weight of the chosen answers' likelihood."""
        choice = self.objective
        given = choice.nll_weight
        return given if given is not None else default_nll_weight(choice.loss, choice.cpo_alpha)

    @property
    def resume(self) -> str:
        return self.run.resume_from_checkpoint or self.run.resume

    def learning_rate(self, parameters: int) -> Recipe:
        """The peak learning rate for a model of so many parameters, and where it comes from."""
        if self.run.learning_rate is not None:
            return Recipe(self.run.learning_rate, "given")
        return recipe(self.objective.loss, adapter=self.model.use_peft, parameters=parameters)

    def check_schedule(self, steps: int) -> None:
        """Raises OptimizationError if the learning rate over `steps` steps cannot be had or trains nothing."""
        options = keywords(self.run.lr_scheduler_kwargs)
        rate = self.learning_rate(LARGE).learning_rate
        check_schedule(self.run.lr_scheduler_type, self.run.warmup_steps, steps, options, rate)


def parse_arguments(words: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Arguments:
    """Parse the command line, `--config FILE` and run_orpo.sh's values (behind `--defaults`) included.

    Args:
        words: those of this process if None.
        environ: where a user may have set a flag for run_orpo.sh that has no line there: it would be lost.

    Raises:
        ArgumentError: an unknown flag, a value that it does not take, a flag that this run would ignore, or flags that
            contradict each other.
        SystemExit: `--help`.
    """
    words = without_local_rank(sys.argv[1:] if words is None else words, environ or {})
    given = read_words(words, FLAGS)
    if given.help:
        print(help_text(FLAGS, given.help == "all", shutil.get_terminal_size((100, 24)).columns))
        sys.exit(0)
    _refuse_lost(given, environ or {})
    values = {name: _value(name, text, "run_orpo.sh: ") for name, text in given.soft.items() if text.strip()}
    values |= {name: _value(name, text, given.where.get(name, "")) for name, text in given.texts.items()}
    args = _arguments(values, frozenset(given.texts))
    _drop_unused(args, given)
    for fault in _contradictions(args):
        raise ArgumentError(fault)
    return args


def without_local_rank(words: Sequence[str], environ: Mapping[str, str]) -> Sequence[str]:
    """`words` without the --local_rank=N that DeepSpeed's launcher puts first; LOCAL_RANK says the same.

    Raises:
        ArgumentError: it says otherwise.
    """
    written, _, text = (words[0] if words else "").partition("=")
    if written not in ("--local_rank", "--local-rank") or "LOCAL_RANK" not in environ:
        return words
    if text != environ["LOCAL_RANK"]:
        raise ArgumentError(
            f"{words[0]}, and the environment has LOCAL_RANK={environ['LOCAL_RANK']}: a launcher sets both, drop yours"
        )
    return words[1:]


def _refuse_lost(given: Given, environ: Mapping[str, str]) -> None:
    """A flag that is set from outside and that run_orpo.sh has no line for would be lost unsaid."""
    seen = given.soft.keys() | given.texts.keys()
    for name in FLAGS.keys() & environ.keys() - seen if given.soft else ():
        if text := environ[name]:
            raise ArgumentError(
                f"{name} is set from outside to {quoted(text)}, but run_orpo.sh has no line for it: give it as "
                f'--{name}, or add the line {name}="${{{name}:-}}" at its top'
            )


def _value(name: str, text: str, where: str) -> Any:
    try:
        return FLAGS[name].parse(text)
    except ArgumentError as error:
        raise ArgumentError(f"{where}{error}") from None


def _arguments(values: dict[str, Any], given: frozenset[str]) -> Arguments:
    groups = {
        group: declared(**{name: value for name, value in values.items() if FLAGS[name].group == group})
        for group, declared in GROUPS.items()
    }
    return Arguments(**groups, given=given)


def _drop_unused(args: Arguments, given: Given) -> None:
    """What the launcher hands over without effect in this run gets its default; what the user wrote is refused."""
    unused = {name: why for name, flag in FLAGS.items() if (why := flag.why_unused(args))}
    for name, why in unused.items():
        flag, group = FLAGS[name], getattr(args, FLAGS[name].group)
        changed = getattr(group, name) != flag.default
        if (name in given.texts and getattr(group, name) is not None) or (changed and not flag.soft):
            raise ArgumentError(f"{given.where.get(name, '')}--{name} has no effect in this run: {why}")
        setattr(group, name, flag.default)


def _contradictions(args: Arguments) -> Iterator[str]:
    """What flags say against each other, though each by itself is right."""
    data, objective = args.data, args.objective
    if args.quantized and not args.model.use_peft:
        yield "4-bit weights cannot be trained themselves: use_peft=true adds an adapter, or drop qlora/load_in_4bit"
    if {"adapter_name_or_path", "peft_path"} <= args.given:
        yield "adapter_name_or_path and peft_path are the same flag: give one of them"
    if args.model.new_adapter and args.model.torch_dtype == "bfloat16":
        yield "new_adapter merges in float32, and torch_dtype=bfloat16 would round what is merged: drop one of them"
    if objective.engine == "trl" and objective.loss not in TRL_HAS:
        yield f"engine=trl offers loss={', '.join(TRL_HAS)}; loss={objective.loss} needs engine=packed"
    for name, value in (("nll_scope", "sequence"), ("nll_weight", None), *TRL_HAS_NOT):
        found = getattr(objective, name)
        if objective.engine == "trl" and found not in (value, None):
            yield f"engine=trl computes no {name}={found}; engine=packed does"
    try:
        default_beta(objective.loss) if objective.beta is None else None
    except ValueError as error:
        yield str(error)
    if args.model.begins_in_weights and args.run.strategy.startswith("zero"):
        yield (
            f"init_lora_weights={args.model.init_lora_weights} keeps half of the adapter as it is, which DeepSpeed's "
            "optimizers move: strategy=ddp or fsdp, or init_lora_weights=default"
        )
    if args.run.bf16 and args.run.fp16:
        yield "bf16=true and fp16=true are two precisions of one run: drop one of them"
    if {"resume", "resume_from_checkpoint"} <= args.given:
        yield "resume and resume_from_checkpoint are the same flag: give one of them"
    if not (args.run.do_train or args.run.do_eval):
        yield "nothing to do: do_train and do_eval are both false"
    if data.train_file_dir is None and data.dataset_name is None:
        yield "no training data: set train_file_dir or dataset_name"
    yield from _faults_of_steps(args)
    yield from _faults_of_selection(args)
    try:
        choose(**args.reading())
    except ValueError as error:
        yield f"data_format, {', '.join(list(data.reading())[1:])}: {error}"


def _faults_of_steps(args: Arguments) -> Iterator[str]:
    """What transformers would refuse after the model has been loaded: optimizers and schedules lacking arguments."""
    run, default = args.run, FLAGS
    if not run.do_train:
        return
    if run.lr_scheduler_type in BY_EVALUATION and not (run.do_eval and run.eval_steps):
        yield f"lr_scheduler_type={run.lr_scheduler_type} changes when an evaluation is done: set eval_steps"
    if is_projected(run.optim) and args.model.use_peft:
        yield f"optim={run.optim} trains all weights through a projection: use_peft=false, or another optim"
    try:
        if run.max_steps > 0:
            warmup_length(run.warmup_steps, run.max_steps)
        if run.lr_scheduler_type != default["lr_scheduler_type"].default or run.lr_scheduler_kwargs:
            args.check_schedule(run.max_steps if run.max_steps > 0 else UNKNOWN)
        if run.optim != default["optim"].default or run.optim_args:
            check_optimizer(run.optim, run.optim_args, run.optim_target_modules)
    except OptimizationError as error:
        yield str(error)


def _faults_of_selection(args: Arguments) -> Iterator[str]:
    """What stands in the way of the weights that a run is to end with."""
    run, sets = args.run, [name for name in args.evaluation_sets if name]
    best, metric = run.load_best_model_at_end, run.metric_for_best_model.removeprefix("eval_")
    if best and not (run.eval_steps and run.save_steps):
        yield "load_best_model_at_end chooses among evaluated checkpoints: set eval_steps, and save_steps to the same"
    elif best and not _is_multiple(run.save_steps, run.eval_steps):
        yield (
            f"load_best_model_at_end needs an evaluation of every checkpoint: save_steps={run.save_steps:g} is no "
            f"multiple of eval_steps={run.eval_steps:g}"
        )
    if run.early_stopping_patience and not run.eval_steps:
        yield "early_stopping_patience counts evaluations during training: set eval_steps"
    if (best or run.early_stopping_patience) and sets and not metric.startswith(tuple(f"{name}_" for name in sets)):
        yield (
            f"metric_for_best_model={run.metric_for_best_model}: there are {len(sets)} named evaluation sets; say "
            f"which, as in {sets[0]}_{metric}"
        )
    if run.ema_decay and (best or run.average_checkpoints):
        yield "a result is either a moving average (ema_decay) or made of checkpoints: drop one of them"
    if (best or run.average_checkpoints or run.ema_decay) and run.strategy != "ddp":
        names = ("ema_decay", "average_checkpoints", "load_best_model_at_end")
        name = next(name for name in names if getattr(run, name))
        yield f"{name} needs whole weights in each process: strategy=ddp, or drop it with strategy={run.strategy}"


def _is_multiple(save_steps: float, eval_steps: float) -> bool:
    """Of numbers of steps, or of shares of the run."""
    ratio = save_steps / eval_steps
    return (save_steps < 1) == (eval_steps < 1) and abs(ratio - round(ratio)) < 1e-9
