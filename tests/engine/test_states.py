"""Layers that carry a state share their prompts exactly: log-probabilities and gradients as of plain forwards."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from architectures import build
from test_invariance import NAMES, STEPS
from training import logged, make_pairs, make_trainer

from preference.engine.probe import packed_logps, plain_logps, prepare_model
from preference.engine.states.install import _switch
from preference.engine.states.kinds import FUNCTIONS
from preference.engine.states.tree import Tree, current

# One of each kind of layer and of each way that models call them.
KINDS = ["qwen3_5_text", "kimi_linear", "mamba2", "mamba", "lfm2", "minimax", "falcon_h1"]
OTHERS = ["qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "bailing_hybrid", "nemotron_h", "bamba", "granitemoehybrid"]
OTHERS += ["jamba", "falcon_mamba", "lfm2_moe", "lfm3"]


def double(arch: str, **config):
    """A tiny model in double precision; the grouped product of experts has none."""
    return build(arch, experts_implementation="eager", **config).double()


def draw(*lengths: tuple[int, int, int], seed: int = 0) -> list[dict[str, list[int]]]:
    drawn = random.Random(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{k: [drawn.randrange(3, 500) for _ in range(n)] for k, n in zip(names, x, strict=True)} for x in lengths]


def eight_pairs() -> list[dict[str, list[int]]]:
    """Chunks of 64 tokens that are just not full, full, and just begun; one-token prompts and answers; common starts.

    A branch begins with the last prompt token: a prefix of 64 tokens belongs to a prompt of 65.
    """
    pairs = draw((64, 65, 2), (65, 64, 63), (66, 1, 3), (1, 5, 1), (1, 2, 66), (20, 3, 4), (20, 2, 5), (30, 130, 1))
    pairs[1]["prompt_ids"][:40] = pairs[0]["prompt_ids"][:40]
    pairs[2]["prompt_ids"][:63] = pairs[0]["prompt_ids"][:63]
    pairs[6]["prompt_ids"] = pairs[5]["prompt_ids"]
    pairs[7]["prompt_ids"][:18] = pairs[5]["prompt_ids"][:18]
    return pairs


def weighted(logps_B3: torch.Tensor) -> torch.Tensor:
    return (logps_B3 * torch.linspace(-1, 2, logps_B3.numel(), dtype=logps_B3.dtype).view_as(logps_B3)).sum()


def compare(model, pairs, **close: float) -> None:
    """Log-probabilities, and the gradient of every trained tensor, within `close`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Some models' own heads end in float32.
    plain, packed = plain_logps(model, pairs).double(), packed_logps(model, pairs, True).double()
    assert torch.allclose(packed, plain, **close)
    want, got = (torch.autograd.grad(weighted(x), list(trained.values()), allow_unused=True) for x in (plain, packed))
    largest = max(float(w.norm()) for w in want if w is not None)
    for name, w, g in zip(trained, want, got, strict=True):
        assert (w is None) == (g is None), name
        # A tensor whose gradient is next to nothing is held to the rounding of those that it is a difference of.
        assert w is None or float((g - w).norm()) <= close["rtol"] * (float(w.norm()) + 1e-3 * largest), name


