"""peft's list of kinds, whole: each is gone on with to the bit and merged, or only answers, or is refused by name; one
that a newer peft has passes nowhere in silence.
"""

from __future__ import annotations

import json

import pytest
import torch
from handed_in import make_plain
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from preference.models.adapters import check_on_paper, load_stack, merge
from preference.models.folder import ModelError
from preference.models.kinds import CHANGES_WEIGHTS, ONLY_ANSWERS, UNUSED, check_kind
from preference.models.look import look_on_paper
from preference.serve.loading import LoadingError, find_source

IDS = torch.tensor([[1, 5, 9, 77, 300]])
LAYERS = ["q_proj", "o_proj"]
OPTIONS = {
    "ADALORA": {"total_step": 10}, "BOFT": {"boft_block_size": 4}, "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 4, "r": 0}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "VBLORA": {"num_vectors": 16, "vector_length": 4}, "C3A": {"block_size": 4}, "WAVEFT": {"n_frequency": 32},
    "FOURIERFT": {"n_frequency": 32}, "MISS": {"r": 8}, "RANDLORA": {"r": 4}, "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 9]}, "ROAD": {"group_size": 16},
}  # fmt: skip
FROM_WEIGHTS = {"BOFT", "FROD", "UNILORA", "SHIRA"}  # which peft makes of weights, not of their shapes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_plain(tmp_path_factory.mktemp("kinds") / "plain", num_hidden_layers=1)


def base(plain):
    return AutoModelForCausalLM.from_pretrained(plain)


def named(folder, kind, **config):
    """A folder that says it is an adapter of this kind."""
    folder.mkdir()
    values = {"peft_type": kind, "base_model_name_or_path": "owner/base"} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_every_kind_of_peft_is_listed_once():
    listed = [*CHANGES_WEIGHTS, *ONLY_ANSWERS, *UNUSED]
    assert len(listed) == len(set(listed)) and set(listed) == {kind.value for kind in PeftType}


@pytest.mark.parametrize("kind", sorted(CHANGES_WEIGHTS))
def test_a_change_of_weights_is_gone_on_with_to_the_bit_and_merged(kind, plain, tmp_path):
    options = {"target_modules": LAYERS} | OPTIONS.get(kind, {})
    made = get_peft_model(base(plain), PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    made.save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(base(plain), tmp_path))
    assert not torch.equal(expected, logits(base(plain)))
    model = load_stack(base(plain), str(tmp_path), trainable=True)
    assert torch.equal(logits(model), expected) and any(weight.requires_grad for weight in model.parameters())
    assert torch.allclose(logits(merge(base(plain), str(tmp_path))), expected, atol=1e-5)
    if kind in FROM_WEIGHTS:
        with pytest.raises(ModelError, match=f"kind {kind}, which is made from the weights, and a dry run loads none"):
            check_on_paper(look_on_paper(str(plain)), str(tmp_path))
    else:
        check_on_paper(look_on_paper(str(plain)), str(tmp_path))


def test_what_is_no_change_of_weights_is_not_trained(tmp_path):
    for kind in ONLY_ANSWERS:
        folder = named(tmp_path / kind, kind)
        check_kind(folder, changes=False)
        with pytest.raises(ModelError, match=f"kind {kind}: .* neither trained nor merged nor exported"):
            check_kind(folder, changes=True)


def test_the_others_and_those_of_a_newer_peft_are_refused(tmp_path):
    for kind, reason in (UNUSED | {"LORA_OF_TOMORROW": "none that was tried here"}).items():
        folder = named(tmp_path / kind, kind)
        with pytest.raises(ModelError, match=f"kind {kind} and cannot be used: .*{reason}"):
            check_kind(folder, changes=False)
        with pytest.raises(LoadingError, match="cannot be used"):  # as chat, export and evaluation find it
            find_source(folder)


def test_what_peft_would_leave_out_of_a_config_is_refused(tmp_path):
    check_kind(named(tmp_path / "older", "LORA", enable_lora=None, merge_weights=False), changes=True)
    with pytest.raises(ModelError, match=r"says use_new_math = True, which peft .* does not know and would leave out"):
        check_kind(named(tmp_path / "newer", "LORA", use_new_math=True), changes=False)
