"""Layers that carry a state share their prompts exactly: log-probabilities and gradients as of plain forwards."""

from __future__ import annotations

import random
import sys
from itertools import pairwise

import pytest
import torch
from architectures import build
from test_invariance import NAMES, STEPS
from training import logged, make_pairs, make_trainer

from preference.engine.probe import packed_logps, plain_logps, prepare_model
from preference.engine.states.delta import gated_delta_rule
from preference.engine.states.install import _switch
from preference.engine.states.kinds import FUNCTIONS
from preference.engine.states.tree import Tree, current
from tiny import tiny_model

# One of each kind of layer and of each way that models call them, then the others.
KINDS = ["qwen3_5_text", "kimi_linear", "mamba2", "mamba", "lfm2", "minimax", "falcon_h1"]
OTHERS = ["qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "bailing_hybrid", "nemotron_h", "bamba", "granitemoehybrid"]
OTHERS += ["jamba", "falcon_mamba", "lfm2_moe", "lfm3"]


DELTA = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")


def double(arch: str, **config):
    """A tiny model in double precision; the grouped product of experts has none."""
    if arch in DELTA:
        config |= dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    return build(arch, experts_implementation="eager", **config).double()


@pytest.fixture
def no_float32(monkeypatch):
    """Models take recurrences, norms and decays to float32, whatever they are in: here that is double precision."""

    def start() -> None:
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch, "float", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    return start


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


@pytest.mark.parametrize("arch", KINDS + OTHERS)
def test_as_one_forward_per_sequence(arch: str, no_float32) -> None:
    """Eight pairs in one row; and, for two kinds of layers, rows of one and two pairs."""
    model = double(arch)
    assert prepare_model(model).share_prompt
    no_float32()
    pairs = eight_pairs()
    if arch in ("mamba", "falcon_mamba", "jamba"):  # token by token: no chunk has an end
        pairs = pairs[3:7]
    for part in (pairs, pairs[3:4], pairs[5:7]) if arch in ("qwen3_5_text", "mamba2") else (pairs,):
        compare(model, part, rtol=1e-7, atol=1e-8)


# Mamba 1 walks token by token, which is slow; its projections are those of the others.
@pytest.mark.parametrize("arch", [arch for arch in KINDS + OTHERS if arch not in ("falcon_mamba", "jamba")])
def test_adapters_and_frozen_weights(arch: str, no_float32) -> None:
    """LoRA on the projections of state layers: the gradient of both factors passes through the shared state."""
    from peft import LoraConfig, get_peft_model

    model = double(arch)
    kinds = getattr(model.config, "layers_block_type", None) or [model.config.model_type]
    mamba = any("mamba" in kind for kind in kinds) or arch in ("falcon_h1", "nemotron_h")
    targets = ["in_proj"] if mamba else "all-linear"  # PEFT refuses the out_proj of some of these
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=targets)
    model = get_peft_model(model, config).double()
    assert prepare_model(model).share_prompt
    no_float32()
    compare(model, eight_pairs()[3:7], rtol=1e-7, atol=1e-8)


def row_of(tree: Tree, heads: int, width: int) -> list[torch.Tensor]:
    """Queries, keys, values, decays and rates of a packed row, where a gradient is wanted."""
    torch.manual_seed(0)
    qkv = [torch.randn(1, tree.length, heads, width, requires_grad=True) for _ in range(3)]
    g = (-2 * torch.rand(1, tree.length, heads)).requires_grad_()
    return [*qkv, g, torch.rand(1, tree.length, heads).requires_grad_()]


def delta_rule_of_transformers(tree: Tree, *row: torch.Tensor) -> torch.Tensor:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as plain

    q, k, v, g, beta = (x[:, :70] for x in row)
    options = dict(output_final_state=True, use_qk_l2norm_in_kernel=True)
    first, state = plain(q, k, v, g=g, beta=beta, **options)
    q, k, v, g, beta = (x[:, 70:] for x in row)
    second, _ = plain(q, k, v, g=g, beta=beta, initial_state=state, **options)
    return torch.cat([first, second], dim=1)