@pytest.mark.parametrize("arch", KINDS)
def test_as_one_forward_per_sequence(arch: str) -> None:
    model = double(arch)
    assert prepare_model(model).share_prompt
    pairs = eight_pairs()
    for part in (pairs, pairs[3:4], pairs[5:7]):
        compare(model, part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", OTHERS)
def test_other_families(arch: str) -> None:
    model = double(arch)
    assert prepare_model(model).share_prompt
    compare(model, eight_pairs()[4:], rtol=1e-5, atol=1e-6)


def test_adapters_and_frozen_weights() -> None:
    """LoRA on every projection of a state layer: the gradient of both factors passes through the shared state."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(double("qwen3_5_text"), config).double()
    assert any("in_proj_qkv.lora_A" in name for name, _ in model.named_parameters())
    assert prepare_model(model).share_prompt
    compare(model, eight_pairs()[3:7], rtol=1e-4, atol=1e-6)  # factors of some 1 make the rounding of float32 larger


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("arch", ["qwen3_5_text", "mamba2"])
def test_recomputation_runs_over_the_same_row(arch: str, reentrant: bool) -> None:
    """Gradients with checkpointing equal those without, with another packed forward in between."""
    gradients = []
    for checkpointing in (False, True):
        model = build(arch)
        prepare_model(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        loss = weighted(packed_logps(model, eight_pairs()[3:7], True))
        packed_logps(model, draw((9, 2, 3), (1, 4, 1)), True)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["qwen3_5_text", "mamba", "minimax"])
def test_generation_is_as_before(arch: str) -> None:
    prepare_model(build("mamba2"))  # whose functions MiniMax borrows
    model, ids = build(arch), torch.tensor([[5, 6, 7, 8]])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    before, logits = model.generate(ids, **options), model(ids).logits
    assert prepare_model(model).share_prompt
    packed_logps(model, draw((9, 2, 3)), True)
    assert torch.equal(model.generate(ids, **options), before)
    assert torch.equal(model(ids).logits, logits)


OWN_ATTENTION = {"bloom": {}, "mpt": {}, "falcon": {}, "falcon, alibi": {"alibi": True}, "gptj": {}, "codegen": {}}
OWN_ATTENTION |= {"gpt_neox_japanese": {}}  # xglm does not run in double precision; the table has it


@pytest.mark.parametrize("arch", OWN_ATTENTION)
def test_attention_of_a_models_own(arch: str) -> None:
    """Biases by distance, learned and rotary positions: each by the place in the sequence, not in the row."""
    model = double(arch.split(",")[0], **OWN_ATTENTION[arch])
    assert prepare_model(model).share_prompt
    compare(model, eight_pairs(), rtol=1e-5, atol=1e-6)


CUTS = {
    "8x1": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "tokens": {"max_tokens_per_micro_batch": 70, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "rows": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "share_prompt": False},
}


def test_however_a_batch_is_cut(tmp_path) -> None:
    """Loss and gradient norm of a step: a state must not pass from one pair of a row to the next."""
    found, options = {}, STEPS | {"max_steps": 2}
    for name, cut in CUTS.items():
        trainer = make_trainer("packed", tmp_path, make_pairs(8), model=build("qwen3_5_text"), **options | cut)
        trainer.train()
        found[name] = logged(trainer, *NAMES)
    for name in CUTS:
        assert found[name] == [pytest.approx(step, rel=1e-6) for step in found["8x1"]], name


def tree_of(*parents: int, sizes: list[int]) -> Tree:
    return Tree(sizes, parents)


def test_runs_of_a_level_are_rows_padded_to_twice_their_length_at_most() -> None:
    #                 0    1   2    3    4   5
    tree = tree_of(-1, 0, 0, -1, 2, 2, sizes=[130, 65, 3, 60, 200, 90])
    levels, places = tree.levels(torch.device("cpu"))
    assert [[(g.rows, g.width, g.goes_on) for g in level] for level in levels] == [
        [(1, 130, True), (1, 60, False)],
        [(1, 65, False), (1, 3, True)],
        [(1, 200, False), (1, 90, False)],
    ]
    assert sorted(places.tolist()) == list(range(tree.length))
    assert levels[2][0].parents.tolist() == [0]
    order, at = tree.tails(4, torch.device("cpu"))
    none = tree.length
    # Before segment 4: the three tokens of segment 2, which end its path; before segment 2: the last of segment 0.
    before = {0: [none] * 3, 1: [127, 128, 129], 3: [none] * 3, 4: [195, 196, 197]}
    for segment, expected in before.items():
        begin = int(at[tree.starts[segment]])
        assert order[begin - 3 : begin].tolist() == expected
    assert tree.positions(torch.device("cpu"))[[0, 130, 195, 258]].tolist() == [0, 130, 130, 133]


# What the packages' functions take: flash-linear-attention 0.6.0, and the sources of causal-conv1d and mamba-ssm.
KERNELS = {
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "torch_chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel",
    "mamba2_chunk_scan": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit "
    "return_final_states return_varlen_states",
    "mamba_selective_scan": "u delta A B C D z delta_bias delta_softplus return_last_state",
}
OPTIONS = {"chunk_size", "use_mambapy"}  # of the torch functions alone; transformers keeps them from the kernels


@pytest.mark.parametrize("function, arch", zip(KERNELS, ["lfm2", "qwen3_5_text", "mamba2", "mamba"], strict=True))
def test_kernels_take_what_they_are_given(function: str, arch: str, monkeypatch) -> None:
    """The kernels themselves need a GPU: here the torch functions stand in, called as the kernels may be."""
    model = build(arch)
    prepare_model(model)
    file = vars(sys.modules[type(model.base_model).__module__])
    plain, called = file[function].__wrapped__, []

    def kernel(*args, **kwargs):
        if current() is not None:
            names = KERNELS[function].split()
            given = [*names[: len(args)], *kwargs]
            assert set(given) <= {*names} | OPTIONS and len(given) == len(set(given))
            called.append(given)
        return plain(*args, **kwargs)

    monkeypatch.setitem(file, function, _switch(kernel, FUNCTIONS[function]))
    pairs = eight_pairs()[4:6]
    with torch.no_grad():
        assert torch.allclose(packed_logps(model, pairs, True), plain_logps(model, pairs), atol=1e-3)
    assert called
