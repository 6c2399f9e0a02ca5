"""What a user types: each look at a model is had by the commands themselves, in this process, over tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from handed_in import make_adapter, make_plain
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import chat
import export_model
import orpo_train
from preference.arguments import parse_arguments
from preference.launch.process import run_script
from preference.models.adapters import check_on_paper
from preference.models.hardware import Hardware
from preference.models.loading import adapt, load_base
from preference.models.look import look_on_paper
from preference.models.sources import ModelSource, find_model
from preference.serve.loading import find_source, load_tuned_model, resolve_base
from preference.serve.merging import load_merged
from tiny import tiny_tokenizer

CPU = Hardware("cpu", "CPU", 0, False)
IDS = torch.tensor([[1, 5, 9, 77, 300]])
PAIR = {"question": "Hi?", "response_chosen": "Rest and drink water. " * 8, "response_rejected": "No."}
DRY = ("--dry_run", "true")


@pytest.fixture
def type_in(tmp_path, monkeypatch, capsys):
    """type_in(script, words): what it wrote, and the sentence that it ended with."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(PAIR | {"question": f"Hi {i}?"}) + "\n" for i in range(4)))
    common = ["--train_file_dir", tmp_path / "rows.jsonl", "--cache_dir", tmp_path / "c", "--use_cpu", "true"]
    common += ["--bf16", "false", "--do_eval", "false", "--max_steps", "1", "--html_report", "false"]

    def type_in(script: str, *words) -> tuple[str, str]:
        words = [*words, *common] if script == "orpo_train.py" else [*words, "--use_cpu"]
        if script == "orpo_train.py" and "--output_dir" not in words:
            words += ["--output_dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        end = ""
        try:
            run_script(orpo_train.main, script) if script == "orpo_train.py" else chat.main()
        except SystemExit as left:
            end = str(left.code or "")
        said = capsys.readouterr()
        return said.out + said.err, end

    return type_in


def test_an_adapter_goes_by_the_names_that_people_know(tmp_path):
    plain = make_plain(tmp_path / "plain")
    adapter = make_adapter(tmp_path / "adapter", plain)
    for words in (["--model_name_or_path", adapter], ["--peft_path", adapter], ["--adapter_name_or_path", adapter],
                  ["--model_name_or_path", plain, "--adapter_name_or_path", adapter]):  # fmt: skip
        args = parse_arguments([str(word) for word in words])
        assert orpo_train.find_model(args) == ModelSource(str(plain), str(adapter)), words


@pytest.mark.parametrize("words", [(), DRY])
def test_a_template_that_writes_a_token_without_a_row_is_refused(tmp_path, type_in, words):
    plain, tokenizer = make_plain(tmp_path / "plain"), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|tool_{i}|>" for i in range(200)]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|tool_199|>\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|tool_199|>\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(plain)
    _, end = type_in("orpo_train.py", "--model_name_or_path", plain, "--template_name", "auto", *words)
    assert "('<|tool_199|>') of the template or a stop token is not in the model's vocabulary" in end
    if not words:
        _, end = type_in("chat.py", plain)
        assert "('<|tool_199|>') of the template or a stop token is not in the model's vocabulary" in end


@pytest.mark.parametrize("words", [(), DRY])
def test_rows_are_held_to_the_positions(tmp_path, type_in, words):
    learned, rotary = make_plain(tmp_path / "l", "gpt2", n_positions=32), tmp_path / "r"
    _, end = type_in("orpo_train.py", "--model_name_or_path", learned, "--template_name", "qwen", *words)
    assert "tokens" in end and "has 32 positions: --max_source_length" in end
    if not words:
        make_plain(rotary, max_position_embeddings=32)
        said, end = type_in("orpo_train.py", "--model_name_or_path", rotary, "--template_name", "qwen")
        assert not end and "and the model was trained for 32" in said and "rope_scaling" in said


def test_a_run_does_not_write_over_its_model(tmp_path, type_in):
    plain = make_plain(tmp_path / "plain")
    before = {file.name: file.read_bytes() for file in plain.iterdir()}
    _, end = type_in("orpo_train.py", "--model_name_or_path", plain, "--template_name", "qwen",
                     "--use_peft", "false", "--output_dir", plain)  # fmt: skip
    assert "is or holds model_name_or_path" in end
    assert {file.name: file.read_bytes() for file in plain.iterdir()} == before


@pytest.mark.parametrize("script", ["chat.py", "orpo_train.py"])
def test_a_folder_that_is_gone_is_asked_of_no_hub(type_in, monkeypatch, script):
    monkeypatch.setattr(
        "preference.models.starter._from_hub", lambda name, *_: pytest.fail(f"the hub was asked: {name}")
    )
    named = ["--model_name_or_path"] if script == "orpo_train.py" else []
    _, end = type_in(script, *named, "outputs/gone")
    assert "'outputs/gone' was not found" in end


def test_a_run_from_a_relative_path_is_found_from_elsewhere(tmp_path, type_in, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    plain = make_plain(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    _, end = type_in("orpo_train.py", "--model_name_or_path", "plain", "--template_name", "qwen")
    assert not end
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(resolve_base(find_source(str(tmp_path / "out")))) == plain
    assert find_model(str(tmp_path / "out")) == ModelSource(str(plain), str(tmp_path / "out"))


def test_an_adapter_with_a_larger_vocabulary_is_gone_on_with(tmp_path):
    """As peft saves it once the embedding has been resized: with both tables whole, of more rows than the base has."""
    plain = make_plain(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.resize_token_embeddings(520)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear",
                                             modules_to_save=["embed_tokens", "lm_head"]))  # fmt: skip
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.1)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    ids = torch.cat([IDS, torch.tensor([[519]])], 1)
    with torch.no_grad():
        expected = model.eval()(ids).logits
    args, source = parse_arguments([]), find_model(str(folder))
    check_on_paper(look_on_paper(source.base), source.adapter)
    trained = adapt(load_base(source, args, CPU), source, args, write=False, say=print)
    assert {"modules_to_save", "lora_A"} <= {
        word for name, p in trained.named_parameters() if p.requires_grad for word in name.split(".")
    }
    served = find_source(str(folder))
    merged = load_merged(served, [(ids[0].tolist(), 2)])[0]
    with torch.no_grad():
        assert torch.equal(trained.eval()(ids).logits, expected)
        assert torch.allclose(load_tuned_model(served, torch.float32, "cpu")(ids).logits, expected, atol=1e-6)
        assert torch.allclose(merged.eval()(ids).logits, expected, atol=1e-4)


def test_a_stop_token_beyond_the_vocabulary_is_refused(tmp_path, type_in, monkeypatch):
    plain = make_plain(tmp_path / "plain")
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 99999]}))
    said = "token 99999 of the template or a stop token is in neither the model's vocabulary of 512 rows"
    _, end = type_in("chat.py", plain)
    assert said in end and "take it out of generation_config.json" in end
    monkeypatch.setattr(sys, "argv", ["export_model.py", str(plain), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=said):
        export_model.main()
    assert not (tmp_path / "out").exists()
