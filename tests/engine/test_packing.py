"""The packed row: what stands where, and that nothing sees what it must not."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import random

import pytest
import torch

from preference.engine import attention, head
from preference.engine.cpu import attention as segment_attention
from preference.engine.forward import pair_logps
from preference.engine.masks import PackedMask
from preference.engine.packing import PackingError, pack_pairs, packed_length
from preference.engine.probe import packed_logps, plain_logps, prepare_model
from preference.engine.sides import side_of
from preference.engine.transfer import _in_one_copy, to_device
from tiny import tiny_model

PAIRS = [
    dict(prompt_ids=[11, 12, 13], chosen_ids=[21, 22], rejected_ids=[31, 32, 33]),
    dict(prompt_ids=[14], chosen_ids=[23], rejected_ids=[34], weight=0.0),
]


def random_pairs(n: int, seed: int = 0, prompt: int = 20, answer: int = 12) -> list[dict]:
    draw = random.Random(seed)
    sizes = [(draw.randint(1, prompt), draw.randint(1, answer), draw.randint(1, answer)) for _ in range(n)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{k: [draw.randrange(3, 500) for _ in range(m)] for k, m in zip(names, s, strict=True)} for s in sizes]


def related_pairs(n: int, seed: int = 0) -> list[dict]:
    """Pairs as of a data set with two system prompts, some of them of one prompt."""
    draw = random.Random(seed)
    systems = [[draw.randrange(3, 500) for _ in range(m)] for m in (9, 24)]
    systems.append(systems[1] + [draw.randrange(3, 500) for _ in range(8)])
    pairs = random_pairs(n, seed)
    for i, pair in enumerate(pairs):
        pair["prompt_ids"] = draw.choice(systems) + pair["prompt_ids"] if i % 5 else pair["prompt_ids"]
        if i % 3 == 2:
            pair["prompt_ids"] = pairs[i - 1]["prompt_ids"]
    return pairs


def test_layout_of_a_row() -> None:
    batch = pack_pairs(PAIRS)
    assert batch["input_ids"].tolist() == [[14, 14, 11, 12, 13, 21, 13, 31, 32]]  # sorted by prefix
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 2, 3, 4]]
    assert batch["target_ids"].tolist() == [23, 34, 12, 13, 21, 22, 31, 32, 33]
    assert batch["target_at"].tolist() == list(range(9))
    assert batch["score_at"].tolist() == [2, 3, 4, 5, 6, 7, 8, 0, 1]
    assert (batch["segments"], batch["position_offsets"]) == ([1, 1, 2, 2, 3], [0, 0, 0, 2, 2])
    assert batch["branches"] == [(0, 1, ()), (1, 2, ()), (2, 4, ()), (4, 5, (2,))]
    assert batch["scored"].tolist() == batch["lengths"].tolist() == [[2, 2, 3], [0, 1, 1]]
    assert batch["weight"].tolist() == [1.0, 0.0]
    assert batch["cu_seqlens_q"].tolist() == [0, 1, 2, 6, 9]
    assert batch["cu_seqlens_k"].tolist() == [0, 1, 2, 6, 11]
    assert batch["key_at"].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 6, 7, 8]
    assert batch["key_order"].tolist() == [0, 1, 2, 6, 3, 7, 4, 5, 8, 9, 10]
    assert batch["key_starts"].tolist() == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
    assert batch["longest"] == (4, 5)


def test_what_prompts_have_in_common_stands_once() -> None:
    """A system prompt of three pairs, a longer one of two of these, and one prompt that two pairs have."""
    system, more = list(range(100, 110)), list(range(200, 209))
    pairs = [
        dict(prompt_ids=[*system, 7], chosen_ids=[1, 2], rejected_ids=[3]),
        dict(prompt_ids=[*system, *more, 8], chosen_ids=[4], rejected_ids=[5]),
        dict(prompt_ids=[50, 51, 52], chosen_ids=[6], rejected_ids=[7]),
        dict(prompt_ids=[*system, *more, 9, 8], chosen_ids=[4], rejected_ids=[5, 6]),
        dict(prompt_ids=[*system, *more, 9, 8], chosen_ids=[4], rejected_ids=[7]),
    ]
    batch = pack_pairs(pairs)
    row = [50, 51, 52, 52, *system, 7, 1, 7, *more, 8, 8, 9, 8, 8, 5, 9, 8, 8]
    assert batch["input_ids"].tolist() == [row]
    # The fifth token of the system prompt is predicted at one place, and is one target that four pairs count.
    ends = batch["scored"].flatten().cumsum(0).tolist()
    prompts = {i: batch["score_at"][ends[3 * i] - int(batch["scored"][i, 0]) :][:5].tolist() for i in (0, 1, 3, 4)}
    assert len({tuple(at) for at in prompts.values()}) == 1
    assert batch["target_ids"][prompts[0]].tolist() == system[1:6]
    read = batch["target_ids"][batch["score_at"]].split(batch["scored"].flatten().tolist())
    for pair, parts in zip(pairs, zip(read[::3], read[1::3], read[2::3], strict=True), strict=True):
        assert [part.tolist() for part in parts] == [pair["prompt_ids"][1:], pair["chosen_ids"], pair["rejected_ids"]]


def test_every_position_sees_its_own_pairs_tokens() -> None:
    """The tokens of a position's path, the last prompt token twice where a branch begins, are its sequence."""
    for seed in range(20):
        pairs = related_pairs(6, seed)
        batch = pack_pairs(pairs)
        ids, paths = batch["input_ids"][0].tolist(), paths_of(batch)
        sequences = {tuple(p["prompt_ids"] + p[name][:-1]) for p in pairs for name in ("chosen_ids", "rejected_ids")}
        beginnings = {sequence[:n] for sequence in sequences for n in range(1, len(sequence) + 1)}
        read = [tuple(ids[at] for at in path) for path in paths]
        assert set(read) == beginnings
        assert batch["position_ids"][0].tolist() == [len(path) - 1 for path in paths]
        at = batch["target_at"][batch["score_at"]].split(batch["scored"].flatten().tolist())
        for i, pair in enumerate(pairs):
            for place, answer in zip(at[3 * i + 1 :][:2], (pair["chosen_ids"], pair["rejected_ids"]), strict=True):
                assert [read[n] for n in place] == [tuple(pair["prompt_ids"] + answer[:k]) for k in range(len(answer))]
            assert [read[n] for n in at[3 * i]] == [
                tuple(pair["prompt_ids"][:k]) for k in range(1, len(pair["prompt_ids"]))
            ]


