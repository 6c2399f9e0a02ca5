"""The wrappers in torchrun/: what they start, and a run on two CPU processes that trains as one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

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


def train(folder: Path, name: str, script: str, **settings: str) -> dict:
    """Run a script of the project on the tiny model; what it wrote about itself, in one dict."""
    settings |= {
        "PYTHON": sys.executable,
        "model_name_or_path": str(folder / "model"),
        "train_file_dir": str(folder / "train"),
        "validation_file_dir": str(folder / "eval"),
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / name),
        "lora_dropout": "0",
        "bf16": "false",
    }
    flags = ["--max_steps", "3", "--logging_steps", "1", "--sample_answers", "0", "--use_cpu", "true"]
    result = start(ROOT / script, *flags, **settings)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    files = ("trainer_state.json", "run.json", "all_results.json")
    return {k: v for file in files for k, v in json.loads((folder / name / file).read_text()).items()}


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny_run: Path) -> None:
    one = train(tiny_run, "one", "run_orpo.sh", per_device_train_batch_size="2", gradient_accumulation_steps="2")
    two = train(
        tiny_run,
        "two",
        "torchrun/run_single_node.sh",
        NPROC="2",
        per_device_train_batch_size="2",
        gradient_accumulation_steps="1",
    )  # fmt: skip
    assert (one["world_size"], two["world_size"]) == (1, 2)
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


@pytest.mark.slow
def test_what_is_wrong_on_all_processes_is_said_once(tiny_run: Path) -> None:
    settings = {"model_name_or_path": str(tiny_run / "model"), "train_file_dir": str(tiny_run / "nowhere")}
    output = {"output_dir": str(tiny_run / "refused"), "cache_dir": str(tiny_run / "cache"), "PYTHON": sys.executable}
    result = start(ROOT / "torchrun/run_single_node.sh", "--use_cpu", "true", NPROC="2", **settings, **output)
    assert result.returncode == 1
    assert result.stderr.count("orpo_train.py: ") == 1 and f"{tiny_run / 'nowhere'}" in result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("setup: ") == 1


@pytest.mark.slow
def test_accelerate_launch_starts_the_script_itself(tiny_run: Path) -> None:
    """Two processes without the wrappers train on one batch of both."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [ROOT / "orpo_train.py", "--model_name_or_path", tiny_run / "model", "--template_name", "qwen"]
    command += ["--train_file_dir", tiny_run / "train", "--cache_dir", tiny_run / "cache", "--do_eval", "false"]
    command += ["--output_dir", tiny_run / "direct", "--max_steps", "1", "--use_cpu", "true"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "WORLD_SIZE")}
    done = subprocess.run([*launch, "--multi_gpu", *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((tiny_run / "direct" / "run.json").read_text())
    assert (run["world_size"], run["pairs_per_step"]) == (2, 16)
