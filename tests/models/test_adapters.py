"""An adapter that is handed in: gone on with as it is, merged for a new one, or kept below it over 4-bit weights."""

from __future__ import annotations

import functools
import json
import math
from argparse import Namespace

import pytest
import torch
from handed_in import expected_logits, make_adapter, make_plain
from peft import PeftModel
from training import make_pairs, make_trainer, same_weights, weights_of
from transformers import AutoModelForCausalLM

from preference.arguments import parse_arguments
from preference.engine.forward import pair_logps
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.files import NEXT
from preference.models.adapters import FROZEN, load_stack
from preference.models.hardware import Hardware
from preference.models.loading import MERGED, adapt, load_base, untuned
from preference.models.look import ModelError
from preference.models.sources import find_model
from preference.models.vocabulary import add_rows
from preference.serve.candidates import Candidates
from preference.serve.loading import LoadingError, find_source, load_tuned_model
from preference.serve.models import Models
from tiny import tiny_model, tiny_tokenizer

CPU = Hardware("cpu", "CPU", 0, False)
IDS = torch.tensor([[1, 5, 9, 77, 300]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters")
    plain = make_plain(out / "plain")
    return {"plain": plain, "adapter": make_adapter(out / "adapter", plain)}


def loaded(folder, *words, write=False):
    args = parse_arguments([str(word) for word in words])
    source = find_model(str(folder))
    return adapt(load_base(source, args, CPU), source, args, write=write, say=lambda text: None)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def loss_gradients(model):
    """Of a sum of log-probabilities through the packed engine, for every weight that is trained."""
    prepare_model(model)
    model.train().zero_grad()
    logps = pair_logps(model, pack_pairs(list(make_pairs(4))))
    (logps.chosen_B - logps.rejected_B).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_flags_that_contradict_the_adapter_are_refused(folders):
    loaded(folders["adapter"], "--lora_rank", 4, "--lora_alpha", 8, "--target_modules", "all")
    loaded(folders["adapter"], "--defaults", "--lora_rank=16")
    with pytest.raises(ModelError, match="--lora_rank 8 contradicts the adapter"):
        loaded(folders["adapter"], "--defaults", "--lora_rank=8")  # as run_orpo.sh hands over what is set from outside
    for words in (("--lora_rank", 8), ("--lora_alpha", 16), ("--use_dora", "true"), ("--target_modules", "q_proj")):
        with pytest.raises(ModelError, match=f"{words[0]} .* contradicts the adapter .* --new_adapter true"):
            loaded(folders["adapter"], *words)


def test_the_gradient_is_that_of_the_merged_model(folders):
    """dA = s B^T dW and dB = s dW A^T of the same dW."""
    adapted = loaded(folders["adapter"])
    layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    parts = {
        n: (m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]) for n, m in layers.items()
    }
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["plain"]), folders["adapter"])
    whole = loss_gradients(merged.merge_and_unload().requires_grad_(True))
    found = loss_gradients(adapted)
    assert len(found) == 2 * len(layers) == 28
    for name, (a, b, scale) in parts.items():
        dw = whole[name.removeprefix("base_model.model.") + ".weight"]
        for ours, theirs in ((a.grad, scale * b.T @ dw), (b.grad, scale * dw @ a.T)):
            assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.norm()), rtol=0)


