"""The weights that a run ends with: best or averaged checkpoints, moving averages, early stopping; exact on resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_orpo_train import ROWS, write

import orpo_train
from preference.arguments import parse_arguments
from preference.flags.declaration import ArgumentError
from preference.launch.signals import StoppedBySignal
from preference.train.selection import Selection, SelectionError
from preference.train.stopping import StopTogether
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with a model, rows, and two evaluation files."""
    folder = tmp_path_factory.mktemp("given")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write(folder / "train.jsonl", ROWS)
    write(folder / "near.jsonl", [dict(row, question="Near: " + row["question"]) for row in ROWS[:3]])
    write(folder / "far.jsonl", [dict(row, response_chosen="Far away.") for row in ROWS[:2]])
    return folder


@pytest.fixture
def run(given, tmp_path, monkeypatch):
    def call(name: str, stop_at: int = -1, **flags) -> Path:
        defaults = dict(
            model_name_or_path=given / "model", train_file_dir=given / "train.jsonl", output_dir=tmp_path / name,
            template_name="qwen", cache_dir=tmp_path / "cache", html_report="false", bf16="false", use_cpu="true",
            use_peft="false", learning_rate=1e-3, sample_answers=0, per_device_train_batch_size=2,
            gradient_accumulation_steps=1, logging_steps=50, lr_scheduler_type="constant",
        )  # fmt: skip
        words = [f"--{name}={value}" for name, value in (defaults | flags).items()]
        monkeypatch.setattr(sys, "argv", ["orpo_train.py", *words])
        with monkeypatch.context() as patch:
            if stop_at > 0:

                def look(self, args, state, control, **kwargs):
                    self.stopping = state.global_step == stop_at - 1

                patch.setattr(StopTogether, "on_pre_optimizer_step", look)
                with pytest.raises(StoppedBySignal, match=f"step {stop_at}"):
                    orpo_train.main()
            else:
                orpo_train.main()
        return tmp_path / name

    return call


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_best_checkpoints_by_a_named_set_are_averaged_and_a_resumed_run_ends_with_the_same(run, given):
    """More loss is called better, so that the first evaluations are the best, and patience ends after two more.

    Interrupted at a step of neither kind, and at the one whose evaluation ends the run, which it leaves out.
    """
    flags = dict(
        validation_file_dir=f"near={given}/near.jsonl,far={given}/far.jsonl", eval_steps=2, save_steps=2, max_steps=12,
        load_best_model_at_end="true", metric_for_best_model="far_loss", greater_is_better="true",
        early_stopping_patience=2, average_checkpoints=2, save_total_limit=1,
    )  # fmt: skip
    whole = run("whole", **flags)
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    first, second = (load_file(whole / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    ended = load_file(whole / "model.safetensors")
    for name, weights in ended.items():
        assert torch.equal(weights, ((first[name].double() + second[name].double()) / 2).float()), name
    facts, figures = read(whole, "run.json"), read(whole, "all_results.json")
    assert facts["weights_of_steps"] == [2, 4] and facts["chosen_by"] == "eval_far_loss"
    assert figures["train_steps"] == 6 and figures["eval_far_loss"] != figures["eval_near_loss"]
    logged = {
        e["step"]: e["eval_far_loss"] for e in read(whole, "trainer_state.json")["log_history"] if "eval_far_loss" in e
    }
    assert facts["values"] == {str(step): logged[step] for step in (2, 4)}
    assert logged[4] < figures["eval_far_loss"] < logged[2]  # the model that was evaluated is the averaged one
    groups = read(whole, "evaluation.json")["set"]
    assert groups["near"]["tuned"]["pairs"] == 3 and groups["far"]["tuned"]["pairs"] == 2
    report = read(whole, "data_report.json")
    assert report["evaluation_near"]["pairs"] == 3 and report["evaluation_far"]["pairs"] == 2
    for stop_at in (5, 6):
        run(f"stopped{stop_at}", stop_at=stop_at, **flags)
        resumed = run(f"stopped{stop_at}", **flags)
        assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert read(resumed, "all_results.json")["train_steps"] == 6


def test_a_moving_average_resumes_and_is_what_the_run_ends_with(run, given):
    flags = dict(validation_file_dir=given / "near.jsonl", ema_decay=0.5, max_steps=4, save_steps=2, use_peft="true")
    whole = run("whole", **flags)
    run("stopped", stop_at=3, **flags)
    resumed = run("stopped", **flags)
    ended = load_file(whole / "adapter_model.safetensors")
    assert (resumed / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert read(whole, "run.json")["weights"] == "moving average, decay 0.5"
    last, every = run("every", **(flags | {"save_steps": 1})), {}
    for step in (1, 2, 3, 4):
        every[step] = load_file(last / f"checkpoint-{step}" / "adapter_model.safetensors") if step > 2 else {}
    means = torch.load(last / "checkpoint-3" / "moving_average.pt")
    name = next(name for name in ended if "lora_B" in name)
    mean = means[name.replace("lora_B.weight", "lora_B.default.weight")]
    decay = min(0.5, 5 / 14)
    assert torch.allclose(ended[name], decay * mean + (1 - decay) * every[4][name], atol=1e-9)
    assert not torch.equal(ended[name], every[4][name])


def test_what_a_selection_says_of_a_log():
    log = [{"step": step, "eval_loss": loss} for step, loss in ((2, 3.0), (4, 2.0), (6, 2.1), (8, 1.95), (10, 2.2))]
    assert not Selection(patience=2).exhausted(log) and Selection(patience=1).exhausted(log)
    assert Selection(patience=3, threshold=0.1).exhausted(log)

    class State:
        save_steps, global_step, max_steps, log_history = 4, 10, 10, log

    assert Selection(average=2).steps(State) == [8, 10] and Selection().steps(State) == []
    assert Selection(best=True).steps(State) == [8] and Selection(best=True, average=2).steps(State) == [4, 8]
    assert Selection("eval_nll_loss").greater_is_better is False and Selection("preference/margins").greater_is_better
    with pytest.raises(SelectionError, match="have loss, preference/accuracies$"):
        Selection("acc", best=True).check({"eval_loss": 1.0, "eval_preference/accuracies": 0.5, "eval_runtime": 2.0})


@pytest.mark.parametrize(
    "words, said",
    [
        ("--load_best_model_at_end --eval_steps 2", "set eval_steps, and save_steps to the same"),
        ("--load_best_model_at_end --eval_steps 2 --save_steps 3", "save_steps=3 is no multiple of eval_steps=2"),
        ("--load_best_model_at_end --eval_steps 0.1 --save_steps 20", "no multiple"),
        ("--early_stopping_patience 2", "set eval_steps"),
        ("--metric_for_best_model nll_loss", "has no effect in this run: neither"),
        ("--early_stopping_patience 2 --eval_steps 2 --validation_file_dir a=x,b=y", "say which, as in a_loss"),
        ("--ema_decay 0.9 --average_checkpoints 2 --save_steps 2", "drop one of them"),
        ("--ema_decay 0.9 --strategy fsdp", "ema_decay needs whole weights"),
        ("--average_checkpoints 2", "save_steps=0 writes no checkpoints"),
        ("--average_checkpoints 1 --save_steps 2", "takes a whole number, 0 or at least 2"),
        ("--validation_file_dir a=x,a=y", "two sets are called a"),
        ("--validation_file_dir x,a=y", "x stands before the first name: write NAME=x"),
        ("--validation_file_dir nll=y", "cannot be called nll"),
        ("--validation_file_dir a=,b=y", "a: no file or folder is named"),
    ],
)
def test_choices_that_cannot_be_made(words, said):
    with pytest.raises(ArgumentError, match=said):
        parse_arguments(words.split())


def test_sets_have_names_inputs_and_caps(tmp_path):
    sets = parse_arguments(["--validation_file_dir", "med=a,b:20,general=c:0.5"]).evaluation_sets
    assert sets == {"med": "a,b:20", "general": "c:0.5"}
    odd = tmp_path / "x=1.jsonl"
    odd.write_text("")
    assert parse_arguments(["--validation_file_dir", str(odd)]).evaluation_sets == {"": str(odd)}
    assert parse_arguments(["--validation_file_dir", "a,b"]).evaluation_sets == {"": "a,b"}
