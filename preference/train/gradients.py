"""The norm of a gradient on a CPU, and clipping by it, so exact that they do not depend on how weights are shared out.

torch adds up the squares of a float32 tensor on a CPU in a few running sums: of 28 million numbers (an embedding) the
norm is off by 1e-5 to 1e-3, and otherwise for a half of it. On a GPU sums are trees, and torch's own norm is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

CHUNK = 1 << 16


def _local_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """This rank's part of each gradient."""
    for p in parameters:
        if p.grad is not None:
            yield p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad


def _norms_of_chunks(flat: Tensor) -> Iterator[Tensor]:
    whole = len(flat) - len(flat) % CHUNK
    for part in (flat[:whole].view(-1, CHUNK), flat[whole:].view(1, -1)):
        yield torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)


def exact_norm(parameters: Iterable[nn.Parameter], add_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The norm of all gradients together, float32, within 1e-6.

    Args:
        add_up: sums a number over ranks; given where each rank has a part of the gradients.
    """
    norms = [norm for gradient in _local_gradients(parameters) for norm in _norms_of_chunks(gradient.reshape(-1))]
    square = torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
    return (add_up(square) if add_up else square).sqrt().float()


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale gradients of that norm down to the `largest`, as `torch.nn.utils.clip_grad_norm_` does."""
    scale = largest / (norm + 1e-6)
    if scale < 1:
        for gradient in _local_gradients(parameters):
            gradient.mul_(scale)
