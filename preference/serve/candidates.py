"""Those who are evaluated: a tuned model and its base, each of which answers under the tuned one's template."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from preference.models.hardware import detect
from preference.serve.generation import Chat, Sampling, Turn
from preference.serve.loading import (
    LoadingError,
    find_source,
    generation_config,
    load_template,
    load_tokenizer,
    load_tuned_model,
    load_untuned_model,
    pick_dtype,
)
from preference.serve.models import note, untuned


class Candidates:
    """The models that are evaluated, by name ("base", "tuned"; "model" alone), each with what must be entered while it
    answers; and their tokenizer.
    """

    def __init__(self, args: Namespace, modelscope: bool = False) -> None:
        self.args, self.hub = args, modelscope
        self.source = find_source(args.model, base=args.base_model, use_modelscope=self.hub)
        if args.win_rate and not self.source.adapter and self.source.base is None:
            raise LoadingError(
                f"{args.model} is not known to be tuned from anything: --base_model names what to compare it with"
            )
        hardware = detect(args.use_cpu)
        dtype = pick_dtype(args.torch_dtype, hardware)
        note(f"loading {args.model} ...")
        tuned = load_tuned_model(self.source, dtype, hardware.device, self.hub)
        self.tokenizer = load_tokenizer(self.source)
        self.models: dict[str, tuple[Any, Any]] = {"model": (tuned, nullcontext)}
        if self.source.adapter:
            self.models = {"base": (tuned, partial(untuned, tuned, self.source)), "tuned": (tuned, nullcontext)}
        elif self.source.base is not None:
            note(f"loading the base model {self.source.base} ...")
            base = load_untuned_model(self.source, dtype, hardware.device, self.hub)
            self.models = {"base": (base, nullcontext), "tuned": (tuned, nullcontext)}

    def answer(self, turns: Sequence[Turn]) -> dict[str, list[str]]:
        """Greedy answers of every model, the template being the result's."""
        template, warnings = load_template(self.source, self.tokenizer)
        for warning in warnings:
            note(f"warning: {warning}")
        config = generation_config(self.source, self.models[next(reversed(self.models))][0])  # that of the tuned one
        sampling = Sampling(temperature=0.0, max_new_tokens=self.args.max_new_tokens)
        answers: dict[str, list[str]] = {}
        for name, (model, within) in self.models.items():
            chat = Chat(model, self.tokenizer, template, config, sampling)
            answers[name] = []
            for start in range(0, len(turns), self.args.batch_size):
                answers[name] += chat.answers(turns[start : start + self.args.batch_size], 0, within)
                note(f"{name}: {len(answers[name])} of {len(turns)} answers")
        return answers
