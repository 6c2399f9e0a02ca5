"""`--help`: examples, then the flags that most runs set; `--help all` has every flag by topic."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from preference.flags.declaration import Flag

COMMON = (
    "model_name_or_path", "template_name", "use_peft", "qlora", "lora_rank",
    "train_file_dir", "validation_file_dir", "dataset_name", "max_source_length", "max_target_length",
    "loss", "orpo_beta", "beta",
    "dry_run", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "learning_rate", "eval_steps", "save_steps", "output_dir",
)  # fmt: skip
EXAMPLES = """\
usage: orpo_train.py [--config FILE] [--name value] ...

  sh run_orpo.sh                                          on the sample data
  train_file_dir=my_pairs sh run_orpo.sh --dry_run true   will it fit, how long?
  sh run_orpo.sh --model_name_or_path /models/mine --template_name auto
  sh run_orpo.sh --max_steps 20 --learning_rate 5e-5 --output_dir outputs/trial
  python orpo_train.py --config my_run.yaml --seed 7      flags from a file

Hyphens are underscores: --lora-rank 8 = --lora_rank 8.
Switches: --no_use_peft = --use_peft false.
"""
COLUMN = 38  # where the explanations begin, if the terminal is wide enough for two columns


def help_text(flags: Mapping[str, Flag], everything: bool, width: int) -> str:
    """
    Args:
        everything: all flags by topic, or the common ones by group. width: columns of the terminal.
    """
    lines = [
        EXAMPLES,
        *_beside("  --config FILE", "flags as `name: value` lines, overridden by the command line", width),
    ]
    if everything:
        topics = {topic: [f for f in flags.values() if f.topic == topic] for topic in _topics(flags)}
    else:
        common = [flags[name] for name in COMMON]
        groups = {"model": "the model", "data": "the data", "objective": "the objective", "run": "the run"}
        topics = {title: [f for f in common if f.group == group] for group, title in groups.items()}
    for topic, members in topics.items():
        lines += ["", f"{topic}:"]
        for flag in members:
            lines += _flag(flag, width)
    rest = len(flags) - len(COMMON)
    lines += ["", "each with its default" + ("" if everything else f"; --help all has {rest} more flags")]
    return "\n".join(lines)


def _topics(flags: Mapping[str, Flag]) -> Sequence[str]:
    return list(dict.fromkeys(flag.topic for flag in flags.values()))


def _flag(flag: Flag, width: int) -> Iterator[str]:
    """The flag as it would be typed with its default, and what it does beside it or below."""
    head = f"  --{flag.name} {_default(flag)}"
    named = flag.choices and not callable(flag.choices)  # a library that knows them is not imported for this
    text = f"{flag.help} [{', '.join(flag.names)}]" if named else flag.help
    yield from _beside(head, text, width)


def _beside(head: str, text: str, width: int) -> Iterator[str]:
    """A text beside its head where the terminal is wide enough for two columns, or below."""
    column = COLUMN if width >= 70 else 6
    wrapped = textwrap.wrap(text, max(width, 40) - column - 1, break_on_hyphens=False)
    if len(head) < column - 1:
        yield head.ljust(column) + wrapped.pop(0)
    else:
        yield head
    for line in wrapped:
        yield " " * column + line


def _default(flag: Flag) -> str:
    """The default as one writes it; what is written where there is none."""
    if flag.default is None:
        return "auto" if flag.auto else {int: "N", float: "X", bool: "true|false"}.get(flag.kind, "TEXT")
    if flag.auto and not flag.default:
        return "auto"
    return str(flag.default).lower() if flag.kind is bool else str(flag.default)
