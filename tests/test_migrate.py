"""migrate.py: configs as the documentation of other tools shows them become commands that orpo_train.py takes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

import migrate as script
from preference.arguments import parse_arguments
from preference.arguments.migration import MigrationError, migrate, read_foreign

LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: orpo  # choices: [sigmoid (dpo), orpo, simpo]
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
adapter: qlora
rl: dpo
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test
    type: chat_template.default
    field_messages: conversation
sequence_len: 4096
sample_packing: false
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
warmup_steps: 10
weight_decay: 0.0
"""
TRL = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
loss_type: sigmoid
learning_rate: 5e-7
beta: 0.05
max_length: 1024
use_peft: true
lora_r: 32
lora_alpha: 16
eval_strategy: steps
eval_steps: 50
output_dir: Qwen2-0.5B-DPO
push_to_hub: true
"""
SWIFT = """
rlhf_type: simpo
model: Qwen/Qwen2.5-7B-Instruct
train_type: full
dataset: [my_pairs.jsonl]
max_length: 2048
torch_dtype: bfloat16
learning_rate: 1e-6
attn_impl: sdpa
warmup_ratio: 0.05
"""
WANTED = {
    "LLaMA-Factory": (LLAMA_FACTORY, {
        "loss": "orpo", "orpo_beta": "0.1", "use_peft": "true", "lora_rank": "8", "target_modules": "all",
        "template_name": "llama3", "max_source_length": "1024", "max_target_length": "1024", "warmup_steps": "0.1",
        "learning_rate": "5.0e-6", "max_train_samples": "1000", "output_dir": "saves/llama3-8b/lora/dpo",
    }, {"dataset", "overwrite_cache", "preprocessing_num_workers", "ddp_timeout"}),
    "axolotl": (AXOLOTL, {
        "loss": "dpo", "model_name_or_path": "NousResearch/Meta-Llama-3-8B", "use_peft": "true", "qlora": "true",
        "dataset_name": "fozziethebeat/alpaca_messages_2k_dpo_test", "lora_rank": "32", "target_modules": "all",
        "per_device_train_batch_size": "2", "num_train_epochs": "4", "learning_rate": "0.0002", "bf16": "true",
        "warmup_steps": "10", "max_source_length": "2048", "optim": "adamw_bnb_8bit",
    }, {"datasets (field_messages, type)", "sample_packing", "tf32"}),
    "TRL": (TRL, {
        "loss": "dpo", "beta": "0.05", "learning_rate": "5e-7", "dataset_name": "trl-lib/ultrafeedback_binarized",
        "max_target_length": "512", "lora_rank": "32", "eval_steps": "50",
    }, {"push_to_hub"}),
    "ms-swift": (SWIFT, {
        "loss": "simpo", "use_peft": "false", "train_file_dir": "my_pairs.jsonl", "warmup_steps": "0.05",
        "attn_implementation": "sdpa", "bf16": "true",
    }, set()),
}  # fmt: skip


@pytest.mark.parametrize("tool", WANTED)
def test_a_config_becomes_a_command(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text, flags, left = WANTED[tool]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    found = migrate(read_foreign(str(path)))
    assert found.tool == tool and flags.items() <= found.flags.items(), found.flags
    assert {key for key, _ in found.left} == left, found.left
    assert all(why for _, why in found.left)
    monkeypatch.setattr(sys, "argv", ["migrate.py", str(path)])
    script.main()
    said = capsys.readouterr()
    words = shlex.split(said.out.replace("\\\n", " "))
    assert words[:2] == ["python", "orpo_train.py"] and said.err.count("# left out:") == len(left)
    if "needs a change" not in said.err:
        parsed = parse_arguments(words[2:]).values()
        assert parsed["loss"] == flags["loss"] and parsed["output_dir"] == found.flags.get("output_dir", "outputs/orpo")


@pytest.mark.parametrize("tool", ["LLaMA-Factory", "axolotl", "TRL", "ms-swift"])
def test_the_command_is_taken_as_it_is(tool: str, tmp_path: Path) -> None:
    """A config whose keys all go together here gives a command that needs no change."""
    path = tmp_path / "config.yaml"
    path.write_text(WANTED[tool][0])
    found = migrate(read_foreign(str(path)))
    parse_arguments([f"--{name}={text}" for name, text in found.flags.items()])


@pytest.mark.parametrize("config", [{"stage": "sft"}, {"rl": "grpo"}, {"stage": "rm", "finetuning_type": "lora"}])
def test_what_is_no_preference_tuning_is_refused(config: dict[str, str]) -> None:
    with pytest.raises(MigrationError, match="no preference tuning"):
        migrate(config)


@pytest.mark.parametrize("config", [{"loss_type": "nonsense"}, {"rlhf_type": "foo"}])
def test_a_loss_that_there_is_not_is_refused(config: dict[str, str]) -> None:
    with pytest.raises(MigrationError, match="unknown loss"):
        migrate(config)


def test_words_for_off_and_for_float16() -> None:
    found = migrate({"lora_target_modules": ["q_proj"], "lora_target_linear": "false", "dtype": "float16"})
    assert found.flags == {"target_modules": "q_proj", "fp16": "true"} and not found.left


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "text, said",
    [("", "holds no settings"), ("- a\n- b\n", "holds no settings"), ("a: [", "cannot be read"),
     ("just text", "holds no settings"), (LAUGHS, "more than 20 aliases"), ("a: &a [*a]\nseed: *a", "100000 values"),
     ("seed: 1\nloss_type: ipo\nseed: 2", "seed is written twice"), ("b: {c: 1, c: 2}", "c is written twice"),
     ("seed: " + "[" * 50_000, "50 levels"), ("#" * (1 << 20) + "\n", "longer than 1048576"),
     ("seed: !!python/object/apply:os.getcwd []", "cannot be read")],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_what_is_no_config_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(MigrationError, match=f"c.yaml.*{said}") as error:
        read_foreign(str(path))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"seed": 1, "seed": 2}')
    for path, said in ((tmp_path, "Is a directory"), (tmp_path / "c", "No such file"), (tmp_path / "c.json", "twice")):
        with pytest.raises(MigrationError, match=rf"^{path} cannot be read: [\w ]*{said}"):
            read_foreign(str(path))


def test_no_value_acts_on_a_terminal_or_is_too_long_to_read() -> None:
    """Digits beyond those that Python makes a number of, and an escape sequence on its way into the command."""
    found = migrate({"loss_type": "ipo", "seed": "9" * 5000, "cutoff_len": "9" * 5000, "output_dir": "a\x1b]0;t\x07"})
    assert found.flags == {"loss": "ipo"} and {key for key, _ in found.left} == {"seed", "cutoff_len", "output_dir"}


def test_values_that_a_flag_does_not_take_are_left_with_the_reason() -> None:
    config = {"finetuning_type": "freeze", "quantization_bit": 8, "learning_rate": "fast", "bf16": "int8",
              "warmup_ratio": "some"}  # fmt: skip
    found = migrate(config)
    assert not found.flags and [key for key, _ in found.left] == [*config]
