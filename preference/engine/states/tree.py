"""A packed row as a recurrence sees it: runs that start from the state in which another run ended.

A run (engine/packing.py) begins where its parent ends: the prefix of a pair behind what prompts have in common, an
answer behind its prompt. A recurrence needs nothing of the past but its state and a convolution of k taps nothing but
k - 1 tokens, so both are exact over a tree: runs of one level start from the final states of the level above, and
gradients flow back through those. The runs of a level that are about as long are the rows of one call.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # tokens that a recurrence takes at once; rows are not told apart by less


@dataclass(frozen=True)
class Group:
    """Runs of one level, the rows of one call.

    Attributes:
        rows, width: R runs of at most L tokens.
        at: where each token of the rows stands in the packed row, [R * L]; N where a run is over.
        parents: which of the final states of the level above each run starts from, [R]; None at the root.
        goes_on: how many of these runs others start from; they come first.
        cu_seqlens: where the runs begin and the last one ends, [R + 1], if they are not padded but one row; `at` then
            has a place for each of their tokens.
    """

    rows: int
    width: int
    at: Tensor
    parents: Tensor | None
    goes_on: int
    cu_seqlens: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """[N + 1, ...], the last one zeros, -> [R, L, ...]; of unpadded runs [1, tokens, ...]."""
        shape = (self.rows, self.width) if self.cu_seqlens is None else (1, -1)
        return x.index_select(0, self.at).unflatten(0, shape)


def _parents(chains: Sequence[tuple[int, int, tuple[int, ...]]], runs: int) -> list[int]:
    """For each run the one that it begins behind, -1 for none."""
    parents = [-1] * runs
    for first, last, before in chains:
        parents[first:last] = [before[-1] if before else -1, *range(first, last - 1)]
    return parents


def _alike(runs: list[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Runs in groups in which none is padded to more than twice its length, or to a chunk."""
    group: list[int] = []
    for run in sorted(runs, key=lambda run: -sizes[run]):
        if group and sizes[group[0]] > max(CHUNK, 2 * sizes[run]):
            yield group
            group = []
        group.append(run)
    if group:
        yield group


