"""The CUDA side's attention without a card: which kernel takes what, and that each way is exact."""

from __future__ import annotations

import pytest
import torch
from cuda_stand_ins import use_card, varlen, varlen_backward
from test_packing import dense_attention, related_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from preference.engine.branches import by_chain
from preference.engine.cuda.attention import WAYS, attend
from preference.engine.forward import pair_logps
from preference.engine.masks import EngineError, PackedMask, Scores
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.engine.sides import side_of
from tiny import tiny_model

PLAIN = Scores(8**-0.5)


def made(batch, heads=4, key_heads=2, size=8, value_size=None, dtype=torch.float64):
    torch.manual_seed(0)
    n = batch["input_ids"].shape[1]
    sizes = ((heads, size), (key_heads, size), (key_heads, value_size or size))
    return [torch.randn(1, h, n, d, dtype=dtype, requires_grad=True) for h, d in sizes]


def assert_same(found, want, inputs, atol=1e-7) -> None:
    assert torch.allclose(found, want, atol=atol)
    torch.manual_seed(1)
    grad = torch.randn_like(want)
    gradients = (torch.autograd.grad(x, inputs, grad, retain_graph=True) for x in (found, want))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=10 * atol)


@pytest.mark.parametrize("window, chunk", [(None, None), (6, None), (None, 5)])
def test_each_way_is_dense_attention_under_the_layouts_mask(monkeypatch, window, chunk) -> None:
    use_card(monkeypatch)
    batch = pack_pairs(related_pairs(5))
    inputs = made(batch)
    want = dense_attention(*inputs, batch, window, chunk)
    for way in ("varlen", "flex", "sdpa"):
        if way == "varlen" and chunk:
            continue
        monkeypatch.setattr("preference.engine.cuda.attention.takes_varlen", lambda *args: True)
        monkeypatch.setattr("preference.engine.cuda.attention.takes_flex", lambda *args: True)
        assert_same(attend(*inputs, PackedMask(batch, window, chunk, way), PLAIN), want, inputs)


@pytest.mark.parametrize("extra", [{"cap": 1.5}, {"sinks": torch.linspace(-1, 2, 4, dtype=torch.float64)}])
@pytest.mark.parametrize("window", [None, 6])
def test_capped_scores_and_sinks_are_those_of_the_chains(monkeypatch, extra, window) -> None:
    """FlexAttention and the padded rows against attention written out branch by branch, with narrower values."""
    calls = use_card(monkeypatch)
    batch = pack_pairs(related_pairs(5))
    inputs = made(batch, size=16, value_size=24, dtype=torch.float32)
    sinks = extra.get("sinks")
    scores = Scores(0.3, extra.get("cap"), None if sinks is None else sinks.float().requires_grad_())
    learned = inputs if sinks is None else [*inputs, scores.sinks]
    want = by_chain(*inputs, PackedMask(batch, window), scores)
    for way in ("auto", "sdpa"):
        found = attend(*inputs, PackedMask(batch, window, None, way), scores)
        assert_same(found, want, learned, atol=1e-5)
    assert calls == ["flex", "sdpa"]


@pytest.mark.parametrize(
    "card, size, dtype, options, kernel",
    [
        ((9, 0), 64, torch.bfloat16, {}, "varlen"),
        ((8, 0), 128, torch.float16, {"window": 4}, "varlen"),
        ((7, 5), 64, torch.float16, {}, "flex"),  # T4
        ((7, 0), 64, torch.float16, {}, "sdpa"),  # V100
        ((9, 0), 64, torch.float32, {}, "flex"),
        ((9, 0), 20, torch.bfloat16, {}, "flex"),  # no multiple of 8
        ((9, 0), 8, torch.float32, {}, "sdpa"),  # too narrow for FlexAttention
        ((9, 0), 264, torch.bfloat16, {}, "flex"),
        ((9, 0), 24, torch.bfloat16, {"value_size": 16}, "flex"),  # latent attention
        ((9, 0), 64, torch.bfloat16, {"chunk": 5}, "flex"),
        ((9, 0), 64, torch.bfloat16, {"chunk": 5000}, "varlen"),
        ((9, 0), 64, torch.bfloat16, {"cap": 30.0}, "flex"),
        ((9, 0), 64, torch.bfloat16, {"dropout": 0.1}, "sdpa"),
    ],
)
def test_which_kernel_takes_a_call(monkeypatch, card, size, dtype, options, kernel) -> None:
    calls = use_card(monkeypatch, card)
    for name in ("varlen", "flex", "sdpa"):
        monkeypatch.setitem(WAYS, name, lambda *args, name=name: calls.append(name))
    batch = pack_pairs(related_pairs(3))
    inputs = made(batch, size=size, value_size=options.get("value_size"), dtype=dtype)
    mask = PackedMask(batch, options.get("window"), options.get("chunk"))
    attend(*inputs, mask, Scores(0.1, options.get("cap"), dropout=options.get("dropout", 0.0)))
    assert calls == [kernel]


