"""LoRA layers that read one input (query, key and value; gate and up) as one step of autograd.

Their A's are one matrix: one product reads the input for all of them, and one gives its gradient. With x [N, I] and the
adapters' A_i [R_i, I], B_i [O_i, R_i]:

    h = s x [A_1; A_2; ..]^T,  y_i = x W_i^T + h_i B_i^T
    g_i = s dy_i B_i,  dx = sum of dy_i W_i + g A,  dA = g^T x,  dB_i = dy_i^T h_i

Gate and up are of one shape, and both are kept for the backward: they lie in one tensor, and so do their gradients, so
that what is done to both is done in one batched product.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from preference.engine.cuda.lora import Adapted, cast, scaled, wide_product, writes_float32
from preference.engine.layers.linear import cast_once
from preference.engine.layers.lora import adapted_forward, plain_adapter

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
IN_ONE = ("gate_proj", "up_proj")  # the outputs of which lie in one tensor


def behind(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors lie one behind another in one storage."""
    end, storage = tensors[0].storage_offset(), tensors[0].untyped_storage()
    for x in tensors:
        if not x.is_contiguous() or x.untyped_storage()._cdata != storage._cdata or x.storage_offset() != end:
            return False
        end += x.numel()
    return True


def rows_of(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices of one width below each other; copied only where they do not lie so."""
    if not behind(tensors):
        return torch.cat(list(tensors))
    return tensors[0].as_strided((sum(len(x) for x in tensors), tensors[0].shape[1]), tensors[0].stride())


def stack_of(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, [n, ...]; copied only where they do not lie one behind another."""
    if not behind(tensors):
        return torch.stack(list(tensors))
    return tensors[0].as_strided((len(tensors), *tensors[0].shape), (tensors[0].numel(), *tensors[0].stride()))


def _wide_batch(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Batches of `wide_product`."""
    if a.dtype != dtype == torch.float32 and a.device.type == "cuda" and writes_float32("bmm"):
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a, b).to(dtype)


class Siblings(torch.autograd.Function):
    """x [..., I]; frozen W_i [O_i, I] and biases [O_i] or None; A_i, B_i -> an output [..., O_i] for each.

    `tensors`: weight, bias, A and B of each layer in turn.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, dtype: torch.dtype, in_one: bool, *tensors: Any) -> Any:
        layers = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        x_NI = cast_once(x, dtype).reshape(-1, x.shape[-1])
        weights = [weight.detach().to(dtype) for weight, *_ in layers]
        b_OR = [cast(b, dtype) for *_, b in layers]
        ranks = [b.shape[1] for b in b_OR]
        a_RI = rows_of([cast(a, dtype) for _, _, a, _ in layers])
        h_NR = scaled(x_NI, a_RI.t(), scale)
        in_one = in_one and len({b.shape for b in b_OR}) == 1
        if in_one:
            all_NO = x_NI.new_empty((len(layers), len(x_NI), len(weights[0])))
            outputs = list(all_NO.unbind())
        else:
            outputs = [x_NI.new_empty(len(x_NI), len(weight)) for weight in weights]
        for out, weight, (_, bias, *_) in zip(outputs, weights, layers, strict=True):
            if bias is None:
                torch.mm(x_NI, weight.t(), out=out)
            else:
                torch.addmm(bias.to(dtype), x_NI, weight.t(), out=out)
        if in_one:
            all_NO.baddbmm_(_by_layer(h_NR, len(layers)), stack_of(b_OR).transpose(1, 2))
        else:
            for out, h, b in zip(outputs, h_NR.split(ranks, 1), b_OR, strict=True):
                out.addmm_(h, b.t())
        ctx.save_for_backward(x_NI, h_NR, a_RI, *weights, *b_OR)
        ctx.scale, ctx.in_one, ctx.ranks, ctx.shape = scale, in_one, ranks, x.shape
        ctx.dtypes = x.dtype, dtype, layers[0][2].dtype, layers[0][3].dtype
        return tuple(out.view(*x.shape[:-1], -1) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_NI, h_NR, a_RI, *rest = ctx.saved_tensors
        weights, b_OR = rest[: len(grads)], rest[len(grads) :]
        x_dtype, dtype, a_dtype, b_dtype = ctx.dtypes
        d_NO = [grad.reshape(-1, grad.shape[-1]).to(dtype) for grad in grads]
        g_NR = torch.empty_like(h_NR)
        if ctx.in_one:
            d, g, h = stack_of(d_NO), _by_layer(g_NR, len(grads)), _by_layer(h_NR, len(grads))
            torch.baddbmm(d.new_empty(()), d, stack_of(b_OR), beta=0, alpha=ctx.scale, out=g)
            d_b = _wide_batch(d.transpose(1, 2), h, b_dtype).unbind()
        else:
            for grad, b, g in zip(d_NO, b_OR, g_NR.split(ctx.ranks, 1), strict=True):
                torch.addmm(grad.new_empty(()), grad, b, beta=0, alpha=ctx.scale, out=g)
            d_b = [wide_product(d.t(), h, b_dtype) for d, h in zip(d_NO, h_NR.split(ctx.ranks, 1), strict=True)]
        d_a = wide_product(g_NR.t(), x_NI, a_dtype).split(ctx.ranks)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(d_NO[0], weights[0])
            for grad, weight in zip(d_NO[1:], weights[1:], strict=True):
                d_x.addmm_(grad, weight)
            d_x = d_x.addmm_(g_NR, a_RI).view(ctx.shape).to(x_dtype)
        return d_x, None, None, None, *(x for a, b in zip(d_a, d_b, strict=True) for x in (None, None, a, b))


def _by_layer(h_NR: Tensor, count: int) -> Tensor:
    """[N, count * R] as [count, N, R], in place."""
    return h_NR.unflatten(1, (count, -1)).transpose(0, 1)


class Group:
    """Layers of one module that read one input in turn. What the first computes for the others waits for them."""

    def __init__(self, layers: list[LoraLinear], in_one: bool) -> None:
        self.layers, self.in_one = layers, in_one
        self.apart = False  # they were seen to read different inputs
        self.waiting: dict[int, Tensor] = {}
        self.read: Any = None

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """The output of the layer in that place; None where it is to compute by itself."""
        now = (x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        if place and self.waiting:
            source, then = self.read
            if source() is x and then == now and place in self.waiting:
                return self.waiting.pop(place)
            self.waiting, self.apart = {}, True
        if place or self.apart or (settings := self._settings(x)) is None:
            return None
        first, *others = Siblings.apply(x, *settings)
        self.waiting = dict(enumerate(others, 1))
        self.read = weakref.ref(x, lambda gone: self._forget(gone)), now
        return first

    def _forget(self, gone: Any) -> None:
        if self.read is not None and self.read[0] is gone:
            self.waiting = {}

    def _settings(self, x: Tensor) -> tuple[Any, ...] | None:
        """What `Siblings` takes; None where the layers do not all compute as it does."""
        names = [plain_adapter(layer) for layer in self.layers]
        if None in names:
            return None
        each = list(zip(self.layers, names, strict=True))
        scales = {float(layer.scaling[name]) for layer, name in each}
        tensors = [
            (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
            for layer, name in each
        ]
        kinds = {(weight.dtype, a.dtype, b.dtype) for weight, _, a, b in tensors}
        if len(scales) > 1 or len(kinds) > 1:
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else tensors[0][0].dtype
        if not autocast and x.dtype != dtype:
            return None
        return scales.pop(), dtype, self.in_one, *(t for layer in tensors for t in layer)


def _forward(group: Group, place: int, self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = None if args or kwargs else group.take(place, x)
    return adapted_forward(Adapted, self, x, *args, **kwargs) if found is None else found


def join_siblings(model: nn.Module) -> int:
    """Let joined LoRA layers that read one input run as one step; returns how many such groups there are."""
    groups = []
    for module in model.modules():
        for names in NAMES:
            layers = [m for m in (getattr(module, name, None) for name in names) if hasattr(m, "packed_adapter")]
            if len(layers) > 1:
                groups.append(Group(layers, names == IN_ONE))
    for group in groups:
        for place, layer in enumerate(group.layers):
            layer.packed_group = group
            layer.forward = types.MethodType(functools.partial(_forward, group, place), layer)
    return len(groups)