class Tree:
    """The runs of a packed row by levels.

    Args:
        sizes: tokens of each run, in the row's order; parents: the run that each begins behind, -1 for none.

    Attributes:
        length, longest: tokens of the row, and of its longest sequence.
    """

    def __init__(self, sizes: Sequence[int], parents: Sequence[int]) -> None:
        self.sizes, self.parents = sizes, parents
        self.length = sum(sizes)
        self.starts = [0, *accumulate(sizes)]
        self.begins: list[int] = []  # the position in its sequence at which each run begins
        for parent in parents:  # parents stand before their children
            self.begins.append(0 if parent < 0 else self.begins[parent] + sizes[parent])
        self.longest = max(begin + size for begin, size in zip(self.begins, self.sizes, strict=True))
        self._made: dict[Any, Any] = {}

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Tree:
        """The tree of a packed batch (engine/packing.py)."""
        return cls(batch["segments"], _parents(batch["branches"], len(batch["segments"])))

    def cut(self, most: int) -> Tree:
        """The same row in runs of at most `most` tokens."""
        return self.once(("cut", most), lambda: self._cut(most))

    def _cut(self, most: int) -> Tree:
        sizes: list[int] = []
        parents: list[int] = []
        last: list[int] = []  # the last piece of each run
        for size, parent in zip(self.sizes, self.parents, strict=True):
            pieces = -(-size // most)
            parents += [-1 if parent < 0 else last[parent], *range(len(sizes), len(sizes) + pieces - 1)]
            sizes += [size // pieces + (piece < size % pieces) for piece in range(pieces)]
            last.append(len(sizes) - 1)
        return Tree(sizes, parents)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call: all layers share it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def levels(self, device: torch.device, padded: bool = True) -> tuple[list[list[Group]], Tensor]:
        """The groups of each level from the root on, and where each of the N tokens stands in their rows, [N].

        Not padded, the runs of a level are one group, one row.
        """
        return self.once(("levels", device, padded), lambda: self._levels(device, padded))

    def _levels(self, device: torch.device, padded: bool) -> tuple[list[list[Group]], Tensor]:
        levels: list[list[Group]] = []
        places = torch.empty(self.length, dtype=torch.long)
        filled, states = 0, {-1: 0}  # tokens of all rows so far; of the level above, the place of each run's state
        runs = [run for run, parent in enumerate(self.parents) if parent < 0]
        while runs:
            level, ended, above = [], {}, set(runs)
            children = [run for run, parent in enumerate(self.parents) if parent in above]
            read = {self.parents[run] for run in children}
            for group in _alike(runs, self.sizes) if padded else [runs]:
                width = max(self.sizes[run] for run in group)
                group = [run for run in group if run in read] + [run for run in group if run not in read]
                begins = [0, *accumulate(width if padded else self.sizes[run] for run in group)]
                at = torch.full((begins[-1],), self.length)
                for begin, run in zip(begins, group, strict=False):
                    tokens = torch.arange(self.starts[run], self.starts[run + 1])
                    at[begin : begin + len(tokens)] = tokens
                    places[tokens] = filled + begin + torch.arange(len(tokens))
                filled += len(at)
                parents = torch.tensor([states[self.parents[run]] for run in group]).to(device) if levels else None
                more = sum(run in read for run in group)
                ended |= {run: len(ended) + row for row, run in enumerate(group[:more])}
                cu_seqlens = None if padded else torch.tensor(begins).to(device)
                level.append(Group(len(group), width, at.to(device), parents, more, cu_seqlens))
            levels.append(level)
            runs, states = children, ended
        return levels, places.to(device)

    def tails(self, taps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The row as a causal convolution of `taps` taps needs it: each run behind the tokens that come before it.

        Returns:
            Which token stands at each place, N for none; where each of the N tokens stands, [N].
        """
        return self.once(("tails", taps, device), lambda: self._tails(taps, device))

    def _tails(self, taps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        order: list[int] = []
        places: list[int] = []
        for run, size in enumerate(self.sizes):
            order += self._before(run, taps - 1)
            places += range(len(order), len(order) + size)
            order += range(self.starts[run], self.starts[run + 1])
        return torch.tensor(order, device=device), torch.tensor(places, device=device)

    def copies(self, taps: int, device: torch.device) -> Tensor:
        """The places of `tails` at which tokens stand that come before a run."""

        def make() -> Tensor:
            begins = [start + (taps - 1) * run for run, start in enumerate(self.starts[:-1])]
            return torch.tensor([begin + i for begin in begins for i in range(taps - 1)], device=device)

        return self.once(("copies", taps, device), make)

    def positions(self, device: torch.device) -> Tensor:
        """The position of each token in its sequence, [N]."""

        def make() -> Tensor:
            parts = [torch.arange(begin, begin + n) for begin, n in zip(self.begins, self.sizes, strict=True)]
            return torch.cat(parts).to(device)

        return self.once(("positions", device), make)

    def visible(self, device: torch.device) -> Tensor:
        """Which keys each token sees: earlier ones of its own run and of those that it follows; bool [N, N]."""
        return self.once(("visible", device), lambda: self._visible(device))

    def _visible(self, device: torch.device) -> Tensor:
        keep = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        for run, size in enumerate(self.sizes):
            hidden = torch.ones(self.length, dtype=torch.bool)
            above = run
            while above >= 0:
                hidden[self.starts[above] : self.starts[above + 1]] = False
                above = self.parents[above]
            keep[self.starts[run] : self.starts[run] + size, hidden] = False
        return keep.to(device)

    def _before(self, run: int, count: int) -> list[int]:
        """The last `count` tokens before a run; N for each that there is not."""
        parent = self.parents[run]
        tokens: list[int] = []
        while parent >= 0 and len(tokens) < count:
            begin = max(self.starts[parent], self.starts[parent + 1] - count + len(tokens))
            tokens = [*range(begin, self.starts[parent + 1]), *tokens]
            parent = self.parents[parent]
        return [self.length] * (count - len(tokens)) + tokens


def with_zeros(x_ND: Tensor) -> Tensor:
    """[N, ...] -> [N + 1, ...]: a row of zeros for places where there is no token."""
    return torch.cat([x_ND, x_ND.new_zeros(1, *x_ND.shape[1:])])


Run = Callable[[list[Tensor], Tensor | None, Group], tuple[Tensor, Tensor | None]]


def over_runs(tree: Tree, tokens: Sequence[Tensor], run: Run, padded: bool = True) -> Tensor:
    """A recurrence over all runs of a packed row.

    Args:
        tokens: what the recurrence reads, each [1, N, ...].
        run: from [R, L, ...] of each, zeros behind the end of a run, the states [R, ...] that the rows start from
            (None: zeros) and the group, to the output [R, L, ...] and the final states, which are wanted of those
            that others start from. Zeros must leave a state as it is.
        padded: as in `Tree.levels`; [1, tokens, ...] takes the place of [R, L, ...] if not.

    Returns:
        The output, [1, N, ...].
    """
    levels, places = tree.levels(tokens[0].device, padded)
    whole = [with_zeros(x[0]) for x in tokens]
    outputs: list[Tensor] = []
    states: Tensor | None = None
    for level in levels:
        ended = []
        for group in level:
            initial = None if group.parents is None else states.index_select(0, group.parents)
            out, final = run([group.take(x) for x in whole], initial, group)
            outputs.append(out.flatten(0, 1))
            if group.goes_on and final is not None:
                ended.append(final[: group.goes_on])
        states = torch.cat(ended) if ended else None
    return torch.cat(outputs).index_select(0, places)[None]


_tree: contextvars.ContextVar[Tree | None] = contextvars.ContextVar("packed_tree", default=None)


def current() -> Tree | None:
    """The tree of the packed forward that is running, None outside of one."""
    return _tree.get()


@contextlib.contextmanager
def over(tree: Tree | None) -> Iterator[None]:
    """While this is open, layers that carry a state run over `tree`."""
    token = _tree.set(tree)
    try:
        yield
    finally:
        _tree.reset(token)
