"""A config of TRL, LLaMA-Factory, axolotl or ms-swift -> flags of this program, and what has no counterpart.

Names come from the flags' own `peers` and from flags/peers.py; here stand the values that mean the same under another
word, and the keys that become something else than one flag.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preference.arguments.parsing import FLAGS
from preference.flags.declaration import ArgumentError
from preference.flags.peers import ELSEWHERE, elsewhere
from preference.screen import ACTING

TOOLS = {  # by keys that only one of them has
    "LLaMA-Factory": {"stage", "finetuning_type", "cutoff_len", "pref_loss", "pref_beta", "dataset_dir", "lora_target"},
    "axolotl": {"base_model", "datasets", "micro_batch_size", "rl", "sequence_len", "adapter", "num_epochs", "lora_r"},
    "ms-swift": {"rlhf_type", "train_type", "tuner_type", "model", "split_dataset_ratio", "attn_impl", "train_stage"},
    "TRL": {"dataset_name", "use_peft", "loss_type", "lora_r", "trainer", "max_length", "script_args", "dtype"},
}
BETAS = ("pref_beta", "rl_beta", "rlhf_beta", "beta", "dpo_beta", "simpo_beta", "orpo_alpha", "orpo_lambda")
LOSSES = {"sigmoid": "dpo", "kto_pair": "kto", "sigmoid_norm": "sigmoid_norm", "simpo": "simpo", "orpo": "orpo"}
ADAPTERS = {"lora": "true", "qlora": "true", "full": "false", "none": "false", "": "false"}
# Characters of a config, and what they may hold: none has a tenth of it
LONGEST, ALIASES, DEPTH, VALUES = 1 << 20, 20, 50, 100_000
OTHER_STAGES = {"sft", "pt", "rm", "ppo", "grpo", "rloo", "gkd", "reward", "pretrain"}


class MigrationError(ArgumentError):
    """A config that cannot be translated; str() says why."""


@dataclass
class Migration:
    """`flags`: names and values; `left`: keys without a counterpart, each with the reason or what to do instead."""

    tool: str
    flags: dict[str, str] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)


def read_foreign(path: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        MigrationError: it cannot be read or is no mapping.
    """
    import yaml

    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)
        found = json.loads(text, object_pairs_hook=_once) if path.endswith(".json") else _of_yaml(text)
        if len(text) > LONGEST or _values(found) > VALUES:
            raise ValueError(f"it is longer than {LONGEST} characters, or has more than {VALUES} values")
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise MigrationError(f"{path} cannot be read: {reason}") from None
    if not isinstance(found, dict) or not found:
        raise MigrationError(f"{path} holds no settings (name: value lines)")
    return {str(key): value for key, value in found.items()}


def _of_yaml(text: str) -> Any:
    """YAML in which scalars stay the text that was written (1e-4 is no number in YAML 1.1), but for null."""
    import yaml

    class Texts(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    keep = {"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
    Texts.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag in keep]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # as far as it is good: what is deep takes long
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)  # each may double what the ones before it stand for
        if depth > DEPTH or aliases > ALIASES:
            raise ValueError(f"it has more than {ALIASES} aliases (*name) or {DEPTH} levels: write out what they are")
    return yaml.load(text, Loader=Texts)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these entries. Raises ValueError where a name stands twice: one of them would be lost."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is written twice: keep one")
    return dict(pairs)


def _values(found: Any) -> int:
    """How many values there are when every alias is written out; more than VALUES of one that holds itself."""
    waiting, count = [found], 0
    while waiting and count <= VALUES:
        value = waiting.pop()
        count += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return count


def tool_of(config: Mapping[str, Any]) -> str:
    """Whose config it is: the one of which most telling keys are there."""
    counts = {tool: len(keys & config.keys()) for tool, keys in TOOLS.items()}
    return max(counts, key=lambda tool: counts[tool]) if any(counts.values()) else "TRL"


def migrate(config: Mapping[str, Any], tool: str | None = None) -> Migration:
    """Translate every key. A value that the flag does not take counts as left.

    Raises:
        MigrationError: what it trains is no preference tuning, or a loss that there is not.
    """
    found = Migration(tool or tool_of(config))
    loss = _loss(config)
    if loss:
        try:
            FLAGS["loss"].parse(loss)
        except ArgumentError as error:
            raise MigrationError(f"it trains by what there is not here: {error}") from None
        found.flags["loss"] = loss
    for key, value in config.items():
        for name, text in _translate(found, key, value, loss or "orpo"):
            _take(found, key, name, text)
    for key in ("warmup_steps", "warmup_ratio"):  # a ratio is written as a share of the steps
        if config.get(key) not in (None, "", 0, "0", "0.0"):
            _take(found, key, "warmup_steps", _text(config[key]))
    return found


def _take(found: Migration, key: str, name: str, text: str) -> None:
    try:
        FLAGS[name].parse(text)
        if ACTING.search(text):
            raise ArgumentError(f"{name} holds a control character")
    except ArgumentError as error:
        found.left.append((key, str(error)))
    else:
        found.flags[name] = text