def test_only_answers_are_scored_where_the_loss_needs_no_more() -> None:
    batch = pack_pairs(PAIRS, prompt_logps=False)
    assert batch["target_ids"].tolist() == [23, 34, 21, 22, 31, 32, 33]
    assert batch["target_at"].tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert batch["score_at"].tolist() == [2, 3, 4, 5, 6, 0, 1]
    assert batch["scored"].tolist() == [[0, 2, 3], [0, 1, 1]]
    assert batch["lengths"].tolist() == [[2, 2, 3], [0, 1, 1]]


def test_layout_of_rows() -> None:
    batch = pack_pairs(PAIRS, share_prompt=False)
    ids = batch["input_ids"]
    assert ids.shape == (4, 5)
    assert [row[:n] for row, n in zip(ids.tolist(), [4, 5, 1, 1], strict=True)] == [
        [11, 12, 13, 21], [11, 12, 13, 31, 32], [14], [14]
    ]  # fmt: skip
    assert "segments" not in batch and "position_ids" not in batch
    assert batch["target_at"].tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 15]
    assert pack_pairs(PAIRS, share_prompt=False, prompt_logps=False)["target_at"].tolist() == [2, 3, 7, 8, 9, 10, 15]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_length_is_what_is_packed(share_prompt: bool) -> None:
    for pair in random_pairs(20):
        ids = pack_pairs([pair], share_prompt=share_prompt)["input_ids"]
        padding = 0 if share_prompt else abs(len(pair["chosen_ids"]) - len(pair["rejected_ids"]))
        assert ids.numel() == packed_length(pair, share_prompt=share_prompt) + padding


