"""Who answers in a chat, the tuned model and, once it is asked for, its base; and who judges answers."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from transformers.utils import logging

from preference.launch.tool import is_url
from preference.models.adapters import FROZEN
from preference.models.hardware import Hardware, detect
from preference.models.limits import check_vocabulary, template_ids
from preference.screen import shown
from preference.serve.generation import Chat, Sampling, Within
from preference.serve.judge import Judge, LocalJudge, ServerJudge
from preference.serve.loading import (
    BEFORE,
    Source,
    add_adapter_before,
    find_source,
    generation_config,
    load_template,
    load_tokenizer,
    load_tuned_model,
    load_untuned_model,
    pick_dtype,
)
from preference.templates.resolve import stop_ids


def note(text: str) -> None:
    """What is said about the answers goes to standard error, so that piped answers stay clean."""
    print(shown(text), file=sys.stderr, flush=True)


def open_judge(
    name: str, model: str | None, key: str | None, *, dtype: str = "auto", use_cpu: bool = False, hub: bool = False
) -> Judge:
    """A judge: `name` is the address of an OpenAI-compatible server (http...), with the name of its model and the key
    to send, or a model on this machine (folder, run or hub id; `hub`: of ModelScope)."""
    if is_url(name):
        return ServerJudge(name, model, key)
    hardware = detect(use_cpu)
    return LocalJudge(open_chat(find_source(name, use_modelscope=hub), hardware, dtype, Sampling(0.0), hub), name)


def open_chat(
    source: Source,
    hardware: Hardware,
    dtype: str,
    sampling: Sampling,
    hub: bool = False,
    template_name: str | None = None,
) -> Chat:
    """The tuned model of `source`, ready to answer. Raises LoadingError and others where it cannot."""
    tokenizer = load_tokenizer(source)
    template, warnings = load_template(source, tokenizer, template_name)
    for warning in warnings:
        note(f"warning: {warning}")
    model = load_tuned_model(source, pick_dtype(dtype, hardware), hardware.device, hub)
    generation = generation_config(source, model)
    stops = stop_ids(generation, template, tokenizer)
    check_vocabulary(model, tokenizer, [*template_ids(template, tokenizer), *stops])
    return Chat(model, tokenizer, template, generation, sampling)


@contextmanager
def switched_to(model: Any, name: str) -> Iterator[None]:
    """While open, `model` has this adapter on, and no other."""
    lora, active = model.base_model, list(model.active_adapters)
    lora.set_adapter(name)
    try:
        yield
    finally:
        lora.set_adapter(active)


def untuned(model: Any, source: Source) -> AbstractContextManager[Any]:
    """While open, the adapted `model` is as the run was handed it: without its adapter, or with the one it had then."""
    if FROZEN in model.peft_config:
        return switched_to(model, FROZEN)
    if source.adapter_before is None:
        return model.disable_adapter()
    if BEFORE not in model.peft_config:
        add_adapter_before(model, source)
    return switched_to(model, BEFORE)


class Models:
    """The tuned model and, once it is asked for, its base: the same weights without the adapter, or a second model."""

    def __init__(self, args: Namespace, modelscope: bool = False) -> None:
        note(f"loading {args.model} ...")
        logging.disable_progress_bar()
        self.modelscope, self.name = modelscope, args.model
        self.source: Source = find_source(
            args.model,
            base=args.base_model,
            use_modelscope=self.modelscope,
            trust_remote_code=args.trust_remote_code,
        )
        hardware = detect(args.use_cpu)
        self.device, self.dtype = hardware.device, pick_dtype(args.torch_dtype, hardware)
        sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.seed)
        self.tuned = open_chat(self.source, hardware, args.torch_dtype, sampling, modelscope, args.template_name)
        self.template = self.tuned.template
        self._base: Chat | None = None
        note(f"{args.model} on {hardware.name}, template {self.template.name}")

    def base(self) -> tuple[Chat, Within]:
        """The model before tuning: who answers, and what must be entered meanwhile."""
        if self.source.adapter:
            return self.tuned, partial(untuned, self.tuned.model, self.source)
        if self._base is None:
            if self.source.base is not None:
                note(f"loading the base model {self.source.base} ...")
            model = load_untuned_model(self.source, self.dtype, self.device, self.modelscope)
            tuned = self.tuned  # the same prompts, stops and sampling, whatever the base says of itself
            self._base = Chat(model, tuned.tokenizer, self.template, tuned.origin, tuned.sampling)
        return self._base, nullcontext

    def resample(self, sampling: Sampling) -> None:
        """Draw the answers of all who speak here in this way from now on."""
        for chat in filter(None, (self.tuned, self._base)):
            chat.resample(sampling)
