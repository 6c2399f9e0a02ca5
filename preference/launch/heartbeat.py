"""Ends a run of several processes when one of them fails, stands still or is cut off.

A process that dies closes its connections, and the others learn of it, if they have one to it. A node that loses its
network or its power does not, nor does a process that is stopped, nor one that fails while the others still wait for
it to come: they would wait until a time-out, half an hour by default. So each process counts up a number in a store
that all reach. The first process of each node watches those of the other nodes and the other processes of its own;
these watch the first.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

BEATS = 6  # as many of them fit into the timeout after which a process counts as lost
PATIENCE = 5  # that many timeouts for the first heartbeat: processes load their libraries at different speeds
LEFT, FAILED = 1 << 40, 1 << 41  # added to the count of one that is done, or that ends with an error
PARENT_SECONDS = 1.0


class Heartbeat:
    """Watches others of a run, from `start` to `stop`, which tells them that this one ends.

    Args:
        me, others: names in the store and in messages: "node 1", "rank 3".
        keeper: who keeps the store.
        store: connects to the store that all reach.
        timeout: seconds after which one that has not been heard of is lost.
        lost: called with a sentence about it, on a thread.
    """

    def __init__(
        self,
        me: str,
        others: Sequence[str],
        keeper: str,
        store: Callable[[], Any],
        timeout: float,
        lost: Callable[[str], None],
    ) -> None:
        self.me, self.keeper, self.store, self.timeout, self.lost = me, keeper, store, timeout, lost
        self.stopped, self.beating = threading.Event(), threading.Thread(target=self._beat, daemon=True)
        self.last_word = LEFT
        self.rounds, self.reached = 0, time.monotonic()  # of talking to the store, and when it last answered
        self.awake = self.reached  # since then: this process itself may have been stopped, with its node or alone
        self.counts = dict.fromkeys(others, (0, self.reached))

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
                store.add(self.me, 1)
                for other, (count, _) in self.counts.items():
                    if (now := store.add(other, 0)) != count:
                        self.counts[other] = now, time.monotonic()
                self.rounds, self.reached = self.rounds + 1, time.monotonic()
            store.add(self.me, self.last_word)
        except RuntimeError:  # no store, or it is closed: its keeper has ended, or is gone
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
            counts = self.counts.items()
            failed = [name for name, (count, _) in counts if count >= FAILED]
            silent = [name for name, (count, since) in counts if count < LEFT and self._silent(since, count > 0)]
            if self._silent(self.reached, self.rounds > 0):
                silent = [self.keeper]
            if failed or silent:
                ended = f"has not been heard of by {self.me} for {self.timeout:g} s"
                names = ", ".join(failed or silent)
                self.lost(f"{names} " + ("has failed, and its output says why" if failed else ended))
                return


_running: list[Heartbeat] = []


def watched(environ: Mapping[str, str]) -> list[tuple[str, list[str], str]]:
    """(me, others, keeper of the store) for each heartbeat of this process of a torchrun launch."""
    rank, local = int(environ.get("RANK", "0")), int(environ.get("LOCAL_RANK", "0"))
    here = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes, node = int(environ.get("GROUP_WORLD_SIZE", "1")), int(environ.get("GROUP_RANK", "0"))
    first = rank - local  # ranks of a node follow each other
    found = []
    if nodes > 1 and local == 0:
        found.append((f"node {node}", [f"node {other}" for other in range(nodes) if other != node], "node 0"))
    if here > 1:
        others = range(first + 1, first + here) if local == 0 else [first]
        found.append((f"rank {rank}", [f"rank {other}" for other in others], "rank 0"))
    return found


def watch_others(environ: Mapping[str, str], timeout: float) -> list[Heartbeat]:
    """Heartbeats between the processes of a torchrun launch; they end the process when one is lost.

    Args:
        environ: torchrun's variables.
        timeout: see `Heartbeat`; 0 for none.
    """
    pairs = watched(environ) if timeout else []
    if not pairs:
        return []
    from torch.distributed import PrefixStore, TCPStore  # not on a thread: the main one goes on importing

    def store() -> Any:
        address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        longest = timedelta(seconds=PATIENCE * timeout)
        # A restart finds the counts of the dead ones in a store that outlived them
        prefix = f"heartbeat {environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return PrefixStore(prefix, TCPStore(*address, is_master=False, timeout=longest))

    def lost(sentence: str) -> None:
        text = f"{sentence}: this run ends; the last checkpoint stands (--lost_after sets the time)\n"
        try:
            os.write(2, text.encode())
        finally:
            os._exit(1)  # the main thread waits in a collective

    hearts = [Heartbeat(me, others, keeper, store, timeout, lost).start() for me, others, keeper in pairs]
    _running.extend(hearts)
    for heart in hearts:
        atexit.register(heart.stop)
    return hearts


def tell_of_failure() -> None:
    """Before this process ends with an error: the other nodes need not wait for it. Its own node's torchrun sees it."""
    for heart in _running:
        heart.stop(failed=heart.me.startswith("node"))


def follow_launcher(environ: Mapping[str, str]) -> None:
    """End with torchrun, also where that was killed and could tell nobody: as on SIGTERM, with a checkpoint."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
