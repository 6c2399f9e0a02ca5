"""Pairs -> one packed row in which every prompt stands once, and what prompts have in common stands once.

A pair with prompt P (p tokens), chosen answer C and rejected answer R is laid out as

    P[0..p-2] | P[p-1] C[0..c-2] | P[p-1] R[0..r-2]
    prefix      chosen branch      rejected branch

so that every position of a branch predicts exactly one token. Both branches start at position id p-1 and see the
prefix and themselves, never each other. Prompts of a row that begin alike (a system prompt, several pairs of one
prompt) share those tokens in the same way: a row is a tree, its root what all prompts have in common, its leaves the
answers.

The tree lies in the row depth first, as *segments* of tokens. A *branch* is a segment with its first child, that one's
first child and so on: neighbours in the row and an ordinary causal sequence. It sees the segments between the root and
its first segment, and nothing else (engine/attention.py).

Models that cannot share a prefix get two full sequences per pair as right-padded rows of a batch instead: nothing
about their forward is changed, and causality keeps the padding out of every result.

A packed batch is a dict of tensors and plain ints, so that DataLoader workers, pinned memory and `.to(device)` need
no help.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from preference.errors import PreferenceError

Pair = Mapping[str, Any]

MIN_SHARED = 8  # tokens that prompts must have in common for a segment of their own to pay


class PackingError(PreferenceError, ValueError):
    """A pair that has no log-probabilities: an empty prompt or answer."""


def pair_lengths(pair: Pair) -> tuple[int, int, int]:
    """(prompt, chosen, rejected) tokens of a pair.

    Raises:
        PackingError: one of them is 0; names the pair by its `source` where it has one.
    """
    lengths = len(pair["prompt_ids"]), len(pair["chosen_ids"]), len(pair["rejected_ids"])
    if min(lengths) == 0:
        part = ("prompt", "chosen answer", "rejected answer")[lengths.index(0)]
        raise PackingError(f"{pair.get('source') or 'a pair'}: the {part} has no tokens")
    return lengths


def packed_length(pair: Pair, *, share_prompt: bool = True) -> int:
    """Tokens that a pair costs in a micro-batch at most (in rows without sharing: before padding)."""
    p, c, r = pair_lengths(pair)
    return p - 1 + c + r if share_prompt else 2 * (p - 1) + c + r


def _ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """arange(start, start + length) of each pair (start, length), one behind the other."""
    offsets: np.ndarray = np.repeat(starts - (lengths.cumsum() - lengths), lengths)
    return offsets + np.arange(lengths.sum())


@dataclass
class _Row:
    """A packed row as it grows.

    Attributes:
        ids: tokens of each segment.
        position_offsets: position of each segment's first token.
        branches: [first segment, segment behind the last, segments that it sees besides], as in `pack_pairs`.
        prompts: for each pair the segments of its prefix.
        answers: for each pair its two branches.
    """

    ids: list[np.ndarray] = field(default_factory=list)
    position_offsets: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    prompts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    answers: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, ids: Sequence[int], position: int, path: tuple[int, ...], goes_on: bool) -> int:
        """The number of a new segment below the segments of `path`; it continues the last branch or begins one."""
        segment = len(self.ids)
        self.ids.append(np.asarray(ids, dtype=np.int64))
        self.position_offsets.append(position)
        first, _, before = self.branches.pop() if goes_on else (segment, segment, path)
        self.branches.append((first, segment + 1, before))
        return segment

    def add_pair(self, number: int, pair: Pair, depth: int, path: tuple[int, ...], goes_on: bool) -> None:
        """A pair whose first `depth` tokens are the segments of `path`."""
        *prefix, last = pair["prompt_ids"]
        if prefix[depth:]:
            path, goes_on = (*path, self.add(prefix[depth:], depth, path, goes_on)), True
        branches = ([last, *pair[name][:-1]] for name in ("chosen_ids", "rejected_ids"))
        chosen = self.add(next(branches), len(prefix), path, goes_on)
        self.prompts[number], self.answers[number] = path, (chosen, self.add(next(branches), len(prefix), path, False))

    def add_pairs(
        self, prefixes: list[tuple[list[int], int]], pairs: Sequence[Pair], depth: int, path: tuple, goes_on: bool
    ) -> None:
        """Pairs, each given by its prefix and number, sorted by prefix; `depth` tokens are in the row already."""
        if len(prefixes) == 1:
            number = prefixes[0][1]
            self.add_pair(number, pairs[number], depth, path, goes_on)
            return
        first, last = prefixes[0][0], prefixes[-1][0]
        common = common_length(first, last)
        if common - depth >= MIN_SHARED:
            path, depth, goes_on = (*path, self.add(first[depth:common], depth, path, goes_on)), common, True
        for ids, group in itertools.groupby(prefixes, key=lambda p: p[0][common : common + 1]):
            for part in [list(group)] if ids else [[one] for one in group]:
                self.add_pairs(part, pairs, depth, path, goes_on)
                goes_on = False


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def learned_at(pair: Pair, side: str) -> np.ndarray | None:
    """Which tokens of the answer `side` are learned, bool; None where all are (`{side}_runs`, engine/batching.py)."""
    runs = pair.get(f"{side}_runs")
    if not runs:
        return None
    found: np.ndarray = np.repeat(np.arange(len(runs)) % 2 == 0, runs)
    if len(found) != len(pair[f"{side}_ids"]) or not found.any():
        raise PackingError(f"{pair.get('source') or 'a pair'}: {side}_runs {runs} do not fit the answer")
    return found


def _targets(pairs: Sequence[Pair], at: list[np.ndarray], lengths_B3: np.ndarray, prompt_logps: bool) -> dict[str, Any]:
    """What to score; `at` says where the prompt, chosen and rejected tokens of each pair in turn are predicted."""
    parts = [part for pair in pairs for part in (pair["prompt_ids"][1:], pair["chosen_ids"], pair["rejected_ids"])]
    for number, pair in enumerate(pairs):
        for place, side in enumerate(("chosen", "rejected"), 1):
            if (learned := learned_at(pair, side)) is not None:
                i = 3 * number + place
                parts[i], at[i] = np.asarray(parts[i])[learned], at[i][learned]
                lengths_B3[number, place] = len(parts[i])
    if not prompt_logps:
        parts, at = ([part for i, part in enumerate(x) if i % 3] for x in (parts, at))
    ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    # A shared token is one target, however many pairs count it.
    asked, score_at = np.unique(np.stack([np.concatenate(at), ids]), axis=1, return_inverse=True)
    scored_B3 = lengths_B3 - np.array([1, 0, 0]) if prompt_logps else lengths_B3 * np.array([0, 1, 1])
    return {
        "target_at": torch.from_numpy(asked[0].copy()),
        "target_ids": torch.from_numpy(asked[1].copy()),
        "score_at": torch.from_numpy(score_at.reshape(-1)),
        "scored": torch.from_numpy(scored_B3),
    }


def _pack_shared(pairs: Sequence[Pair]) -> tuple[dict[str, Any], list[np.ndarray]]:
    row = _Row()
    prefixes = sorted((list(pair["prompt_ids"][:-1]), number) for number, pair in enumerate(pairs))
    row.add_pairs(prefixes, pairs, 0, (), False)
    sizes = np.array([len(ids) for ids in row.ids])
    starts = sizes.cumsum() - sizes
    segments = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    none: np.ndarray = np.zeros(0, dtype=np.int64)
    at = [
        part
        for number in range(len(pairs))
        for part in (
            np.concatenate([none, *(segments[i] for i in row.prompts[number])]),
            *(segments[i] for i in row.answers[number]),
        )
    ]
    # For varlen kernels: a branch's queries stand in the row, its keys are gathered.
    keys = [[*before, *range(first, last)] for first, last, before in row.branches]
    query_sizes = [int(sizes[first:last].sum()) for first, last, _ in row.branches]
    key_sizes = [int(sizes[seen].sum()) for seen in keys]
    cumulative = [np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (query_sizes, key_sizes)]
    key_at = np.concatenate([segments[i] for seen in keys for i in seen])
    uses = np.bincount(key_at, minlength=int(sizes.sum()))
    return {
        "input_ids": torch.from_numpy(np.concatenate(row.ids))[None],
        "position_ids": torch.from_numpy(_ragged_arange(np.array(row.position_offsets), sizes))[None],
        "segments": sizes.tolist(),
        "position_offsets": row.position_offsets,
        "branches": row.branches,
        "key_at": torch.from_numpy(key_at),
        "key_order": torch.from_numpy(np.argsort(key_at, kind="stable")),
        "key_starts": torch.from_numpy(np.concatenate([[0], uses.cumsum()])),
        "cu_seqlens_q": torch.from_numpy(cumulative[0]),
        "cu_seqlens_k": torch.from_numpy(cumulative[1]),
        "longest": (max(query_sizes), max(key_sizes)),
    }, at


def _pack_rows(pairs: Sequence[Pair]) -> tuple[dict[str, Any], list[np.ndarray]]:
    rows = [
        np.concatenate([pair["prompt_ids"], answer[:-1]]).astype(np.int64)
        for pair in pairs
        for answer in (pair["chosen_ids"], pair["rejected_ids"])
    ]
    width = max(map(len, rows))
    # Padding repeats the last token: any id will do, and transformers warns of pad tokens.
    ids = np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])
    at = []
    for number, pair in enumerate(pairs):
        prefix = len(pair["prompt_ids"]) - 1
        chosen, rejected = (
            np.arange(len(row)) + (2 * number + i) * width for i, row in enumerate(rows[2 * number :][:2])
        )
        at += [chosen[:prefix], chosen[prefix:], rejected[prefix:]]
    return {"input_ids": torch.from_numpy(ids)}, at


def pack_pairs(pairs: Sequence[Pair], *, share_prompt: bool = True, prompt_logps: bool = True) -> dict[str, Any]:
    """One micro-batch from B pairs.

    Args:
        pairs: mappings with prompt_ids, chosen_ids, rejected_ids (ints) and optionally `weight` (1; 0 for a pair that
            only evens out the ranks) and `source` (for messages).
        share_prompt: the packed row described above; otherwise two right-padded rows per pair.
        prompt_logps: score the prompt tokens too (`Objective.needs_prompt`).

    Returns:
        input_ids [1, N] and position_ids [1, N], or input_ids [2B, S] alone (chosen and rejected of each pair in
        turn); target_ids [U], the tokens to score, each once; target_at [U], where in the flattened input_ids each of
        them is predicted; score_at [T], which of those each pair's tokens are, prompt, chosen and rejected of each
        pair in turn; scored [B, 3], how many of each kind; lengths [B, 3], prompt_len (p-1), chosen and rejected
        tokens, of answers those that are learned; weight [B].

        The packed row has besides: segments and position_offsets, the tokens of each segment and the position of its
        first; branches, triples (first segment, segment behind the last, the segments before it that it sees); and
        for varlen attention kernels key_at [M], cu_seqlens_q, cu_seqlens_k and longest, the most queries and keys of
        a branch; key_order [M] and key_starts [N+1], the places in key_at of each token in turn, and where each
        token's begin.

    Raises:
        PackingError: an empty prompt or answer.
    """
    if not pairs:
        raise PackingError("no pairs to pack")
    lengths_B3 = np.array([pair_lengths(pair) for pair in pairs], dtype=np.int64)
    batch, at = (_pack_shared if share_prompt else _pack_rows)(pairs)
    return {
        **batch,
        **_targets(pairs, at, lengths_B3, prompt_logps),
        "lengths": torch.from_numpy(lengths_B3 - np.array([1, 0, 0])),
        "weight": torch.tensor([float(pair.get("weight", 1.0)) for pair in pairs]),
    }
