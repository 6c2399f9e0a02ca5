"""What a model's folder may hold that is not a model: every script ends with one sentence, and nothing is allocated.

In this process, over folders of a tiny model; each damage meets the script behind it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tuned import make_base, make_run

import chat
import evaluate_model
import export_model
import orpo_train
from preference.launch.process import run_script
from preference.models.folder import ModelError, check_sizes

PAIR = {"question": "Hi?", "response_chosen": "Hello.", "response_rejected": "No."}
EXAM = [{"question": "2+2?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"}]
SCRIPTS = ("chat", "export", "evaluate", "train", "dry_run")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("models")
    base = make_base(work / "base")
    return {"base": base, "run": make_run(work / "run", base)}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str, Path], str]:
    """call(script, model folder): the sentence that the script ends with."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "exam.json").write_text(json.dumps(EXAM))
    train = ["--train_file_dir", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out",
             "--cache_dir", tmp_path / "c", "--use_cpu", "true", "--bf16", "false", "--do_eval", "false",
             "--max_steps", "1"]  # fmt: skip
    words = {
        "chat": ["--prompts", tmp_path / "rows.jsonl", "--use_cpu"],
        "export": ["--output", tmp_path / "exported"],
        "evaluate": ["--mcq", tmp_path / "exam.json", "--use_cpu"],
        "train": train,
        "dry_run": [*train, "--dry_run", "true"],
    }
    mains = {"chat": chat.main, "export": export_model.main, "evaluate": evaluate_model.main}

    def run(script: str, model: Path) -> str:
        named = ["--model_name_or_path", model] if script in ("train", "dry_run") else [model]
        monkeypatch.setattr(sys, "argv", [script, *map(str, [*named, *words[script]])])
        with pytest.raises(SystemExit) as end:
            mains[script]() if script in mains else run_script(orpo_train.main, "orpo_train.py")
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out and not list(tmp_path.glob("exported*"))
        assert isinstance(end.value.code, str) and "\n" not in end.value.code, end.value.code
        return end.value.code

    return run