@pytest.mark.parametrize("empty", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_empty_parts_are_refused_by_name(empty: str) -> None:
    with pytest.raises(PackingError, match=f"a.jsonl:7: the {empty.split('_')[0]}"):
        pack_pairs([*PAIRS, PAIRS[0] | {empty: [], "source": "a.jsonl:7"}])


def test_a_batch_travels_to_workers() -> None:
    batch = pickle.loads(pickle.dumps(pack_pairs(PAIRS)))
    assert all(isinstance(value, (torch.Tensor, list, tuple)) for value in batch.values())
    plain = itertools.chain(batch["segments"], batch["position_offsets"], batch["longest"], *batch["branches"])
    assert all(type(n) in (int, tuple) for n in plain)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_answers_and_pairs_do_not_see_each_other(arch: str, share_prompt: bool) -> None:
    """Changing one answer changes nothing of the other answer, the prompt, or another pair."""
    model, pairs = tiny_model(arch), related_pairs(3)
    prepare_model(model, share_prompt=share_prompt)
    with torch.no_grad():
        before = packed_logps(model, pairs, share_prompt)
        for i, (column, part) in enumerate([(1, "chosen_ids"), (2, "rejected_ids")]):
            changed = copy.deepcopy(pairs)
            changed[i][part] = [(t + 50) % 500 for t in changed[i][part]]
            after = packed_logps(model, changed, share_prompt)
            differs = (before - after).abs() > 1e-6
            assert differs[i, column] and differs.sum() == 1


@pytest.mark.parametrize("whole, block", [(0, 3), (20, 3), (0, 256), (384, 256)])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window, chunk", [(None, None), (6, None), (None, 5)])
def test_segment_attention_is_attention(monkeypatch, whole, block, heads, key_heads, window, chunk) -> None:
    """Values and gradients against dense attention under the mask that the layout means, in double precision."""
    monkeypatch.setattr(segment_attention, "WHOLE", whole)
    monkeypatch.setattr(segment_attention, "BLOCK", block)
    batch = pack_pairs(related_pairs(5))
    mask = PackedMask(batch, window, chunk)
    n = batch["input_ids"].shape[1]
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, n, 8, dtype=torch.float64, requires_grad=True) for h in (heads, key_heads, key_heads)]
    grad = torch.randn(1, n, heads, 8, dtype=torch.float64)
    dense = dense_attention(*inputs, batch, window, chunk)
    module = torch.nn.Module()
    for segment in (
        attention.packed_attention(module, *inputs, mask),
        attention.packed_attention(module, *inputs, mask, softcap=1e9),  # branch by branch, written out
    ):
        assert torch.allclose(segment, dense, atol=1e-7)
        want = torch.autograd.grad(dense, inputs, grad, retain_graph=True)
        for a, b in zip(torch.autograd.grad(segment, inputs, grad), want, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("whole", [0, 256])
def test_segment_attention_in_16_bits_differs_by_rounding(monkeypatch, whole: int) -> None:
    monkeypatch.setattr(segment_attention, "WHOLE", whole)
    batch = pack_pairs(related_pairs(5))
    torch.manual_seed(0)
    shapes = [(1, heads, batch["input_ids"].shape[1], 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = attention.packed_attention(torch.nn.Module(), *inputs, PackedMask(batch))
    want = dense_attention(*exact, batch, None, None)
    grad = torch.randn(want.shape).bfloat16()
    gradients = zip(
        (found, *torch.autograd.grad(found, inputs, grad)),
        (want, *torch.autograd.grad(want, exact, grad.double())),
        strict=True,
    )
    for a, b in gradients:
        assert a.dtype == torch.bfloat16 and 0 < (a.double() - b).norm() < 0.01 * b.norm()


def dense_attention(query, key, value, batch, window, chunk) -> torch.Tensor:
    """Under the mask that follows from tokens alone: a position sees those whose path from the root begins its own."""
    paths = paths_of(batch)
    keep = torch.tensor([
        [
            k <= q and paths[q][: len(paths[k])] == paths[k]
            and (window is None or len(paths[q]) - len(paths[k]) < window)
            and (chunk is None or (len(paths[q]) - 1) // chunk == (len(paths[k]) - 1) // chunk)
            for k in range(len(paths))
        ]
        for q in range(len(paths))
    ])  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def paths_of(batch) -> list[list[int]]:
    """For each position of the row the positions from the root of its tree to itself, by segments and branches."""
    starts = [0, *itertools.accumulate(batch["segments"])]
    paths = []
    for first, last, before in batch["branches"]:
        path = [at for segment in before for at in range(starts[segment], starts[segment + 1])]
        for at in range(starts[first], starts[last]):
            path = [*path, at]
            paths.append(path)
    return paths


@pytest.mark.parametrize("keep_bytes", [1, 2**30])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("scale, cap, bias, side", [(1.0, None, False, "cpu"), (0.3, 2.0, True, "cpu"),
                                                    (0.3, 2.0, True, "cuda"), (0.3, 2.0, False, "xpu")])  # fmt: skip
def test_head_is_log_softmax(monkeypatch, keep_bytes, frozen, scale, cap, bias, side) -> None:
    """Values and gradients of the head in small blocks, kept or computed again, against log_softmax."""
    monkeypatch.setattr(head, "KEEP_BYTES", keep_bytes)
    monkeypatch.setattr("preference.engine.cpu.side.CACHE_ELEMENTS", 100)
    monkeypatch.setattr(head, "side_of", lambda device: dataclasses.replace(side_of(side), head_rows=5))
    torch.manual_seed(0)
    hidden = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=not frozen)
    offset = torch.randn(30, dtype=torch.float64, requires_grad=not frozen) if bias else None
    ids, grad = torch.randint(0, 30, (17,)), torch.randn(17, dtype=torch.float64)
    inputs = [x for x in (hidden, weight, offset) if x is not None and x.requires_grad]
    got = head.token_logps(hidden, weight, offset, ids, scale, cap)
    logits = torch.nn.functional.linear(hidden, weight, offset) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    want = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert torch.allclose(got, want, atol=1e-12)
    assert torch.allclose(head.target_logps(logits, ids, 1.0, None), want, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_head_under_autocast_is_the_models_head() -> None:
    model, pairs = tiny_model("llama"), random_pairs(4)
    prepare_model(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(packed_logps(model, pairs, True), plain_logps(model, pairs), rtol=0.01, atol=0.1)
        assert pair_logps(model, pack_pairs(pairs)).chosen_B.dtype == torch.float32


def test_a_gathered_head_sums_its_gradient_in_float32(monkeypatch) -> None:
    """FSDP2 hands over a head in bfloat16: its gradient is rounded once, not after every block and target token."""
    monkeypatch.setattr(head, "KEEP_BYTES", 1)  # a block a token
    torch.manual_seed(0)
    hidden, ids = torch.rand(600, 4).bfloat16(), torch.full((600,), 3)
    weight = torch.zeros(5, 4, dtype=torch.bfloat16, requires_grad=True)
    head.token_logps(hidden, weight, None, ids).sum().backward()
    onehot = torch.nn.functional.one_hot(ids, 5).double()
    want = (onehot - 0.2).t() @ hidden.double()
    assert (weight.grad.double() - want).norm() / want.norm() < 4e-3


def test_one_copy_brings_every_tensor_of_a_batch() -> None:
    batch = pack_pairs(related_pairs(3))
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    there = _in_one_copy(tensors, torch.device("cpu"), pinned=False)
    assert there.keys() == tensors.keys() and len({x.untyped_storage().data_ptr() for x in there.values()}) == 1
    for name, tensor in tensors.items():
        assert there[name].dtype == tensor.dtype and torch.equal(there[name], tensor)
    assert to_device(batch, torch.device("cpu"))["segments"] == batch["segments"]
