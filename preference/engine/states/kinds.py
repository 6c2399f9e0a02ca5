"""The kinds of layers that carry a state, each over a packed row by the function that transformers runs it with.

transformers writes such a layer as projections around a few functions of the modeling file (`causal_conv1d_fn`,
`torch_chunk_gated_delta_rule`, ...), which call the kernels of flash-linear-attention, causal-conv1d and mamba-ssm
where these are installed and torch otherwise. Here is, under each of those names, the same function over the runs of a
packed row (states/tree.py): it calls the one that it replaces, so that kernels serve both.

Every function takes the tree, the function that it replaces, and that one's arguments; N tokens in one row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from preference.engine.states.convolution import convolution as row_convolution
from preference.engine.states.delta import gated_delta_rule
from preference.engine.states.tree import CHUNK, Group, Tree, current, over, over_runs, with_zeros

STEP = 2.0**-10  # time step of a token that writes a state of Mamba; small, so that it hardly decays meanwhile


def in_torch(package: str, x: Tensor) -> bool:
    """Whether x is run in torch's operators: no kernel of `package` is there for it."""
    return x.device.type == "cpu" or importlib.util.find_spec(package) is None


def _chunk(width: int, most: int) -> int:
    """Tokens of a chunk for rows of `width` tokens: a power of two, no larger than needed."""
    return min(most, max(16, 1 << (width - 1).bit_length()))


def convolution(
    tree: Tree,
    plain: Callable[..., Tensor],
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """A causal depthwise convolution, [1, C, N] by [C, taps]: each run behind its path's last taps - 1 tokens."""
    if in_torch("causal_conv1d", hidden_states):
        act = None if activation is None else ACT2FN[activation]
        return row_convolution(tree, hidden_states.transpose(1, 2), weight, bias, act).transpose(1, 2)
    order, places = tree.tails(weight.shape[-1], hidden_states.device)
    x_MC = with_zeros(hidden_states[0].t()).index_select(0, order)
    out = plain(x_MC.t()[None], weight, bias, activation=activation)
    return out[0].t().index_select(0, places).t()[None]


def delta_rule(
    tree: Tree,
    plain: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule (Yang et al. 2024, arXiv 2412.06464), with one decay a head or, in Kimi's, one a channel.

    query, key [1, N, heads, K], value [1, N, heads, V], log decay g [1, N, heads] or [1, N, heads, K], beta
    [1, N, heads]. Where all are zero, the state stays as it is. flash-linear-attention runs a level of the tree in one
    call, in which nothing is padded.
    """
    in_torch_here = in_torch("fla", value)
    if g.ndim == 3 and in_torch_here:
        return gated_delta_rule(tree, query, key, value, g, beta, use_qk_l2norm_in_kernel), None

    def run(rows: list[Tensor], initial: Tensor | None, group: Group) -> tuple[Tensor, Tensor | None]:
        q, k, v, decay, rate = rows
        cut: dict[str, Any] = {"cu_seqlens": group.cu_seqlens}
        if in_torch_here:
            cut = {"chunk_size": _chunk(group.width, CHUNK)}
        return plain(
            q, k, v, g=decay, beta=rate, initial_state=initial, output_final_state=group.goes_on > 0,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **cut,
        )  # fmt: skip

    return over_runs(tree, (query, key, value, g, beta), run, padded=in_torch_here), None


def state_space_dual(
    tree: Tree,
    plain: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): input [1, N, heads, P], dt [1, N, heads], B and C [1, N, groups, S].

    The time steps are made before rows are padded: a step of zero leaves the state as it is.
    """
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def run(rows: list[Tensor], initial: Tensor | None, group: Group) -> tuple[Tensor, Tensor | None]:
        x, step, b, c = rows
        chunk, final = _chunk(group.width, chunk_size), group.goes_on > 0
        out = plain(x, step, A, b, c, chunk_size=chunk, D=D, initial_states=initial, return_final_states=final)
        return out if final else (out, None)

    return over_runs(tree, (hidden_states, dt, B, C), run)


def selective_scan(
    tree: Tree,
    plain: Callable[..., Tensor],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    use_mambapy: bool = False,
    **_: Any,
) -> Tensor:
    """Mamba (Gu and Dao 2023, arXiv 2312.00752): input and dt [1, I, N], A [I, S], B and C [1, S, N].

    Its functions take no initial state and give no gradient to the final one. So S tokens before a run write the state
    that it starts from, one column each, with a small time step; S tokens behind it, with a time step of zero, read
    the one in which it ends.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    x, step, b, c = (part.transpose(1, 2).to(wide) for part in (hidden_states, dt, B, C))
    step = step if delta_bias is None else step + delta_bias.to(wide)
    step = F.softplus(step) if delta_softplus else step
    inner, size = A.shape
    columns = torch.eye(size, dtype=wide, device=A.device)
    # A column that is written early decays while the others are written; it is made larger by as much.
    later = torch.arange(size - 1, -1, -1, device=A.device, dtype=wide)
    swell = torch.exp(-A.to(wide) * later * STEP) / STEP

    def run(rows: list[Tensor], initial: Tensor | None, group: Group) -> tuple[Tensor, Tensor | None]:
        count, width = group.rows, group.width
        none = rows[0].new_zeros(count, size, inner)
        unit, silent = columns.expand(count, -1, -1), columns.new_zeros(count, size, size)
        parts = [rows]
        if initial is not None:
            parts.insert(0, [(initial * swell).transpose(1, 2), none + STEP, unit, silent])
        if group.goes_on:
            parts.append([none, none, silent, unit])
        tokens = [torch.cat(part, dim=1).transpose(1, 2).contiguous() for part in zip(*parts, strict=True)]
        out = plain(tokens[0], tokens[1], A, tokens[2], tokens[3], use_mambapy=use_mambapy).transpose(1, 2)
        begin = 0 if initial is None else size
        return out[:, begin : begin + width], out[:, begin + width :].transpose(1, 2) if group.goes_on else None

    out = over_runs(tree, (x, step, b, c), run).transpose(1, 2)
    out = out if D is None else out + hidden_states * D[:, None]
    return out if z is None else out * F.silu(z)


def no_fusion(*_: Any, **__: Any) -> None:
    """A whole layer in one kernel knows no tree; the layer then calls its parts."""


def lightning_attention(
    self: nn.Module, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """MiniMax's linear attention (arXiv 2501.08313): Mamba-2's recurrence with a time step of 1, B = key, C = query."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    tree = current()
    if tree is None:
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, **kwargs)
    qkv = self.act_fn(self.qkv_proj(hidden_states)).unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
    query, key, value = qkv.split(self.head_dim, dim=-1)
    decay = -self.slope_rate.flatten().to(torch.promote_types(qkv.dtype, torch.float32))
    ones = decay.new_ones(*qkv.shape[:3])
    with over(None):  # where a Mamba-2 model is prepared too, the function asks for a tree itself
        out = state_space_dual(tree, mamba2_chunk_scan, value, ones, decay, key, query, self.block_size)
    out = self.norm(out.flatten(2).to(qkv.dtype))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * out), None


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space_dual,
    "mamba2_split_conv1d_scan_combined": no_fusion,
    "mamba_selective_scan": selective_scan,
    "mamba_inner_fn": no_fusion,
}
FORWARDS: dict[str, Callable[..., Any]] = {"MiniMaxLightningAttention": lightning_attention}
