"""The attention that reads a packed row, for every architecture that uses transformers' AttentionInterface.

A model builds one mask per kind of layer and hands it to each attention call. Registered under our own name, the mask
function returns a `PackedMask` in its place: the layout of the row and the layer's window. It travels as an argument,
so it is there again when gradient checkpointing recomputes a layer, whichever way it does that, and a layer with a
window gets its own. Outside a packed forward (generation, say) both functions pass the call on to the implementation
that the model had before.

Three ways to compute it, one per kind of hardware and kernel:
- on CUDA in 16 bits, torch's varlen kernel: a query segment per chain, keys gathered, causal from the bottom right;
- on a CPU, engine/cpu/attention.py;
- elsewhere, and for dropout, capped scores and learned sinks: chain by chain through SDPA or written out.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from preference.engine.cpu.attention import segment_attention
from preference.errors import PreferenceError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

NAME, NAME_OVER_EAGER = "packed_pairs", "packed_pairs_eager"


class EngineError(PreferenceError, ValueError):
    """A model, or one of its settings, that the packed engine cannot compute exactly. The message names engine=trl."""


@dataclass
class PackedMask:
    """Stands where a mask tensor would: the row's layout, and which of the visible keys a layer keeps.

    window: keys at most window-1 positions back. chunk: keys of the query's own chunk of that many positions.
    """

    layout: Mapping[str, Any]
    window: int | None = None
    chunk: int | None = None
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call: all layers of a kind share it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """bool [queries, keys] for the last `queries` positions of a causal sequence of `keys` tokens."""
        return self.once((queries, keys, device), lambda: self._visible(queries, keys, device))

    def _visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        key = torch.arange(keys, device=device)
        query = key[keys - queries :, None]
        keep = key <= query
        if self.window is not None:
            keep &= key > query - self.window
        if self.chunk is not None:
            keep &= key // self.chunk == query // self.chunk
        return keep

    def narrows(self, keys: int) -> bool:
        """Whether the window or chunk hides anything from a causal sequence of `keys` tokens."""
        return keys > min(self.window or keys, self.chunk or keys)


_layout: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("packed_layout", default=None)


@contextlib.contextmanager
def packed_row(layout: Mapping[str, Any]) -> Iterator[None]:
    """While this is open, forwards of prepared models build packed masks from `layout` (a packed batch)."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def _mask(usual: Callable[..., Any]) -> Callable[..., Any]:
    def mask_function(*args: Any, **kwargs: Any) -> Any:
        layout = _layout.get()
        if layout is None:
            return usual(*args, **kwargs)
        if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs:
            raise EngineError("this model's attention pattern is not causal, windowed or chunked: use engine=trl")
        config, size = kwargs["config"], kwargs.get("local_size")
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if size is not None and (size not in (window, chunk) or window == chunk):
            raise EngineError(f"this model's attention is limited to {size} tokens in an unknown way: use engine=trl")
        return PackedMask(layout, window if size == window else None, chunk if size == chunk else None)

    return mask_function


def _usual_attention(module: torch.nn.Module, eager: bool) -> Callable[..., Any]:
    return sys.modules[type(module).__module__].eager_attention_forward if eager else sdpa_attention_forward


def _attention(eager: bool) -> Callable[..., Any]:
    def attention_function(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if isinstance(attention_mask, PackedMask):
            return packed_attention(module, query, key, value, attention_mask, **kwargs), None
        if _layout.get() is not None:
            raise EngineError(f"{type(module).__name__} does not pass its mask on: use engine=trl")
        return _usual_attention(module, eager)(module, query, key, value, attention_mask, **kwargs)

    return attention_function


for _name, _eager, _usual_mask in ((NAME, False, sdpa_mask), (NAME_OVER_EAGER, True, eager_mask)):
    AttentionInterface.register(_name, _attention(_eager))
    AttentionMaskInterface.register(_name, _mask(_usual_mask))


@contextlib.contextmanager
def installed(model: PreTrainedModel) -> Iterator[Callable[[], None]]:
    """Switch `model` to the packed attention; back again at the end, unless the function that this yields is called."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME_OVER_EAGER if before in ("eager", NAME_OVER_EAGER) else NAME)
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    finally:
        if not kept:
            model.set_attn_implementation(before)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    scale: float,
    cap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention written out, for capped scores and learned sinks. All [1, H, n, D]; softmax in fp32 at least."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(F.dropout(weights[..., : key.shape[2]].to(query.dtype), dropout), value)


def _by_chain(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, attend: Callable[..., Tensor]) -> Tensor:
    """`attend(q, k, v)` for each chain: its queries, and the keys and values of all that it sees."""
    # One split and one concatenation: a slice for each chain would write a full-length gradient for each chain.
    queries, keys, values = (x.split(mask.layout["runs"], dim=2) for x in (query, key, value))
    outputs = []
    for first, last, before in mask.layout["chains"]:
        seen = [*before, *range(first, last)]
        q = torch.cat(queries[first:last], dim=2)
        outputs.append(attend(q, *(torch.cat([x[run] for run in seen], dim=2) for x in (keys, values))))
    return torch.cat(outputs, dim=2)


@functools.cache
def _varlen_options() -> frozenset[str]:
    return frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()


def _varlen(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float) -> Tensor:
    """All heads first, [H, N, D] -> [N, H, D]. Untested on a GPU; the tests run it over a stand-in for the kernel."""
    layout = mask.layout
    q, k, v = query.transpose(0, 1), key.transpose(0, 1)[layout["key_at"]], value.transpose(0, 1)[layout["key_at"]]
    options: dict[str, Any] = {"window_size": (-1 if mask.window is None else mask.window - 1, 0), "scale": scale}
    if "enable_gqa" in _varlen_options():
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_attn(q, k, v, layout["cu_queries"], layout["cu_keys"], *layout["longest"], **options)


def _takes_varlen(query: Tensor, value: Tensor, mask: PackedMask) -> bool:
    return (
        query.device.type == "cuda"
        and {"window_size", "scale"} <= _varlen_options()
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and not (mask.chunk and mask.layout["longest"][1] > mask.chunk)
    )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """Attention over a packed row.

    Args:
        query, key, value: [1, heads, N, head size]; keys and values may have fewer heads.
        dropout, scaling, softcap, s_aux (learned sinks): as transformers' attention functions take them.

    Returns:
        [1, N, heads, head size of the values].

    Raises:
        EngineError: a term that depends on the key's place in a row, which a packed row does not have.
    """
    if position_bias is not None:
        raise EngineError(f"{type(module).__name__} adds a position bias to its attention: use engine=trl")
    device = query.device.type
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(device):  # as SDPA would
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if dropout == 0 and softcap is None and s_aux is None:
        if device == "cpu":
            return segment_attention(query[0], key[0], value[0], mask, scale).transpose(0, 1)[None]
        if _takes_varlen(query, value, mask):
            return _varlen(query[0], key[0], value[0], mask, scale)[None]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        if softcap is not None or s_aux is not None:
            return _plain_attention(q, k, v, mask.visible(n, m, q.device), scale, softcap, s_aux, dropout)
        plain = n == m and not mask.narrows(m)
        keep = None if plain else mask.visible(n, m, q.device)
        return F.scaled_dot_product_attention(q, k, v, keep, dropout_p=dropout, is_causal=plain, scale=scale)

    return _by_chain(query, key, value, mask, attend).transpose(1, 2)