def changed(**entries: object) -> Callable[[Path], None]:
    """The JSON object of a file with other entries."""

    def change(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[60] ^= 8
    file.write_bytes(content)


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def text(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content) and None


BILLION = 10**9
DAMAGES = [
    # a model of 10^9 layers and the like, at every entrance
    ("base/config.json", changed(num_hidden_layers=BILLION), "chat", "num_hidden_layers 1,000,000,000"),
    ("base/config.json", changed(num_hidden_layers=BILLION), "train", "num_hidden_layers 1,000,000,000"),
    ("base/config.json", changed(hidden_size=BILLION), "export", "hidden_size 1,000,000,000"),
    ("base/config.json", changed(vocab_size=BILLION), "evaluate", "vocab_size 1,000,000,000"),
    ("base/config.json", changed(num_local_experts=BILLION), "dry_run", "num_local_experts 1,000,000,000"),
    # below every bound, and far above what lies beside it
    ("base/config.json", changed(vocab_size=10**6, hidden_size=10**6), "train", "weights .* its weight files have"),
    ("run/adapter_config.json", changed(r=BILLION), "chat", "rank 1000000000"),
    # files that are not what they are called
    ("base/config.json", text(b"\xff\xfe{"), "train", "config.json of .* cannot be read"),
    ("base/config.json", text(b"[" * 100_000), "chat", "config.json of .* cannot be read"),
    ("base/config.json", changed(num_attention_heads="x"), "dry_run", "cannot be read: .*num_attention_heads"),
    ("base/config.json", folder_instead, "export", "holds neither config.json"),
    ("base/tokenizer.json", cut, "evaluate", "tokenizer of .* cannot be read"),
    ("base/tokenizer_config.json", text(b"[]"), "train", "tokenizer of .* cannot be read"),
    ("base/tokenizer_config.json", changed(chat_template=7), "chat", "tokenizer of .* cannot be read"),
    ("base/tokenizer_config.json", changed(model_max_length=[1]), "export", "tokenizer of .* cannot be read"),
    ("base/model.safetensors", cut, "chat", "is cut off or damaged"),
    ("base/model.safetensors", header, "export", "cannot be loaded|no safetensors file|are missing"),
    ("run/adapter_model.safetensors", cut, "evaluate", "is cut off or damaged"),
    ("run/adapter_config.json", changed(trainable_token_indices=[10**9]), "chat", "token 1000000000 lies beyond"),
    ("run/adapter_config.json", changed(trainable_token_indices="x"), "train", "trainable_token_indices of .* cannot"),
    ("run/adapter_config.json", text(b"{"), "export", "adapter_config.json cannot be read"),
    ("run/adapter_config.json", changed(base_model_name_or_path=[1]), "train", "must be a text"),
    ("run/generation_config.json", text(b"\xff garbage"), "chat", "generation_config.json cannot be read"),
    ("run/generation_config.json", text(b"[]"), "export", "generation_config.json cannot be read"),
    ("run/chat_template.jinja", text(b"\xff\xfe\xff"), "chat", "tokenizer of .* cannot be read"),
    ("run/generation_config.json", changed(eos_token_id=1e9), "export", "eos_token_id is 1000000000.0"),
    ("run/generation_config.json", changed(output_hidden_states=["all"]), "chat", "output_hidden_states is ..all"),
    ("run/all_results.json", text(b"\xb7"), "export", "all_results.json of .* cannot be read: .*delete it"),
    ("base/config.json", changed(output_hidden_states="x"), "evaluate", "output_hidden_states must be true or false"),
    ("run/run.json", text(b'{"arguments": []}'), "evaluate", "run.json is not what a run writes"),
]  # fmt: skip


@pytest.mark.parametrize("file, damage, script, words", DAMAGES, ids=[f"{d[0]}-{d[2]}-{d[3]}" for d in DAMAGES])
def test_a_damaged_folder_is_one_sentence(folders, tmp_path, call, file, damage, script, words):
    which, name = file.split("/")
    model = shutil.copytree(folders[which], tmp_path / "m")
    damage(model / name)
    sentence = call(script, model)
    assert re.search(words, sentence) and str(tmp_path) in sentence, sentence


def test_a_full_disk_under_an_export_leaves_nothing(folders, tmp_path):
    """No file may grow beyond 60 KiB in this child, as where the disk is full."""
    words = [sys.executable, "export_model.py", folders["run"], "--output", tmp_path / "e"]
    limited = ["sh", "-c", 'ulimit -f 120; exec "$@"', "sh", *map(str, words)]
    ended = subprocess.run(limited, cwd=Path(export_model.__file__).parent, capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-2000:]
    assert re.search("export_model.py: .*[Ff]ile too large.*set --output to another disk", last)
    assert not list(tmp_path.iterdir())


def test_no_output_is_an_input(folders, tmp_path, call, monkeypatch):
    """Of any script; a folder that is not there, or is not one's own, is said before the model is loaded."""
    prompts = tmp_path / "rows.jsonl"
    for output, words in (
        (prompts, "would overwrite what is read"),
        (folders["run"] / "run.json", "would overwrite what is read"),
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "none" / "x.jsonl", "there is no folder"),
    ):
        for main, flag in ((chat.main, "--prompts"), (evaluate_model.main, "--mcq")):
            monkeypatch.setattr(sys, "argv", list(map(str, ["x", folders["run"], flag, prompts, "--output", output])))
            with pytest.raises(SystemExit, match=words):
                main()
    assert json.loads(prompts.read_text()) == PAIR


@pytest.mark.parametrize(
    "row",
    [{"question": "a", "system": 3}, {"question": "a", "history": [1]}, {"question": "a", "history": "b"},
     {"question": "\ud800"}, {"prompt": {}}, {"history": []}],
    ids=str,
)  # fmt: skip
def test_rows_of_prompts_that_are_none(folders, tmp_path, call, row):
    """chat.py names the row; deep nesting is a row like any other."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert re.search(r"rows.jsonl(:1|, prompt 1)", call("chat", folders["run"]))
    (tmp_path / "rows.jsonl").write_text('{"question": ' + "[" * 100_000)
    assert "rows.jsonl:1: not JSON" in call("chat", folders["run"])


@pytest.mark.parametrize(
    "entry",
    [
        {"num_hidden_layers": 10_001}, {"n_layer": 10**12}, {"text_config": {"num_layers": 10**9}},
        {"encoder": [{"d_model": 10**7}]}, {"n_routed_experts": 70_000}, {"num_key_value_heads": 10**9},
        {"intermediate_size": [512, 1 << 21]}, {"head_dim": 1e300}, {"vocab_size": float("inf")},
        {"num_hidden_layers": 9_000, "num_experts": 9_000},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_no_model_has(entry):
    with pytest.raises(ModelError, match="config.json of m has .* no model has more than"):
        check_sizes("m", {"model_type": "llama", "hidden_size": 64} | entry)


def test_the_largest_models_pass():
    check_sizes("llama", {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248,
                          "vocab_size": 128256, "max_position_embeddings": 10_485_760, "rope_theta": 1e9})  # fmt: skip
    check_sizes(
        "kimi", {"num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8, "vocab_size": 163840}
    )
