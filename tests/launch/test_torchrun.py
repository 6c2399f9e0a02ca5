"""What the wrappers in torchrun/ start, and accelerate launch: two CPU processes that train as one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import orpo_train

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("dash") or "sh"


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A project with the real wrappers, whose run_orpo.sh only prints what it was given."""
    (tmp_path / "torchrun").mkdir()
    for name in ("run_single_node.sh", "run_multi_node.sh"):
        shutil.copy(ROOT / "torchrun" / name, tmp_path / "torchrun")
    (tmp_path / "setup.sh").write_text(f'echo "{sys.executable}"\n')
    (tmp_path / "run_orpo.sh").write_text(
        'echo "ARGS $TORCHRUN_ARGS"\necho "THREADS $OMP_NUM_THREADS"\necho "FLAGS $*"\n'
    )
    return tmp_path / "torchrun"


def start(script: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    names = "NPROC NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS OMP_NUM_THREADS strategy".split()
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run([SHELL, str(script), *words], env=kept | env, text=True, capture_output=True)


def test_one_machine(echo: Path) -> None:
    result = start(echo / "run_single_node.sh", "--max_steps", "3", NPROC="2")
    assert result.returncode == 0, result.stderr
    assert "ARGS --standalone --local_addr 127.0.0.1 --nproc_per_node 2\n" in result.stdout
    assert "FLAGS --max_steps 3\n" in result.stdout
    threads = int(result.stdout.partition("THREADS ")[2].split()[0])
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_many_machines_by_environment_or_by_words(echo: Path) -> None:
    expected = "ARGS --nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr 10.0.0.1 --master_port 29500\n"
    settings = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "NPROC": "4"}
    assert expected in start(echo / "run_multi_node.sh", **settings).stdout
    words = [f"{name}={value}" for name, value in settings.items()]
    result = start(echo / "run_multi_node.sh", *words, "--seed", "7", NPROC="8", NODE_RANK="0")
    assert expected in result.stdout and "FLAGS --seed 7\n" in result.stdout


@pytest.mark.parametrize("words", [["--rdzv", "NNODES=2"], ["NNODES=1:2"], ["NNODES=2", "MAX_RESTARTS=3"]])
def test_machines_that_number_themselves(echo: Path, words: list[str]) -> None:
    """Restarts need it too: with fixed numbers torchrun's processes would find what dead ones have left."""
    result = start(echo / "run_multi_node.sh", *words, "MASTER_ADDR=a", "--seed", "7", NPROC="2")
    nodes = next(word for word in words if "NNODES" in word).partition("=")[2]
    restarts = " --max_restarts 3" if "MAX_RESTARTS=3" in words else ""
    rendezvous = "--rdzv_backend c10d --rdzv_id orpo --rdzv_endpoint a:29500"
    assert f"ARGS --nnodes {nodes} --nproc_per_node 2 {rendezvous}{restarts}\n" in result.stdout, result.stderr
    assert "FLAGS --seed 7\n" in result.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["NNODES=2", "NODE_RANK=2", "MASTER_ADDR=a"], "NODE_RANK goes from 0 to NNODES-1 = 1"),
        (["NNODES=2", "NODE_RANK=0"], "set MASTER_ADDR"),
        (["NNODES=2", "MASTER_ADDR=a"], "NODE_RANK is a whole number"),
        (["NODE_RANK=0"], "set NNODES"),
        (["NNODES=1", "NPROC=all"], "NPROC is a whole number; got 'all'"),
        (["NNODES=1", "NPROC=0"], "at least 1"),
        (["NNODES=2:1", "MASTER_ADDR=a"], "MIN:MAX"),
        (["NNODES=1", "strategy=dpp"], "unknown"),
        (["NPROCS=2"], "'NPROCS=2' is not understood"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(echo: Path, words: list[str], message: str) -> None:
    result = start(echo / "run_multi_node.sh", *(["NPROC=1"] if "NPROC" not in str(words) else []), *words)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "ARGS" not in result.stdout


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a few rows of data."""
    from tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("torchrun")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train", 16), ("eval", 5)):
        (folder / name).mkdir()
        rows = [
            {
                "question": f"{name} {i}: name {'three ' * (i % 4)}fresh juices",
                "response_chosen": f"apple and mint, carrot and ginger {'orange ' * (i % 5)}",
                "response_rejected": f"juices {'menu ' * (i % 3)}",
            }
            for i in range(count)
        ]
        (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ACCELERATE = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ELSEWHERE = ("MASTER_PORT", "WORLD_SIZE")  # what another launcher may have set


def command_of(folder: Path, name: str, **settings: object) -> list[str]:
    """orpo_train.py and its flags: three steps of the tiny model."""
    flags = {
        "model_name_or_path": folder / "model", "template_name": "qwen", "cache_dir": folder / "cache",
        "train_file_dir": folder / "train", "validation_file_dir": folder / "eval", "output_dir": folder / name,
        "lora_dropout": 0, "bf16": "false", "max_steps": 3, "logging_steps": 1, "sample_answers": 0, "use_cpu": "true",
    }  # fmt: skip
    return [str(ROOT / "orpo_train.py"), *(f"--{flag}={value}" for flag, value in (flags | settings).items())]


def result(folder: Path) -> dict:
    """What a run wrote about itself, in one dict."""
    files = ("trainer_state.json", "run.json", "all_results.json")
    return {k: v for file in files for k, v in json.loads((folder / file).read_text()).items()}


@pytest.mark.slow
def test_accelerate_launch_starts_the_script_itself_and_two_processes_train_as_one_does(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wrappers, whose runs are held to one process in test_signals.py and tests/train/test_fsdp.py."""
    monkeypatch.setattr(sys, "argv", command_of(tiny_run, "one", per_device_train_batch_size=8))
    orpo_train.main()
    environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    launch = [sys.executable, "-m", "accelerate.commands.launch", *ACCELERATE, "--multi_gpu"]
    command = [*launch, *command_of(tiny_run, "two", per_device_train_batch_size=2, gradient_accumulation_steps=2)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (result(tiny_run / name) for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2) and one["pairs_per_step"] == two["pairs_per_step"] == 8
    for key in ("loss", "grad_norm", "rewards/accuracies", "log_odds_ratio"):
        numbers = [[entry[key] for entry in run["log_history"] if key in entry] for run in (one, two)]
        assert len(numbers[0]) == 3, key
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-5), key
    for key in ("base_eval_loss", "eval_loss", "eval_rewards/margins"):
        assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-7), key

    saved = [load_file(tiny_run / name / "adapter_model.safetensors") for name in ("one", "two")]
    weights = [{name: w for name, w in adapter.items() if "lora_B" in name} for adapter in saved]
    assert weights[0] and any(v.abs().max() > 0 for v in weights[0].values())
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().max() < 1e-5, name
