"""What an adapter can be besides A and B: each kind is trained, saved, loaded, and merged to what it computes."""

from __future__ import annotations

import json

import pytest
import torch
from handed_in import make_plain
from training import make_pairs, make_trainer

from preference.arguments import parse_arguments
from preference.models.adapters import add_adapter
from preference.models.hardware import Hardware
from preference.models.loading import adapt, load_base
from preference.models.look import ModelError
from preference.models.sources import find_model
from preference.models.vocabulary import add_rows, add_to_tokenizer, tokens_to_add
from preference.serve.loading import find_source, load_tuned_model
from preference.serve.merging import load_merged
from tiny import tiny_model, tiny_tokenizer

CPU = Hardware("cpu", "CPU", 0, False)
IDS = torch.tensor([[1, 5, 9, 77, 300]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    out = tmp_path_factory.mktemp("bases")
    biased = make_plain(out / "biased", attention_bias=True)
    return {"plain": make_plain(out / "plain"), "tied": make_plain(out / "tied", tie_word_embeddings=True),
            "biased": biased}  # fmt: skip


KINDS = {
    "rslora": ("plain", ["--use_rslora", "true", "--init_lora_weights", "gaussian"], "lora_"),
    "whole layers": ("plain", ["--modules_to_save", "embed_tokens,lm_head"], "modules_to_save"),
    "excluded": ("plain", ["--exclude_modules", "up_proj"], "lora_"),
    "biases": ("biased", ["--lora_bias", "all", "--loraplus_lr_ratio", "16"], "bias"),
    "new tokens": ("plain", ["--add_tokens", "<a>,<b>"], "trainable_tokens_delta"),
    "new tokens, tied": ("tied", ["--add_tokens", "<a>,<b>"], "trainable_tokens_delta"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_saved_loaded_and_merged(kind, bases, tmp_path):
    base, words, part = KINDS[kind]
    args = parse_arguments([*words, "--lora_rank", "4"])
    source, tokenizer = find_model(str(bases[base])), tiny_tokenizer()
    tokenizer.add_tokens([f"<more {i}>" for i in range(512 - len(tokenizer))])  # as many as the model has rows
    add_to_tokenizer(tokenizer, tokens_to_add(args.model.add_tokens))
    model = load_base(source, args, CPU)
    rows = model.get_input_embeddings().weight.detach().clone()
    new = add_rows(model, tokenizer, tokens_to_add(args.model.add_tokens))
    model = adapt(model, source, args, write=False, say=print, grow=lambda _: new)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any(part in name for name in before)
    high = 500 if not new else max(new) + 1
    pairs = make_pairs(8, low=3 if not new else 450, high=high)
    trainer = make_trainer("packed", tmp_path / "run", pairs, model=model, learning_rate=1e-3, max_steps=2)
    trainer.loraplus_lr_ratio = args.model.loraplus_lr_ratio
    trainer.train()
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still, still
    if kind == "excluded":
        assert not any("up_proj" in name for name in before)
    if kind == "biases":
        rates = {group["lr"] / trainer.args.learning_rate for group in trainer.optimizer.param_groups}
        assert rates == {1.0, 16.0}
    if new:
        assert new == [512, 513]
        assert torch.equal(model.get_base_model().get_input_embeddings().weight[: len(rows)], rows)
    ids = torch.cat([IDS, torch.tensor([new])], 1) if new else IDS
    with torch.no_grad():
        expected = model.eval()(ids).logits
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "saved/run.json").write_text(json.dumps({"base_model": str(bases[base].resolve())}))
    served = find_source(str(tmp_path / "saved"))
    with torch.no_grad():
        loaded = load_tuned_model(served, torch.float32, "cpu")(ids).logits
        merged = load_merged(served, [(ids[0].tolist(), 2)])[0]
        merged.save_pretrained(tmp_path / "merged")
        exported = load_tuned_model(find_source(str(tmp_path / "merged")), torch.float32, "cpu")(ids).logits
    assert torch.allclose(loaded, expected, atol=1e-5) and torch.allclose(exported, expected, atol=1e-4)


@torch.no_grad()
def test_new_rows_begin_as_the_mean_of_the_others():
    tokenizer, model = tiny_tokenizer(), tiny_model(vocab_size=len(tiny_tokenizer()))
    means = [layer.weight.mean(0) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    add_to_tokenizer(tokenizer, ["<new>", "<|im_end|>"])
    assert add_rows(model, tokenizer, ["<new>", "<|im_end|>"]) == [2, len(tokenizer) - 1]
    for layer, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True):
        assert layer.weight.shape[0] == len(tokenizer) and torch.allclose(layer.weight[-1], mean, atol=1e-7)


def test_what_could_not_be_exported_is_refused_before_it_trains():
    tied = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ModelError, match="modules_to_save: .*lm_head is tied"):
        add_adapter(tied, parse_arguments(["--modules_to_save", "lm_head"]).model, 0)
    with pytest.raises(ModelError, match="exclude_modules: the model has no w_pack"):
        add_adapter(tied, parse_arguments(["--exclude_modules", "w_pack"]).model, 0)


def test_tokens_come_from_a_list_or_a_file(tmp_path):
    (tmp_path / "tokens").write_text("<a>\n\n<b>\n<a>\n")
    assert tokens_to_add(str(tmp_path / "tokens")) == tokens_to_add("<a>, <b>,<a>") == ["<a>", "<b>"]
    with pytest.raises(ModelError, match="names no token"):
        tokens_to_add(",")
