"""Every causal-LM architecture of transformers that can be built tiny, run by the packed engine and compared.

    python tests/architectures.py            # writes docs/architectures.md, about a minute

A model is random, of a few layers, with a window of 6 tokens where its attention has windows, so that they matter.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402
from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from preference.engine.masks import EngineError  # noqa: E402
from preference.engine.probe import (  # noqa: E402
    packed_logps,
    plain_logps,
    prepare_model,
)

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=512)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LARGEST = 30_000_000  # parameters
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
TRIES = (  # what configs disagree about; the first that builds and runs is taken
    dict(num_hidden_layers=4, num_key_value_heads=2),
    dict(num_hidden_layers=4, num_key_value_heads=2, head_dim=8),
    dict(num_hidden_layers=4, num_key_value_heads=4),
    dict(num_hidden_layers=4, num_key_value_heads=2, head_dim=8, **EXPERTS),
    dict(num_hidden_layers=4),
)
MAMBA2 = dict(num_key_value_heads=2, num_hidden_layers=3, mamba_d_state=8, mamba_chunk_size=16)
MAMBA2 |= dict(mamba_n_heads=8, mamba_d_head=8, mamba_expand=2, mamba_d_ssm=64)
DELTA = dict(num_hidden_layers=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
DELTA |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
KIMI = dict(num_hidden_layers=2, num_key_value_heads=4, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
KIMI |= EXPERTS | dict(v_head_dim=8, n_group=1, topk_group=1, linear_head_dim=8, linear_num_heads=4)
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": KIMI | dict(head_dim=8, layer_group_size=2, first_k_dense_replace=1),
    "bamba": MAMBA2 | dict(attn_layer_indices=[1]),
    "codegen": dict(rotary_dim=4, n_embd=32, n_layer=2, n_head=4, n_inner=64),
    "falcon_h1": MAMBA2,
    "gptj": dict(rotary_dim=4, n_embd=32, n_layer=2, n_head=4, n_inner=64),
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=6),
    "granitemoehybrid": MAMBA2 | EXPERTS | dict(layer_types=["mamba", "attention", "mamba"]),
    "kimi_linear": KIMI | dict(layer_types=["linear_attention", "full_attention"]),
    "lfm2": dict(num_hidden_layers=3, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
    "lfm2_moe": EXPERTS
    | dict(num_hidden_layers=3, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
    "mamba2": dict(num_hidden_layers=2, num_heads=8, head_dim=8, expand=2, state_size=8, n_groups=2, chunk_size=16),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "mlp", "mamba"], num_key_value_heads=2, head_dim=8)
    | dict(ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, chunk_size=16),
    "olmo_hybrid": DELTA,
    "qwen3_5": dict(text_config=SIZES | TOKENS | DELTA),
    "qwen3_5_moe": dict(text_config=SIZES | TOKENS | DELTA | EXPERTS),
    "qwen3_5_moe_text": DELTA | EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | EXPERTS,
}


@dataclass(frozen=True)
class Finding:
    model_type: str
    how: str  # shared, rows, refused, not built
    detail: str = ""


def _pairs(vocabulary: int) -> list[dict[str, list[int]]]:
    draw = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = [(14, 9, 5), (1, 3, 8), (17, 1, 1)]
    pairs = [
        {name: [draw.randrange(3, vocabulary) for _ in range(n)] for name, n in zip(names, sizes, strict=True)}
        for sizes in lengths
    ]
    pairs[2]["prompt_ids"][:9] = pairs[0]["prompt_ids"][:9]  # which two prompts share
    return pairs


def build(model_type: str, **config: Any) -> Any:
    """A tiny random model that runs. Raises whatever its last try raised."""
    special = SPECIAL.get(model_type)
    error: Exception | None = None
    for more in [special] if special else TRIES:
        try:
            made = CONFIG_MAPPING[model_type](**(SIZES | TOKENS | more | config))
            text = made.get_text_config()
            if getattr(text, "sliding_window", None) and "sliding_window" not in config:
                text.sliding_window = 6
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(made).parameters())
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} M parameters")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(made).eval()
            with torch.no_grad():
                model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
            return model
        except Exception as caught:  # any model's own code: configs have no common contract
            error = caught
    raise error


def examine(model_type: str) -> Finding:
    """How the engine runs an architecture.

    Raises:
        AssertionError: it ran it and the log-probabilities are wrong.
    """
    try:
        model = build(model_type)
    except Exception as error:
        return Finding(model_type, "not built", f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
    pairs = _pairs(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        plain = plain_logps(model, pairs)
        try:
            engine = prepare_model(model)
        except EngineError as error:
            return Finding(model_type, "refused", str(error))
        packed = packed_logps(model, pairs, engine.share_prompt)
    worst = float((packed - plain).abs().max())
    assert worst < 1e-3, f"{model_type}: log-probabilities differ by {worst:.2g}"
    return Finding(model_type, "shared" if engine.share_prompt else "rows", engine.reason)


def sweep() -> Iterator[Finding]:
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield examine(model_type)


INTRO = """# Which architectures the packed engine runs, and how

