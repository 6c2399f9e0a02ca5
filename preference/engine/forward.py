"""From a model and a packed batch to the log-probabilities of its pairs, without building logits.

`prepare_model` gives a causal LM's forward one more keyword, `packed`: with it the forward runs the backbone on a
packed batch and scores the batch's target tokens; without it nothing changes, so that generation and saving go on as
before. The call goes through the model's own forward, so the hooks of DDP, FSDP2 and ZeRO-3 and the wrappers of PEFT
and accelerate see it. Whether a model can be run this way is not taken on trust: `prepare_model` compares a few
tokens with the model's plain forward (engine/probe.py).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from preference.engine.attention import packed_row
from preference.engine.batching import PAIR_COLUMNS
from preference.engine.head import target_logps, token_logps
from preference.engine.masks import EngineError
from preference.engine.own_attention import has_own_attention, row_inputs
from preference.engine.sides import side_of
from preference.engine.states.install import keep_tree_in_recomputation
from preference.engine.states.tree import Tree, over
from preference.losses import PairLogps

HEAD_ROWS = 256  # rows at once through a head that is more than a weight


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits by before soft-capping; each family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _score(head: nn.Module, hidden_TD: Tensor, ids_T: Tensor, config: Any) -> Tensor:
    scale, cap = logit_scale(config), getattr(config, "final_logit_softcapping", None)
    # An exact nn.Linear; not one with an adapter, in 8 bits, or replaced by PEFT: those are called as they are.
    if type(head).forward is nn.Linear.forward and "forward" not in vars(head) and head.weight.is_floating_point():
        # Under FSDP2 the last norm, in one group with the head, has gathered it by now, in the products' dtype.
        if isinstance(head, FSDPModule):  # torch < 2.13 leaves the group open else
            with torch.no_grad():
                head(hidden_TD[:0])
        weight = head.weight
        return token_logps(hidden_TD.to(weight.device), weight, head.bias, ids_T.to(weight.device), scale, cap)

    def rows(hidden: Tensor, ids: Tensor) -> Tensor:
        return target_logps(head(hidden), ids, scale, cap)

    parts = zip(hidden_TD.split(HEAD_ROWS), ids_T.split(HEAD_ROWS), strict=True)
    return torch.cat([checkpoint(rows, hidden, ids, use_reentrant=False) for hidden, ids in parts])


def _packed_forward(self: PreTrainedModel, packed: Mapping[str, Any], kwargs: dict[str, Any]) -> Tensor:
    """The log-probabilities [U] of the batch's targets, fp32 at least."""
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    backbone = self.model if self.base_model is self else self.base_model
    side_of(packed["input_ids"].device.type).begin(self)
    if "segments" in packed:
        keep_tree_in_recomputation(self)
        tree = Tree.of(packed)
        if has_own_attention(self):
            inputs |= row_inputs(backbone, tree, packed["position_ids"])
        else:
            inputs["position_ids"] = packed["position_ids"]
            if not getattr(self, "packed_states", False):  # a layer with a state reads the mask's values
                # Without a mask transformers reads the values of the position ids, to look for packed sequences.
                inputs["attention_mask"] = torch.ones_like(packed["input_ids"], dtype=torch.bool)
        with packed_row(packed, getattr(self, "packed_attention", "auto")), over(tree):
            out = backbone(**inputs, use_cache=False)
    else:
        out = backbone(**inputs, use_cache=False)
    hidden = out.last_hidden_state[:, -packed["input_ids"].shape[1] :]  # behind the virtual tokens of prompt tuning
    hidden_UD = hidden.flatten(0, 1)[packed["target_at"]]
    return _score(self.get_output_embeddings(), hidden_UD, packed["target_ids"], self.config.get_text_config())


def patch_forward(model: PreTrainedModel) -> None:
    """Let `model(input_ids=..., packed=batch)` return target log-probabilities. Done once per model."""
    if hasattr(model.forward, "takes_packed"):
        return
    installed = vars(model).get("forward")  # e.g. a hook of accelerate; else the class's own, looked up on each call

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(self: PreTrainedModel, *args: Any, packed: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if packed is not None:
            return _packed_forward(self, packed, kwargs)
        return installed(*args, **kwargs) if installed else type(self).forward(self, *args, **kwargs)

    forward.takes_packed = True
    model.forward = types.MethodType(forward, model)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model under wrappers of PEFT, DDP and others."""
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise EngineError(f"{type(model).__name__} holds no transformers model: use engine=trl")
        model = inner
    return model


def pair_logps(model: nn.Module, batch: Mapping[str, Any], *, tails: bool = False) -> PairLogps:
    """Log-probabilities of a batch of `pack_pairs`, whose tensors lie on the model's device.

    Args:
        model: prepared by `prepare_model`, in any wrapper whose forward reaches it.
        tails: sum up what lies beyond the shorter answer's length besides, for LD-DPO.
    """
    logps_T = model(input_ids=batch["input_ids"], packed=batch)[batch["score_at"]]
    scored = batch["scored"]
    sums = torch.segment_reduce(logps_T, "sum", lengths=scored.flatten(), initial=0.0, unsafe=True).view(-1, 3)
    lengths = batch["lengths"].to(sums.dtype)
    prompt, chosen, rejected = sums.unbind(1)
    weight = batch["weight"].to(sums.dtype)
    columns = {f"{name}_B": batch[name].to(sums.dtype) for name in PAIR_COLUMNS if name in batch}
    if tails:
        shorter = scored[:, 1:].min(1).values
        cut = torch.stack([scored[:, 0], shorter, scored[:, 1] - shorter, shorter, scored[:, 2] - shorter], dim=1)
        parts = torch.segment_reduce(logps_T, "sum", lengths=cut.flatten(), initial=0.0).view(-1, 5)
        columns |= {"chosen_tail_B": parts[:, 2], "rejected_tail_B": parts[:, 4]}
    return PairLogps(chosen, rejected, prompt, lengths[:, 1], lengths[:, 2], lengths[:, 0], weight, **columns)
