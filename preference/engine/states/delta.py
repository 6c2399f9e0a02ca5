"""The gated delta rule over a packed row in torch's operators, keeping little for the backward.

Yang et al. 2024 (arXiv 2412.06464), section 3.3. A head's state S [K, V] takes a value v for a key k at a rate beta and
decays by exp(g); a query q reads it:

    S_t = exp(g_t) (1 - beta_t k_t k_t') S_t-1 + beta_t k_t v_t',  o_t = S_t' q_t

Over a chunk of T tokens that starts from S, with G the running sum of g and D_ij = exp(G_i - G_j) for j <= i:

    A = beta (k k' * D) below the diagonal,  M = q k' * D up to it
    u = v - exp(G) k S,  w = (1 + A)^-1 beta u,  o = exp(G) q S + M w,  S' = exp(G_T) S + k' (exp(G_T - G) w)

Chunks that lie equally deep in the tree are one batch; each starts from the state in which the one before it ended. The
backward has the inputs, each chunk's (1 + A)^-1 and the states between chunks, and makes the rest again.

Letters in shapes: H heads, R chunks of a batch, T tokens of a chunk, K and V the widths of keys and values. A query and
the key of the same token are neighbours, so that what both are multiplied by is read once. Products have one dtype
(`low`: autocast's, or the inputs'); decays, scores, states and sums are float32 at least (`wide`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preference.engine.states.tree import Group, Tree, with_zeros

CHUNK = 64
FAINT = -80.0  # least exponent of a decay: one that ends among the denormals, or overflows, takes ten times as long
EPSILON = 1e-6  # of the norms of queries and keys, as in transformers and flash-linear-attention


@dataclass(frozen=True)
class _Row:
    """A packed row: query, key [N, heads, K] and value [N, H, V]; g and beta wide, with zeros behind, [N + 1, H]."""

    query: Tensor
    key: Tensor
    value: Tensor
    g: Tensor
    beta: Tensor
    normed: bool
    low: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        return self.g.dtype

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normed: bool, low: Any) -> _Row:
        wide = torch.promote_types(_wide(value), g.dtype)
        return cls(query, key, value, with_zeros(g.to(wide)), with_zeros(beta.to(wide)), normed, low)


class _Gradients:
    """Of a row, each [N + 1, ...] with a last token of no meaning."""

    def __init__(self, row: _Row) -> None:
        inputs = row.query, row.key, row.value
        self.query, self.key, self.value = (x.new_empty(len(x) + 1, *x.shape[1:]) for x in inputs)
        self.g, self.beta = torch.empty_like(row.g), torch.empty_like(row.beta)


def _exp(x: Tensor) -> Tensor:
    return x.clamp(min=FAINT).exp_()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Chunks:
    """The chunks of one batch, [H, R, T, ...], without their states; see the top for the names."""

    def __init__(self, row: _Row, group: Group) -> None:
        self.row, self.group = row, group
        self.at = group.at.clamp(max=len(row.value) - 1)  # behind the end of a run any token does: its beta is zero
        self.v = self.take(row.value).to(row.low).contiguous()
        heads, width = len(self.v), row.query.shape[-1]
        qk = self.v.new_empty(heads, group.rows, group.width, 2, width)
        self.scales = self.v.new_empty(heads, group.rows, group.width, 2, 1, dtype=row.wide)
        for one, (x, by) in enumerate(((row.query, width**-0.5), (row.key, 1.0))):
            x = self.take(x).to(row.wide)
            scale = x.new_full((*x.shape[:-1], 1), by)
            if row.normed:
                scale = x.square().sum(-1, keepdim=True).add_(EPSILON).rsqrt_().mul_(by)
            # Each head of a query and key serves as many heads of the values as follow each other.
            qk.unflatten(0, (len(x), -1))[:, :, :, :, one] = x.mul_(scale)[:, None]
            self.scales.unflatten(0, (len(x), -1))[:, :, :, :, one] = scale[:, None]
        self.qk = qk.flatten(2, 3)  # [H, R, 2 T, K]
        self.k = self.qk[:, :, 1::2]
        total = self.take(row.g).cumsum(-1)
        self.beta = self.take(row.beta)[..., None]
        self.beta_low = self.beta.to(row.low)
        self.decay = _exp(total)[..., None].to(row.low)
        self.end = _exp(total[..., -1:])[..., None]
        self.to_end = _exp(total[..., -1:] - total)[..., None].to(row.low)
        self.between = _exp((total[..., :, None] - total[..., None, :]).tril_()).tril_()
        scores = (self.qk @ self.k.transpose(2, 3)).unflatten(2, (-1, 2))
        self.read = (scores[:, :, :, 0] * self.between).to(row.low)  # M
        self.overlap = scores[:, :, :, 1] * self.between.tril(-1)  # A / beta

    def take(self, x: Tensor) -> Tensor:
        """[N, heads, ...] -> [heads, R, T, ...]."""
        at = self.at if len(x) == len(self.row.value) else self.group.at
        return x.index_select(0, at).unflatten(0, (self.group.rows, self.group.width)).movedim(2, 0)

    def put(self, whole: Tensor, x: Tensor) -> None:
        """[H, R, T, ...] -> its places in [N + 1, heads, ...], summed over the heads that one serves."""
        heads = whole.shape[1]
        x = x if len(x) == heads else x.unflatten(0, (heads, -1)).sum(1)
        whole.index_copy_(0, self.group.at, x.movedim(0, 2).flatten(0, 1).to(whole.dtype))

    def inverse(self) -> Tensor:
        """(1 + A)^-1."""
        a = self.overlap * self.beta
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        return torch.linalg.solve_triangular(a, one, upper=False, unitriangular=True).to(self.row.low)

    def seen(self, state: Tensor | None) -> Tensor | None:
        """exp(G) [q; k] S, [H, R, T, 2, V]."""
        return None if state is None else (self.qk @ state).unflatten(2, (-1, 2)).mul_(self.decay[..., None])

    def forward(self, inverse: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """o, and the states [H, .., K, V] of those chunks that others start from. state: wide."""
        more, seen = self.group.goes_on, self.seen(None if state is None else state.to(self.row.low))
        u = self.v if seen is None else self.v - seen[:, :, :, 1]
        w = inverse @ (u * self.beta_low)
        out = self.read @ w
        out = out if seen is None else out.add_(seen[:, :, :, 0])
        if not more:
            return out, None
        ended = (self.k[:, :more].transpose(2, 3) @ (w[:, :more] * self.to_end[:, :more])).to(self.row.wide)
        return out, ended if state is None else ended.addcmul_(state[:, :more], self.end[:, :more])

    def backward(
        self, inverse: Tensor, state: Tensor | None, d_out: Tensor, d_ended: Tensor | None, to: _Gradients
    ) -> Tensor | None:
        """Puts the gradients of the chunks in place; returns that of the states that they started from.

        state and d_out are low; d_ended, wide, is of the states in which the first chunks ended.
        """
        low, wide, seen = self.row.low, self.row.wide, self.seen(state)
        u = self.v if seen is None else self.v - seen[:, :, :, 1]
        w = inverse @ (u * self.beta_low)
        d_w = self.read.transpose(2, 3) @ d_out
        if d_ended is not None:
            more, d_ended_low = d_ended.shape[1], d_ended.to(low)
            written, d_written = w[:, :more] * self.to_end[:, :more], self.k[:, :more] @ d_ended_low
            d_w[:, :more].addcmul_(d_written, self.to_end[:, :more])
        d_rhs = inverse.transpose(2, 3) @ d_w
        d_u = d_rhs * self.beta_low
        # The gradients of M and of A / -beta; what these times M and A come to in a row and a column is that of its G.
        d_scores = torch.stack([d_out, d_rhs], dim=3).flatten(2, 3) @ w.transpose(2, 3)
        d_read, d_overlap = d_scores.to(wide).unflatten(2, (-1, 2)).unbind(3)
        of_overlap = d_overlap * self.overlap
        d_beta = (d_rhs * u).sum(-1, dtype=wide) - of_overlap.sum(-1)
        moved = (d_read * self.read).addcmul_(of_overlap, self.beta, value=-1)
        d_total = moved.sum(3) - moved.sum(2)
        d_read.mul_(self.between)
        d_overlap.mul_(self.between.tril_(-1)).mul_(-self.beta)
        d_scores = torch.stack([d_read, d_overlap], dim=3).to(low).flatten(2, 3)
        d_qk = d_scores @ self.k
        d_k = d_scores.transpose(2, 3) @ self.qk
        d_state = None
        if state is not None:
            d_seen = torch.stack([d_out, d_u.neg()], dim=3)
            d_total += (d_seen * seen).sum((3, 4), dtype=wide)
            d_seen = d_seen.mul_(self.decay[..., None]).flatten(2, 3)
            d_qk += d_seen @ state.transpose(2, 3)
            d_state = (self.qk.transpose(2, 3) @ d_seen).to(wide)
        if d_ended is not None:
            d_k[:, :more] += written @ d_ended_low.transpose(2, 3)
            of_written = (written * d_written).sum(-1, dtype=wide)
            d_total[:, :more] -= of_written
            d_total[:, :more, -1] += of_written.sum(-1)
            if state is not None and d_state is not None:
                d_total[:, :more, -1] += (d_ended * state[:, :more]).sum((2, 3)) * self.end[:, :more, 0, 0]
                d_state[:, :more].addcmul_(d_ended, self.end[:, :more])
        d_qk[:, :, 1::2] += d_k
        d_query, d_key = self.through_norm(d_qk).unbind(3)
        self.put(to.query, d_query)
        self.put(to.key, d_key)
        self.put(to.value, d_u)
        self.put(to.beta, d_beta)
        self.put(to.g, d_total.flip(2).cumsum(2).flip(2))
        return d_state

    def through_norm(self, d_qk: Tensor) -> Tensor:
        """The gradient [H, R, T, 2, K] of queries and keys as they came in from that of `qk` (overwritten)."""
        d, qk, scales = d_qk.unflatten(2, (-1, 2)), self.qk.unflatten(2, (-1, 2)), self.scales
        if self.row.normed:
            along = (d * qk).sum(-1, keepdim=True, dtype=self.row.wide)
            along[:, :, :, 0] *= qk.shape[-1]  # queries have 1 / sqrt(K) for a norm
            d.addcmul_(qk, along.to(d.dtype), value=-1)
        return d.mul_(scales.to(d.dtype))


class _DeltaRule(torch.autograd.Function):
    """query, key [N, heads, K], value [N, H, V], g and beta [N, H] -> [N, H, V]; products in `low`."""

    @staticmethod
    def forward(ctx: Any, query, key, value, g, beta, tree: Tree, normed: bool, low: torch.dtype) -> Tensor:
        levels = tree.cut(CHUNK).levels(value.device)[0]
        inverses: list[Tensor] = []
        states: list[Tensor | None] = [None]  # those that a level starts from, [H, .., K, V]
        with torch.autocast(value.device.type, enabled=False):
            row = _Row.of(query, key, value, g, beta, normed, low)
            out = value.new_empty(len(value) + 1, *value.shape[1:])
            for level in levels:
                above, ended = states[-1], []
                for group in level:
                    chunks = _Chunks(row, group)
                    inverses.append(chunks.inverse())
                    state = None if above is None else above.index_select(1, group.parents)
                    part, final = chunks.forward(inverses[-1], state)
                    chunks.put(out, part)
                    ended += [] if final is None else [final]
                states[-1] = None if above is None else above.to(low)
                states.append(torch.cat(ended, dim=1) if ended else None)
        ctx.save_for_backward(query, key, value, g, beta, *states[1:-1], *inverses)
        ctx.levels, ctx.normed, ctx.low = levels, normed, low
        return out[:-1]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, g, beta, *kept = ctx.saved_tensors
        states, inverses = [None, *kept[: len(ctx.levels) - 1]], kept[len(ctx.levels) - 1 :]
        row = _Row.of(query, key, value, g, beta, ctx.normed, ctx.low)
        to, d_out = _Gradients(row), with_zeros(d_out.to(ctx.low))
        d_ended: Tensor | None = None
        for level, state in zip(reversed(ctx.levels), reversed(states), strict=True):
            d_states = None if state is None else torch.zeros_like(state, dtype=row.wide)
            begin = 0
            for group, inverse in zip(level, inverses[-len(level) :], strict=True):
                held = None if state is None else state.index_select(1, group.parents)
                d_mine = None
                if d_ended is not None and group.goes_on:
                    d_mine = d_ended[:, begin : begin + group.goes_on]
                begin += group.goes_on
                chunks = _Chunks(row, group)
                d_state = chunks.backward(inverse, held, chunks.take(d_out).contiguous(), d_mine, to)
                if d_states is not None:
                    d_states.index_add_(1, group.parents, d_state)
            inverses, d_ended = inverses[: -len(level)], d_states
        big = to.query[:-1], to.key[:-1], to.value[:-1]
        return *big, to.g[:-1].to(g.dtype), to.beta[:-1].to(beta.dtype), None, None, None


def gated_delta_rule(
    tree: Tree, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normed: bool
) -> Tensor:
    """The gated delta rule over the runs of a packed row.

    Args:
        query, key: [1, N, heads, K]; value: [1, N, H, V], H a multiple of heads.
        g, beta: log decay and rate, [1, N, H].
        normed: queries and keys are brought to length 1 first.

    Returns:
        [1, N, H, V] in the values' dtype.
    """
    kind = value.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else _wide(value)
    return _DeltaRule.apply(query[0], key[0], value[0], g[0], beta[0], tree, normed, low)[None]