def test_the_delta_rule_keeps_little_and_rounds_as_autocast_does() -> None:
    tree = Tree([70, 130], [-1, 0])
    row = row_of(tree, heads=2, width=32)
    kept: dict[str, int] = {}
    found = {}

    def ours(tree: Tree, *row: torch.Tensor) -> torch.Tensor:
        return gated_delta_rule(tree, *row, True)

    for name, rule, low in (
        ("theirs", delta_rule_of_transformers, False),
        ("ours", ours, False),
        ("theirs, bf16", delta_rule_of_transformers, True),
        ("ours, bf16", ours, True),
    ):
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor, storages=storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with torch.autocast("cpu", torch.bfloat16, enabled=low), saved:
            out = rule(tree, *row)
        kept[name] = sum(storages.values())
        found[name] = [out, *torch.autograd.grad(out.float().square().sum(), row)]
    assert kept["ours"] < kept["theirs"] / 3 and kept["ours, bf16"] < kept["theirs, bf16"] / 3

    def off(name: str) -> list[float]:
        return [float((x - y).norm() / y.norm()) for x, y in zip(found[name], found["theirs"], strict=True)]

    assert max(off("ours")) < 1e-5
    assert all(0 < a < 1.5 * b for a, b in zip(off("ours, bf16"), off("theirs, bf16"), strict=True))


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
def test_attention_of_a_models_own(arch: str, no_float32) -> None:
    """Biases by distance, learned and rotary positions: each by the place in the sequence, not in the row."""
    model = double(arch.split(",")[0], **OWN_ATTENTION[arch])
    assert prepare_model(model).share_prompt
    no_float32()
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
        trainer = make_trainer("packed", tmp_path, make_pairs(8), model=tiny_model("qwen3_5_text"), **options | cut)
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
        [(1, 130, 1), (1, 60, 0)],
        [(1, 65, 0), (1, 3, 1)],
        [(1, 200, 0), (1, 90, 0)],
    ]
    assert sorted(places.tolist()) == list(range(tree.length))
    assert levels[2][0].parents.tolist() == [0]
    (flat, *_), at = tree.levels(torch.device("cpu"), padded=False)
    [group] = flat
    # A run that others start from comes first: both do here.
    assert (group.cu_seqlens.tolist(), group.goes_on, len(group.at)) == ([0, 130, 190], 1, 190)
    assert sorted(at.tolist()) == list(range(tree.length))
    cut = tree.cut(64)
    assert cut.sizes == [44, 43, 43, 33, 32, 3, 60, 50, 50, 50, 50, 45, 45]
    assert cut.parents == [-1, 0, 1, 2, 3, 2, -1, 5, 7, 8, 9, 5, 11]
    order, at = tree.tails(4, torch.device("cpu"))
    none = tree.length
    # Before segment 4: the three tokens of segment 2, which end its path; before segment 2: the last of segment 0.
    before = {0: [none] * 3, 1: [127, 128, 129], 3: [none] * 3, 4: [195, 196, 197]}
    for segment, expected in before.items():
        begin = int(at[tree.starts[segment]])
        assert order[begin - 3 : begin].tolist() == expected
    assert sorted([*tree.copies(4, torch.device("cpu")).tolist(), *at.tolist()]) == list(range(len(order)))
    assert tree.positions(torch.device("cpu"))[[0, 130, 195, 258]].tolist() == [0, 130, 130, 133]


# What the packages' functions take: flash-linear-attention 0.6.0, and the sources of causal-conv1d and mamba-ssm.
KERNELS = {
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "torch_chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "cu_seqlens",
    "mamba2_chunk_scan": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit "
    "return_final_states return_varlen_states",
    "mamba_selective_scan": "u delta A B C D z delta_bias delta_softplus return_last_state",
}
OPTIONS = {"chunk_size", "use_mambapy"}  # of the torch functions alone; transformers keeps them from the kernels


def in_one_row(plain, *args, cu_seqlens, initial_state=None, **options):
    """The delta rule over sequences that lie in one row, [1, tokens, ...], as flash-linear-attention takes them."""
    assert all(len(x) == 1 and x.shape[1] == int(cu_seqlens[-1]) for x in args)
    assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
    g, beta = options.pop("g"), options.pop("beta")
    outputs, states = [], []
    for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        q, k, v, decay, rate = (x[:, begin:end] for x in (*args, g, beta))
        start = None if initial_state is None else initial_state[row : row + 1]
        out, state = plain(q, k, v, g=decay, beta=rate, initial_state=start, **options)
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states) if options["output_final_state"] else None


@pytest.mark.parametrize("function, arch", list(zip(KERNELS, ["lfm2", "qwen3_5_text", "mamba2", "mamba"], strict=True)))
def test_kernels_take_what_they_are_given(function: str, arch: str, monkeypatch) -> None:
    """The kernels themselves need a GPU: here the torch functions stand in, called as the kernels may be.

    flash-linear-attention gets all runs of a level, which differ in length, in one call.
    """
    model = build(arch)
    prepare_model(model)
    file = vars(sys.modules[type(model.base_model).__module__])
    plain, called = file[function].__wrapped__, []
    monkeypatch.setattr("preference.engine.states.kinds.in_torch", lambda package, x: False)

    def kernel(*args, **kwargs):
        if current() is not None:
            names = KERNELS[function].split()
            given = [*names[: len(args)], *kwargs]
            assert set(given) <= {*names} | OPTIONS and len(given) == len(set(given))
            called.append(given)
        return in_one_row(plain, *args, **kwargs) if kwargs.get("cu_seqlens") is not None else plain(*args, **kwargs)

    monkeypatch.setitem(file, function, _switch(kernel, FUNCTIONS[function]))
    pairs = eight_pairs()[5:8]  # three levels, and two runs that others start from
    with torch.no_grad():
        assert torch.allclose(packed_logps(model, pairs, True), plain_logps(model, pairs), rtol=0, atol=5e-4)
    assert called
    if arch == "qwen3_5_text":
        assert len(called) == 3 * 3  # levels x layers that carry a state