def test_a_new_adapter_starts_from_the_merged_weights(folders, tmp_path):
    """It adds nothing yet; what it lies over is on the disk, and serving finds it there, also moved."""
    new = loaded(
        folders["adapter"], "--new_adapter", "true", "--output_dir", tmp_path / "out", "--lora_rank", 2, write=True
    )
    expected = expected_logits("adapter", folders, IDS)
    assert torch.allclose(logits(new), expected, atol=2e-6)
    assert {config.r for config in new.peft_config.values()} == {2}
    torch.nn.init.normal_(new.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    new.save_pretrained(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / MERGED / "config.json").is_file()
    assert torch.equal(
        logits(load_tuned_model(find_source(str(tmp_path / "moved")), torch.float32, "cpu")), logits(new)
    )
    (tmp_path / "moved" / NEXT).mkdir()  # another run begins to replace that result
    with pytest.raises(ModelError, match="belongs to the adapter that lies beside it: set another output_dir"):
        loaded(folders["adapter"], "--new_adapter", "true", "--output_dir", tmp_path / "moved", write=True)


def test_training_all_weights_from_an_adapter_takes_it_in(folders):
    model = loaded(folders["adapter"], "--use_peft", "false")
    assert not hasattr(model, "peft_config") and all(p.requires_grad for p in model.parameters())
    assert torch.allclose(logits(model), expected_logits("adapter", folders, IDS), atol=2e-6)


@pytest.mark.parametrize("words, engine", [((), "packed"), ((), "trl"), (("--new_adapter", "true"), "packed")])
def test_the_reference_is_what_was_handed_in(folders, tmp_path, words, engine):
    """The adapter's output, not the base's: DPO starts at ln 2."""
    model = loaded(folders["adapter"], *words, "--output_dir", tmp_path / "out", write=True)
    trainer = make_trainer(engine, tmp_path / "run", make_pairs(4), model=model, loss="dpo", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved/ref").exists()


def test_a_model_that_is_only_scored_answers_without_its_adapter_first(folders):
    model = loaded(folders["adapter"], "--do_train", "false")
    plain = AutoModelForCausalLM.from_pretrained(folders["plain"])
    with untuned(model, scoring=True) as separate:
        assert separate and torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), expected_logits("adapter", folders, IDS))
    with untuned(loaded(folders["adapter"]), scoring=False) as separate:
        assert not separate


def test_over_4_bit_weights_it_stays_below_the_new_one(folders, tmp_path):
    """Both count, one is trained, both are saved, and both are there when the run's folder is loaded."""
    old, new = (loaded(folders["adapter"], "--qlora", "true", *words) for words in ((), ("--new_adapter", "true")))
    assert torch.allclose(logits(new), logits(old), atol=1e-6)
    trained = {name for name, p in new.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    options = {"loss": "dpo", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer("packed", tmp_path / "run", make_pairs(4), model=new, **options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / FROZEN / "adapter_config.json").is_file()
    (tmp_path / "saved/run.json").write_text(json.dumps({"base_model": str(folders["plain"])}))
    again = loaded(folders["adapter"], "--qlora", "true", "--new_adapter", "true")
    resumed = make_trainer("packed", tmp_path / "run", make_pairs(4), model=again, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert same_weights(weights_of(again), weights_of(new))
    again = loaded(tmp_path / "saved", "--qlora", "true", "--do_train", "false")
    assert torch.allclose(logits(again), logits(new), atol=1e-6) and not torch.allclose(
        logits(new), logits(old), atol=1e-4
    )


MIXTURES = {
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "mixtral": {},
}


@pytest.mark.parametrize("arch", MIXTURES)
def test_routers_get_no_adapter(tmp_path, arch):
    """Linear layers, and modules of their own beside stacked experts, which get one, are saved, loaded and merged."""
    from preference.models.adapters import add_adapter
    from preference.models.targets import routers

    model = tiny_model(arch, **MIXTURES[arch])
    model.save_pretrained(tmp_path / "base")
    gates = {name.rpartition(".")[2] for name in routers(model)}
    assert gates == ({"gate", "shared_expert_gate"} if arch == "qwen2_moe" else {"gate"})
    adapted = add_adapter(model, parse_arguments([]).model, 0)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert not [name for name in trained if "gate." in name] and any("expert" in name for name in trained)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))
    resumed = load_base(find_model(str(tmp_path / "base")), parse_arguments([]), CPU)
    resumed = load_stack(resumed, str(tmp_path / "adapter"), trainable=True)
    assert torch.equal(logits(resumed), logits(adapted))
    assert sorted(n for n, p in resumed.named_parameters() if p.requires_grad) == sorted(trained)
    assert torch.allclose(logits(again.merge_and_unload()), logits(adapted), atol=1e-5)


def test_a_tied_head_is_refused_before_it_trains():
    from preference.models.adapters import add_adapter

    tied = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ModelError, match="lm_head is tied"):
        add_adapter(tied, parse_arguments(["--target_modules", "q_proj,lm_head"]).model, 0)
    add_adapter(tiny_model(), parse_arguments(["--target_modules", "q_proj,lm_head"]).model, 0)


