"""Ids by the rows of the embedding, tokens by the positions; what no hub is asked for."""

from __future__ import annotations

import pytest
from training import pairs_of

from conversation import get_conv_template
from preference.models.limits import (
    check_positions,
    check_vocabulary,
    largest_id,
    longest_row,
    position_table,
    template_ids,
)
from preference.models.look import ModelError
from preference.models.sources import SourceError, find_model
from preference.models.starter import ModelNotFound, resolve_model
from tiny import tiny_model, tiny_tokenizer

ROWS = pairs_of([([3, 4], [5, 6, 7], [8]), ([3] * 40, [511], [9] * 30), ([1], [2], [4])])


def test_the_largest_id_and_the_longest_row_are_named():
    assert largest_id(ROWS) == (511, "pairs.jsonl:2")
    assert longest_row(ROWS) == (70, "pairs.jsonl:2")


def test_ids_beyond_the_embedding_are_refused_by_token_and_row():
    tokenizer = tiny_tokenizer()
    ids = template_ids(get_conv_template("qwen"), tokenizer)
    check_vocabulary(tiny_model(), tokenizer, ids, [ROWS])
    with pytest.raises(
        ModelError, match=r"token 511 of pairs.jsonl:2 is in neither the model's vocabulary of 511 rows"
    ):
        check_vocabulary(tiny_model(vocab_size=511), tokenizer, ids, [ROWS])
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|tool_{i}|>" for i in range(200)]})
    ids.append(tokenizer.convert_tokens_to_ids("<|tool_199|>"))
    with pytest.raises(ModelError, match=r"'<\|tool_199\|>'\) of the template or a stop token"):
        check_vocabulary(tiny_model(), tokenizer, ids)


def test_a_pad_token_without_a_row_gives_way():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|tool_{i}|>" for i in range(200)]})
    tokenizer.pad_token = "<|tool_199|>"
    check_vocabulary(tiny_model(), tokenizer, [1])
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize("arch, sizes", [("gpt2", {"n_positions": 64}), ("opt", {"max_position_embeddings": 64}),
                                         ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                                   "rotary_dim": 4})])  # fmt: skip
def test_rows_beyond_a_table_of_positions_are_refused(arch, sizes):
    if arch == "opt":
        sizes = sizes | {"ffn_dim": 64, "word_embed_proj_dim": 32}
    model = tiny_model(arch, **sizes)
    assert position_table(model) == 64
    with pytest.raises(ModelError, match=r"pairs.jsonl:2 has 70 tokens.* has 64 positions: --max_source_length 43 "):
        check_positions(model, [ROWS])
    assert check_positions(model, [ROWS.select([0, 2])]) is None


def test_rows_beyond_trained_rotary_positions_are_warned_of():
    model = tiny_model(max_position_embeddings=64)
    assert position_table(model) is None
    assert "pairs.jsonl:2 has 70 tokens, and the model was trained for 64" in check_positions(model, [ROWS])
    assert "rope_scaling" in check_positions(model, [ROWS])
    assert check_positions(tiny_model(), [ROWS]) is None


def test_what_is_or_looks_like_a_path_is_never_asked_of_a_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("preference.models.starter._from_hub", lambda name, *_: asked.append(name) or name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/empty").mkdir(parents=True)
    for name in (
        "outputs/gone",
        "outputs/empty",
        "./gone",
        "../gone/x",
        "models/gone",
        "me/checkpoint-5",
        "a/b/c",
        str(tmp_path / "gone"),
    ):
        with pytest.raises(ModelNotFound, match=r"path here, so no hub|cannot be a hub id"):
            resolve_model(name)
    assert not asked
    assert resolve_model("hub:outputs/gone") == resolve_model("hub:outputs/gone") and set(asked) == {"outputs/gone"}
    assert resolve_model("owner/name") == "owner/name" == asked[-1]
    with pytest.raises(ModelNotFound, match="is also a path here"):
        resolve_model("hub:outputs/empty")


def test_an_adapters_base_may_be_named(tmp_path):
    from handed_in import make_adapter, make_plain

    plain = make_plain(tmp_path / "plain")
    adapter = make_adapter(tmp_path / "adapter", plain)
    moved = plain.rename(tmp_path / "moved")
    with pytest.raises(SourceError, match="--model_name_or_path BASE --adapter_name_or_path ADAPTER"):
        find_model(str(adapter))
    warned = []
    found = find_model(str(moved), str(adapter), base_given=True, warn=warned.append)
    assert (found.base, found.adapter) == (str(moved), str(adapter)) and "is laid over" in warned[0]
    with pytest.raises(SourceError, match="is no adapter"):
        find_model(str(moved), str(moved))
