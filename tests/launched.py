"""Processes of a run that was started through a wrapper."""

from __future__ import annotations

from pathlib import Path


def _parents() -> dict[int, int]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    return found


def workers(launcher: int) -> list[int]:
    """The training processes under `launcher`, by rank."""
    parents = _parents()
    below, level = [], [launcher]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        below += level
    ranks = {}
    for pid in below:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"orpo_train.py") for word in words[:4]) and b"torchrun/launch.py" not in words:
            environment = dict(
                item.split(b"=", 1) for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in item
            )
            ranks.setdefault(int(environment[b"RANK"]), pid)  # loader workers come later, with the same words
    return [ranks[rank] for rank in sorted(ranks)]
