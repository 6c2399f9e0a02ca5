"""Attention over a packed row in torch's own operators: branch by branch, or all branches as rows of one padded batch.

The padded batch costs the same few operators however many branches there are, and the work of padding; branch by branch
costs some ten operators a branch and no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preference.engine.masks import PackedMask, Scores, repeat_heads


def weigh(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scores: Scores) -> Tensor:
    """Attention written out, for capped scores and learned sinks; softmax in fp32 at least.

    Args:
        query [B, H, n, D], key and value [B, H, m, D]; keep, bool, broadcast over [B, H, n, m].
    """
    products = torch.matmul(query, key.transpose(2, 3)) * scores.scale
    if scores.cap is not None:
        products = scores.cap * torch.tanh(products / scores.cap)
    products = products.masked_fill(~keep, torch.finfo(products.dtype).min)
    if scores.sinks is not None:
        batch, _, queries, _ = products.shape
        sink = scores.sinks.to(products.dtype).reshape(1, -1, 1, 1).expand(batch, -1, queries, 1)
        products = torch.cat([products, sink], dim=-1)
    weights = F.softmax(products, dim=-1, dtype=torch.promote_types(products.dtype, torch.float32))
    return torch.matmul(F.dropout(weights[..., : key.shape[2]].to(query.dtype), scores.dropout), value)


def by_chain(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> Tensor:
    """All [1, heads, N, D] -> [1, N, H, D]."""
    key, value = repeat_heads(query, key, value)
    # One split and one concatenation: a slice for each branch would write a full-length gradient for each branch.
    queries, keys, values = (x.split(mask.layout["segments"], dim=2) for x in (query, key, value))
    outputs = []
    for first, last, before in mask.layout["branches"]:
        seen = [*before, *range(first, last)]
        q = torch.cat(queries[first:last], dim=2)
        k, v = (torch.cat([x[segment] for segment in seen], dim=2) for x in (keys, values))
        outputs.append(_attend(q, k, v, mask, scores))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, scores: Scores) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    if scores.cap is not None or scores.sinks is not None:
        return weigh(q, k, v, mask.visible(n, m, q.device), scores)
    plain = n == m and not mask.narrows(m)
    keep = None if plain else mask.visible(n, m, q.device)
    return F.scaled_dot_product_attention(q, k, v, keep, dropout_p=scores.dropout, is_causal=plain, scale=scores.scale)


@dataclass(frozen=True)
class _Padded:
    """The branches of a row as rows of a batch: C branches of at most n queries and m keys.

    Attributes:
        query_at [C, n], key_at [C, m]: the place in the row of each; padding repeats place 0.
        keep: bool [C, 1, n, m], which keys a query sees. A query of padding sees the first.
        back: [N], where each place of the row stands in the flattened queries.
    """

    query_at: Tensor
    key_at: Tensor
    keep: Tensor
    back: Tensor


def _places(segments: list[range], chosen: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Places [C, longest] of the segments of each branch, padded with 0, and how many there are, [C]."""
    rows = [np.concatenate([np.asarray(segments[i]) for i in seen]) for seen in chosen]
    lengths = np.array([len(row) for row in rows])
    places = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    for place, row in zip(places, rows, strict=True):
        place[: len(row)] = row
    return places, lengths


def _pad(mask: PackedMask, device: torch.device) -> _Padded:
    starts = [0, *accumulate(mask.layout["segments"])]
    segments = [range(a, b) for a, b in pairwise(starts)]
    branches = mask.layout["branches"]
    query_at, queries = _places(segments, [list(range(first, last)) for first, last, _ in branches])
    key_at, keys = _places(segments, [[*before, *range(first, last)] for first, last, before in branches])
    # Branches lie in the row one behind the other, so its places are the padded queries in order.
    real = np.arange(query_at.shape[1]) < queries[:, None]
    moved = [torch.from_numpy(x).to(device, non_blocking=True) for x in (query_at, key_at, queries, keys)]
    query_at, key_at, queries, keys = moved
    key = torch.arange(key_at.shape[1], device=device)
    query = torch.arange(query_at.shape[1], device=device) + (keys - queries)[:, None]
    keep = mask.keeps(query[:, :, None], key) & (key < keys[:, None, None])
    keep |= (key == 0) & (query >= keys[:, None])[:, :, None]
    back = torch.from_numpy(real.reshape(-1).nonzero()[0]).to(device, non_blocking=True)
    return _Padded(query_at, key_at, keep[:, None], back)


def padded(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> Tensor:
    """All [1, heads, N, D] -> [1, N, H, D]."""
    key, value = repeat_heads(query, key, value)
    rows = mask.once("padded", lambda: _pad(mask, query.device))
    q = query[0][:, rows.query_at].transpose(0, 1)
    k, v = (x[0][:, rows.key_at].transpose(0, 1) for x in (key, value))
    if scores.cap is not None or scores.sinks is not None:
        out = weigh(q, k, v, rows.keep, scores)
    else:
        out = F.scaled_dot_product_attention(q, k, v, rows.keep, dropout_p=scores.dropout, scale=scores.scale)
    return out.transpose(1, 2).flatten(0, 1)[rows.back][None]
