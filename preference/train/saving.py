"""What a training leaves: weights with all that serving needs to render and to stop as in training."""

from __future__ import annotations

from typing import Any

from preference.templates.resolve import chat_template_to_save, stop_ids


def save(trainer: Any, conversation: Any) -> None:
    """The adapter or model, with the tokenizer, the template and the stop tokens that it was trained with."""
    tokenizer = trainer.processing_class
    tokenizer.chat_template = chat_template_to_save(conversation, tokenizer)
    generation = trainer.model.generation_config
    stops = stop_ids(generation, conversation, tokenizer)  # the model's own too: Llama 3.1 has three
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    generation.pad_token_id = tokenizer.pad_token_id
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        generation.save_pretrained(trainer.args.output_dir)
