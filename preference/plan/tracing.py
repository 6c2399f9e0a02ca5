"""A training step on paper: what it would hold in memory and compute, with no weight, activation or gradient made.

The model is built on the meta device and run, forward and backward, under torch's FakeTensorMode: every operation sees
shapes and types alone. A dispatch mode above it follows every storage that is made and freed, and counts the
floating-point operations of matrix products and the bytes that the other operations read and write. So the figures
come from the model's own code, with its adapter, autocast and checkpointing, not from a formula for one architecture.

Layers of one kind do the same, so a deep model is run with a few layers, and with twice as many; all figures grow
evenly from there. What a kernel takes for itself while it runs is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from preference.engine.forward import causal_lm
from preference.errors import PreferenceError

Loss = Callable[[nn.Module, dict[str, Any]], Tensor]
FEW = 2  # groups of layers of the smaller model that is run; the larger has twice as many


class TraceError(PreferenceError, RuntimeError):
    """A model whose step cannot be followed without its weights (experts chosen by value, say)."""


@dataclass(frozen=True)
class Trace:
    """A step on paper. Bytes beyond weights and earlier gradients; the peaks are the most at any time of a phase.

    Attributes:
        activations: what the layers leave for the backward.
        layers, head, early, late: peaks while the layers run forward; head and loss, forward; the head and the upper
            half of the layers, backward; the rest.
        left: gradients.
        flops: operations of matrix products. moved: bytes read and written by all other operations.
    """

    activations: float
    layers: float
    head: float
    early: float
    late: float
    left: float
    flops: float
    moved: float

    @property
    def peak(self) -> float:
        return max(self.layers, self.head, self.early, self.late)

    @property
    def forward_peak(self) -> float:
        return max(self.layers, self.head)


def _is_free(func: Any) -> bool:
    """Views and fresh empty tensors: nothing is read or written."""
    return func.__name__.startswith(("empty", "new_empty")) or any(
        result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
    )


class _Meter(TorchDispatchMode):
    """Follows what is made, freed and computed, once `begin` was called."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.peaks: dict[str, int] = {}
        self.phase = ""
        self.now = self.flops = self.moved = 0

    def begin(self, phase: str) -> None:
        self.phase, self.peaks[phase] = phase, self.now

    def know(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.known:
            return
        size = storage.nbytes() if self.phase else 0  # what was there before is not counted

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        if self.phase:
            self.peaks[self.phase] = max(self.peaks[self.phase], self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        for tensor in made:
            self.know(tensor)
        if not self.phase:
            return out
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            counted = args[:2] if func._overloadname == "dtype" else args  # without the type of what is written
            self.flops += count(*counted, **(kwargs or {}), out_val=out)
        elif not _is_free(func):
            read = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in made + read)
        return out


def materialize(model: nn.Module, device: str) -> None:
    """Give every parameter and buffer on the meta device a fake tensor on `device`; tied ones stay tied.

    To be called under a FakeTensorMode.
    """
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
                tensors[name] = fakes[id(tensor)]


def _layer_list(model: nn.Module) -> tuple[nn.Module, str]:
    """(owner, attribute) of the list of the model's layers."""
    lm = causal_lm(model)
    depth = getattr(lm.config.get_text_config(), "num_hidden_layers", None)
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, name
    raise TraceError(f"{type(lm).__name__} has no list of its {depth} layers")


def _period(config: Any) -> int:
    """After how many layers the kinds of layers repeat."""
    kinds = getattr(config, "layer_types", None) or []
    for period in range(1, len(kinds)):
        if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
            return period
    return max(1, len(kinds))


def _alike(layers: Any, period: int) -> bool:
    """Whether the parameters of each layer are those of the one a period before."""
    shapes = [[(name, p.shape, p.dtype, p.requires_grad) for name, p in x.named_parameters()] for x in layers]
    return all(shapes[i] == shapes[i - period] for i in range(period, len(shapes)))


class PaperModel:
    """A model of the meta device, ready to be run without weights.

    Args:
        model: on the meta device, with its adapter and as the engine wants it (`prepare_model`). It is changed.
        device: kind of device whose operators are followed.
    """

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.model, self.mode, self.device = model, FakeTensorMode(allow_non_fake_inputs=True), device
        with self.mode:
            materialize(model, device)
        model.train()

    def trace(self, batch: Mapping[str, Any], loss: Loss, *, accumulating: bool = False) -> Trace:
        """Follow forward and backward over one micro-batch.

        Args:
            batch: tensors, of which shape and type count, and other values.
            loss: makes a scalar from the model and the batch.
            accumulating: whether gradients of an earlier micro-batch are there already.

        Raises:
            TraceError: the model's code looks at values, which are not there.
        """
        owner, name = _layer_list(self.model)
        layers = getattr(owner, name)
        few = FEW * _period(causal_lm(self.model).config.get_text_config())
        if len(layers) <= 3 * few or not _alike(layers, few // FEW):
            return self._run(batch, loss, accumulating, layers)
        try:
            traces = []
            for count in (few, 2 * few):
                setattr(owner, name, nn.ModuleList(list(layers)[:count]))
                traces.append(astuple(self._run(batch, loss, accumulating, getattr(owner, name))))
        finally:
            setattr(owner, name, layers)
        more = (len(layers) - few) / few
        return Trace(*(a + (b - a) * more for a, b in zip(*traces, strict=True)))

    def _run(self, batch: Mapping[str, Any], loss: Loss, accumulating: bool, layers: nn.ModuleList) -> Trace:
        with self.mode, _Meter() as meter:
            fakes = {
                key: torch.empty(value.shape, dtype=value.dtype, device=self.device)
                if isinstance(value, Tensor)
                else value
                for key, value in batch.items()
            }
            for parameter in self.model.parameters():
                meter.know(parameter)
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad and accumulating else None
            try:
                meter.begin("layers")
                with _marks(layers, meter) as kept:
                    result = loss(self.model, fakes)
                    meter.begin("early")
                    result.backward()
                del result
            except Exception as error:  # whatever a model's own code raises at tensors without values
                reason = str(error).splitlines()[0] if str(error) else ""
                raise TraceError(f"{type(error).__name__}: {reason}") from error
            left = meter.now
            for parameter in self.model.parameters():
                parameter.grad = None
        peaks = (meter.peaks.get(phase, 0) for phase in ("layers", "head", "early", "late"))
        return Trace(kept["activations"], *peaks, left, meter.flops, meter.moved)


@contextlib.contextmanager
def _marks(layers: nn.ModuleList, meter: _Meter) -> Iterator[dict[str, int]]:
    """Tell the meter when the layers have run forward and half of them backward; yields what the layers left."""
    kept: dict[str, int] = {}

    def middle_ran(_: nn.Module, __: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if meter.phase == "layers" and hidden.requires_grad:  # checkpointing runs a layer again, in its backward
            hidden.register_hook(lambda _: meter.begin("late"))

    def last_ran(_: nn.Module, __: Any, out: Any) -> None:
        if meter.phase == "layers":
            kept["activations"] = meter.now
            meter.begin("head")

    last = len(layers) - 1
    handles = [layers[last // 2].register_forward_hook(middle_ran), layers[last].register_forward_hook(last_ran)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
