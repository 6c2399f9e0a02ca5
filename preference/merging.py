"""From an adapter and its base to one plain model, and what that changes in its answers.

Merging adds the adapter's product to the weights in float32; only then are they rounded to the type they are saved in.
Both steps are measured on prompts, so that a merge that does not fit shows before it is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from preference.loading import LoadingError, Source, load_tuned_model

_PROBES = (
    ("What should I do about a mild fever and a sore throat?", "Rest, drink plenty of water, and see a doctor if it"),
    ("感冒发烧应该怎么办？", "多休息，多喝水。如果发烧超过三天，请及时就医。"),
    ("Name the first five prime numbers.", "The first five prime numbers are 2, 3, 5, 7 and 11."),
)
Probes = list[tuple[list[int], int]]
MERGE_LIMIT = 1e-4  # of the largest logit: ten times what rounding in float32 was seen to make


@dataclass(frozen=True)
class Difference:
    """Between two models on the same prompts. `logits`: largest difference, absolute; `share`: of the largest logit;
    `kl`: mean divergence of the next-token distributions, nats per token."""

    logits: float
    share: float
    kl: float


def probes(template: Any, tokenizer: Any) -> Probes:
    """(ids, where the answer begins) of questions with answers, in the model's own template."""
    found = []
    for question, answer in _PROBES:
        prompt = tokenizer.encode(template.get_prompt(question), add_special_tokens=False)
        found.append((prompt + tokenizer.encode(answer, add_special_tokens=False), len(prompt)))
    return found


@torch.no_grad()
def logits_of(model: Any, probes: Probes) -> torch.Tensor:
    """[N, V] float32 logits at the N positions that write the answers."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0, start - 1 :].float() for ids, start in probes])


def difference(before_NV: torch.Tensor, after_NV: torch.Tensor) -> Difference:
    largest = (before_NV - after_NV).abs().max().item()
    before, after = before_NV.log_softmax(-1), after_NV.log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    return Difference(largest, largest / before_NV.abs().max().item(), max(kl, 0.0))


def load_merged(source: Source, probes: Probes, use_modelscope: bool = False) -> tuple[Any, Difference | None]:
    """The tuned model as a plain float32 model on the CPU; for an adapter also what merging changed.

    Raises:
        LoadingError: the base is quantized, or the merged model answers otherwise than the adapted one.
    """
    model = load_tuned_model(source, torch.float32, "cpu", use_modelscope)
    if getattr(model.config, "quantization_config", None) is not None:
        raise LoadingError("quantized weights cannot be merged into: name the unquantized model with --base_model")
    if not source.adapter:
        return model, None
    adapted = logits_of(model, probes)
    model = model.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    found = difference(adapted, logits_of(model, probes))
    if not found.share <= MERGE_LIMIT:
        raise LoadingError(
            f"the merged model answers otherwise than the adapted one (logits differ by {found.logits:.3g}, "
            f"{found.share:.1e} of the largest; allowed {MERGE_LIMIT:.0e}). An adapter on an output head that is tied "
            "to the embedding cannot be merged: keep it as an adapter"
        )
    return model, found


def cast(model: Any, dtype: torch.dtype, probes: Probes) -> tuple[Difference, Difference | None]:
    """Round the weights of `model` (float32) to `dtype`, in place.

    Returns:
        What rounding the weights alone changes; and as a measure for that, if the type is a smaller one, what computing
        in it changes with the weights as they were.
    """
    before = logits_of(model, probes)
    computed = None
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            computed = difference(before, logits_of(model, probes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
    rounded = difference(before, logits_of(model, probes))
    model.to(dtype)
    return rounded, computed
