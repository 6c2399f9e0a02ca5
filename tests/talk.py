"""A chat with what a run has left."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from preference.serve.generation import Chat, Sampling
from preference.serve.loading import find_source, generation_config, load_template, load_tokenizer, load_tuned_model

GREEDY = Sampling(temperature=0, max_new_tokens=24)


def chat_with(folder: Path, sampling: Sampling = GREEDY, config: GenerationConfig | None = None) -> Chat:
    source = find_source(str(folder))
    tokenizer = load_tokenizer(source)
    template, _ = load_template(source, tokenizer)
    model = load_tuned_model(source, torch.float32, "cpu")
    return Chat(model, tokenizer, template, config or generation_config(source, model), sampling)
