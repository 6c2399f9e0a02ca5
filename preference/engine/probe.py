"""How the packed engine may run a model: with shared prompts, in padded rows, or not at all.

What a class says about itself narrows the choice; then a few tokens are run both ways, packed and through the model's
plain forward, and their log-probabilities compared. So an architecture that nobody thought of is measured, not trusted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from preference.engine.attention import installed
from preference.engine.forward import causal_lm, pair_logps, patch_forward
from preference.engine.head import target_logps
from preference.engine.masks import EngineError
from preference.engine.own_attention import has_own_attention
from preference.engine.packing import MIN_SHARED, pack_pairs
from preference.engine.side import Side
from preference.engine.sides import side_of
from preference.engine.states.install import install

log = logging.getLogger(__name__)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
STATE_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
TOKEN_LAYERS = {"mlp", "moe"}  # each token by itself


@dataclass(frozen=True)
class Engine:
    """How a model is run.

    Attributes:
        share_prompt: in one packed row; else in two padded rows per pair. reason: why not shared.
        attention: how the attention of a packed row is computed, one of the side's `implementations`.
    """

    share_prompt: bool
    reason: str = ""
    attention: str = "auto"


@dataclass(frozen=True)
class Wanted:
    """What `prepare` is asked for."""

    share_prompt: bool
    attention: str
    lighten: bool


def _prompt_learning(model: nn.Module) -> bool:
    return any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values())


def _why_not_shared(model: nn.Module, lm: PreTrainedModel, states: bool) -> str:
    """What a model says of itself that rules out a shared prefix; "" if nothing. states: `install` found some."""
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS - TOKEN_LAYERS
    other = sorted(kinds - STATE_LAYERS) or sorted(() if states else kinds)
    if _prompt_learning(model):
        return "virtual tokens of prompt tuning stand before each sequence"
    if other:
        return f"its {other[0]} layers are of a kind that the engine does not know"
    if not lm._can_set_attn_implementation() and not has_own_attention(lm):
        return f"{type(lm).__name__} does not use transformers' AttentionInterface"
    return ""


def _refuse_by_config(lm: PreTrainedModel) -> None:
    config = lm.config.get_text_config()
    if getattr(lm.config, "is_encoder_decoder", False):
        raise EngineError(f"{type(lm).__name__} is an encoder-decoder; only causal language models are trained here")
    if lm.get_output_embeddings() is None:
        raise EngineError(f"{type(lm).__name__} has no language-model head: use engine=trl")
    if getattr(config, "output_router_logits", False):
        raise EngineError(
            "output_router_logits adds a loss over all tokens of a micro-batch, which depends on how a batch is cut: "
            "set it to false in the model's config, or use engine=trl"
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _sequence_logps(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """[prompt, answer] sums of log-probabilities by the model's plain forward."""
    ids = torch.tensor([prompt + answer], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] : -1]
    logps = target_logps(logits, ids[0, 1:], 1.0, None)
    return torch.stack([logps[: len(prompt) - 1].sum(), logps[len(prompt) - 1 :].sum()])


def _probe_pairs(vocabulary: int) -> list[dict[str, list[int]]]:
    """Three short pairs of arbitrary tokens: one with a one-token prompt, two whose prompts begin alike."""
    lengths = ((MIN_SHARED + 6, 5, 7), (1, 4, 2), (MIN_SHARED + 4, 1, 3))
    ids = iter((17 + 7919 * i) % vocabulary for i in range(sum(map(sum, lengths))))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [{name: [next(ids) for _ in range(n)] for name, n in zip(names, sizes, strict=True)} for sizes in lengths]
    pairs[2]["prompt_ids"][:MIN_SHARED] = pairs[0]["prompt_ids"][:MIN_SHARED]
    return pairs


def plain_logps(model: nn.Module, pairs: list[dict[str, list[int]]]) -> Tensor:
    """[B, 3] sums over prompt, chosen and rejected tokens, one sequence at a time."""
    rows = []
    for pair in pairs:
        prompt, chosen = _sequence_logps(model, pair["prompt_ids"], pair["chosen_ids"])
        rows.append(torch.stack([prompt, chosen, _sequence_logps(model, pair["prompt_ids"], pair["rejected_ids"])[1]]))
    return torch.stack(rows)


def packed_logps(model: nn.Module, pairs: list[dict[str, list[int]]], share_prompt: bool) -> Tensor:
    """The same by the packed engine."""
    device = next(model.parameters()).device
    batch = pack_pairs(pairs, share_prompt=share_prompt)
    logps = pair_logps(model, {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()})
    return torch.stack([logps.prompt_B, logps.chosen_B, logps.rejected_B], dim=1)


