"""torch.compile for the packed engine: each decoder layer by itself, for rows of any length.

A layer is compiled once and serves all rows and all layers of its kind (dynamic shapes), in place of a whole model that
is compiled again for every length. The attention stays a call that the compiler does not look into, and the layers are
those of transformers and PEFT: what the engine puts in their place to save memory (engine/layers/) the compiler would
have to break off at.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from preference.engine.attention import NAME, NAME_OVER_EAGER
from preference.engine.forward import causal_lm
from preference.engine.masks import EngineError


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """
    Raises:
        EngineError: the model keeps its layers in no list.
    """
    depth = getattr(lm.config.get_text_config(), "num_hidden_layers", None)
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise EngineError(f"{type(lm).__name__} has no list of its {depth} layers to compile: torch_compile=false")


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Have the layers of a model that `prepare_model` has made ready compile at their first call; returns how many."""
    layers = decoder_layers(causal_lm(model))
    for name in (NAME, NAME_OVER_EAGER):
        function = AttentionInterface()[name]
        if not hasattr(function, "opaque"):
            opaque = torch.compiler.disable(function)
            opaque.opaque = True
            AttentionInterface.register(name, opaque)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return len(layers)
