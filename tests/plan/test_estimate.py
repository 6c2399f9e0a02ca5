"""The estimates of a dry run against hand-counted numbers, against tensors that a real step makes, and end to end."""

from __future__ import annotations

import json
import sys
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import orpo_train
from preference.arguments import ArgumentError, parse_arguments
from preference.engine.forward import causal_lm
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.errors import PreferenceError
from preference.losses import Objective
from preference.models.hardware import Hardware
from preference.plan.dry_run import Setup, advice, dry_run
from preference.plan.estimate import (
    Estimator,
    _packed_loss,
    _trl_loss,
    changed,
    padded_tokens,
    paper_model,
    plan_work,
    stand_ins,
)
from preference.plan.tracing import FEW, PaperModel, Trace
from preference.report import trackers
from tiny import EXTRA, SIZES, tiny_model, tiny_tokenizer

CPU = Hardware("cpu", "a CPU", 16 * 2**30, False)
GPU = Hardware("cuda", "a GPU", 80 * 2**30, True)
LENGTHS = np.array([[9, 7, 5], [4, 12, 8]])


def config(arch: str = "llama", **more):
    extra = {"gemma3_text": dict(head_dim=8, query_pre_attn_scalar=8), "qwen3_5_text": EXTRA["qwen3_5_text"]}.get(
        arch, {}
    )
    return AutoConfig.for_model(arch, **(SIZES | dict(vocab_size=512, tie_word_embeddings=False) | extra | more))


def flags(**values):
    return parse_arguments([f"--{name}={value}" for name, value in values.items()])


def estimator(hardware: Hardware = CPU, half: torch.dtype | None = None, config_=None, **values) -> Estimator:
    args = flags(**{"use_peft": False} | values)
    return Estimator("", args, hardware, Objective(), half, config=config_ or config())


def real_step(model, batch, loss) -> tuple[int, int]:
    """(bytes but weights that the layers save for the backward, bytes of gradients) of a step that is run."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    last = causal_lm(model).model.layers[-1]
    last.register_forward_hook(lambda *_: kept.append(sum(saved.values())))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(model, batch)
    result.backward()
    return kept[0], sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def masks(lengths) -> int:
    """Bytes of the packed attention's masks, made once a row: fp32, for two query heads a key head."""
    return sum(2 * 4 * n * n for n in (int(row.sum()) - 1 for row in lengths))


# ---- weights, gradients, optimizer


def test_weights_gradients_and_optimizer_are_those_of_a_hand_count():
    # per layer: q and o 32x32, k and v 32x16, three of 32x64, two norms; embeddings and head 512x32; a last norm
    parameters = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 2 * 512 * 32 + 32
    found = estimator()
    assert (found.parameters, found.trainable) == (parameters, parameters)
    assert (found.weights, found.gradients, sum(found.optimizer_sizes())) == tuple(
        n * 4 * parameters for n in (1, 1, 2)
    )
    real = tiny_model("llama", tie_word_embeddings=False)
    assert found.parameters == real.num_parameters()


def test_an_adapter_is_counted_alone_and_its_frozen_weights_are_held_in_bfloat16_on_a_gpu():
    # rank 4 on every linear layer of a block: 4 x (inputs + outputs)
    adapter = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    base = estimator().parameters
    for hardware, size in ((CPU, 4), (GPU, 2)):
        found = estimator(hardware, torch.bfloat16 if hardware.bf16 else None, use_peft=True, lora_rank=4)
        assert found.cast_away == 0
        assert found.trainable == adapter and found.parameters == base + adapter
        assert found.weights == size * base + 4 * adapter
        assert found.gradients == 4 * adapter and sum(found.optimizer_sizes()) == 8 * adapter


def test_the_packed_engine_holds_frozen_layers_in_bfloat16_on_a_cpu_and_the_process_keeps_what_it_lets_go():
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    packed, trl = (
        estimator(CPU, torch.bfloat16, use_peft=True, lora_rank=4, engine=engine) for engine in ("packed", "trl")
    )
    assert trl.weights - packed.weights == packed.cast_away == 2 * linear and trl.cast_away == 0
    memory = packed.memory(of_sizes(1), False)
    good = memory.weights + packed.cast_away + memory.optimizer
    assert memory.peak == pytest.approx(good + 1.4 * packed.gradients + 90e6)


def test_four_bit_weights_are_the_linear_layers_but_the_head():
    found = estimator(GPU, torch.bfloat16, use_peft=True, lora_rank=4, qlora=True)
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    rest = estimator().parameters - linear
    assert found.weights == pytest.approx(0.516 * linear + 4 * rest + 4 * found.trainable)