def chat_of(folder, **run):
    """Who chats from a run's folder: run.json says `run`."""
    tiny_tokenizer().save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"template": "qwen", "arguments": {}} | run))
    words = {"model": str(folder), "base_model": None, "trust_remote_code": False, "use_cpu": True}
    sampling = {"torch_dtype": "float32", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 4, "seed": 0}
    return Models(Namespace(**words, **sampling, template_name=None))


def base_in_evaluation(folder):
    """Logits of what evaluate_model.py compares a run's result with."""
    words = {"model": str(folder), "base_model": None, "use_cpu": True, "torch_dtype": "float32", "win_rate": None}
    model, within = Candidates(Namespace(**words)).models["base"]
    with within():
        return logits(model)


def before_and_tuned(models):
    chat, within = models.base()
    with within() if callable(within) else within:
        before = logits(chat.model)
    return before, logits(models.tuned.model)


@pytest.mark.parametrize("words", [(), ("--use_peft", "false"), ("--new_adapter", "true")])
def test_before_tuning_is_what_was_handed_in(folders, tmp_path, words):
    """The adapter's output, not the bare base's: resumed, taken into all weights, and merged for a new one."""
    model = loaded(folders["adapter"], *words, "--output_dir", tmp_path / "run", write=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and ("lora_B" in name or "norm" in name):
                weight.add_(0.1)
    model.save_pretrained(tmp_path / "run")
    flags = {words[0][2:]: words[1] == "true"} if words else {}
    base = str(tmp_path / "run" / MERGED if "--new_adapter" in words else folders["plain"])
    models = chat_of(tmp_path / "run", adapter=str(folders["adapter"]), base_model=base, arguments=flags)
    for _ in range(2):
        before, tuned = before_and_tuned(models)
        assert torch.allclose(before, expected_logits("adapter", folders, IDS), atol=2e-6)
        assert torch.allclose(tuned, logits(model), atol=1e-6) and not torch.allclose(before, tuned, atol=1e-2)
    assert torch.equal(base_in_evaluation(tmp_path / "run"), before)


def test_before_tuning_over_a_frozen_adapter_is_that_one(folders, tmp_path):
    model = loaded(folders["adapter"], "--qlora", "true", "--new_adapter", "true")
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "run")
    models = chat_of(tmp_path / "run", adapter=str(folders["adapter"]), base_model=str(folders["plain"]))
    before, tuned = before_and_tuned(models)
    assert torch.allclose(before, expected_logits("adapter", folders, IDS), atol=2e-6)
    assert not torch.allclose(before, tuned, atol=1e-2)
    assert torch.equal(base_in_evaluation(tmp_path / "run"), before)


def test_an_adapter_that_is_gone_is_named(folders, tmp_path):
    loaded(folders["adapter"]).save_pretrained(tmp_path / "run")
    gone = str(tmp_path / "gone")
    models = chat_of(tmp_path / "run", adapter=gone, base_model=str(folders["plain"]))
    with pytest.raises(LoadingError, match="tuned further is not at .*gone any more"):
        before_and_tuned(models)


def test_tokens_are_added_with_a_new_adapter(folders, tmp_path):
    """After the merge; where there is none they are refused, with what to type."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<more {i}>" for i in range(512 - len(tokenizer))] + ["<a>"])
    flags = ["--new_adapter", "true", "--add_tokens", "<a>"]
    args, source = parse_arguments([*flags, "--output_dir", str(tmp_path / "run")]), find_model(str(folders["adapter"]))
    grow = functools.partial(add_rows, tokenizer=tokenizer, names=["<a>"])
    model = adapt(load_base(source, args, CPU), source, args, write=True, say=print, grow=grow)
    with torch.no_grad():
        found = model.eval()(torch.cat([IDS, torch.tensor([[512]])], 1)).logits
    assert found.shape[-1] == 513
    assert torch.allclose(found[:, :5, :512], expected_logits("adapter", folders, IDS), atol=2e-6)
    assert any("trainable_tokens" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ModelError, match="--new_adapter true merges it and starts one that has them"):
        loaded(folders["adapter"], "--add_tokens", "<a>")
    with pytest.raises(ModelError, match="while the weights below it are quantised: qlora=false"):
        loaded(folders["adapter"], *flags, "--qlora", "true")
