"""Tokens that are added: names in the tokenizer, rows in the model that begin as the mean of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from preference.models.look import ModelError


def tokens_to_add(text: str | None) -> list[str]:
    """The tokens of add_tokens: names with commas between, or the lines of a file.

    Raises:
        ModelError: there are none.
    """
    if text is None:
        return []
    path = Path(text).expanduser()
    try:
        names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"add_tokens {text} cannot be read: {error}") from error
    found = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not found:
        raise ModelError(f"add_tokens {text} names no token: a,b,c or a file with one a line")
    return found


def add_to_tokenizer(tokenizer: Any, names: list[str]) -> None:
    """Those that it has already stay as they are."""
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([name for name in names if name not in vocabulary])


@torch.no_grad()
def add_rows(model: PreTrainedModel, tokenizer: Any, names: list[str]) -> list[int]:
    """Give the model a row for every token of the tokenizer, and return the ids whose rows are to be trained: those
    added here, and those of `names`.
    """
    if not names:
        return []
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    before = layers[0].weight.shape[0]
    if len(tokenizer) > before:
        means = [layer.weight.float().mean(0) for layer in layers]
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
        for layer, mean in zip(layers, means, strict=True):
            layer.weight[before:] = mean.to(layer.weight.dtype)
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names}
    return sorted(ids | set(range(before, len(tokenizer))))