@pytest.mark.parametrize(
    "optim, share", [("adamw_torch_fused", 2), ("sgd", 0), ("adamw_8bit", 0.5), ("paged_lion_32bit", 1)]
)
def test_optimizer_states(optim, share):
    found = estimator(optim=optim)
    assert sum(found.optimizer_sizes()) == share * found.gradients


def test_no_weight_is_made_for_an_estimate():
    big = config(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, vocab_size=128256,
        num_key_value_heads=8,
    )  # fmt: skip
    found = estimator(GPU, torch.bfloat16, big, use_peft=True)
    assert found.parameters > 7e10
    memory = found.memory(found.trace(np.array([[100, 200, 200]]), False), False)
    assert memory.weights == pytest.approx(2 * found.parameters, rel=0.01) and memory.peak > memory.weights


def test_a_system_prompt_is_counted_once_for_a_micro_batch():
    rows = np.array([[30, 7, 5], [24, 12, 8], [40, 3, 3]])
    apart, shared = (
        Estimator("", flags(use_peft=False), CPU, Objective(), None, config=config(), common=n) for n in (0, 20)
    )
    assert apart.tokens(rows) - shared.tokens(rows) == 40
    for found in (apart, shared):
        batch = pack_pairs(stand_ins(rows, found.common))
        assert batch["input_ids"].numel() == found.tokens(rows)
    assert shared.trace(rows, False).flops < apart.trace(rows, False).flops * 0.8
    work = [plan_work(rows, flags(), Objective(), 3, 1, True, common) for common in (0, 20)]
    assert work[0].tokens_per_step - work[1].tokens_per_step == 40


# ---- the step on paper against a real one


STEPS = [("llama", *kind) for kind in product(("packed", "trl"), (None, torch.bfloat16), ("full", "lora"))]
STEPS += [("qwen3_5_text", "packed", torch.bfloat16, "lora")]  # layers that carry a state keep their states


@pytest.mark.parametrize("arch, engine, half, what", STEPS)
def test_activations_are_those_that_a_real_step_saves(arch, engine, half, what):
    values = dict(use_peft=what == "lora", engine=engine)
    kinds = dict(layer_types=["linear_attention", "full_attention", "linear_attention"])
    sizes = config(
        arch, num_hidden_layers=3, hidden_size=64, intermediate_size=128, **(kinds if arch != "llama" else {})
    )
    found = estimator(half=half, config_=sizes, **values)
    lengths = LENGTHS * 10
    trace = found.trace(lengths, False)
    model = paper_model("", flags(**{"use_peft": False} | values), CPU, half, config=sizes).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor, 0.01)
    model.train()
    batch = {"half": half, "dpo": False}
    if engine == "packed":
        prepare_model(model)
        batch |= pack_pairs(stand_ins(lengths))
    else:
        width = padded_tokens(lengths) // 4
        mask = torch.ones(4, width, dtype=torch.long)
        mask[0, 5:] = 0  # a batch without padding needs no mask
        batch |= {"input_ids": mask * 5, "mask": mask}
    saved, gradients = real_step(model, batch, _packed_loss if engine == "packed" else _trl_loss)
    assert trace.activations == pytest.approx(saved + (masks(lengths) if engine == "packed" else 0), rel=0.08)
    assert trace.left == pytest.approx(gradients, abs=64)  # torch 2.11 sees eight numbers more


def test_checkpointing_keeps_one_tensor_a_layer():
    sizes, lengths = config(num_hidden_layers=8), LENGTHS * 10
    usual, less = (estimator(config_=sizes, gradient_checkpointing=on).trace(lengths, False) for on in (False, True))
    tokens = int((lengths.sum(1) - 1).sum())
    kept = [trace.activations - masks(lengths) for trace in (usual, less)]
    assert 8 * tokens * 32 * 4 <= kept[1] <= 12 * tokens * 32 * 4 < kept[0] / 4
    assert less.flops == pytest.approx(usual.flops * 1.2, rel=0.15)


