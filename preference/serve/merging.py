"""From an adapter and its base to one plain model, and what that changes in its answers.

Merging adds the adapter's product to the weights in float32; only then are they rounded, once, to the type they are
saved in. Both steps are compared with the adapted model on prompts, so that a merge that does not fit shows before it
is saved. The forwards are computed in float64: in float32 they alone differ by ten times what merging does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from preference.models.hardware import detect
from preference.models.kinds import check_kind
from preference.serve.loading import LoadingError, Source, load_tuned_model

_PROBES = (
    ("What should I do about a mild fever and a sore throat?", "Rest, drink plenty of water, and see a doctor if it"),
    ("感冒发烧应该怎么办？", "多休息，多喝水。如果发烧超过三天，请及时就医。"),
    ("Name the first five prime numbers.", "The first five prime numbers are 2, 3, 5, 7 and 11."),
)
Probes = list[tuple[list[int], int]]
# Merging may change logits by MERGE_LIMIT, or by MERGE_SHARE of the largest where logits are large.
MERGE_LIMIT, MERGE_SHARE = 1e-5, 1e-6
FLOAT32_SHARE = 1e-4  # for forwards in float32: ten times what their own rounding was seen to make
# Rounding the weights may change logits by so many times what computing in that type changes (root mean squares).
# Seen: up to 1.0; 1.8 with random adapters under which a tiny model is chaotic.
ROUNDING_LIMIT = 3.0


@dataclass(frozen=True)
class Difference:
    """Between two models on the same prompts. `logits`: largest difference, absolute; `share`: of the largest logit;
    `rms`: root mean square of the differences, of that of the logits; `kl`: mean divergence of the next-token
    distributions, nats per token; `computed_in`: the type of the forwards."""

    logits: float
    share: float
    rms: float
    kl: float
    computed_in: str

    def __str__(self) -> str:
        return (
            f"logits differ by {self.logits:.1e} at most, by {self.rms:.1e} of their size (rms); "
            f"KL divergence {self.kl:.1e} nats a token"
        )


def probes(template: Any, tokenizer: Any) -> Probes:
    """(ids, where the answer begins) of questions with answers, in the model's own template."""
    found = []
    for question, answer in _PROBES:
        prompt = tokenizer.encode(template.get_prompt(question), add_special_tokens=False)
        found.append((prompt + tokenizer.encode(answer, add_special_tokens=False), len(prompt)))
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Float64(TorchFunctionMode):
    """Where models ask for float32, as norms, softmax and rotary angles do, float64 is used."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@torch.no_grad()
def logits_of(model: Any, probes: Probes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, V] logits in `dtype`, float32 or float64, at the N positions that write the answers.

    With float64 the model, of float32 weights, computes in it; the weights are then as before.
    """
    if dtype == torch.float64:
        try:
            model.double()
            with _Float64():
                return _forward(model, probes)
        finally:
            model.float()
    return _forward(model, probes).float()


def _forward(model: Any, probes: Probes) -> torch.Tensor:
    ids = ((torch.tensor([ids]), start) for ids, start in probes)
    return torch.cat([model(input_ids=row, use_cache=False).logits[0, start - 1 :] for row, start in ids])


def exact_logits(model: Any, probes: Probes) -> torch.Tensor:
    """logits_of in float64, or in float32 where memory is short or the architecture (MoE) has no kernel for float64."""
    if 8 * sum(weight.numel() for weight in model.parameters()) < 0.8 * detect(use_cpu=True).memory:
        try:
            return logits_of(model, probes, torch.float64)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    else:
        reason = "too little memory"
    print(f"merging is measured in float32 ({reason})")
    return logits_of(model, probes)


def difference(before_NV: torch.Tensor, after_NV: torch.Tensor) -> Difference:
    change_NV = before_NV - after_NV
    largest, rms = change_NV.abs().max().item(), change_NV.square().mean().sqrt().item()
    before, after = before_NV.log_softmax(-1), after_NV.log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    scale = before_NV.abs().max().item(), before_NV.square().mean().sqrt().item()
    return Difference(largest, largest / scale[0], rms / scale[1], max(kl, 0.0), name_of(before_NV.dtype))


def load_merged(
    source: Source, probes: Probes, use_modelscope: bool = False
) -> tuple[Any, torch.Tensor, Difference | None]:
    """The tuned model as a plain float32 model on the CPU, and exact_logits of it as it was trained, [N, V]; for an
    adapter also what merging changed.

    Raises:
        LoadingError: the base is quantized, or the merged model answers otherwise than the adapted one.
    """
    if source.adapter:
        check_kind(source.name, changes=True)
    model = load_tuned_model(source, torch.float32, "cpu", use_modelscope)
    if getattr(model.config, "quantization_config", None) is not None:
        raise LoadingError("quantized weights cannot be merged into: name the unquantized model with --base_model")
    exact_NV = exact_logits(model, probes)
    if not source.adapter:
        return model, exact_NV, None
    model = model.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    found = difference(exact_NV, logits_of(model, probes, exact_NV.dtype))
    in_float64 = exact_NV.dtype == torch.float64
    share = MERGE_SHARE if in_float64 else FLOAT32_SHARE
    if not (found.share <= share or (in_float64 and found.logits <= MERGE_LIMIT)):
        raise LoadingError(
            f"the merged model answers otherwise than the adapted one (logits differ by {found.logits:.3g}, "
            f"{found.share:.1e} of the largest; allowed {share:.0e}). An adapter on an output head that is tied "
            "to the embedding cannot be merged: keep it as an adapter"
        )
    return model, exact_NV, found


@torch.no_grad()
def cast(
    model: Any, dtype: torch.dtype, probes: Probes, exact_NV: torch.Tensor
) -> tuple[Difference, Difference] | None:
    """Round the weights of `model` (float32) to `dtype`, in place.

    Returns:
        How far from `exact_NV` rounding the weights takes it; and as a measure for that, how far computing in `dtype`
        does with the weights as they were. None where all weights fit in `dtype` as they are.

    Raises:
        LoadingError: rounding takes it further, by more than ROUNDING_LIMIT.
    """
    if all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in model.parameters()):
        model.to(dtype)
        return None
    with torch.autocast("cpu", dtype):
        computed_NV = logits_of(model, probes)
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))
    rounding = difference(exact_NV, logits_of(model, probes, exact_NV.dtype))
    computing = difference(exact_NV, computed_NV)
    if not rounding.rms <= ROUNDING_LIMIT * computing.rms:
        raise LoadingError(
            f"weights rounded to {name_of(dtype)} answer otherwise than the tuned model: logits differ by "
            f"{rounding.rms:.1e} of their size (rms), where computing in that type makes {computing.rms:.1e}. "
            "Export with --dtype float32"
        )
    model.to(dtype)
    return rounding, computing
