"""Pairs -> one packed row in which every prompt stands once.

A pair with prompt P (p tokens), chosen answer C and rejected answer R is laid out as

    P[0..p-2] | P[p-1] C[0..c-2] | P[p-1] R[0..r-2]
    prefix      chosen branch      rejected branch

so that every position predicts exactly one token: p-1, c and r of them. Both branches start at position id p-1. A
branch sees the prefix and itself, never the other branch, and no pair sees another (preference/attention.py). Prefix
and chosen branch together are an ordinary causal sequence.

Models that cannot share a prefix get two full sequences per pair as right-padded rows of a batch instead: nothing
about their forward is changed, and causality keeps the padding out of every result.

A packed batch is a dict of tensors and plain ints, so that DataLoader workers, pinned memory and `.to(device)` need
no help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Pair = Mapping[str, Any]


class PackingError(ValueError):
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
    """Tokens that a pair costs in a micro-batch (in rows without sharing: before padding)."""
    p, c, r = pair_lengths(pair)
    return p - 1 + c + r if share_prompt else 2 * (p - 1) + c + r


def _ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """arange(start, start + length) of each pair (start, length), one behind the other."""
    offsets = np.repeat(starts - (lengths.cumsum() - lengths), lengths)
    return offsets + np.arange(lengths.sum())


def _targets(pairs: Sequence[Pair], lengths_B3: np.ndarray, prompt_logps: bool) -> dict[str, torch.Tensor]:
    """The tokens to score, in the order prompt, chosen, rejected of each pair, and how many of each."""
    parts = [part for pair in pairs for part in (pair["prompt_ids"][1:], pair["chosen_ids"], pair["rejected_ids"])]
    if not prompt_logps:
        parts = [part for i, part in enumerate(parts) if i % 3]
    scored_B3 = lengths_B3 - np.array([1, 0, 0]) if prompt_logps else lengths_B3 * np.array([0, 1, 1])
    return {
        "target_ids": torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])),
        "scored": torch.from_numpy(scored_B3),
    }


def _pack_shared(pairs: Sequence[Pair], lengths_B3: np.ndarray, prompt_logps: bool) -> dict[str, Any]:
    ids = [
        np.asarray(part, dtype=np.int64)
        for pair in pairs
        for last in [pair["prompt_ids"][-1:]]
        for part in (pair["prompt_ids"][:-1], last, pair["chosen_ids"][:-1], last, pair["rejected_ids"][:-1])
    ]
    prefix, chosen, rejected = lengths_B3[:, 0] - 1, lengths_B3[:, 1], lengths_B3[:, 2]
    sizes_B3 = np.stack([prefix, chosen, rejected], axis=1)
    begin = sizes_B3.sum(1).cumsum() - sizes_B3.sum(1)
    position_starts = np.stack([np.zeros_like(prefix), prefix, prefix], axis=1)
    position_ids = _ragged_arange(position_starts.reshape(-1), sizes_B3.reshape(-1))
    answers = chosen + rejected
    scored_at = np.arange(sizes_B3.sum()) if prompt_logps else _ragged_arange(begin + prefix, answers)
    # For varlen kernels: queries in row order, two segments a pair; a segment's keys include the shared prefix.
    key_starts = np.stack([begin, begin, begin + prefix + chosen], axis=1)
    key_sizes = np.stack([prefix + chosen, prefix, rejected], axis=1)
    query_sizes = np.stack([prefix + chosen, rejected], axis=1).reshape(-1)
    span_sizes = np.stack([prefix + chosen, prefix + rejected], axis=1).reshape(-1)
    cumulative = [np.concatenate([[0], sizes.cumsum()]).astype(np.int32) for sizes in (query_sizes, span_sizes)]
    return {
        "input_ids": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "target_at": torch.from_numpy(scored_at),
        "segments": [tuple(sizes) for sizes in sizes_B3.tolist()],
        "key_at": torch.from_numpy(_ragged_arange(key_starts.reshape(-1), key_sizes.reshape(-1))),
        "cu_queries": torch.from_numpy(cumulative[0]),
        "cu_keys": torch.from_numpy(cumulative[1]),
    }


def _pack_rows(pairs: Sequence[Pair], lengths_B3: np.ndarray, prompt_logps: bool) -> dict[str, Any]:
    prefix, answers = lengths_B3[:, :1] - 1, lengths_B3[:, 1:]
    width = int((prefix + answers).max())
    ids = np.empty((len(pairs), 2, width), dtype=np.int64)
    for i, pair in enumerate(pairs):
        for j, answer in enumerate((pair["chosen_ids"], pair["rejected_ids"])):
            row = np.concatenate([pair["prompt_ids"], answer[:-1]])
            ids[i, j] = row[-1]  # padding: any id will do, and transformers warns of pad tokens
            ids[i, j, : len(row)] = row
    begin = np.arange(2 * len(pairs)).reshape(-1, 2) * width
    if prompt_logps:  # prompt and chosen answer are neighbours in the chosen row
        starts = np.stack([begin[:, 0], begin[:, 1] + prefix[:, 0]], axis=1)
        sizes = answers + np.concatenate([prefix, np.zeros_like(prefix)], axis=1)
    else:
        starts, sizes = begin + prefix, answers
    return {
        "input_ids": torch.from_numpy(ids.reshape(2 * len(pairs), width)),
        "target_at": torch.from_numpy(_ragged_arange(starts.reshape(-1), sizes.reshape(-1))),
    }


def pack_pairs(pairs: Sequence[Pair], *, share_prompt: bool = True, prompt_logps: bool = True) -> dict[str, Any]:
    """One micro-batch from B pairs.

    Args:
        pairs: mappings with prompt_ids, chosen_ids, rejected_ids (ints) and optionally `weight` (1; 0 for a pair that
        only evens
            out the ranks) and `source` (for messages).
        share_prompt: the packed row described above; otherwise two right-padded rows per pair.
        prompt_logps: score the prompt tokens too (`Objective.needs_prompt`).

    Returns:
        input_ids [1, N] and position_ids [1, N], or input_ids [2B, S] alone (chosen and rejected of each pair in
        turn); target_ids [T], the T tokens to score, prompt, chosen and rejected of each pair in turn; target_at [T],
        where in the flattened input_ids each of them is predicted; scored [B, 3], how many of each kind; lengths [B,
        3], prompt_len (p-1), chosen and rejected tokens; weight [B]. The packed row has besides: segments, a list of
        B triples of ints (prefix, chosen branch, rejected branch); key_at, cu_queries, cu_keys for varlen attention
        kernels.

    Raises:
        PackingError: an empty prompt or answer.
    """
    if not pairs:
        raise PackingError("no pairs to pack")
    lengths_B3 = np.array([pair_lengths(pair) for pair in pairs], dtype=np.int64)
    layout = _pack_shared if share_prompt else _pack_rows
    return {
        **layout(pairs, lengths_B3, prompt_logps),
        **_targets(pairs, lengths_B3, prompt_logps),
        "lengths": torch.from_numpy(lengths_B3 - np.array([1, 0, 0])),
        "weight": torch.tensor([float(pair.get("weight", 1.0)) for pair in pairs]),
    }