def _loss(config: Mapping[str, Any]) -> str | None:
    """The objective. Keys that name it: the more special one counts (stage: dpo with pref_loss: orpo is ORPO)."""
    named = [str(config[key]).lower() for key in ("stage", "rlhf_type", "rl", "trainer") if config.get(key)]
    if named and named[-1] in OTHER_STAGES:
        raise MigrationError(f"it trains by {named[-1]}, which is no preference tuning: there is nothing to translate")
    special = next((config[key] for key in ("pref_loss", "loss_type") if config.get(key)), None)
    special = special[0] if isinstance(special, list) and len(special) == 1 else special
    if special is not None and (not named or named[-1] in ("dpo", "cpo", "simpo", "orpo")):
        word = str(special).lower()
        return "cpo" if word == "sigmoid" and named[-1:] == ["cpo"] else LOSSES.get(word, word)
    return LOSSES.get(named[-1], named[-1]) if named else None


def _translate(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    """(flag, value) of a key, or none: then `found.left` has it."""
    name = key.replace("-", "_")
    if name in ("stage", "rlhf_type", "rl", "trainer", "pref_loss", "loss_type", "warmup_ratio", "warmup_steps"):
        return  # read together
    if value is None or value == "":
        return
    special = _SPECIAL.get(name)
    if special:
        yield from special(found, key, value, loss)
    elif name in BETAS:
        yield "orpo_beta" if loss == "orpo" else "beta", _text(value)
    elif name in FLAGS:
        yield name, _text(value)
    elif name in _PEERS:
        yield _PEERS[name], _text(value)
    else:
        why = ELSEWHERE.get(name) or elsewhere(name) or "there is no such setting here"
        found.left.append((key, why))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)


def _adapter(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    word = _text(value).lower()
    if word not in ADAPTERS:
        found.left.append((key, f"{word} is none of lora, qlora, full"))
        return
    yield "use_peft", ADAPTERS[word]
    if word == "qlora":
        yield "qlora", "true"


def _datasets(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    """axolotl lists mappings; what else stands in them is about columns, which are recognised here."""
    flag = {"test_datasets": "validation_file_dir"}.get(key, "train_file_dir")
    entries = value if isinstance(value, list) else [value]
    paths = [str(entry.get("path", "")) if isinstance(entry, dict) else str(entry) for entry in entries]
    local = [
        path for path in paths if re.search(r"\.(jsonl?|csv|parquet)(\.gz)?$", path) or path.startswith((".", "/"))
    ]
    if len(local) == len(paths):
        yield flag, ",".join(paths)
    elif flag == "train_file_dir" and len(paths) == 1:
        yield "dataset_name", paths[0]
    else:
        found.left.append((key, f"several hub datasets ({', '.join(paths)}): download them and name their folders"))
    extra = sorted(
        {name for entry in entries if isinstance(entry, dict) for name in entry} - {"path", "ds_type", "name"}
    )
    if extra:
        found.left.append((f"{key} ({', '.join(extra)})", "columns are recognised; --columns names them where not"))


def _dataset(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    """LLaMA-Factory names entries of its dataset_info.json, ms-swift hub ids and files."""
    if found.tool == "LLaMA-Factory":
        found.left.append(
            (key, f"{_text(value)} is an entry of dataset_info.json: name its file with --train_file_dir")
        )
    else:
        yield from _datasets(found, key, value, loss)


def _length(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    """One limit of prompt and answer together: there are two here, whose sum counts."""
    text = _text(value)
    if not text.isdecimal() or len(text) > 9 or int(text) < 2:
        found.left.append((key, "it is no number of tokens"))
        return
    yield "max_source_length", str(int(text) - int(text) // 2)
    yield "max_target_length", str(int(text) // 2)


def _bits(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    if _text(value) == "4":
        yield "qlora", "true"
    else:
        found.left.append((key, "there are 4 bits (--qlora) or none"))


def _targets(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    text = _text(value)
    if text != "false":  # lora_target_linear, beside a list of modules
        yield "target_modules", "all" if text in ("all-linear", "true") else text


def _precision(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
    word = _text(value).lower()
    if word in ("auto", "true", "bf16", "bfloat16"):
        yield "bf16", "true"
    elif word in ("fp16", "float16", "half"):
        yield "fp16", "true"
    elif word in ("false", "float32", "fp32", "no"):
        yield "bf16", "false"
    else:
        found.left.append((key, "there is bfloat16, float16 or float32"))


def _by_strategy(flag: str) -> Callable[[Migration, str, Any, str], Iterator[tuple[str, str]]]:
    def translate(found: Migration, key: str, value: Any, loss: str) -> Iterator[tuple[str, str]]:
        word = _text(value).lower()
        if word in ("no", "false"):
            yield flag, "0"
        elif word != "steps":  # with steps the number has a key of its own
            found.left.append((key, f"--{flag} takes a number of steps, or a share below 1"))

    return translate


_Special = Callable[[Migration, str, Any, str], Iterator[tuple[str, str]]]
_SPECIAL: dict[str, _Special] = {
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "adapter"), _adapter),
    **dict.fromkeys(("datasets", "test_datasets"), _datasets),
    "dataset": _dataset,
    **dict.fromkeys(("cutoff_len", "max_length", "sequence_len", "max_seq_length"), _length),
    **dict.fromkeys(("quantization_bit", "quant_bits"), _bits),
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules", "lora_target_linear"), _targets),
    **dict.fromkeys(("bf16", "dtype", "torch_dtype"), _precision),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), _by_strategy("eval_steps")),
    "save_strategy": _by_strategy("save_steps"),
}
_PEERS = {peer: flag.name for flag in FLAGS.values() for peer in flag.peers}
