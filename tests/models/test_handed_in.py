"""What is handed in is used as it is, or refused by name, at every entrance; pytest -s prints the table."""

from __future__ import annotations

import re

import pytest
import torch
from handed_in import expected_logits, make_all, make_plain

from preference.arguments import parse_arguments
from preference.errors import PreferenceError
from preference.models.adapters import check_on_paper
from preference.models.hardware import Hardware
from preference.models.loading import adapt, load_base
from preference.models.look import look_on_paper
from preference.models.sources import find_model
from preference.serve.loading import find_source, load_tuned_model
from preference.serve.merging import load_merged

CPU = Hardware("cpu", "CPU", 0, False)
ENTRANCES = ("train", "evaluate", "dry run", "chat", "export")
USED = {"plain": ENTRANCES, "adapter": ENTRANCES, "fp8": ENTRANCES, "bnb4": ("train", "evaluate", "dry run", "chat")}
USED["own_head"] = ENTRANCES
USED["prompt_tuning"] = ("evaluate", "chat")
REFUSED = {
    "bnb8_whole": r"says that bitsandbytes has quantised its weights, and they are whole: take quantization_config out",
    "prompt_tuning": r"is of the kind PROMPT_TUNING: tokens before the prompt, .* nor merged nor exported",
    "missing": r"2 tensors are missing \(lm_head.weight, model.layers.1.mlp.down_proj.weight\) and would be random",
    "more_layers": r"describes \(model_type llama, 3 layers\): 9 tensors are missing \(model.layers.2.",
    "fewer_layers": r"9 tensors have no place in LlamaForCausalLM \(model.layers.1.",
    "value_head": r"1 tensors have no place in LlamaForCausalLM \(v_head.summary.weight\)",
    "other_shape": r"1 tensors have another shape \(lm_head.weight is \[500, 64\], not \[512, 64\]\)",
    "cut_off": r"model.safetensors is cut off or damaged",
    "lost_weights": r"lost_weights has lost its weights: neither model.safetensors",
    "gptq": r"quantised with GPTQ, and the package that reads it is not installed: pip install optimum gptqmodel",
    "fp8_unsaid": r"is held as F8_E4M3, and config.json has no quantization_config",
    "bnb4": r"quantized weights cannot be merged into: name the unquantized model with --base_model",
    "bnb4_damaged": r"bnb4_damaged, which is quantised with bitsandbytes, cannot be loaded: .* or get the folder anew",
    "adapter_lost": r"holds adapter_config.json but no adapter_model.safetensors: its weights are lost",
    "adapter_of_another": r"does not fit its base .*plain: 14 of its tensors have no place",
    "adapter_over_adapter": r"an adapter itself: merge that first",
    "encoder_decoder": r"is no causal language model but of the type t5 \(T5ForConditionalGeneration\)",
    "masked": r"is no causal language model but of the type bert \(BertForMaskedLM\)",
    "adapter_nan": r"2 tensors hold NaN or infinity \(.*0.self_attn.q_proj.lora_B.weight, .*1.self_attn.q_proj.lora_B",
    "adapter_of_8_bits": r"lora_A.weight as I8, .*, and nothing says how that is scaled",
    "adapter_of_other_size": r"(size mismatch for .*lora_A|14 of its tensors have another shape)",
    "adapter_in_weights": r"begins in its base's weights \(init_lora_weights=pissa_niter_4\)",
    "adapter_beside_bin": r"holds a whole model and an adapter: name both",
    "model_and_adapter": r"holds a whole model and an adapter: name both",
}
# From headers alone 4-bit tensors are not unpacked, and no values are seen
UNSEEN_ON_PAPER = ("bnb4_damaged", "adapter_nan")
IDS = torch.tensor([[1, 5, 9, 77, 300]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("models"))


def enter(entrance: str, folder: str):
    """The model as an entrance has it; None on paper."""
    if entrance == "chat":
        return load_tuned_model(find_source(folder), torch.float32, "cpu")
    if entrance == "export":
        return load_merged(find_source(folder), [([1, 5, 9, 77, 300], 2)])[0]
    source = find_model(folder)
    if entrance == "dry run":
        model = look_on_paper(source.base)
        assert model is None or all(weight.is_meta for weight in model.parameters())
        if model is not None and source.adapter:
            check_on_paper(model, source.adapter)
        return None
    args = parse_arguments([] if entrance == "train" else ["--do_train", "false"])
    return adapt(load_base(source, args, CPU), source, args, write=False, say=print)


def test_every_kind_at_every_entrance(folders, monkeypatch):
    monkeypatch.setattr("sys.argv", ["orpo_train.py"])
    lines, wrong = [], []
    for kind, folder in folders.items():
        for entrance in ENTRANCES:
            try:
                model = enter(entrance, str(folder))
                outcome, right = "used", entrance in USED.get(kind, ())
                right |= entrance == "dry run" and kind in UNSEEN_ON_PAPER
                if model is not None and right:
                    with torch.no_grad():
                        logits = model.eval()(IDS).logits
                    right = torch.allclose(logits, expected_logits(kind, folders, IDS), atol=2e-5, rtol=0)
            except PreferenceError as error:
                outcome = str(error)
                right = entrance not in USED.get(kind, ()) and re.search(REFUSED[kind], outcome)
            lines.append(f"{kind:<22}{entrance:<10}{outcome}")
            if not right:
                wrong.append(lines[-1])
    print("\n".join(["", *lines]))
    assert len(lines) == len(ENTRANCES) * len(USED | REFUSED) and not wrong, "\n".join(wrong)


def test_an_adapter_is_gone_on_with_to_the_bit(folders):
    """Nothing of it is drawn anew, and it is what training changes."""
    model = enter("train", str(folders["adapter"]))
    assert torch.equal(model.eval()(IDS).logits, expected_logits("adapter", folders, IDS))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}
    assert model.peft_config["default"].base_model_name_or_path == str(folders["plain"])


def test_a_model_is_saved_as_tied_only_if_it_is(folders, tmp_path):
    own = enter("chat", str(folders["own_head"]))
    assert not own.config.tie_word_embeddings and not torch.equal(own.lm_head.weight, own.model.embed_tokens.weight)
    tied = make_plain(tmp_path / "tied", tie_word_embeddings=True)
    assert enter("chat", str(tied)).config.tie_word_embeddings and look_on_paper(str(tied)).config.tie_word_embeddings
