"""The flags: unknown and unused ones are errors, --config is overridden by the command line, --help is quick."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference.arguments import FLAGS, ArgumentError, parse_arguments
from preference.arguments.help import COMMON, help_text
from preference.flags.peers import ELSEWHERE


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


def test_the_rank_that_deepspeeds_launcher_writes_is_taken():
    """Its first word behind the script; without the launcher, or with another rank, it is refused as any other."""
    args = parse_arguments(["--local_rank=1", "--max_steps", "3"], {"LOCAL_RANK": "1"})
    assert args.run.max_steps == 3 and args.given == {"max_steps"}
    with pytest.raises(ArgumentError, match=r"--local-rank=0, and the environment has LOCAL_RANK=1"):
        parse_arguments(["--local-rank=0"], {"LOCAL_RANK": "1"})
    for words, environ in ((["--local_rank=1"], {}), (["--max_steps", "3", "--local_rank=1"], {"LOCAL_RANK": "1"})):
        with pytest.raises(ArgumentError, match="unknown flag --local_rank: nothing to set"):
            parse_arguments(words, environ)


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


def test_the_weight_of_the_odds_ratio_is_that_of_the_model():
    args = parse_arguments([])
    assert args.beta == 0.1 and "starter model" in args.settle_beta(135_000_000) and args.beta == 1.0
    args = parse_arguments(["--orpo_beta", "auto"])
    assert "2403.07691" in args.settle_beta(7 * 10**9) and args.beta == 0.1
    args = parse_arguments(["--orpo_beta", "0.3"])
    assert args.settle_beta(135_000_000) == "given" and args.beta == 0.3
    args = parse_arguments(["--loss", "simpo"])
    assert args.settle_beta(135_000_000) == "the loss' default" and args.beta == 2


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
        (["--max_target_length", "0"], "a whole number, at least 1 .*; got '0'"),
        (["--do_train", "false", "--do_eval", "false"], "nothing to do"),
        (["--save_steps", "2.5"], "a whole number of steps, or a share"),
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
    [
        ("lerning_rate: 1", "did you mean --learning_rate"),
        ("- 1", "line 1: expected `name: value` lines"),
        ("# nothing\n", "there are none"),
        ("seed: [1]", "line 1: seed takes one value; write a list as a,b,c"),
        ("loss: orpo\nseed: {a: 1}", "line 2: seed takes one value"),
        ("a: &a [*a]", "takes one value"),
        ("seed: !!python/object/apply:os.getcwd []", "takes one value"),
        ("? [seed]\n: 1", "a name is one word"),
        ("lora_rank: 8\nseed: 1\nlora-rank: 9", "line 3: lora_rank is written twice, first in line 1"),
        ("lora_rank: 010", "line 1: lora_rank takes a whole number, at least 1 .*; got '010'"),
        ("max_steps: 1:30", "max_steps takes a whole number, -1 or at least 1; got '1:30'"),
        ("max_steps: 1_0", "got '1_0'"),
        ("learning_rate: .inf", "learning_rate takes a number, above 0 .*, or auto; got '.inf'"),
        ("use_peft: 2", "use_peft takes true or false; got '2'"),
        ("seed: 1\n---\nseed: 2", "line 2: a second document"),
        ("seed: 1\n\tloss: dpo", "line 2: not YAML"),
        ("seed: '1", "not YAML"),
        ("seed: " + "[" * 100_000, "takes one value"),
        ("{" * 100_000, "a name is one word"),
        ("do_eval: false\neval_steps: 5", "line 2: --eval_steps has no effect in this run"),
        ("run_name: \x07", "not YAML|not allowed|special characters"),
        ("#" * (1 << 20) + "\n", "no list of flags"),
    ],
)
def test_a_bad_config_file_names_itself_and_the_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ArgumentError, match=message) as error:
        parse_arguments(["--config", str(file)])
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_config_file_means_what_stands_there(tmp_path):
    """Not what YAML 1.1 makes of it: 83, 90, false, a date, a text."""
    file = tmp_path / "run.yaml"
    lines = ["run_name: 0123", "report_to: wandb", "output_dir: 1:30", "do_eval: off", "learning_rate: 1e-4",
             "cache_dir: 2026-01-01", "model_name_or_path: 'null'", "tokenizer_name_or_path: ~", "columns:",
             "dataset_name: '--seed'", "max-train-samples: 7"]  # fmt: skip
    file.write_text("\n".join(lines))
    args = parse_arguments(["--config", str(file)])
    assert (args.run.run_name, args.run.output_dir, args.run.do_eval) == ("0123", "1:30", False)
    assert (args.run.learning_rate, args.model.cache_dir, args.model.model_name_or_path) == (1e-4, "2026-01-01", "null")
    assert args.model.tokenizer_name_or_path is None and args.data.columns is None
    assert (args.data.dataset_name, args.data.max_train_samples, args.run.seed) == ("--seed", 7, 42)
    assert "columns" not in args.given and {"run_name", "max_train_samples"} <= args.given


NONSENSE = """
num_train_epochs -1 0 nan inf auto | max_steps 0 -2 1e3 1.5 auto | save_steps -4 | logging_steps -2 0 | eval_steps -1
max_grad_norm -1 nan | per_device_train_batch_size -3 1.5 | per_device_eval_batch_size -3
gradient_accumulation_steps -1 | sample_answers -2 | sample_tokens 0 | orpo_beta -1 nan | lora_rank 0 -4 99999999999
lora_dropout 1.5 1 nan -0.1 | lora_alpha nan 0 -1 | learning_rate -1 0 nan inf 1e999 | lr_scheduler_type cosin
optim adamx | seed -1 4294967296 x | warmup_steps -0.5 1.5 nan | max_train_samples -7 0 | max_eval_samples -2
weight_decay -1 nan | save_total_limit 0 | max_source_length 0 | max_target_length -1
validation_split_percentage 100 -1 nan | lost_after -1 | loss orp | dataloader_num_workers -1 | bf16 maybe
use_peft 2 | strategy fspd | min_score_gap -1 nan | engine fast | data_check no | max_tokens_per_micro_batch -1
model_name_or_path | optim_args momentum | lr_scheduler_kwargs a
"""


def test_a_value_that_means_nothing_is_refused_in_one_sentence_before_a_file_is_opened(tmp_path):
    """Each flag's own range: the message has the name, the value and what is allowed."""
    tried = 0
    for entry in NONSENSE.replace("\n", "|").split("|"):
        name, *values = entry.split() or [""]
        for value in values or ([""] if name else []):
            words = [f"--{name}={value}", "--train_file_dir", str(tmp_path / "missing")]
            words += ["--save_steps", "1"] if name == "save_total_limit" else []
            with pytest.raises(ArgumentError) as error:
                parse_arguments(words)
            said = str(error.value)
            assert said.startswith(name) and "\n" not in said, said
            assert repr(value) in said or value in said, said
            tried += 1
    assert tried > 70


