"""run_orpo.sh under dash: variables, flags that replace them, the printed command, and a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preference.arguments import FLAGS, ArgumentError, parse_arguments
from tiny import tiny_model, tiny_tokenizer

SHELL = shutil.which("dash") or "sh"


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """A copy of run_orpo.sh beside an orpo_train.py and a torchrun/launch.py that print their words as JSON."""
    folder = tmp_path_factory.mktemp("launcher")
    shutil.copy(root / "run_orpo.sh", folder)
    (folder / "setup.sh").write_text('echo "$PYTHON"\n')
    (folder / "torchrun").mkdir()
    for script in ("orpo_train.py", "torchrun/launch.py"):
        (folder / script).write_text("import json, sys\nprint('WORDS', json.dumps(sys.argv[1:]))\n")
    return folder


@pytest.fixture
def launched(folder):
    """launched(*flags, **variables): the words of orpo_train.py, and the command that was printed."""

    def launch(*flags: str, **variables: str) -> tuple[list[str], str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
        command = [SHELL, str(folder / "run_orpo.sh"), *flags]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True)
        printed, words = done.stdout.strip().split("\nWORDS ")
        return json.loads(words), printed

    return launch


@pytest.fixture
def launcher(launched):
    """launcher(*flags, **variables): the arguments of the run that run_orpo.sh starts, as orpo_train.py reads them."""
    return lambda *flags, **variables: parse_arguments(launched(*flags, **variables)[0])


def test_defaults_are_those_of_the_documentation(launcher, launched):
    args = launcher()
    assert args.model.model_name_or_path == "models/SmolLM2-135M-Instruct" and args.data.template_name == "qwen"
    assert (args.objective.loss, args.objective.engine, args.data.validation_file_dir) == (
        "orpo",
        "packed",
        "data/eval",
    )
    assert args.run.bf16 is None and args.run.learning_rate is None and args.run.max_steps == -1 and not args.given
    printed = launched()[1]
    assert printed.startswith("+ ") and " orpo_train.py --defaults --model_name_or_path=models/SmolLM2" in printed


def test_variables_set_outside_and_flags_win_in_that_order(launcher):
    variables = {"train_file_dir": "my data/ö", "lora_rank": "64", "seed": "7", "num_train_epochs": "3"}
    args = launcher("--max_steps", "5", "--lora-rank=4", **variables)
    assert (args.data.train_file_dir, args.model.lora_rank, args.run.seed, args.run.max_steps) == ("my data/ö", 4, 7, 5)
    assert args.run.num_train_epochs == 1 and args.given == {"max_steps", "lora_rank"}  # max_steps decides
    assert launcher("--no-use-peft").model.use_peft is False and launcher("--qlora").model.qlora is True


@pytest.mark.parametrize(
    "value", ["it's", 'a "b" $HOME `x`', "a;b", "*", "a\\b", "--seed", "--seed=3\n--loss=dpo", "x\ny"]
)
def test_values_pass_unchanged(launcher, launched, value):
    """None becomes a flag, code of the shell, or a list of files; what is printed gives the same words again."""
    args = launcher(run_name="", model_name_or_path=value)
    assert (args.model.model_name_or_path, args.run.seed, args.objective.loss) == (value, 42, "orpo")
    words, printed = launched("--note", value, output_dir=value)
    assert words[1] == value and f"--output_dir={value}" in words
    again = subprocess.run([SHELL, "-c", f'printf "%s\\0" {printed[2:]}'], capture_output=True, text=True, check=True)
    assert again.stdout.split("\0")[2:-1] == words


def test_what_has_no_effect_is_left_out(launcher):
    assert launcher(use_peft="False", lora_rank="64").model.lora_rank == 16
    args = launcher("--loss", "dpo", orpo_beta="0.3", beta="")
    assert args.objective.orpo_beta is None and args.beta == 0.1
    assert launcher(dataset_name="a/b", train_file_dir="c").data.train_file_dir == "data/train"
    assert launcher(do_train="No", learning_rate="1e-5", save_steps="9").run.learning_rate is None
    assert launcher(validation_file_dir="").data.validation_file_dir is None
    assert launcher(do_eval="off").data.validation_file_dir is None
    resumed = launcher("--resume_anyway", resume="outputs/a/checkpoint-3").run
    assert (resumed.resume, resumed.resume_anyway) == ("outputs/a/checkpoint-3", True)


@pytest.mark.parametrize("word", ["true", "Yes", "ON", "1", "t"])
def test_booleans_mean_the_same_everywhere(launcher, word):
    assert launcher(dry_run=word, do_train=word, qlora=word).run.dry_run is True
    assert parse_arguments(["--dry_run", word]).run.dry_run is True


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"max_steps": "1e3"}, "run_orpo.sh: max_steps takes a whole number, -1 or at least 1; got '1e3'"),
        ({"max_steps": "auto"}, "max_steps takes a whole number, -1 or at least 1; got 'auto'"),
        ({"max_steps": "10 steps"}, "max_steps takes a whole number, -1 or at least 1; got '10 steps'"),
        ({"do_train": "maybe"}, "do_train takes true or false; got 'maybe'"),
        (
            {"num_train_epochs": "--max_steps=3"},
            "num_train_epochs takes a number, above 0 and at most 100000; got '--max_steps=3'",
        ),
        ({"dry_run": "on", "do_train": "no"}, "--dry_run has no effect in this run"),
        ({"qlora": "true", "use_peft": "false"}, "4-bit weights cannot be trained themselves"),
    ],
)
def test_a_variable_that_means_nothing_is_refused(launcher, variables, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        launcher(**variables)


@pytest.mark.parametrize("word", ["--touch FILE\nseed", "--touch FILE;seed", "--$(touch FILE)", "--defaults"])
def test_a_flag_is_never_code_of_the_shell(launcher, tmp_path, word):
    with pytest.raises(ArgumentError, match="unknown flag|behind --defaults stand"):
        launcher(word.replace("FILE", str(tmp_path / "made")), "7")
    assert not (tmp_path / "made").exists()


def test_torchrun_args_are_split_and_not_evaluated(launched, tmp_path):
    words, _ = launched("--seed", "3", TORCHRUN_ARGS=f"--nproc_per_node  2 * $(touch {tmp_path}/made) ;")
    expected = ["--nproc_per_node", "2", "*", "$(touch", f"{tmp_path}/made)", ";", "orpo_train.py", "--seed", "3"]
    assert words[: len(expected)] == expected and not (tmp_path / "made").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", ">&- 2>&-", "2>&1 | exec true"])
def test_words_that_nobody_reads_do_not_keep_a_run_from_starting(root, tmp_path, redirection):
    """A full disk under the log, no streams, a reader that has left: of setup.sh as well."""
    for name in ("run_orpo.sh", "setup.sh", "requirements.txt"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / "orpo_train.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    command = f"(sleep 0.2; exec {SHELL} {tmp_path}/run_orpo.sh) {redirection}"
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    subprocess.run([SHELL, "-c", command], env=environment, timeout=60, check=False)
    assert (tmp_path / "ran").exists()


def test_a_config_file_stands_in_for_the_values(launched):
    assert launched("--config", "my.yaml", "--seed", "3")[0] == ["--config", "my.yaml", "--seed", "3"]
    assert launched("--config=my.yaml", lora_rank="3")[0] == ["--config=my.yaml"]


def test_a_flag_set_from_outside_without_a_line_is_not_lost(launched):
    with pytest.raises(ArgumentError, match="optim is set from outside to 'sgd', but run_orpo.sh has no line for it"):
        parse_arguments(launched()[0], {"optim": "sgd", "seed": "5"})
    assert parse_arguments(launched("--optim", "sgd")[0], {"optim": "sgd"}).run.optim == "sgd"
    assert parse_arguments(["--seed", "3"], {"optim": "sgd"}).run.optim == "adamw_torch_fused"  # not by run_orpo.sh


def test_every_variable_is_a_flag_and_most_stand_at_their_default(launched):
    """run_orpo.sh differs from a bare orpo_train.py in two values only, which its comments give reasons for."""
    soft = dict(word[2:].split("=", 1) for word in launched(tokenizer_name_or_path="t", cache_dir="c")[0][1:])
    assert soft.keys() <= FLAGS.keys()
    changed = {name for name, text in soft.items() if FLAGS[name].parse(text) != FLAGS[name].default}
    assert changed == {"template_name", "validation_file_dir", "tokenizer_name_or_path", "cache_dir"}


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


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_scripts_keep_their_line_ends_on_every_system(root, tmp_path):
    """A checkout with core.autocrlf, as on Windows, has \\n in all that a shell, a hash or a parser reads."""
    shutil.copy(root / ".gitattributes", tmp_path)
    for name in ("run_orpo.sh", "rows.jsonl"):
        (tmp_path / name).write_bytes(b"a\nb\n")

    def git(*words: str) -> None:
        settings = ("-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "run_orpo.sh").unlink()
    (tmp_path / "rows.jsonl").unlink()
    git("checkout", "--", ".")
    assert {(tmp_path / name).read_bytes() for name in ("run_orpo.sh", "rows.jsonl")} == {b"a\nb\n"}
