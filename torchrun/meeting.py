"""Before torchrun starts anything: do the nodes of a run agree on how many they are?

Nodes that differ in NNODES, or that both have the same NODE_RANK, would wait for each other until a time-out.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import timedelta
from typing import Any

WAIT = 600  # seconds for all nodes to come
GRACE = 2  # seconds for the others to read what is wrong: the store goes with node 0
SETTINGS = {"nnodes": "NNODES", "nproc_per_node": "NPROC"}


class MeetingError(RuntimeError):
    """Nodes that do not agree, or do not come."""


def settings(words: list[str]) -> argparse.Namespace | None:
    """What torchrun's `words` say about the nodes; None where there is one, or where they number themselves."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port"):
        parser.add_argument(f"--{name}")
    known, _ = parser.parse_known_args(words)
    return known if known.node_rank is not None and known.master_addr else None


def meet(here: argparse.Namespace, wait: float = WAIT) -> Any:
    """Compare the settings of all nodes. The store that this takes is the one that torchrun runs on.

    Raises:
        MeetingError: with the node that differs, on every node.
    """
    from torch.distributed import TCPStore

    rank, count, where = int(here.node_rank), int(here.nnodes), f"{here.master_addr}:{here.master_port}"
    print(f"torchrun: this is node {rank}; waiting for all {count} at {where}", flush=True)
    try:
        store = TCPStore(
            here.master_addr, int(here.master_port), is_master=rank == 0, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=wait),
        )  # fmt: skip
        _compare(store, here, rank, count)
    except RuntimeError as error:  # what torch raises where a network or a node is missing
        if isinstance(error, MeetingError):
            time.sleep(GRACE if rank == 0 else 0)
            raise
        reason = str(error).splitlines()[0]
        raise MeetingError(f"not all nodes came to {where} within {wait:g} s ({reason})") from None
    return store


def _compare(store: Any, here: argparse.Namespace, rank: int, count: int) -> None:
    ours = {name: getattr(here, key) for key, name in SETTINGS.items()}
    if store.add(f"nodes/{rank}/times", 1) > 1:
        raise MeetingError(f"another node has NODE_RANK={rank} as well: each has its own, from 0 to {count - 1}")
    store.set(f"nodes/{rank}", json.dumps(ours))
    for other in range(count):
        theirs = json.loads(store.get(f"nodes/{other}"))
        for name, value in ours.items():
            if theirs[name] != value:
                raise MeetingError(
                    f"node {other} has {name}={theirs[name]}, node {rank} has {name}={value}: give all nodes the same"
                )
