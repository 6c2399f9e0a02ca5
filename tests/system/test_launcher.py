"""run_orpo.sh under dash: variables, flags that replace them, the printed command, and a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import tiny_model, tiny_tokenizer

SHELL = shutil.which("dash") or "sh"


@pytest.fixture
def launcher(root, tmp_path):
    """launch(*flags, **variables): run_orpo.sh in a copy of its folder whose orpo_train.py prints its words as JSON."""
    shutil.copy(root / "run_orpo.sh", tmp_path)
    (tmp_path / "setup.sh").write_text('echo "$PYTHON"\n')
    (tmp_path / "orpo_train.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")

    def launch(*flags: str, **variables: str) -> tuple[dict[str, str], str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
        command = [SHELL, str(tmp_path / "run_orpo.sh"), *flags]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True)
        printed, words = done.stdout.strip().splitlines()
        words = json.loads(words)
        assert all(word.startswith("--") for word in words[::2])
        return dict(zip([w[2:] for w in words[::2]], words[1::2], strict=True)), printed

    return launch


def test_defaults_are_those_of_the_documentation(launcher):
    flags, printed = launcher()
    expected = {
        "model_name_or_path": "models/SmolLM2-135M-Instruct",
        "template_name": "qwen",
        "loss": "orpo",
        "engine": "packed",
    }
    assert expected.items() <= flags.items()
    assert flags["validation_file_dir"] == "data/eval" and "bf16" not in flags and "max_steps" not in flags
    assert printed.startswith("+ ") and "orpo_train.py --model_name_or_path models/SmolLM2-135M-Instruct" in printed


def test_variables_set_outside_and_flags_win_in_that_order(launcher):
    flags, _ = launcher("--max_steps", "5", "--lora_rank=4", train_file_dir="my data/ö", lora_rank="64", seed="7")
    assert (flags["train_file_dir"], flags["lora_rank"], flags["seed"], flags["max_steps"]) == (
        "my data/ö",
        "4",
        "7",
        "5",
    )
    assert "num_train_epochs" not in flags  # max_steps decides


@pytest.mark.parametrize("value", ["it's", 'a "b" $HOME `x`', "a;b", "*", "a\\b"])
def test_values_pass_unchanged(launcher, value):
    assert launcher(model_name_or_path=value)[0]["model_name_or_path"] == value
    assert launcher("--note", value)[0]["note"] == value


def test_only_what_this_run_uses_is_passed(launcher):
    assert not {"lora_rank", "target_modules", "lora_dropout"} & launcher(use_peft="false")[0].keys()
    assert not {"orpo_beta", "nll_scope"} & launcher("--loss", "dpo")[0].keys()
    assert "train_file_dir" not in launcher(dataset_name="a/b")[0]
    assert not {"learning_rate", "num_train_epochs", "save_steps"} & launcher(do_train="false")[0].keys()
    assert "validation_file_dir" not in launcher(validation_file_dir="")[0]
    assert not {"resume", "resume_anyway"} & launcher()[0].keys()
    resumed = launcher("--resume_anyway", resume="outputs/a/checkpoint-3")[0]
    assert (resumed["resume"], resumed["resume_anyway"]) == ("outputs/a/checkpoint-3", "true")
    assert launcher("--qlora")[0]["qlora"] == "true"  # a bare switch


def test_a_config_file_stands_in_for_the_values(launcher):
    flags, _ = launcher("--config", "my.yaml", "--seed", "3", "--brand_new", "x")
    assert flags == {"config": "my.yaml", "seed": "3", "brand_new": "x"}


def test_every_variable_is_a_flag_of_orpo_train(launcher):
    from preference.arguments import FLAGS, parse_arguments

    flags, _ = launcher(
        tokenizer_name_or_path="t", cache_dir="c", per_device_train_batch_size="2", bf16="true", learning_rate="1e-5"
    )
    assert flags.keys() <= FLAGS.keys()
    assert parse_arguments([w for name, value in flags.items() for w in (f"--{name}", value)]).run.seed == 42


def test_it_trains(root, tmp_path):
    """The real thing: two steps of a tiny model on the sample data."""
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    variables = dict(
        PYTHON=sys.executable, model_name_or_path=str(tmp_path / "model"), output_dir=str(tmp_path / "out"),
        max_train_samples="16", max_eval_samples="4", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    command = [SHELL, "run_orpo.sh", "--max_steps", "2", "--sample_tokens", "4"]
    done = subprocess.run(command, cwd=root, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "+ " in done.stdout and "preference accuracy" in done.stdout and "saved in" in done.stdout
    figures = json.loads(Path(tmp_path / "out" / "all_results.json").read_text())
    assert figures["train_steps"] == 2


def test_a_wrong_flag_ends_with_one_line(root):
    command = [SHELL, "run_orpo.sh", "--lerning_rate", "1"]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "did you mean --learning_rate?" in done.stderr and "Traceback" not in done.stderr
