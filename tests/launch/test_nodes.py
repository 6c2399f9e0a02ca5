"""Several nodes: they agree before they start, and one that is cut off is noticed."""

from __future__ import annotations

import queue
import socket
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed import HashStore

from preference.launch.heartbeat import Heartbeat, watch_others, watched

sys.path.append(str(Path(__file__).resolve().parents[2] / "torchrun"))
import meeting
from meeting import MeetingError, meet, settings

# ---- before torchrun


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers_of(*nodes: tuple[int, int, int], wait: float = 60) -> list[str]:
    """What nodes of (NODE_RANK, NNODES, NPROC) make of each other: "" or the error, in their order."""
    port, answers = free_port(), {}

    def one(i: int, rank: int, nnodes: int, nproc: int) -> None:
        here = Namespace(
            node_rank=str(rank), nnodes=str(nnodes), nproc_per_node=str(nproc), master_addr="127.0.0.1",
            master_port=str(port),
        )  # fmt: skip
        try:
            stores.append(meet(here, wait))
            answers[i] = ""
        except MeetingError as error:
            answers[i] = str(error)

    stores = []
    threads = [threading.Thread(target=one, args=(i, *node)) for i, node in enumerate(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [answers[i] for i in range(len(nodes))]


@pytest.fixture(autouse=True)
def a_short_grace(monkeypatch):
    monkeypatch.setattr(meeting, "GRACE", 0.3)


def test_nodes_that_agree_go_on():
    assert answers_of((0, 2, 4), (1, 2, 4)) == ["", ""]


@pytest.mark.parametrize("nodes", [[(0, 2, 1), (1, 3, 1)], [(0, 3, 1), (1, 2, 1)]])
def test_another_number_of_nodes_is_named_on_both(nodes):
    for answer in answers_of(*nodes):
        assert "NNODES=2" in answer and "NNODES=3" in answer and "node 1 has" in answer


def test_another_number_of_processes_is_named():
    for answer in answers_of((0, 2, 4), (1, 2, 8)):
        assert "node 0 has NPROC=4" in answer and "node 1 has NPROC=8" in answer


def test_two_nodes_of_one_number():
    answers = answers_of((0, 3, 1), (1, 3, 1), (1, 3, 1), wait=2)
    assert sum("another node has NODE_RANK=1 as well" in answer for answer in answers) == 1


def test_a_node_that_does_not_come():
    [answer] = answers_of((0, 2, 1), wait=1)
    assert "not all nodes came to 127.0.0.1:" in answer


def test_only_numbered_nodes_meet():
    assert settings(["--standalone", "--nproc_per_node", "2", "orpo_train.py", "--max_steps", "3"]) is None
    assert settings(["--nnodes", "1:2", "--rdzv_backend", "c10d", "orpo_train.py"]) is None
    words = "--nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr a --master_port 29500 orpo_train.py --seed 1"
    expected = {"nnodes": "2", "node_rank": "1", "nproc_per_node": "4", "master_addr": "a", "master_port": "29500"}
    assert vars(settings(words.split())) == expected


# ---- while training


class Network:
    """A store that two nodes reach until they are cut off; then a call never comes back."""

    def __init__(self) -> None:
        self.store, self.cut = HashStore(), threading.Event()
        self.never = threading.Event()

    def add(self, key: str, amount: int) -> int:
        if self.cut.is_set():
            self.never.wait()
        return self.store.add(key, amount)


def pair(timeout: float) -> tuple[list[Heartbeat], list[Network], list[queue.Queue]]:
    networks, told = [Network(), Network()], [queue.Queue(), queue.Queue()]
    networks[1].store = networks[0].store
    hearts = [
        Heartbeat(f"node {i}", [f"node {1 - i}"], "node 0", lambda i=i: networks[i], timeout, told[i].put).start()
        for i in (0, 1)
    ]
    return hearts, networks, told


def test_a_node_that_is_cut_off_is_noticed_on_both_sides():
    hearts, networks, told = pair(timeout=0.6)
    while hearts[0].counts["node 1"][0] < 2:
        assert all(sentences.empty() for sentences in told)
    networks[1].cut.set()
    assert told[0].get(timeout=60) == "node 1 has not been heard of by node 0 for 0.6 s"
    assert told[1].get(timeout=60) == "node 0 has not been heard of by node 1 for 0.6 s"
    networks[1].never.set()


def test_a_node_that_fails_says_so():
    hearts, _, told = pair(timeout=0.6)
    hearts[1].stop(failed=True)
    assert told[0].get(timeout=60) == "node 1 has failed, and its output says why"
    hearts[0].stop()


def test_nodes_need_not_come_at_the_same_time():
    """The first heartbeat may take five timeouts."""
    told, store = queue.Queue(), HashStore()
    first = Heartbeat("node 0", ["node 1"], "node 0", lambda: store, 0.4, told.put).start()
    with pytest.raises(queue.Empty):
        told.get(timeout=0.8)
    second = Heartbeat("node 1", ["node 0"], "node 0", lambda: store, 0.4, told.put).start()
    while first.counts["node 1"][0] < 2:
        assert told.empty()
    second.stop()
    first.stop()
    assert told.empty()
    Heartbeat("node 0", ["node 1"], "node 0", HashStore, 0.2, told.put).start()
    assert told.get(timeout=60) == "node 1 has not been heard of by node 0 for 0.2 s"


def test_a_node_that_is_done_is_not_missed():
    hearts, _, told = pair(timeout=0.6)
    hearts[1].stop()
    assert not hearts[1].beating.is_alive()
    with pytest.raises(queue.Empty):
        told[0].get(timeout=1.5)
    hearts[0].stop()


def test_who_watches_whom():
    """First processes of nodes each other and the others of their node; those their first."""
    assert (
        watch_others({}, 60) == [] and watch_others({"LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, 0) == []
    )

    def names(rank: int, local: int, node: int, nodes: int = 2):
        values = {"RANK": rank, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 3, "GROUP_RANK": node}
        return watched({name: str(value) for name, value in (values | {"GROUP_WORLD_SIZE": nodes}).items()})

    assert names(3, 0, 1) == [("node 1", ["node 0"], "node 0"), ("rank 3", ["rank 4", "rank 5"], "rank 0")]
    assert names(4, 1, 1) == [("rank 4", ["rank 3"], "rank 0")]
    assert names(0, 0, 0, nodes=1) == [("rank 0", ["rank 1", "rank 2"], "rank 0")]
    assert watched({"GROUP_WORLD_SIZE": "1"}) == []
