"""What a training leaves: weights with all that serving needs to render and to stop as in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preference.files import save_json
from preference.templates.resolve import chat_template_to_save, stop_ids


def save(trainer: Any, conversation: Any, facts: Mapping[str, Any]) -> None:
    """The adapter or model, with the tokenizer, the template and the stop tokens that it was trained with.

    They appear in output_dir together, with `facts` as run.json, or not at all.
    """
    tokenizer = trainer.processing_class
    tokenizer.chat_template = chat_template_to_save(conversation, tokenizer)
    generation = trainer.model.generation_config
    stops = stop_ids(generation, conversation, tokenizer)  # the model's own too: Llama 3.1 has three
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    generation.pad_token_id = tokenizer.pad_token_id

    def write(folder: Path) -> None:
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            generation.save_pretrained(folder)
            save_json(folder / "run.json", facts)

    trainer.checkpoints.write_result(write)
