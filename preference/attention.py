"""The attention that reads a packed row, for every architecture that uses transformers' AttentionInterface.

A model builds one mask per kind of layer and hands it to each attention call. Registered under our own name, the mask function
returns a `PackedMask` in its place: the layout of the row and the layer's window. It travels as an argument, so it is there again
when gradient checkpointing recomputes a layer, whichever way it does that, and a layer with a window gets its own. Outside a
packed forward (generation, say) both functions pass the call on to the implementation that the model had before.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from preference.segment_attention import SegmentAttention

NAME, NAME_OVER_EAGER = "packed_pairs", "packed_pairs_eager"


class EngineError(ValueError):
    """A model, or one of its settings, that the packed engine cannot compute exactly. The message names engine=trl."""


@dataclass
class PackedMask:
    """Stands where a mask tensor would: the row's layout, and which of the visible keys a layer keeps.

    window: keys at most window-1 positions back. chunk: keys of the query's own chunk of that many positions.
    """

    layout: Mapping[str, Any]
    window: int | None = None
    chunk: int | None = None
    _made: dict[Any, Tensor] = field(default_factory=dict)

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """bool [queries, keys] for the last `queries` positions of a causal sequence of `keys` tokens."""
        at = (queries, keys, device)
        if at not in self._made:
            key = torch.arange(keys, device=device)
            query = key[keys - queries :, None]
            keep = key <= query
            if self.window is not None:
                keep &= key > query - self.window
            if self.chunk is not None:
                keep &= key // self.chunk == query // self.chunk
            self._made[at] = keep
        return self._made[at]

    def bias(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """`visible` as an additive mask of `like`'s dtype."""
        at = (queries, keys, like.device, like.dtype)
        if at not in self._made:
            keep = self.visible(queries, keys, like.device)
            self._made[at] = torch.zeros_like(keep, dtype=like.dtype).masked_fill_(~keep, float("-inf"))
        return self._made[at]

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


def _mask(usual: Any) -> Any:
    def mask_function(*args: Any, **kwargs: Any) -> Any:
        layout = _layout.get()
        if layout is None:
            return usual(*args, **kwargs)
        if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs:
            raise EngineError("this model's attention pattern is not causal, windowed or chunked: use engine=trl")
        config, size = kwargs["config"], kwargs.get("local_size")
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if size is not None and size not in (window, chunk) or (size is not None and window == chunk):
            raise EngineError(f"this model's attention is limited to {size} tokens in an unknown way: use engine=trl")
        return PackedMask(layout, window if size == window else None, chunk if size == chunk else None)

    return mask_function


def _usual_attention(module: torch.nn.Module, eager: bool) -> Any:
    if not eager:
        return sdpa_attention_forward
    return sys.modules[type(module).__module__].eager_attention_forward


def _attention(eager: bool) -> Any:
    def attention_function(module, query, key, value, attention_mask, *args: Any, **kwargs: Any):  # noqa: ANN001, ANN202
        if not isinstance(attention_mask, PackedMask):
            if _layout.get() is not None:
                raise EngineError(f"{type(module).__name__} does not pass its mask on: use engine=trl")
            return _usual_attention(module, eager)(module, query, key, value, attention_mask, *args, **kwargs)
        return packed_attention(module, query, key, value, attention_mask, *args, **kwargs), None

    return attention_function


for _name, _is_eager, _usual_mask in ((NAME, False, sdpa_mask), (NAME_OVER_EAGER, True, eager_mask)):
    AttentionInterface.register(_name, _attention(_is_eager))
    AttentionMaskInterface.register(_name, _mask(_usual_mask))


def install(model: PreTrainedModel) -> None:
    """Switch `model` to the packed attention.

    Raises:
        EngineError: its attention does not go through AttentionInterface.
    """
    if not model._can_set_attn_implementation():
        raise EngineError(f"{type(model).__name__} does not use transformers' AttentionInterface")
    eager = model.config._attn_implementation == "eager"
    model.set_attn_implementation(NAME_OVER_EAGER if eager else NAME)


def _plain_attention(query, key, value, keep, scaling, dropout, softcap, sinks) -> Tensor:  # noqa: ANN001
    """Attention written out, for the few models with capped scores or learned sinks. All [1, H, n, D]; fp32 softmax."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1).to(scores)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = weights[..., : key.shape[2]]
    return torch.matmul(F.dropout(weights, dropout), value)


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
    **kwargs: Any,
) -> Tensor:
    """Attention over a packed row.

    Args:
        query, key, value: [1, heads, N, head size]; keys and values may have fewer heads.

    Returns:
        [1, N, heads, head size of the values].
    """
    for name in ("position_bias",):
        if kwargs.get(name) is not None:
            raise EngineError(f"{type(module).__name__} adds {name} to its attention: use engine=trl")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as SDPA would
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    unusual = dropout > 0 or softcap is not None or s_aux is not None
    if device == "cpu" and not unusual:
        return SegmentAttention.apply(query[0], key[0], value[0], mask, scaling).transpose(0, 1)[None]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        if softcap is not None or s_aux is not None:
            return _plain_attention(q, k, v, mask.visible(n, m, q.device), scaling, dropout, softcap, s_aux)
        if n == m and not mask.narrows(m):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, mask.visible(n, m, q.device), dropout_p=dropout, scale=scaling)

    segments = mask.layout["segments"]
    sizes = [size for prefix_chosen_rejected in segments for size in prefix_chosen_rejected]
    # One split and one concatenation: a slice for each pair would write a full-length gradient for each pair.
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    outputs = []
    for i in range(0, len(sizes), 3):
        for branch in (i + 1, i + 2):
            k, v = (torch.cat([x[i], x[branch]], dim=2) for x in (keys, values))
            q = torch.cat([queries[i], queries[branch]], dim=2) if branch == i + 1 else queries[branch]
            outputs.append(attend(q, k, v))
    return torch.cat(outputs, dim=2).transpose(1, 2)
