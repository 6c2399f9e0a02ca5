"""Two hosts, each a network namespace with an address and a disk of its own: one is cut off, and both resume later."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
from launched import launch, wait_for_log, wait_for_step
from test_signals import EXIT_STOPPED, folder  # noqa: F401  a fixture

from preference.integrity import fault
from preference.train.checkpoints import checkpoint_folders


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
    """The same output_dir on both, as machines have it, but each with a disk of its own mounted there."""
    disk, there = tmp_path / f"disk{rank}" / "out", tmp_path / "out"
    for path in (disk, there):
        path.mkdir(parents=True, exist_ok=True)
    mounted = ["unshare", "-m", "sh", "-c", f'mount --bind {disk} {there} && exec "$@"', "sh"]
    return launch(
        folder, disk, "--output_dir", str(there), "--save_steps", "2", "--lost_after", "12",
        script="torchrun/run_multi_node.sh", within=["ip", "netns", "exec", host, *mounted], NNODES="2", NPROC="1",
        NODE_RANK=str(rank), MASTER_ADDR="10.77.0.1", MASTER_PORT="29512", GLOO_SOCKET_IFNAME=wire,
    )  # fmt: skip


@pytest.mark.slow
def test_one_host_is_cut_off_and_both_go_on_later(folder, tmp_path, hosts):  # noqa: F811
    disks = [tmp_path / f"disk{rank}" / "out" for rank in (0, 1)]
    logs = [disk.with_suffix(".log") for disk in disks]
    jobs = [start(folder, tmp_path, *host, rank) for rank, host in enumerate(hosts)]
    wait_for_step(disks[0], jobs[0], 5)
    ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
    assert [job.wait(120) for job in jobs] == [1, 1]
    for rank, (disk, log) in enumerate(zip(disks, logs, strict=True)):  # each host keeps a copy that is whole
        assert f"node {1 - rank} has not been heard of by node {rank} for 12 s" in log.read_text()
        checkpoint = checkpoint_folders(disk)[0]
        assert (checkpoint / "model.safetensors").exists() and fault(checkpoint) is None
    ip("-n", hosts[1][0], "link", "set", hosts[1][1], "up")
    jobs = [start(folder, tmp_path, *host, rank) for rank, host in enumerate(hosts)]
    wait_for_log(disks[0], jobs[0], "resuming from", 1)
    step = int(logs[0].read_text().rpartition("resuming from ")[2].split("checkpoint-")[1].split()[0])
    wait_for_step(disks[0], jobs[0], step + 3)
    jobs[1].terminate()  # one host is told to stop: both do
    assert [job.wait(120) for job in jobs] == [EXIT_STOPPED, EXIT_STOPPED]
