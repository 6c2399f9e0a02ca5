"""Ends a run on several nodes when one of them fails or is cut off.

A process that dies closes its connections, and the others learn of it, if they have one to it. A node that loses its
network or its power does not, nor does one whose process fails while the others still wait for it to come: they would
wait until a time-out, half an hour by default. So one process of each node counts up a number in a store that all
reach, and watches the numbers of the others.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

BEATS = 6  # as many of them fit into the timeout after which a node counts as lost
PATIENCE = 5  # that many timeouts for the first heartbeat: nodes load their libraries at different speeds
LEFT, FAILED = 1 << 40, 1 << 41  # added to the count of a node that is done, or that ends with an error


class Heartbeat:
    """Watches the other nodes of a run, from `start` to `stop`, which tells them that this one ends.

    Args:
        node, nodes: this node's number, and how many there are.
        store: connects to the store that all nodes reach; node 0 keeps it.
        timeout: seconds after which a node that has not been heard of is lost.
        lost: called with a sentence about it, on a thread.
    """

    def __init__(
        self, node: int, nodes: int, store: Callable[[], Any], timeout: float, lost: Callable[[str], None]
    ) -> None:
        self.node, self.nodes, self.store, self.timeout, self.lost = node, nodes, store, timeout, lost
        self.stopped, self.beating = threading.Event(), threading.Thread(target=self._beat, daemon=True)
        self.last_word = LEFT
        self.rounds, self.reached = 0, time.monotonic()  # of talking to the store, and when it last answered
        self.awake = self.reached  # since then: this process itself may have been stopped, with its node or alone
        self.counts = dict.fromkeys((i for i in range(nodes) if i != node), (0, self.reached))

    def start(self) -> Heartbeat:
        self.beating.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def stop(self, failed: bool = False) -> None:
        if not self.stopped.is_set():
            self.last_word = FAILED if failed else LEFT
            self.stopped.set()
            self.beating.join(min(self.timeout, 5))

    def _beat(self) -> None:
        """A call may never come back where the network is gone: `_watch` looks at the clock, not at this thread."""
        try:
            store = self.store()
            while not self.stopped.wait(self.timeout / BEATS if self.rounds else 0):
                store.add(str(self.node), 1)
                for other, (count, _) in self.counts.items():
                    if (now := store.add(str(other), 0)) != count:
                        self.counts[other] = now, time.monotonic()
                self.rounds, self.reached = self.rounds + 1, time.monotonic()
            store.add(str(self.node), self.last_word)
        except RuntimeError:  # no store, or it is closed: node 0 has ended, or is gone
            return

    def _silent(self, since: float, heard: bool) -> bool:
        return time.monotonic() - max(since, self.awake) > self.timeout * (1 if heard else PATIENCE)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self.stopped.wait(self.timeout / BEATS):
            now = time.monotonic()
            if now - looked > self.timeout / 2:
                self.awake = now
            looked = now
            failed = [i for i, (count, _) in self.counts.items() if count >= FAILED]
            silent = [i for i, (count, since) in self.counts.items() if count < LEFT and self._silent(since, count > 0)]
            if self._silent(self.reached, self.rounds > 0):
                silent = [0]
            if failed or silent:
                names = ", ".join(map(str, failed or silent))
                ended = f"has not been heard of by node {self.node} for {self.timeout:g} s"
                self.lost(f"node {names} " + ("has failed, and its output says why" if failed else ended))
                return


_running: list[Heartbeat] = []


def watch_nodes(environ: Mapping[str, str], timeout: float) -> Heartbeat | None:
    """A heartbeat on the first process of each node of a torchrun launch; it ends the process when one is lost.

    Args:
        environ: torchrun's variables.
        timeout: see `Heartbeat`; 0 for none.
    """
    nodes, node = int(environ.get("GROUP_WORLD_SIZE", "1")), int(environ.get("GROUP_RANK", "0"))
    if nodes == 1 or not timeout or environ["LOCAL_RANK"] != "0":
        return None
    from torch.distributed import PrefixStore, TCPStore  # not on a thread: the main one goes on importing

    def store() -> Any:
        address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        longest = timedelta(seconds=PATIENCE * timeout)
        return PrefixStore("heartbeat", TCPStore(*address, is_master=False, timeout=longest))

    def lost(sentence: str) -> None:
        text = f"{sentence}: this run ends; the last checkpoint stands (--lost_after sets the time)\n"
        os.write(2, text.encode())
        os._exit(1)  # the main thread waits in a collective

    heart = Heartbeat(node, nodes, store, timeout, lost).start()
    _running.append(heart)
    atexit.register(heart.stop)
    return heart


def tell_of_failure() -> None:
    """Before this process ends with an error: the other nodes need not wait for it."""
    for heart in _running:
        heart.stop(failed=True)