@pytest.mark.parametrize(
    "arch, layers, values",
    [
        ("llama", 8, {}),
        ("llama", 8, {"engine": "trl"}),
        ("llama", 8, {"gradient_checkpointing": True}),
        ("qwen2", 8, {"use_peft": True, "lora_rank": 4}),
        ("gemma3_text", 14, {}),
    ],
)
def test_a_few_layers_give_what_running_all_of_them_gives(arch, layers, values, monkeypatch):
    pattern = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if arch == "gemma3_text" else {}
    found = estimator(config_=config(arch, num_hidden_layers=layers, **pattern), **values)
    runs = []
    run = PaperModel._run
    monkeypatch.setattr(PaperModel, "_run", lambda *a: runs.append(len(a[4])) or run(*a))
    few = found.trace(LENGTHS, False)
    monkeypatch.setattr("preference.plan.tracing.FEW", 1000)
    whole = found.trace(LENGTHS, False)
    first = FEW * (2 if pattern else 1)
    assert runs == [first, 2 * first, layers]
    # A phase that does not set the peak may be told wrong: its own peak moves from layer to layer.
    asked = ("peak", "forward_peak", "activations", "left", "flops", "moved")
    assert [getattr(few, x) for x in asked] == pytest.approx([getattr(whole, x) for x in asked], rel=0.003)


def test_a_model_whose_layers_differ_is_run_whole(monkeypatch):
    model = paper_model("", flags(use_peft=False), CPU, None, config=config(num_hidden_layers=9))
    model.model.layers[7].mlp.requires_grad_(False)
    prepare_model(model)
    runs = []
    run = PaperModel._run
    monkeypatch.setattr(PaperModel, "_run", lambda *a: runs.append(len(a[4])) or run(*a))
    PaperModel(model).trace({"half": None} | pack_pairs(stand_ins(np.array([[5, 5, 5]]))), _packed_loss)
    assert runs == [9]


def test_matrix_products_are_counted():
    found = estimator()
    lengths = np.array([[5, 6, 7]])
    tokens = 5 - 1 + 6 + 7
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 512 * 32
    assert 6 * tokens * weights <= found.trace(lengths, False).flops <= 6.5 * tokens * weights


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_longer_rows_and_more_pairs_take_more(engine):
    found = estimator(engine=engine)
    peaks = [
        found.memory(found.trace(np.array(rows) * 20, False), False).peak
        for rows in ([[4, 4, 4]], [[4, 8, 4]], [[9, 8, 8]], [[9, 8, 8]] * 2, [[9, 8, 8]] * 4)
    ]
    assert peaks == sorted(peaks) and peaks[-1] > peaks[0]


# ---- the memory of a run


def of_sizes(gradient: int) -> Trace:
    """A step whose layers leave 1000 bytes, whose head takes 500 more, and that leaves gradients."""
    return Trace(1000, 1000, 1500, 1000 + gradient / 2, gradient, gradient, 0.0, 0.0)


def test_parts_of_a_run():
    for hardware, spread, more in ((GPU, 1.05, 600 * 2**20), (CPU, 1.4, 90e6)):
        found = estimator(hardware)
        total = found.weights + sum(found.optimizer_sizes())
        trace = of_sizes(int(found.gradients))
        spread_held = spread if hardware is GPU else 1.0  # what is there for good leaves no holes
        for accumulating, alive in ((False, trace.peak), (True, trace.peak + found.gradients)):
            memory = found.memory(trace, accumulating)
            assert memory.peak == pytest.approx(spread_held * total + spread * alive + more)
            assert (memory.activations, memory.head) == (1000, 500)


def test_what_strategies_share_out():
    found = estimator(GPU)
    trace = of_sizes(int(found.gradients))
    ddp, fsdp, zero2, zero3, offload = (
        found.memory(trace, False, name, 4) for name in ("ddp", "fsdp", "zero2", "zero3", "zero3_offload")
    )
    assert ddp.peak == pytest.approx(found.memory(trace, False).peak + 1.05 * found.gradients)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (
        found.weights / 4, found.gradients / 4, found.gradients / 2
    )  # fmt: skip
    assert (zero2.weights, zero2.gradients) == (found.weights, found.gradients / 4)
    assert zero3.weights == found.weights / 4 and offload.weights == offload.optimizer == 0
    assert offload.peak < zero3.peak < zero2.peak and fsdp.peak < ddp.peak


def test_trl_dpo_of_all_weights_holds_a_second_model():
    found = estimator(GPU, engine="trl", loss="dpo")
    assert found.memory(of_sizes(1), False).weights == 2 * found.weights


# ---- the plan and the text


def test_the_longest_micro_batch_and_the_tokens_are_the_planners():
    lengths = np.array([[10, 5, 5], [20, 5, 5], [30, 5, 5], [100, 50, 50]])
    args = flags(use_peft=False, max_steps=7)
    work = plan_work(lengths, args, Objective(), 1, 4, True)
    assert work.longest.tolist() == [[100, 50, 50]] and work.micro_batches == 4 and work.steps == 7
    assert work.tokens_per_step == (lengths.sum(1) - 1).sum()
    assert plan_work(lengths, args, Objective(), 4, 1, False).tokens_per_step == (
        (2 * (lengths[:, 0] - 1) + lengths[:, 1] + lengths[:, 2]).sum()
    )
    trl = plan_work(lengths, changed(args, {"engine": "trl"}), Objective(), 4, 1, False)
    assert trl.tokens_per_step == 8 * 150 and trl.micro_batches == 1
    epochs = plan_work(np.repeat(lengths, 5, axis=0), flags(num_train_epochs=1.5), Objective(), 2, 2, True)
    assert epochs.steps == 8  # one and a half times 5


