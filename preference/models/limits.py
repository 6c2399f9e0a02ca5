"""What a model has room for: ids by the rows of its embedding, positions by their table or by its training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from preference.models.look import ModelError
from preference.models.parameters import full_size

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def vocabulary_rows(model: Any) -> int:
    """Ids that both the embedding and the output head have a row for."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    sizes = []
    for layer in layers:
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.__class__.__name__ != "Params4bit":
            whole = weight.shape[0] if weight.numel() else full_size(weight) // weight.shape[-1]
            sizes.append(getattr(layer, "num_embeddings", None) or whole)
    return min(sizes)


def largest_id(dataset: Any) -> tuple[int, str]:
    """The largest token id of a set's pairs, and the source of the row that holds it."""
    best, source = -1, ""
    for batch in dataset.select_columns([*ID_COLUMNS, "source"]).with_format("arrow").iter(batch_size=1000):
        for name in ID_COLUMNS:
            column = batch[name].combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False)
            if len(values) and int(values.max()) > best:
                best = int(values.max())
                ends = np.cumsum([len(ids) for ids in column])
                source = str(batch["source"][int(np.searchsorted(ends, int(values.argmax()), side="right"))])
    return best, source


def longest_row(dataset: Any) -> tuple[int, str]:
    """Tokens of a set's longest sequence, prompt and one answer, and the source of its row."""
    best, source = 0, ""
    for batch in dataset.select_columns([*ID_COLUMNS, "source"]).with_format("arrow").iter(batch_size=1000):
        prompt, chosen, rejected = (
            np.asarray([len(ids) for ids in batch[name].combine_chunks()], dtype=np.int64) for name in ID_COLUMNS
        )
        lengths = prompt + np.maximum(chosen, rejected)
        if len(lengths) and int(lengths.max()) > best:
            best, source = int(lengths.max()), str(batch["source"][int(lengths.argmax())])
    return best, source


def template_ids(template: Any, tokenizer: Any) -> list[int]:
    """Every id that a template writes around what is said, its stop text and EOS included."""
    texts = [template.get_prompt("a", history=[["b", "c"]]), template.get_response("d")]
    ids = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def check_vocabulary(model: Any, tokenizer: Any, ids: Iterable[int], sets: Iterable[Any] = ()) -> None:
    """Refuse ids for which the model has no row; a pad token that has none gives way to one that has.

    Args:
        ids: of the template and of stop tokens. sets: datasets of pairs.

    Raises:
        ModelError: with the token, and where it comes from.
    """
    rows = vocabulary_rows(model)
    found = [(token, "the template or a stop token") for token in ids] + [largest_id(rows) for rows in sets]
    beyond = max(found, default=(-1, ""))
    if beyond[0] >= rows:
        token, where = beyond
        if token >= len(tokenizer):
            raise ModelError(
                f"token {token} of {where} is in neither the model's vocabulary of {rows} rows nor the tokenizer's of "
                f"{len(tokenizer)} tokens: take it out of generation_config.json, or take the tokenizer that belongs "
                "to the model"
            )
        text = tokenizer.convert_ids_to_tokens(token)
        raise ModelError(
            f"token {token} ({text!r}) of {where} is not in the model's vocabulary: that has {rows} rows, and the "
            f"tokenizer {len(tokenizer)} tokens. --add_tokens {text!r} gives the model rows for the tokenizer's new "
            "tokens, and trains them; else take the tokenizer that belongs to the model"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def position_table(model: nn.Module) -> int | None:
    """Rows of a table of positions, learned or computed once, beyond which there is nothing; None: there is none."""
    known = {id(model.get_input_embeddings())} if hasattr(model, "get_input_embeddings") else set()
    sizes = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and id(module) not in known and ("pos" in last or last == "wpe"):
            sizes.append(module.num_embeddings - getattr(module, "offset", 0))
        elif not hasattr(module, "make_weights"):  # which grow
            config = getattr(getattr(model, "config", None), "max_position_embeddings", None)
            for of, buffer in module.named_buffers(recurse=False):
                if "pos" in of and buffer.ndim >= 2 and buffer.shape[0] == config:
                    sizes.append(config)
    return min(sizes, default=None)


def check_positions(model: nn.Module, sets: Iterable[Any]) -> str | None:
    """A warning where rows are longer than the model was trained for.

    Raises:
        ModelError: they are longer than its table of positions.
    """
    longest, where = max((longest_row(rows) for rows in sets), default=(0, ""))
    table = position_table(model)
    if table is not None and longest > table:
        raise ModelError(
            f"the row {where} has {longest} tokens, prompt and answer, and the model has {table} positions: "
            f"--max_source_length {table - table // 3} --max_target_length {table // 3} leaves such rows out, "
            "or take a model of more positions"
        )
    config = model.config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None)
    if table is not None or not isinstance(trained, int) or longest <= trained or not _rotary(config):
        return None
    return (
        f"the row {where} has {longest} tokens, and the model was trained for {trained} positions "
        "(max_position_embeddings): answers may suffer beyond them. rope_scaling in its config.json stretches them, or "
        f"--max_source_length {trained - trained // 3} --max_target_length {trained // 3} leaves such rows out"
    )


def _rotary(config: Any) -> bool:
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))
