"""transformers' optimizers: which there are, which can be had here, and whether their arguments mean anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from preference.optimization.keywords import OptimizationError, keywords

PROJECTED = ("galore", "apollo")  # they project the gradients of optim_target_modules
IN_BACKWARD = ("lomo", "adalomo")  # and all that end in _layerwise
NONSENSE = "not-a-value"


def optimizer_names() -> tuple[str, ...]:
    """The optimizers of this version of transformers."""
    from transformers.training_args import OptimizerNames

    return tuple(kind.value for kind in OptimizerNames)


def is_projected(name: str) -> bool:
    """Whether an optimizer takes optim_target_modules."""
    return name.startswith(PROJECTED)


def check_optimizer(name: str, arguments: str | None, targets: str | None) -> None:
    """Ask transformers for the optimizer as the Trainer will, with a model of one layer.

    Raises:
        OptimizationError: its package is not installed, an argument is missing, wrong or not used.
    """
    if name in IN_BACKWARD or name.endswith("_layerwise"):
        raise OptimizationError(
            f"optim={name} changes weights within the backward pass, before the whole batch is summed up: use "
            f"{'adamw_torch_fused' if 'lomo' in name else name.removesuffix('_layerwise')}"
        )
    if is_projected(name) and not targets:
        raise OptimizationError(f"optim={name} needs optim_target_modules: all-linear, or q_proj,v_proj,...")
    given = {option: str(value) for option, value in keywords(arguments).items()}
    made = _ask(name, given)
    for option in given:
        rest = {other: value for other, value in given.items() if other != option}
        try:
            used = _ask(name, rest | {option: NONSENSE}) != _ask(name, rest)
        except OptimizationError:
            used = True
        if not used:
            raise OptimizationError(f"optim={name} does not use {option} of optim_args")
    _construct(name, made)


def _ask(name: str, given: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """(class, keyword arguments); parameters and modules, which differ from call to call, left out."""
    import torch
    from transformers import Trainer

    args = SimpleNamespace(
        optim=name, optim_args=",".join(f"{option}={value}" for option, value in given.items()),
        optim_target_modules="all-linear", learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        weight_decay=0.0, warmup_steps=1, gradient_accumulation_steps=1, parallel_mode=None,
    )  # fmt: skip
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    except (ImportError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        what = f"with optim_args={args.optim_args}" if given else "cannot be had here"
        raise OptimizationError(f"optim={name} {what}: {' '.join(str(error).split())}") from None
    return made, {option: value for option, value in options.items() if option not in ("params", "model")}


def _construct(name: str, made: tuple[Any, dict[str, Any]]) -> None:
    """The optimizer over one number: it checks the ranges of its own arguments."""
    import torch

    kind, options = made
    if is_projected(name):
        return
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ValueError, TypeError) as error:
        raise OptimizationError(f"optim={name} {options}: {' '.join(str(error).split())}") from None
