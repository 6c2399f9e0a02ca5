"""From a model and a packed batch to the log-probabilities of its pairs, without building logits.

`prepare_model` gives a causal LM's forward one more keyword, `packed`: with it the forward runs the backbone on a packed batch and
scores the batch's target tokens; without it nothing changes, so that generation and saving go on as before. The call goes through
the model's own forward, so the hooks of DDP, FSDP2 and ZeRO-3 and the wrappers of PEFT and accelerate see it.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preference.attention import EngineError, install, packed_row
from preference.losses import PairLogps
from preference.scoring import token_logps

log = logging.getLogger(__name__)

ROW_KEYS = ("segments", "key_at", "cu_queries", "cu_keys")


@dataclass(frozen=True)
class Engine:
    """How the packed engine runs a model. share_prompt: one packed row, or two padded rows per pair, and why."""

    share_prompt: bool
    reason: str = ""


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits by before soft-capping; each family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _packed_forward(self: PreTrainedModel, packed: Mapping[str, Any], kwargs: dict[str, Any]) -> Tensor:
    """The log-probabilities [T] of the batch's targets, fp32 at least."""
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    inputs |= {name: packed[name] for name in ("input_ids", "position_ids") if name in packed}
    if "segments" in packed:
        with packed_row({name: packed[name] for name in ROW_KEYS}):
            hidden = self.base_model(**inputs, use_cache=False).last_hidden_state
    else:
        hidden = self.base_model(**inputs, use_cache=False).last_hidden_state
        hidden = hidden[:, -packed["input_ids"].shape[1] :]
    config = self.config.get_text_config()
    head = self.get_output_embeddings()
    hidden_TD = hidden.flatten(0, 1)[packed["target_at"]]
    cap = getattr(config, "final_logit_softcapping", None)
    return token_logps(hidden_TD, head.weight, head.bias, packed["target_ids"], logit_scale(config), cap)


def _patch_forward(model: PreTrainedModel) -> None:
    """Let `model(packed=batch)` return target log-probabilities."""
    installed = vars(model).get("forward")  # e.g. a hook of accelerate; the class's own forward is looked up on each call

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, packed: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if packed is not None:
            return _packed_forward(self, packed, kwargs)
        return installed(*args, **kwargs) if installed else type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model under wrappers of PEFT, DDP and others."""
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise EngineError(f"{type(model).__name__} holds no transformers model")
        model = inner
    return model


def prepare_model(model: nn.Module, *, share_prompt: bool = True) -> Engine:
    """Make `model` (a causal LM, PEFT-wrapped or not) ready for `pair_logps`; to be called before it is wrapped for DDP or FSDP.

    Returns:
        How it will be run; `share_prompt` of it goes to `pack_pairs`.

    Raises:
        EngineError: the model cannot be run exactly.
    """
    lm = causal_lm(model)
    if not hasattr(lm, "_packed_engine"):
        install(lm)
        _patch_forward(lm)
        lm._packed_engine = Engine(share_prompt)
    return lm._packed_engine


def pair_logps(model: nn.Module, batch: Mapping[str, Any]) -> PairLogps:
    """Log-probabilities of a batch of `pack_pairs`, whose tensors lie on the model's device.

    Args:
        model: prepared by `prepare_model`, in any wrapper whose forward reaches it.
    """
    logps_T = model(packed=batch)
    if logps_T.numel() != batch["target_ids"].numel():
        raise EngineError("the model returned no target log-probabilities: prepare_model was not called on it")
    sums = torch.segment_reduce(logps_T, "sum", lengths=batch["scored"].flatten(), initial=0.0).view(-1, 3)
    lengths = batch["lengths"].to(sums.dtype)
    prompt, chosen, rejected = sums.unbind(1)
    return PairLogps(chosen, rejected, prompt, lengths[:, 1], lengths[:, 2], lengths[:, 0], batch["weight"].to(sums.dtype))