@pytest.mark.parametrize(
    "arch, options, kernel",
    [
        ("llama", {}, "varlen"),
        ("qwen2", {}, "varlen"),
        ("qwen3", {}, "varlen"),
        ("mistral", {"sliding_window": 4}, "varlen"),
        ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}, "flex"),  # capped scores
        ("gpt_oss", {"head_dim": 16}, "flex"),  # sinks
        ("gpt2", {}, "varlen"),
    ],
)
def test_the_kernel_of_each_architecture_is_the_one_that_it_was_compared_with(
    monkeypatch, arch, options, kernel
) -> None:
    """In bfloat16 on an H100: `prepare_model` measures the kernel that the step then calls."""
    torch.compiler.reset()  # another cap in this process would be one that changes, which fake tensors cannot follow
    calls = use_card(monkeypatch)
    monkeypatch.setattr("preference.engine.attention.side_of", lambda kind: side_of("cuda"))
    model = tiny_model(arch, dtype=torch.bfloat16, **options)
    assert prepare_model(model).share_prompt
    assert set(calls) == {kernel}
    calls.clear()
    pair_logps(model, pack_pairs(related_pairs(3))).chosen_B.sum().backward()
    assert set(calls) == {kernel}


def test_a_kernel_that_was_asked_for_and_cannot_is_refused(monkeypatch) -> None:
    use_card(monkeypatch, (7, 5))
    batch = pack_pairs(related_pairs(3))
    with pytest.raises(EngineError, match="the varlen kernel does not take this attention"):
        attend(*made(batch, size=64, dtype=torch.float16), PackedMask(batch, implementation="varlen"), PLAIN)


def test_the_gradient_of_a_key_that_many_see_is_summed_in_float32(monkeypatch) -> None:
    """128 branches of one prompt, in bf16: dK of the prompt is the sum of what the branches give, rounded once."""
    use_card(monkeypatch)
    given = []

    def backward(*args, **options):
        given.append(varlen_backward(*args, **options))
        return given[0]

    monkeypatch.setattr("preference.engine.cuda.attention._varlen_ops", lambda: (varlen, backward))
    prompt = [*range(10, 60)]
    pairs = [dict(prompt_ids=prompt, chosen_ids=[i, 5, 6], rejected_ids=[i + 100, 7]) for i in range(64)]
    batch = pack_pairs(pairs)
    assert len(batch["branches"]) == 128
    parts = made(batch, dtype=torch.bfloat16)
    out = attend(*parts, PackedMask(batch), PLAIN)
    d_key = torch.autograd.grad(out, parts, torch.randn(out.shape).bfloat16())[1][0].transpose(0, 1)
    exact, slow = (torch.zeros(d_key.shape, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    for total in (exact, slow):
        for at, part in zip(batch["key_at"], given[0][1], strict=True):
            total[at] += part.to(total.dtype)
    errors = [float((x.double() - exact)[:49].norm() / exact[:49].norm()) for x in (d_key, slow)]
    assert errors[0] < 2e-3 < 1e-2 < errors[1]


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way, scores", [("varlen", PLAIN), ("sdpa", PLAIN), ("sdpa", Scores(0.3, cap=2.0))])
def test_operators_do_not_grow_with_the_number_of_pairs(monkeypatch, way, scores) -> None:
    use_card(monkeypatch)
    monkeypatch.setattr("preference.engine.cuda.attention.takes_varlen", lambda *args: True)
    monkeypatch.setattr("preference.engine.cuda.attention._varlen_ops", lambda: (shapes_only, shapes_only_backward))
    counts = []
    for pairs in (4, 16):
        batch = pack_pairs(related_pairs(pairs))
        inputs, mask = made(batch), PackedMask(batch, implementation=way)
        attend(*inputs, mask, scores)  # makes what the layers of a row share
        with Count() as count:
            attend(*inputs, mask, scores).sum().backward()
        counts.append(count.operators)
    assert counts[0] == counts[1] < 120


def shapes_only(query, *rest, **options):
    return torch.empty_like(query), torch.zeros(()), torch.zeros(())


def shapes_only_backward(grad, query, key, value, *rest, **options):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
