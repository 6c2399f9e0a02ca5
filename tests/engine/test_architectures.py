"""The packed engine over architectures; `python tests/architectures.py` covers all and writes the table in docs/."""

from __future__ import annotations

import pytest
import torch
from architectures import ROOT, build, examine
from test_packing import random_pairs

from preference.engine.masks import EngineError
from preference.engine.packing import pack_pairs
from preference.engine.probe import packed_logps, plain_logps, prepare_model
from tiny import tiny_model

SHARED = "llama qwen2 qwen3 qwen3_moe mistral mixtral gemma gemma2 gemma3_text phi phi3 olmo2 gpt2 gpt_oss".split()
SHARED += "gpt_neox granite cohere2 stablelm smollm3 glm4 llama4_text".split()
SHARED += "qwen3_5_text lfm2 nemotron_h minimax bloom falcon xglm".split()
ROWS = ["rwkv", "axk2", "gpt_neo"]
REFUSED = ["bert", "modernbert-decoder"]


@pytest.mark.parametrize("arch", SHARED + ROWS + REFUSED)
def test_architecture_runs_as_the_table_says(arch: str) -> None:
    """`examine` compares log-probabilities with plain forwards, windows of 6 tokens included."""
    finding = examine(arch)
    expected = "shared" if arch in SHARED else "rows" if arch in ROWS else "refused"
    assert finding.how == expected, finding
    assert f"| {arch} | {expected} |" in (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")


def test_a_refusal_names_the_other_engine() -> None:
    with pytest.raises(EngineError, match="use engine=trl"):
        prepare_model(build("modernbert-decoder"))


def test_router_losses_are_refused() -> None:
    with pytest.raises(EngineError, match="output_router_logits.*engine=trl"):
        prepare_model(tiny_model("mixtral", output_router_logits=True))


@pytest.mark.parametrize("broken", ["mask", "head"])
def test_a_model_that_does_something_else_is_not_run_shared(monkeypatch, broken: str) -> None:
    """The probe finds what no flag tells: attention that leaks between branches, a head with a step of its own."""
    model = tiny_model("llama")
    if broken == "head":
        model.lm_head.register_forward_hook(lambda *args: args[-1] * 1.5)
        with pytest.raises(EngineError, match="log-probabilities differ.*engine=trl"):
            prepare_model(model)
    else:

        def leaking(self):
            for rows, keys in self.blocks:
                seen = sum(part.stop - part.start for part in keys)
                yield torch.ones(rows.stop - rows.start, seen).tril().bool()

        monkeypatch.setattr("preference.engine.cpu.attention._Plan._visible", leaking)
        engine = prepare_model(model)
        assert not engine.share_prompt and "log-probabilities differ" in engine.reason


@pytest.mark.parametrize("arch, scale", [("granite", {"logits_scaling": 8.0}), ("cohere2", {"logit_scale": 0.3})])
def test_the_scale_of_logits_is_the_models_own(monkeypatch, arch: str, scale: dict[str, float]) -> None:
    model, pairs = tiny_model(arch, **scale), random_pairs(3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # the logits of a trained model are not near zero
        prepare_model(model)
        assert torch.allclose(packed_logps(model, pairs, True), plain_logps(model, pairs), atol=1e-3)
    monkeypatch.setattr("preference.engine.forward.logit_scale", lambda config: 1.0)
    again = tiny_model(arch, **scale)
    again.get_output_embeddings().weight.data.mul_(20)
    with pytest.raises(EngineError, match="log-probabilities differ.*engine=trl"):
        prepare_model(again)


@torch.no_grad()
def test_generation_is_as_before() -> None:
    for arch in ("llama", "gemma2"):  # SDPA and eager
        model = tiny_model(arch)
        ids = torch.tensor([[5, 6, 7, 8]])
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        before, logits = model.generate(ids, **options), model(ids).logits
        assert prepare_model(model).share_prompt
        assert torch.equal(model.generate(ids, **options), before)
        assert torch.allclose(model(ids).logits, logits)
        assert "packed" not in str(model.config.to_dict())


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_of_attention_is_kept(dropout: bool) -> None:
    model = tiny_model("llama", attention_dropout=0.5 if dropout else 0.0)
    prepare_model(model)
    model.train()
    with torch.no_grad():
        first, second = (packed_logps(model, random_pairs(2), True) for _ in range(2))
    assert torch.equal(first, second) != dropout


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_recomputation_sees_the_same_row(arch: str, reentrant: bool) -> None:
    """Gradients with activation checkpointing equal those without, with another packed forward in between."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(arch, sliding_window=6) if arch == "gemma3_text" else tiny_model(arch)
        prepare_model(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        loss = packed_logps(model, random_pairs(3), True).sum()
        packed_logps(model, random_pairs(2, seed=9), True)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


ADAPTERS = {
    "lora": dict(target_modules="all-linear"),
    "dora": dict(target_modules=["q_proj", "v_proj"], use_dora=True),
    "lora on the head": dict(target_modules=["q_proj", "lm_head"]),
    "trained head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str) -> None:
    """An adapter, on the head too, is in the log-probabilities and gets its gradient; disabled, it is not."""
    from peft import LoraConfig, get_peft_model

    bare = tiny_model("llama")
    pairs = random_pairs(3)
    with torch.no_grad():
        without = plain_logps(bare, pairs)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[kind])
    model = get_peft_model(tiny_model("llama"), config)
    assert prepare_model(model).share_prompt
    plain, packed = plain_logps(model, pairs), packed_logps(model, pairs, True)
    assert torch.allclose(packed, plain, atol=1e-4)
    assert not torch.allclose(packed, without, atol=1e-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    want, got = (torch.autograd.grad(x.sum(), trained) for x in (plain, packed))
    for a, b in zip(want, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(packed_logps(model, pairs, True), without, atol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_tuning_runs_in_rows(kind: str) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    model = get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not prepare_model(model).share_prompt
    pairs = random_pairs(3)
    with torch.no_grad():
        assert torch.allclose(packed_logps(model, pairs, False), plain_logps(model, pairs), atol=1e-4)


def test_a_copy_of_a_prepared_model_is_its_own() -> None:
    import copy

    model, pairs = tiny_model("llama"), random_pairs(2)
    prepare_model(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = packed_logps(twin, pairs, True)
        for p in model.parameters():
            p.mul_(1.5)
        assert torch.equal(packed_logps(twin, pairs, True), before)
        assert torch.allclose(plain_logps(twin, pairs), before, atol=1e-4)


def test_share_prompt_can_be_turned_off() -> None:
    model = tiny_model("llama")
    assert prepare_model(model).share_prompt
    assert not prepare_model(model, share_prompt=False).share_prompt
    assert "segments" not in pack_pairs(random_pairs(1), share_prompt=False)