NO_NUMBERS = (
    "nan",
    "-inf",
    "inf",
    "1e400",
    "1e30",
    "-1e30",
    "9" * 5000,
    "9" * 40,
    "abc",
    "1_0",
    "0x10",
    "1,5",
    "--3",
    "1e",
    ".",
)


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.kind in (int, float)])
def test_no_number_of_any_flag_is_nonsense(name):
    """Of every flag that is declared, also later: what it takes has an end, and one sentence says which."""
    flag = FLAGS[name]
    least = flag.range.least if flag.range.above is None else flag.range.above
    assert least is not None
    words = [*NO_NUMBERS, f"{least - 1.5:.1f}", *([] if flag.optional else ["", " "]), *([] if flag.auto else ["auto"])]
    words += ["1.5", "010", "-7"] if flag.kind is int else []
    for word in words:
        with pytest.raises(ArgumentError, match=f"^{name} takes a .*; (got )?['\"]") as error:
            flag.parse(word)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("word", ["lora_rank=1000000000", "dataloader_num_workers=5000", "learning_rate=1000"])
def test_no_number_asks_for_more_than_any_machine_has(word):
    with pytest.raises(ArgumentError, match="takes a .* at most "):
        parse_arguments([f"--{word}"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--loss", "dpo", "--label_smoothing", "0.9"], "label_smoothing takes a number, at least 0 and below 0.5"),
        (["--loss", "dpo", "--beta", "0"], "beta takes a number, above 0 and at most 1000, or auto; got '0'"),
        (["--loss", "simpo", "--simpo_gamma=-1"], "simpo_gamma takes a number, at least 0"),
        (["--max_steps", "3", "--warmup_steps", "4"], "warmup_steps=4 is longer than the run, which has 3"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "needs lr_scheduler_kwargs with num_decay_steps"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "set eval_steps"),
        (["--lr_scheduler_type", "constant", "--warmup-steps", "3"], "--warmup_steps has no effect in this run"),
        (["--optim_target_modules", "q_proj"], "--optim_target_modules has no effect in this run"),
        (["--optim", "galore_adamw", "--optim_target_modules", "q"], "trains all weights through a projection"),
        (["--optim_args", "momentum=0.9"], "optim=adamw_torch_fused does not use momentum"),
        (["--lora_rank"], "--lora_rank needs a value: a whole number, at least 1 and at most 65536"),
        (["--lora_rank", "--seed", "3"], "--lora_rank needs a value"),
        (["--no_use_peft=true"], "takes no value"),
        (["--no_lora_rank"], "unknown flag --no_lora_rank"),
        (["--use_peft", "false", "--lora-rank=8"], "--lora_rank has no effect in this run"),
        (["--"], "belongs to no flag"),
        (["-seed", "3"], "belongs to no flag"),
        (["--config"], "needs a value: a YAML file"),
        (["--config=\0"], "embedded null byte"),
        (["--config=\ud800"], "surrogates not allowed"),
        (["--dry_run", "--max_steps", "0"], "max_steps takes a whole number"),
    ],
)
def test_what_flags_mean_together_is_checked_as_well(words, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        parse_arguments(words)


VALUES = ["", "auto", "-1", "1e3", "nan", "--seed", "true", "a=1", "{", "\0", "1" * 400, "x" * 5000, "٣", "\n"]
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(VALUES))
NAMES = st.one_of(st.sampled_from([*FLAGS, "config", "defaults", "help"]), st.text(max_size=9))
SHAPES = [
    st.builds("--{}={}".format, NAMES, TEXTS),
    st.builds("--{}".format, NAMES),
    st.builds("--no-{}".format, NAMES),
]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(*SHAPES, TEXTS), max_size=5))
def test_any_words_are_arguments_or_one_sentence(words):
    said = ""
    try:
        assert parse_arguments(words).values().keys() == FLAGS.keys()
    except ArgumentError as error:
        said = str(error)
    except SystemExit:
        assert {"--help", "-h"} & {*words}
    assert "\n" not in said and len(said) < 1200


