"""Before torchrun starts anything: do the machines of a run agree on how many they are?

Machines that differ in NNODES, or that both have the same NODE_RANK, would wait for each other until a time-out.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import timedelta
from typing import Any

WAIT = 600  # seconds for all machines to come
GRACE = 2  # seconds for the others to read what is wrong: the store goes with machine 0
SETTINGS = {"nnodes": "NNODES", "nproc_per_node": "NPROC"}


class MeetingError(RuntimeError):
    """Machines that do not agree, or do not come."""


def settings(words: list[str]) -> argparse.Namespace | None:
    """What torchrun's `words` say about the machines; None where there is one, or where they number themselves."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port"):
        parser.add_argument(f"--{name}")
    known, _ = parser.parse_known_args(words)
    return known if known.node_rank is not None and known.master_addr else None


def meet(here: argparse.Namespace, wait: float = WAIT) -> Any:
    """Compare the settings of all machines. The store that this takes is the one that torchrun goes on with.

    Raises:
        MeetingError: with the machine that differs, on every machine.
    """
    from torch.distributed import TCPStore

    rank, count, where = int(here.node_rank), int(here.nnodes), f"{here.master_addr}:{here.master_port}"
    print(f"torchrun: this is machine {rank}; waiting for all {count} at {where}", flush=True)
    try:
        store = TCPStore(
            here.master_addr, int(here.master_port), is_master=rank == 0, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=wait),
        )  # fmt: skip
        _compare(store, here, rank, count)
    except RuntimeError as error:  # what torch raises where a network or a machine is missing
        if isinstance(error, MeetingError):
            time.sleep(GRACE if rank == 0 else 0)
            raise
        reason = str(error).splitlines()[0]
        raise MeetingError(f"not all machines came to {where} within {wait:g} s ({reason})") from None
    return store


def _compare(store: Any, here: argparse.Namespace, rank: int, count: int) -> None:
    ours = {name: getattr(here, key) for key, name in SETTINGS.items()}
    if store.add(f"machines/{rank}/times", 1) > 1:
        raise MeetingError(f"another machine has NODE_RANK={rank} as well: each has its own, from 0 to {count - 1}")
    store.set(f"machines/{rank}", json.dumps(ours))
    for other in range(count):
        theirs = json.loads(store.get(f"machines/{other}"))
        for name, value in ours.items():
            if theirs[name] != value:
                raise MeetingError(
                    f"machine {other} has {name}={theirs[name]}, machine {rank} has {name}={value}: "
                    "give all machines the same"
                )