def _difference(model: nn.Module, lm: PreTrainedModel, share_prompt: bool, autocast: torch.dtype | None) -> str:
    """How the packed forward differs from the plain one on the probe; "" if by rounding alone."""
    pairs = _probe_pairs(lm.config.get_text_config().vocab_size)
    low = autocast or {p.dtype for p in lm.parameters()} - {torch.float32, torch.float64}
    kind = next(lm.parameters()).device.type
    if kind != "cpu" and getattr(lm, "packed_states", False):  # kernels of recurrences multiply in 10 bits (TF32)
        low = True
    with _evaluating(model), torch.autocast(kind, autocast, enabled=autocast is not None):
        plain = plain_logps(model, pairs)
        try:
            packed = packed_logps(model, pairs, share_prompt)
        except EngineError as error:
            return str(error).removesuffix(": use engine=trl")
        except Exception as error:  # whatever a model's own code raises at a row that it was not written for
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    # A wrong mask shows in tiny random models at 1e-3 and in trained ones at 1; rounding grows with the numbers.
    tolerance = 0.3 if low else 2e-4 + 1e-5 * float(plain.abs().max())
    worst = float((packed - plain).abs().max())
    return "" if worst <= tolerance else f"log-probabilities differ by {worst:.2g}"


def _can_be_probed(lm: PreTrainedModel) -> bool:
    """Not while its weights are elsewhere: on the meta device, or sharded by FSDP or ZeRO-3."""
    return all(not p.is_meta and p.numel() and not isinstance(p, DTensor) for p in lm.parameters())


def _differences(model: nn.Module, lm: PreTrainedModel, share_prompt: bool, autocast: torch.dtype | None) -> str:
    """`_difference` in the weights' own precision, which shows most, and in the run's, whose kernels a GPU runs."""
    reason = _difference(model, lm, share_prompt, None)
    if autocast and not reason and next(lm.parameters()).device.type != "cpu":  # a CPU runs the same code in both
        reason = _difference(model, lm, share_prompt, autocast)
    return reason


def _choose(model: nn.Module, lm: PreTrainedModel, wanted: Wanted, autocast: torch.dtype | None, side: Side) -> Engine:
    lm.packed_states = wanted.share_prompt and install(lm)
    reason = _why_not_shared(model, lm, lm.packed_states) if wanted.share_prompt else "share_prompt=false"
    probed, own = _can_be_probed(lm), has_own_attention(lm)
    ways = side.implementations if wanted.attention == "auto" else (wanted.attention,)
    if own:
        ways, reason = ways[:1], reason if wanted.attention == "auto" else "its attention is code of its own"
    if not reason:
        with contextlib.nullcontext(lambda: None) if own else installed(lm) as keep:
            for lm.packed_attention in ways:
                found = _differences(model, lm, True, autocast) if probed else ""
                if not found:
                    keep()
                    if reason:
                        log.warning("%s: attn_implementation=%s (%s)", type(lm).__name__, lm.packed_attention, reason)
                    return Engine(True, attention=lm.packed_attention)
                reason = reason or found
    if wanted.attention != "auto":
        raise EngineError(f"attn_implementation={wanted.attention} does not serve {type(lm).__name__}: {reason}; "
                          "attn_implementation=auto takes what does")  # fmt: skip
    difference = _differences(model, lm, False, autocast) if probed else ""
    if difference:
        raise EngineError(f"{type(lm).__name__} cannot be run by the packed engine ({difference}): use engine=trl")
    return Engine(False, reason)


def prepare_model(
    model: nn.Module,
    *,
    share_prompt: bool = True,
    device: str | None = None,
    autocast: torch.dtype | None = None,
    attention: str = "auto",
    lighten: bool = True,
) -> Engine:
    """Make `model` (a causal LM, PEFT-wrapped or not) ready for `pair_logps`. Calling it again changes nothing.

    Args:
        share_prompt: False lays every pair out as two rows even where its prompt could be shared.
        device: the kind of device that it will run on, if it is not there yet.
        autocast: the run's; a GPU takes other kernels under it, so the model is compared under it too.
        attention: how a packed row's attention is computed, one of the device's `Side.implementations`.
        lighten: let layers run as the device's side has them; not where they are to be compiled.

    Returns:
        How it will be run; `share_prompt` of it goes to `pack_pairs`. The same on all ranks.

    Raises:
        EngineError: the model cannot be run exactly; the message names engine=trl. Or `attention` is not to be had.
    """
    lm, wanted = causal_lm(model), Wanted(share_prompt, attention, lighten)
    if not hasattr(lm, "packed_engine") or lm.packed_engine[0] != wanted:
        _refuse_by_config(lm)
        kind = device or next(lm.parameters()).device.type
        side = side_of(kind)
        if attention not in side.implementations:
            raise EngineError(f"attn_implementation={attention} is not to be had on {kind}, where it can be "
                              f"{' or '.join(side.implementations)}")  # fmt: skip
        if lighten:
            side.lighten(lm)
        patch_forward(lm)
        choice = [_choose(model, lm, wanted, autocast, side)]
        if dist.is_available() and dist.is_initialized():  # a rank whose weights are elsewhere could not measure
            dist.broadcast_object_list(choice, src=0)
        lm.packed_engine, lm.packed_attention = (wanted, choice[0]), choice[0].attention
    engine = lm.packed_engine[1]
    if engine.reason and share_prompt:
        log.warning("%s: prompts are not shared (%s); slower, same result", type(lm).__name__, engine.reason)
    return engine