def test_what_does_not_fit_is_answered_with_a_change_that_fits():
    lengths, args = np.array([[40, 60, 50]] * 16), flags(use_peft=False)

    def setup(memory: float) -> Setup:
        return Setup("", Hardware("cpu", "a CPU", int(memory), False), Objective(), None, lengths, config())

    plan = setup(0).plan(args, 8, 1)
    two, one = (setup(0).plan(args, n, 8 // n).memory().peak for n in (2, 1))
    fits, grows = advice(setup(plan.memory().peak + 1), plan, "ddp", 1, 0.0)
    assert fits.startswith("it fits") and f"{1.6 * plan.memory().peak / 2**30:.2f} GiB" in grows
    for memory, pairs in ((two + 1, 2), (two - 1, 1)):
        said = advice(setup(memory), plan, "ddp", 1, 0.0)[1]
        assert f"set per_device_train_batch_size={pairs} (now 8), gradient_accumulation_steps={8 // pairs}" in said
    assert "gradient_checkpointing=true (now false)" in advice(setup(one - 1), plan, "ddp", 1, 0.0)[1]
    assert "smaller model" in advice(setup(2**20), plan, "ddp", 1, 0.0)[1]


def test_the_text_names_engines_strategies_and_marks_what_was_given():
    setup = Setup("", CPU, Objective(), None, np.array([[10, 6, 5]] * 9), config())
    said = dry_run(flags(use_peft=False), setup, 2, 2)
    assert "* use_peft = False" in said and "    seed = 42" in said
    for word in (
        "engine=packed:",
        "engine=trl:",
        "ddp",
        "fsdp",
        "zero2",
        "zero3_offload",
        "8 devices",
        "time per step",
    ):
        assert word in said, word
    assert "optimizer steps: 3 of 4 pairs" in said and "median" in said and "it fits" in said
    simpo = dry_run(flags(use_peft=False, loss="simpo"), setup, 2, 2)
    assert "TRL has no loss=simpo" in simpo


def test_a_dry_run_needs_no_weights_and_leaves_the_output_folder_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "begin_reporting", lambda *_: pytest.fail("a tracker was begun"))
    folder, out = tmp_path / "model", tmp_path / "out"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header].ljust(file.stat().st_size, b"\xff"))  # whoever reads weights finds NaN
    rows = [{"question": f"q {i}", "response_chosen": f"good {i}", "response_rejected": f"bad {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = dict(
        model_name_or_path=folder, train_file_dir=tmp_path / "rows.jsonl", output_dir=out, dry_run="true",
        template_name="qwen", cache_dir=tmp_path / "cache", use_cpu="true", bf16="false", strategy="fsdp",
        validation_split_percentage=20,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["orpo_train.py", *(f"--{name}={value}" for name, value in words.items())])
    orpo_train.main()
    said = capsys.readouterr().out
    assert not out.exists()
    assert "data: 12 rows read" in said and "⟦good" in said and "it fits" in said and "M of them trained" in said
    out.mkdir()
    (out / "data_report.json").write_text("of a finished run")
    orpo_train.main()
    assert [path.read_text() for path in out.iterdir()] == ["of a finished run"]
    single = [{"prompt": f"q {i}", "completion": f"a {i}", "label": i % 2} for i in range(12)]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    for refused, name, more in (
        ("rows are pairs", "rows", {"loss": "kto", "engine": "trl", "strategy": "ddp"}),
        ("nll_weight=0.5 is for pairs", "single", {"loss": "kto", "nll_weight": 0.5}),
    ):  # as the run itself would
        flags_of = words | {"train_file_dir": tmp_path / f"{name}.jsonl"} | more
        monkeypatch.setattr(sys, "argv", ["orpo_train.py", *(f"--{name}={value}" for name, value in flags_of.items())])
        with pytest.raises(PreferenceError, match=refused):
            orpo_train.main()


def test_a_dry_run_of_an_evaluation_is_refused():
    with pytest.raises(ArgumentError, match="dry_run has no effect"):
        flags(dry_run=True, do_train=False)
