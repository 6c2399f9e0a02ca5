"""What a run leaves, made in a moment: a tiny base model and an output folder with an adapter over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from conversation import get_conv_template
from tiny import tiny_model, tiny_tokenizer


def make_base(folder: Path, arch: str = "llama", **config: Any) -> Path:
    """A model folder: weights, config and a tokenizer without a chat template."""
    model = tiny_model(arch, **config)
    with torch.no_grad():  # as random models go, all tokens are about as likely: make them differ
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, template: str = "qwen", base_name: str | None = None, **lora: Any) -> Path:
    """An output folder as orpo_train.py leaves it, with an adapter that changes the model's answers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear", **lora)
    torch.manual_seed(1)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    tuned.peft_config["default"].base_model_name_or_path = base_name or str(base)
    tuned.save_pretrained(folder)
    write_run_files(folder, base_name or str(base), template)
    return folder


def write_run_files(folder: Path, base_name: str, template: str = "qwen") -> None:
    conv = get_conv_template(template)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = conv.jinja()
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=0).save_pretrained(folder)
    run = {"arguments": {"model_name_or_path": base_name, "fold_system": False, "loss": "orpo"}, "template": conv.name}
    report = {
        "rows_read": 7,
        "rows_kept": 5,
        "dropped": {"empty_answer": 2},
        "files": {
            "/home/someone/data/train.jsonl": {"rows_read": 5, "rows_kept": 3},
            "data/more.jsonl": {"rows_read": 2, "rows_kept": 2},
        },
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "data_report.json").write_text(json.dumps(report))
    (folder / "all_results.json").write_text(json.dumps({"eval_rewards/accuracies": 0.875}))
    front = '---\nbase_model: "/home/someone/base"\nlibrary_name: "peft"\ntags:\n- orpo\n---\n\n'
    (folder / "README.md").write_text(front + "# base, tuned with ORPO\n")
