"""Ends a run on several machines when one of them is cut off from the others.

A process that dies closes its connections, and the others learn of it at once. A machine that loses its network or its
power does not: the others wait in a collective until that times out, half an hour by default. So one process of each
machine counts up a number in the store that torchrun keeps on machine 0, and watches the numbers of the others.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

BEATS = 6  # as many of them fit into the silence after which a machine counts as lost
LEFT = 1 << 40  # added to the count of a machine that is done


class Heartbeat:
    """Watches the other machines of a run, from `start` to `stop`, which tells them that this one is done.

    Args:
        machine, machines: this machine's number, and how many there are.
        store: connects to the store that all machines reach; machine 0 keeps it.
        silence: seconds after which a machine that has not been heard of is lost.
        lost: called with a sentence about it, on a thread.
    """

    def __init__(
        self, machine: int, machines: int, store: Callable[[], Any], silence: float, lost: Callable[[str], None]
    ) -> None:
        self.machine, self.machines, self.store, self.silence, self.lost = machine, machines, store, silence, lost
        self.stopped, self.beating = threading.Event(), threading.Thread(target=self._beat, daemon=True)
        self.reached = time.monotonic()  # when the store last answered
        self.counts = dict.fromkeys((i for i in range(machines) if i != machine), (0, self.reached))

    def start(self) -> Heartbeat:
        self.beating.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopped.set()
        self.beating.join(self.silence)

    def _beat(self) -> None:
        """A call may never come back where the network is gone: `_watch` looks at the clock, not at this thread."""
        try:
            store = self.store()
            while not self.stopped.wait(self.silence / BEATS):
                store.add(str(self.machine), 1)
                for other, (count, _) in self.counts.items():
                    if (now := store.add(str(other), 0)) != count:
                        self.counts[other] = now, time.monotonic()
                self.reached = time.monotonic()
            store.add(str(self.machine), LEFT)
        except RuntimeError as error:
            if "time" not in str(error).lower():  # not a time-out, but closed: machine 0 is done, or its process died
                self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(self.silence / BEATS):
            now = time.monotonic()
            silent = [i for i, (count, heard) in self.counts.items() if count < LEFT and now - heard > self.silence]
            if now - self.reached > self.silence:
                silent = [0]
            if silent and not self.stopped.is_set():
                names = ", ".join(map(str, silent))
                self.lost(f"machine {names} has not been heard of by machine {self.machine} for {self.silence:g} s")
                return


def watch_machines(environ: Mapping[str, str], silence: float) -> Heartbeat | None:
    """A heartbeat on the first process of each machine of a torchrun launch; it ends the process when one is lost.

    Args:
        environ: torchrun's variables.
        silence: see `Heartbeat`; 0 for none.
    """
    machines, machine = int(environ.get("GROUP_WORLD_SIZE", "1")), int(environ.get("GROUP_RANK", "0"))
    if machines == 1 or not silence or environ["LOCAL_RANK"] != "0":
        return None

    def store() -> Any:
        from torch.distributed import PrefixStore, TCPStore

        timeout = timedelta(seconds=silence)
        address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"heartbeat/{attempt}", TCPStore(*address, is_master=False, timeout=timeout))

    def lost(sentence: str) -> None:
        text = f"{sentence}: this run ends; the last checkpoint stands (--lost_after sets the time)\n"
        os.write(2, text.encode())
        os._exit(1)  # the main thread waits in a collective

    heart = Heartbeat(machine, machines, store, silence, lost).start()
    atexit.register(heart.stop)
    return heart
