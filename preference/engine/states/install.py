"""Layers that carry a state learn of the packed row: their functions pass through states/kinds.py while one is open.

A modeling file's functions are looked up in the file each time they are called, and transformers has no registry for
them as it has for attention. So each is replaced there by one that asks whether a packed forward is running, and calls
the one before if not: generation and everything else go on as before.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from preference.engine import own_attention
from preference.engine.states.kinds import FORWARDS, FUNCTIONS
from preference.engine.states.tree import current, over


def _switch(plain: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def function(*args: Any, **kwargs: Any) -> Any:
        tree = current()
        return plain(*args, **kwargs) if tree is None else packed(tree, plain, *args, **kwargs)

    function.packed = packed
    return function


def install(model: nn.Module) -> bool:
    """Let the layers of `model` that carry a state run over packed rows; returns whether there are any."""
    found = False
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file = vars(sys.modules[name])
        for function, packed in (FUNCTIONS | own_attention.FUNCTIONS).items():
            if function in file:
                found = True
                if not hasattr(file[function], "packed"):
                    file[function] = _switch(file[function], packed)
    for module in model.modules():
        if type(module).__name__ in FORWARDS:
            found = True
            module.forward = types.MethodType(FORWARDS[type(module).__name__], module)
    return found


def keep_tree_in_recomputation(model: nn.Module) -> None:
    """Let layers that are computed again in the backward run over the tree that their forward ran over."""
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not hasattr(checkpoint, "keeps_tree"):
            module._gradient_checkpointing_func = _keeping(checkpoint)


def _keeping(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tree = current()

        def again(*inputs: Any, **options: Any) -> Any:
            with over(tree):
                return function(*inputs, **options)

        return checkpoint(again, *args, **kwargs)

    keeping.keeps_tree = True
    return keeping
