"""The small files of a model's folder, read so that whatever is wrong with one is said in a sentence.

A config.json is looked at before transformers is: many of its classes make lists as long as the model has layers.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from preference.errors import PreferenceError

CONFIG = "config.json"
LARGEST_FILE = 64 << 20  # bytes of a config.json: those of large models with a quantisation for each layer have two
MOST_LAYERS = 10_000
# Sizes by what their names say, and what they may be: ten times and more of what the largest models have
MOST = (
    (re.compile(r"layers?$|depth$|blocks$"), MOST_LAYERS),
    (re.compile(r"experts?(_per_tok)?$"), 65_536),
    (re.compile(r"heads?$"), 65_536),
    (re.compile(r"vocab_size$|vocabulary"), 1 << 24),
    (re.compile(r"hidden_size|intermediate|n_embd|d_model|n_inner|ffn|dim$|rank$|width$|state_size$"), 1 << 20),
)
SWITCHES = ("output_hidden_states", "output_attentions", "use_cache", "tie_word_embeddings")  # else read in a forward
MOST_EXPERTS = 200_000  # in all layers together
LARGEST_RANK = 1 << 16  # of an adapter
ANEW = "get the folder anew, weights and config.json of one model"


class ModelError(PreferenceError, RuntimeError):
    """A model that cannot be used as it was handed in, or not for what was asked; the message says the way out."""


@contextlib.contextmanager
def reading(what: str, way_out: str) -> Iterator[None]:
    """Says in one sentence whatever a library makes of the content of a file that was handed in.

    Raises:
        ModelError: anything but a PreferenceError was raised.
    """
    try:
        yield
    except PreferenceError:
        raise
    except Exception as error:  # the content decides which of the library's errors, or of Python's, it is
        raise ModelError(f"{what} cannot be read: {first_line(error)}: {way_out}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, after its type where that says more: KeyError: 'model_type'."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and lines
    text = (lines[0] if lines else "").rstrip(".:")
    return text if plain else f"{type(error).__name__}: {text}".rstrip(": ")


def read_config(source: str, *, cache_dir: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a folder or hub id.

    Raises:
        ModelError: there is none that transformers knows, or its model is larger than any.
    """
    with reading(f"{CONFIG} of {source}", ANEW):
        _check_file(Path(source) / CONFIG)
        content = PreTrainedConfig.get_config_dict(source, cache_dir=cache_dir)[0]
        check_sizes(source, content)
        for name in SWITCHES:
            if not isinstance(content.get(name) or False, bool):
                raise ValueError(f"{name} must be true or false")
        return AutoConfig.from_pretrained(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)


def read_tokenizer(
    source: str, way_out: str, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a pad token; padding is masked by length, so any token serves.

    Args:
        way_out: what to do where there is none.

    Raises:
        ModelError: there is none that can be read.
    """
    config = Path(source) / CONFIG
    if config.is_file():  # from it transformers may take the tokenizer's kind
        with reading(f"{CONFIG} of {source}", ANEW):
            _check_file(config)
            check_sizes(source, json.loads(config.read_text(encoding="utf-8")))
    with reading(f"the tokenizer of {source}", way_out):
        tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
        template = tokenizer.chat_template
        if not (template is None or isinstance(template, str)):
            names = ", ".join(map(str, template)) if isinstance(template, dict) else type(template).__name__
            raise ValueError(f"its chat_template is no text but {names}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.decode(tokenizer.encode("a b"))  # some settings are read only now
        return tokenizer


def read_generation_config(folder: Path) -> GenerationConfig:
    """generation_config.json of a folder. Raises ModelError where it cannot be read."""
    file = folder / "generation_config.json"
    with reading(str(file), "get it anew, or delete it to have the model's own settings"):
        _check_file(file)
        generation = GenerationConfig.from_pretrained(folder)
    check_ids(generation, str(file))
    return generation


def check_ids(generation: Any, where: str) -> None:
    """Refuse stop and pad tokens that are no ids, and switches that are neither on nor off. Raises ModelError."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(generation, name, None)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and (type(token) is not int or not -1 <= token < 1 << 32):
                raise ModelError(f"{where}: {name} is {token!r}, and an id is a whole number: {ANEW}")
    for name in ("do_sample", "return_dict_in_generate", "output_scores", "output_logits", *SWITCHES[:3]):
        if (value := getattr(generation, name, None)) is not None and not isinstance(value, bool):
            raise ModelError(f"{where}: {name} is {value!r}, and is true or false: {ANEW}")


def _check_file(file: Path) -> None:
    if file.is_file() and (size := file.stat().st_size) > LARGEST_FILE:
        raise ModelError(f"{file} has {size:,} bytes, and no such file has more than {LARGEST_FILE:,}: {ANEW}")


def check_sizes(source: str, config: Any) -> None:
    """Refuse the sizes of a model larger than any that there is: nothing is allocated to find that out.

    Args:
        config: the content of config.json.

    Raises:
        ModelError: with the entry.
    """
    counts: dict[str, float] = {"layers": 1, "experts": 1}
    for name, value in _sizes(config):
        for pattern, most in MOST:
            if pattern.search(name) and value > most:
                raise ModelError(
                    f"{CONFIG} of {source} has {name} {_short(value)}, and no model has more than {most:,}: {ANEW}"
                )
        for kind in counts:
            if name.endswith(kind) or (kind == "layers" and name == "n_layer"):
                counts[kind] = max(counts[kind], value)
    if (experts := counts["layers"] * counts["experts"]) > MOST_EXPERTS:
        raise ModelError(
            f"{CONFIG} of {source} has {experts:,} experts in {counts['layers']:,} layers, and no model has more than "
            f"{MOST_EXPERTS:,}: {ANEW}"
        )


def _sizes(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in a config, whatever it is nested in."""
    waiting = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            yield name, value


def _short(value: float) -> str:
    return f"{value:,}" if value < 10**15 else f"above {10**15:,}"