def test_spellings_of_one_flag():
    args = parse_arguments(["--lora-rank", "8", "--no-use-dora", "--max-steps=5", "--bf16", "auto", "--truncate"])
    assert (args.model.lora_rank, args.model.use_dora, args.run.max_steps, args.run.bf16) == (8, False, 5, None)
    assert args.given == {"lora_rank", "use_dora", "max_steps", "bf16", "truncate"} and args.data.truncate is True
    words = ["--seed=1", "--per_device_train_batch_size", "auto", "--learning_rate", "Auto", "--seed", "2"]
    args = parse_arguments([*words, "--run_name=--seed=9", "--report_to", "wandb"])
    assert (args.run.seed, args.run.run_name) == (2, "--seed=9")  # the last one counts
    assert args.run.per_device_train_batch_size == 0 and args.run.learning_rate is None


@pytest.mark.parametrize(
    "name, said",
    [
        ("cutoff_len", "max_source_length + max_target_length"), ("num_epochs", "here it is --num_train_epochs"),
        ("lora_r", "here it is --lora_rank"), ("lora-target", "here it is --target_modules"),
        ("flash_attn", "attention"), ("push_to_hub", "nothing is uploaded"), ("hub_model_id", "nothing is uploaded"),
        ("warmup_ratio", "here it is --warmup_steps (warm-up from above 0: below 1 a share"), ("packing", "packed"),
        ("dataset", "here it is --train_file_dir"), ("finetuning_type", "here it is --use_peft"),
        ("pref_beta", "--orpo_beta with loss=orpo, --beta with the others"), ("pref_loss", "here it is --loss"),
        ("base_model", "here it is --model_name_or_path"), ("max_length", "max_source_length + max_target_length"),
        ("micro_batch_size", "here it is --per_device_train_batch_size"), ("template", "here it is --template_name"),
        ("val_size", "here it is --validation_split_percentage"), ("adam_beta2", "betas 0.9 and 0.999"),
        ("tempalte_name", "did you mean --template_name?"), ("ref_model", "the reference is the model before training"),
        ("LORA_R", "here it is --lora_rank"), ("zzzz", "--help all lists all flags"),
        ("x\ny", r"unknown flag '--x\ny'"),
    ],
)  # fmt: skip
def test_names_of_other_toolkits_are_known(name, said):
    with pytest.raises(ArgumentError, match="^unknown flag") as error:
        parse_arguments([f"--{name}", "1"])
    assert said in str(error.value)


