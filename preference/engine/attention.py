"""The attention that reads a packed row, for every architecture that uses transformers' AttentionInterface.

A model builds one mask per kind of layer and hands it to each attention call. Registered under our own name, the mask
function returns a `PackedMask` in its place: the layout of the row and the layer's window. It travels as an argument,
so it is there again when gradient checkpointing recomputes a layer, whichever way it does that, and a layer with a
window gets its own. Outside a packed forward (generation, say) both functions pass the call on to the implementation
that the model had before. How it is computed is the device's affair (engine/sides.py).
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from preference.engine.masks import EngineError, PackedMask, Scores
from preference.engine.sides import side_of

NAME, NAME_OVER_EAGER = "packed_pairs", "packed_pairs_eager"

_row: contextvars.ContextVar[tuple[Mapping[str, Any], str] | None] = contextvars.ContextVar("packed_row", default=None)


@contextlib.contextmanager
def packed_row(layout: Mapping[str, Any], implementation: str = "auto") -> Iterator[None]:
    """While this is open, forwards of prepared models build packed masks from `layout` (a packed batch)."""
    token = _row.set((layout, implementation))
    try:
        yield
    finally:
        _row.reset(token)


def _mask(usual: Callable[..., Any]) -> Callable[..., Any]:
    def mask_function(*args: Any, **kwargs: Any) -> Any:
        row = _row.get()
        if row is None:
            return usual(*args, **kwargs)
        if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs:
            raise EngineError("this model's attention pattern is not causal, windowed or chunked: use engine=trl")
        config, size = kwargs["config"], kwargs.get("local_size")
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if size is not None and (size not in (window, chunk) or window == chunk):
            raise EngineError(f"this model's attention is limited to {size} tokens in an unknown way: use engine=trl")
        layout, implementation = row
        return PackedMask(layout, window if size == window else None, chunk if size == chunk else None, implementation)

    return mask_function


def _usual_attention(module: torch.nn.Module, eager: bool) -> Callable[..., Any]:
    return sys.modules[type(module).__module__].eager_attention_forward if eager else sdpa_attention_forward


def _attention(eager: bool) -> Callable[..., Any]:
    def attention_function(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if isinstance(attention_mask, PackedMask):
            return packed_attention(module, query, key, value, attention_mask, **kwargs), None
        if _row.get() is not None:
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
    return side_of(device).attend(query, key, value, mask, Scores(scale, softcap, s_aux, dropout))
