"""Tiny real parts for tests: a byte-level BPE tokenizer with ChatML tokens and random models of several architectures.

Nothing here is downloaded. `tiny_model(arch)` is seeded, so two calls give equal weights.
"""

from __future__ import annotations

import functools

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "You are a helpful assistant.",
    "What should I do about a mild fever and a sore throat? Rest, drink water, and see a doctor if it lasts.",
    "Name three fresh juices for the summer menu: apple and mint, carrot and ginger, orange.",
    "感冒发烧应该怎么办？多休息，多喝水，如果症状持续请及时就医。",
    "system user assistant",
]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
EXTRA = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gemma2": dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4096),
    "gemma3_text": dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4096),
    "gemma": dict(head_dim=8),
    "qwen3": dict(head_dim=8),
    "qwen3_5_text": dict(
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "mistral": dict(sliding_window=None),
}


@functools.cache
def _chatml_backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 500 tokens; EOS is `<|im_end|>`, pad is `<|endoftext|>`; no chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_chatml_backend().to_str()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )


def tiny_model(arch: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int = 512, **config):
    """A random two-layer causal LM of architecture `arch` (a transformers model_type), seeded."""
    sizes = {} if arch == "gpt2" else dict(SIZES)
    sizes |= EXTRA.get(arch, {})
    sizes |= dict(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **(sizes | config)))
    return model.to(dtype).eval()