def test_no_flag_stands_twice():
    """Neither among the names of others, nor under two flags; and each has a help that tells more than its name."""
    peers = [peer for flag in FLAGS.values() for peer in flag.peers]
    assert len(peers) == len(set(peers)) and not {*peers, *ELSEWHERE} & FLAGS.keys() and not {*peers} & {*ELSEWHERE}
    assert all(len(flag.help) > 10 and flag.topic for flag in FLAGS.values())


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


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_has_the_common_flags_first_and_all_where_asked(width):
    few, all_of_them = (help_text(FLAGS, everything, width) for everything in (False, True))
    named = [set(re.findall(r"^  --(\w+)", text, re.M)) - {"config"} for text in (few, all_of_them)]
    assert named == [{*COMMON}, {*FLAGS}] and 18 <= len(COMMON) <= 24
    assert f"{len(FLAGS) - len(COMMON)} more flags" in few and "more flags" not in all_of_them
    flags = few.partition("the model:")[2].splitlines()
    assert max(map(len, flags)) <= max(width, 60) and max(map(len, f"{few}\n{all_of_them}".splitlines())) <= max(
        width, 80
    )
    assert re.search(r"--lora_rank 16\s", few)
    assert "usage: " in few and few.index("sh run_orpo.sh") < few.index("--lora_rank")


def test_help_on_the_command_line(capsys):
    for words in (["--help"], ["--seed", "3", "-h", "all"], ["--help", "--defaults", "--seed=3"]):
        with pytest.raises(SystemExit) as end:
            parse_arguments(words)
        assert end.value.code == 0 and ("--optim_args" in capsys.readouterr().out) == ("all" in words)


DECLARED = """    frobs: int = flag(
        3, "how many frobs there are", least=1, unused=(NO_TRAINING,), identity=True, peers=("num_frobs",), topic="frob"
    )
"""
USE = """
import gc, sys
gc.disable()
from types import SimpleNamespace as Fake
from preference.arguments import parse_arguments
assert "torch" not in sys.modules
args = parse_arguments(sys.argv[1:])
print("value", args.run.frobs, args.values()["frobs"])
from preference.train import identity
import datasets, torch
rows = datasets.Dataset.from_dict({name: [[1, 2]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
trainer = Fake(args=Fake(learning_rate=1.0, bf16=False, fp16=False), train_dataset=rows, model=torch.nn.Linear(1, 1),
               processing_class=[], get_total_train_batch_size=lambda _: 8)
now = identity.run_identity(args, trainer, Fake(name="t", stop_str="s"))
print("identity", identity.differences({name: value for name, value in now.items() if name != "frobs"}, now))
from preference.plan.dry_run import configuration
print(next(line for line in configuration(args).splitlines() if "frobs" in line))
"""


def test_a_flag_is_written_once(root, tmp_path):
    """A flag that is added to a copy, in its declaration and a line of run_orpo.sh alone, works in every way."""
    shutil.copytree(root / "preference", tmp_path / "preference", ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, line in (
        ("preference/arguments/run.py", "    seed: int = flag(", DECLARED),
        ("run_orpo.sh", 'seed="${seed:-42}"', 'frobs="${frobs:-3}"\n'),
    ):
        text = (root / name).read_text()
        assert text.count(before) == 1
        (tmp_path / name).write_text(text.replace(before, line + before))
    (tmp_path / "setup.sh").write_text('echo "$PYTHON"\n')
    (tmp_path / "orpo_train.py").write_text(USE)

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **variables}
        return subprocess.run(["sh", tmp_path / "run_orpo.sh", *words], env=environment, capture_output=True, text=True)

    done = run(frobs="7")
    assert "value 7 7" in done.stdout and "identity ['frobs: was 3, is 7']" in done.stdout, done.stderr[-2000:]
    assert " --frobs=7 " in done.stdout and "    frobs = 7" in done.stdout
    said = [run(*words).stderr for words in (["--frobs", "0"], ["--num-frobs", "2"], ["--do-train=no", "--frobs", "5"])]
    assert "frobs takes a whole number, at least 1; got '0'" in said[0]
    assert "unknown flag --num-frobs: here it is --frobs (how many frobs there are)" in said[1]
    assert "--frobs has no effect in this run: do_train=false does not train" in said[2]
    shown = run("--help", "all").stdout
    assert "frob:\n" in shown and re.search(r"--frobs 3 +how many frobs there are\n", shown)
