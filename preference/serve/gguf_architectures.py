"""Which models GGUF files are written for: their keys, and what of each llama.cpp would compute otherwise.

The keys and what llama.cpp assumes where there is none are those of its own loaders (src/models) and of its
convert_hf_to_gguf.py. What a loader would not do as transformers does is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from preference.serve.gguf_tokenizer import GGUFError

Refusals = Iterator[tuple[Any, str]]  # (whether, what)
# The parameters of rotary embeddings that GGUF has a place for, by type; "dynamic" changes nothing within the context
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate"}
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "dynamic": {"factor", "original_max_position_embeddings"},
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary parameters of full attention with their type; older configs keep the base frequency beside them."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    return rope


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def experts_of(config: Any) -> int:
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def window_of(config: Any) -> int | None:
    """A window over all layers: llama.cpp has none there, so the context ends with it."""
    return getattr(config, "sliding_window", None) if config.model_type in ("mistral", "mixtral", "phi3") else None


def context_of(config: Any) -> int:
    """Tokens up to which both compute the same."""
    return min(config.max_position_embeddings, window_of(config) or config.max_position_embeddings)


def _nothing(writer: GGUFWriter, config: Any) -> None:
    """No keys besides those of every model."""


def _none(config: Any) -> Refusals:
    yield from ()


@dataclass(frozen=True)
class Architecture:
    """`interleaved`: query and key rows are reordered for rotation by pairs; `shift`: what is added to norms' weights;
    `activation`: the one that llama.cpp computes; `biases`: whether attention may have them."""

    gguf: MODEL_ARCH
    interleaved: bool = False
    shift: float = 0.0
    activation: str = "silu"
    biases: bool = False
    keys: Callable[[GGUFWriter, Any], None] = _nothing
    refusals: Callable[[Any], Refusals] = _none


def _expert_keys(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(experts_of(config))
    writer.add_expert_used_count(config.num_experts_per_tok)


def _qwen3_moe_keys(writer: GGUFWriter, config: Any) -> None:
    _expert_keys(writer, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _qwen3_moe_refusals(config: Any) -> Refusals:
    yield not config.norm_topk_prob, "experts whose shares are not normalised (norm_topk_prob=false)"
    yield config.mlp_only_layers or config.decoder_sparse_step != 1, "layers without experts among those that have them"


def _gemma_refusals(config: Any) -> Refusals:
    yield not config.tie_word_embeddings, "an output head of its own"


def _scaled_by(config: Any, layers_of_27b: int) -> Refusals:
    """llama.cpp scales by the head's size, but for the 27 B model, which it knows by its layers."""
    largest = config.num_hidden_layers == layers_of_27b
    size = config.hidden_size // config.num_attention_heads if largest else head_dim(config)
    yield config.query_pre_attn_scalar != size, f"query_pre_attn_scalar other than {size}"


def _pattern(config: Any, every: int) -> Refusals:
    expected = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(config.layer_types))
    ]
    yield list(config.layer_types) != expected, f"full attention in other layers than every {every}th"


def _gemma2_keys(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma2_refusals(config: Any) -> Refusals:
    yield from _gemma_refusals(config)
    yield from _scaled_by(config, 46)
    yield from _pattern(config, 2)
    yield not config.attn_logit_softcapping or not config.final_logit_softcapping, "logits without soft caps"


def _gemma3_keys(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3_refusals(config: Any) -> Refusals:
    yield from _gemma_refusals(config)
    yield from _scaled_by(config, 62)
    yield from _pattern(config, 6)
    yield getattr(config, "attn_logit_softcapping", None), "soft caps of attention"
    yield getattr(config, "use_bidirectional_attention", False), "bidirectional attention"
    sliding = config.rope_parameters.get("sliding_attention", {})
    yield sliding.get("rope_type", "default") != "default", "scaled rotary embeddings in sliding layers"


def _granite_keys(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _smollm3_refusals(config: Any) -> Refusals:
    expected = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    yield list(config.no_rope_layers) != expected, "rotary embeddings left out in other layers than every fourth"


def _internlm3_refusals(config: Any) -> Refusals:
    yield config.bias or config.qkv_bias, "biases"


ARCHITECTURES = {  # by transformers' model_type
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved=True, biases=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "mixtral": Architecture(MODEL_ARCH.LLAMA, interleaved=True, keys=_expert_keys),
    "internlm3": Architecture(MODEL_ARCH.LLAMA, interleaved=True, refusals=_internlm3_refusals),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, biases=True),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "qwen3_moe": Architecture(MODEL_ARCH.QWEN3MOE, keys=_qwen3_moe_keys, refusals=_qwen3_moe_refusals),
    "gemma": Architecture(MODEL_ARCH.GEMMA, shift=1.0, activation="gelu_pytorch_tanh", refusals=_gemma_refusals),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2, shift=1.0, activation="gelu_pytorch_tanh", keys=_gemma2_keys, refusals=_gemma2_refusals
    ),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3, shift=1.0, activation="gelu_pytorch_tanh", keys=_gemma3_keys, refusals=_gemma3_refusals
    ),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "granite": Architecture(MODEL_ARCH.GRANITE, interleaved=True, keys=_granite_keys),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, interleaved=True, refusals=_smollm3_refusals),
    "olmo2": Architecture(MODEL_ARCH.OLMO2),
}


def check_supported(config: Any) -> None:
    """Raises GGUFError, with the list of what can be written, if a model of this config cannot be."""
    if config.model_type not in ARCHITECTURES:
        raise GGUFError(
            f"a model of type {config.model_type} cannot be written as GGUF here; what can be: "
            f"{', '.join(ARCHITECTURES)}. llama.cpp's convert_hf_to_gguf.py reads the exported folder and knows more"
        )
    architecture = ARCHITECTURES[config.model_type]
    rope = rope_of(config)
    for refused, what in (*_common_refusals(config, architecture, rope), *architecture.refusals(config)):
        if refused:
            raise GGUFError(f"{what} cannot be written for a model of type {config.model_type}")
    unknown = {key for key, value in rope.items() if value is not None} - _COMMON_KEYS - _ROPE_KEYS[rope["rope_type"]]
    if unknown:
        raise GGUFError(f"rotary embeddings with {', '.join(sorted(unknown))} cannot be written")


def _common_refusals(config: Any, architecture: Architecture, rope: dict[str, Any]) -> Refusals:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    alternates = config.model_type in ("gemma2", "gemma3_text") or window_of(config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    yield kinds != {"full_attention"} and not alternates, "sliding-window attention"
    yield getattr(config, "mlp_bias", False), "biases in the feed-forward layers"
    yield getattr(config, "attention_bias", False) and not architecture.biases, "biases in attention"
    yield activation != architecture.activation, f"the activation {activation}"
    yield rope.get("partial_rotary_factor", 1.0) != 1.0, "rotary embeddings of a part of each head"
    yield rope["rope_type"] not in _ROPE_KEYS, f"rotary embeddings of type {rope['rope_type']}"


def write_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """Every key that the loader of this architecture reads."""
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rope_of(config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
    ARCHITECTURES[config.model_type].keys(writer, config)
