"""Two hosts, each a network namespace with an address and a disk of its own: one dies, and both go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from launched import workers
from test_signals import EXIT_STOPPED, folder, wait_for_step  # noqa: F401  the fixture among them

from preference.checkpoints import checkpoint_folders, fault

ROOT = Path(__file__).resolve().parents[1]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2, with a wire between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    name = uuid.uuid4().hex[:6]
    names = [f"orpo-{name}-{i}" for i in (1, 2)]
    try:
        for i, host in enumerate(names, 1):
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
            if i == 2:
                ip("link", "add", f"o{name}1", "netns", names[0], "type", "veth",
                   "peer", "name", f"o{name}2", "netns", names[1])  # fmt: skip
        for i, host in enumerate(names, 1):
            ip("-n", host, "addr", "add", f"10.77.0.{i}/24", "dev", f"o{name}{i}")
            ip("-n", host, "link", "set", f"o{name}{i}", "up")
    except subprocess.CalledProcessError as error:
        for host in names:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield [(host, f"o{name}{i}") for i, host in enumerate(names, 1)]
    for host in names:
        ip("netns", "del", host)


def start(folder: Path, tmp_path: Path, host: str, wire: str, rank: int) -> subprocess.Popen:  # noqa: F811
    output = tmp_path / f"disk{rank}" / "out"
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "PYTHON": sys.executable, "model_name_or_path": str(folder / "model"), "cache_dir": str(folder / "cache"),
        "train_file_dir": str(folder / "rows.jsonl"), "use_peft": "false", "bf16": "false", "do_eval": "false",
        "per_device_train_batch_size": "2", "gradient_accumulation_steps": "2", "OMP_NUM_THREADS": "1",
        "NNODES": "2", "NODE_RANK": str(rank), "NPROC": "1", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29512",
        "GLOO_SOCKET_IFNAME": wire,
    }  # fmt: skip
    # The same path on both, as machines have it, but each with a disk of its own mounted there.
    there = tmp_path / "out"
    there.mkdir(exist_ok=True)
    script = f"mount --bind {output} {there} && exec sh {ROOT}/torchrun/run_multi_node.sh --output_dir {there} "
    script += "--max_steps 400 --logging_steps 1 --use_cpu true --optim sgd --save_steps 2"
    command = ["ip", "netns", "exec", host, "unshare", "-m", "sh", "-c", script]
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)


@pytest.mark.slow
def test_one_host_dies_and_both_go_on(folder, tmp_path, hosts):  # noqa: F811
    outputs = [tmp_path / f"disk{rank}" / "out" for rank in (0, 1)]
    jobs = [start(folder, tmp_path, *host, rank) for rank, host in enumerate(hosts)]
    wait_for_step(outputs[0], jobs[0], 5)
    for pid in (*workers(jobs[1].pid), jobs[1].pid):
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert jobs[0].wait(90) not in (0, EXIT_STOPPED) and time.monotonic() - began < 60
    jobs[1].wait(10)
    for output in outputs:  # each host keeps its own copy
        assert checkpoint_folders(output) and fault(checkpoint_folders(output)[-1]) is None
    step = int(checkpoint_folders(outputs[0])[0].name.partition("-")[2])
    jobs = [start(folder, tmp_path, *host, rank) for rank, host in enumerate(hosts)]
    wait_for_step(outputs[0], jobs[0], step + 3)
    assert "resuming from" in outputs[0].with_suffix(".log").read_text()
    jobs[1].terminate()  # one host is told to stop: both do
    assert [job.wait(90) for job in jobs] == [EXIT_STOPPED, EXIT_STOPPED]