Made by `python tests/architectures.py` with transformers {version}: a tiny random model of every causal-LM
architecture that could be built (with an attention window of 6 tokens where there are windows) was run packed, and its
log-probabilities compared with one plain forward per sequence. `tests/engine/test_architectures.py` does the same for
the common ones.

- **shared**: one packed row, every prompt once, and what the prompts of a micro-batch begin with alike (a system
  prompt) once for all of them. Full, sliding-window and chunked attention, grouped heads, capped scores, learned sinks,
  mixtures of experts; and layers that carry a state from token to token (gated delta rule, Kimi's delta attention,
  Mamba 1 and 2, short convolutions, lightning attention): each answer starts from the state in which its prompt ended,
  and gradients flow back through it ([how](#layers-that-carry-a-state)). Bloom, CodeGen, Falcon, GPT-J, MPT and XGLM,
  whose attention is code of their own (ALiBi among it), run under one mask for the whole row: exact as well, but the
  memory of their scores grows with the square of a row, which `max_tokens_per_micro_batch` bounds.
- **rows**: two right-padded rows per pair; the objective, the head and the batches are the engine's all the same. For
  models that pick keys by an index of their own, or whose own code counts distances or positions by the place in a
  row. (Both answers in one row without sharing would be wrong for all of these.)
- **refused**: the engine stops with a message that names `engine=trl`. Encoders used as decoders without
  `is_decoder`, and heads that are more than a projection.

The choice is measured again for the model at hand each time one is loaded (`preference/engine/probe.py`): a few tokens
are run both ways. Prompt-tuning adapters run in rows; LoRA and DoRA change nothing. Two things depend on a batch by a
model's own design and stay so: rotary embeddings that rescale with the longest position (dynamic, longrope), and
dropout, which in a shared row is drawn once for what is shared.

## Layers that carry a state

A recurrence needs nothing of the past but its state, and a convolution of k taps nothing but k - 1 tokens. So the runs
of a packed row (what all prompts have in common, each prompt, each answer) are computed level by level: each starts
from the final state of the run that it follows, its convolution from that one's last tokens. Projections see the packed
row as it is; in the recurrence itself, runs of a level that are about as long are the rows of one call. It is called
through the functions of transformers' modeling files, which take the kernels of `flash-linear-attention`,
`causal-conv1d` and `mamba-ssm` where these are installed, and torch otherwise
(`preference/engine/states/`). flash-linear-attention gets all runs of a level in one call that pads nothing
(`cu_seqlens`), the convolution the whole row in one. No kernel of these packages was run: no GPU was at hand. Their
arguments were read from flash-linear-attention 0.6.0 and the sources of the other two, and the tests run torch in their
place, called as they are.

`tests/engine/test_states.py` compares log-probabilities and the gradients of all weights, and of LoRA on all
projections, with one plain forward per sequence, in double precision (in the recurrences too, which models write in
float32) within 1e-7: micro-batches of 1 to 8 pairs, prompts that begin alike, prompts and answers of one token, runs of
63, 64 and 65 tokens. PEFT itself refuses adapters on the convolutions, and on `out_proj` of Mamba models.

"""


def write(path: Path) -> None:
    findings = list(sweep())
    lines = [INTRO.format(version=transformers.__version__)]
    lines.append(", ".join(f"{how}: {sum(f.how == how for f in findings)}" for how in ("shared", "rows", "refused")))
    lines.append("\n| model_type | runs | why |\n|---|---|---|")
    built = [f for f in findings if f.how != "not built"]
    lines.extend(f"| {f.model_type} | {f.how} | {f.detail.replace('|', '/')} |" for f in built)
    missing = ", ".join(f.model_type for f in findings if f.how == "not built")
    lines.append(f"\nNot built tiny, so decided when one is loaded: {missing}.\n")
    path.write_text("\n".join(lines), encoding="utf-8")
    for f in findings:
        if f.how == "not built":
            print(f"{f.model_type}: {f.detail}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write(ROOT / "docs" / "architectures.md")
