"""The flags: unknown and unused ones are errors, --config is overridden by the command line, --help is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from preference.arguments import ArgumentError, parse_arguments


def test_defaults_parse_and_remember_what_was_given():
    args = parse_arguments(["--lora_rank", "4", "--bf16", "true"])
    assert (args.model.lora_rank, args.run.bf16, args.objective.loss) == (4, True, "orpo")
    assert args.given == {"lora_rank", "bf16"}


@pytest.mark.parametrize(
    "word, near",
    [("--lora_rnak", "--lora_rank"), ("--learning-rat=1", "--learning_rate"), ("--orpobeta", "--orpo_beta")],
)
def test_unknown_flag_suggests_the_nearest(word, near):
    with pytest.raises(ArgumentError, match=f"did you mean {near}"):
        parse_arguments([word, "8"])


def test_learning_rate_depends_on_what_is_trained():
    lora, full, given = ([], ["--use_peft", "false"], ["--learning_rate", "3e-5"])
    rates = [
        parse_arguments(words).learning_rate(size).learning_rate
        for words in (lora, full, given)
        for size in (135e6, 8e9)
    ]
    assert rates == [1e-3, 1e-4, 1e-4, 8e-6, 3e-5, 3e-5]
    dpo = [
        parse_arguments(["--loss", "dpo", *words]).learning_rate(size) for words in (lora, full) for size in (1e8, 8e9)
    ]
    assert [recipe.learning_rate for recipe in dpo] == [1e-4, 1e-5, 5e-6, 5e-7]
    assert all(recipe.source for recipe in dpo)


def test_abbreviations_are_not_guessed():
    with pytest.raises(ArgumentError, match="unknown flag --lora_r"):
        parse_arguments(["--lora_r", "8"])


@pytest.mark.parametrize(
    "words",
    [
        ["--use_peft", "false", "--lora_rank", "16"],
        ["--loss", "dpo", "--orpo_beta", "0.1"],
        ["--beta", "0.2"],
        ["--loss", "dpo", "--nll_scope", "answer"],
        ["--loss", "sft", "--beta", "1"],
        ["--loss", "orpo,dpo", "--orpo_beta", "1"],
        ["--loss", "kto", "--label_smoothing", "0.1"],
        ["--sft_share", "0.3"],
        ["--loss", "dpo", "--orpo_stages", "sft,align"],
        ["--f_alpha", "0.3"],
        ["--loss", "cpo", "--cpo_alpha", "2", "--nll_weight", "1"],
        ["--simpo_gamma", "1"],
        ["--engine", "trl", "--max_tokens_per_micro_batch", "512"],
        ["--validation_file_dir", "x", "--validation_split_percentage", "5"],
        ["--do_train", "false", "--learning_rate", "1e-5"],
        ["--max_steps", "5", "--num_train_epochs", "3"],
        ["--save_total_limit", "3"],
        ["--dataset_name", "a/b", "--train_file_dir", "c"],
        ["--sample_answers", "0", "--sample_tokens", "9"],
    ],
)
def test_a_flag_that_this_run_ignores_is_an_error(words):
    with pytest.raises(ArgumentError, match="has no effect in this run"):
        parse_arguments(words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--qlora", "true", "--use_peft", "false"], "4-bit"),
        (["--engine", "trl", "--loss", "simpo"], "engine=packed"),
        (["--engine", "trl", "--nll_scope", "answer"], "engine=packed"),
        (["--engine", "trl", "--orpo_stages", "sft,align"], "engine=packed"),
        (["--loss", "dppo"], "did you mean"),
        (["--loss", "dpo,simpo"], "different defaults for beta"),
        (["--loss", "dpo:-1"], "positive number"),
        (["--max_target_length", "0"], "a whole number, at least 1; got '0'"),
        (["--do_train", "false", "--do_eval", "false"], "nothing to do"),
        (["stray"], "belongs to no flag"),
        (["--data_format", "triples"], "did you mean triple"),
        (["--data_format", "columns"], "needs the columns"),
        (["--data_format", "orca", "--columns", "question=a,chosen=b,rejected=c"], "not together"),
        (["--columns", "question=a,chosen=b"], "missing rejected"),
        (["--min_score_gap", "nan"], "takes a number, at least 0"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(ArgumentError, match=message):
        parse_arguments(words)


def test_config_file_is_typed_and_overridden(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-5\nuse_peft: false\ntemplate_name: 通用\nmax_steps: 7\n", encoding="utf-8")
    args = parse_arguments(["--config", str(file), "--max_steps", "9"])
    assert (args.run.learning_rate, args.model.use_peft, args.data.template_name, args.run.max_steps) == (
        1e-5,
        False,
        "通用",
        9,
    )
    assert parse_arguments([f"--config={file}"]).run.max_steps == 7


@pytest.mark.parametrize(
    "text, message",
    [("lerning_rate: 1", "did you mean --learning_rate"), ("- 1", "name: value"), ("seed: [1]", "one value")],
)
def test_a_bad_config_file_names_itself(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ArgumentError, match=message) as error:
        parse_arguments(["--config", str(file)])
    assert str(file) in str(error.value)


def test_help_imports_nothing_heavy(root):
    code = """
import sys
from preference.arguments import parse_arguments
try:
    parse_arguments(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--orpo_beta" in done.stdout
