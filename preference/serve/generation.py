"""Answers of a chat model: prompts encoded as in training, text streamed as it is written, batches.

Text that a person types never becomes a control token: it is encoded as training data is (tokens/encoding.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from preference.templates.resolve import stop_ids
from preference.tokens.encoding import Encoder, free_sentinel
from preference.tokens.rendering import Renderer

Within = Callable[[], AbstractContextManager[Any]]
CUT_CHARACTER = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 takes the most likely token; `max_new_tokens` counts the stop token."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    seed: int = 42


@dataclass(frozen=True)
class Turn:
    """A question with what was said before: [(user, assistant), ...]; `system=None` means the template's default.

    `prompt` stands for all of it where it is set: text used as it stands.
    """

    question: str
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    prompt: str | None = None


class Chat:
    """A model with its tokenizer and template. `base` (a context manager) makes the same model answer untuned."""

    def __init__(self, model: Any, tokenizer: Any, template: Any, config: GenerationConfig, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.template, self.origin = model, tokenizer, template, config
        self.stops = stop_ids(config, template, tokenizer)
        self.cut = False  # whether the last streamed answer was ended by its reader or its length, not by a stop token
        self.resample(sampling)
        self.renderer = Renderer(template)
        self.encoder = Encoder(tokenizer, self.renderer.template_text)

    def resample(self, sampling: Sampling) -> None:
        """Draw answers in this way from now on."""
        self.sampling = sampling
        self.config = _with_sampling(self.origin, sampling, self.stops, self.tokenizer.pad_token_id)

    def encode(self, turn: Turn) -> list[int]:
        """The ids of the prompt. Raises ConversationError where the template cannot write the conversation."""
        if turn.prompt is not None:
            return self._encode_ready(turn.prompt)
        texts = [turn.question, turn.system or "", *(text for pair in turn.history for text in pair)]
        sentinel = None
        if any(self.encoder.control.found_in(text) for text in texts):
            sentinel = free_sentinel(texts)
            turn = _map_texts(turn, lambda text: self.encoder.control.mark(text, sentinel))
        prompt = self.template.get_prompt(turn.question, history=turn.history, system=turn.system)
        return self.encoder.encode_prompts([prompt], sentinel)[0]

    def _encode_ready(self, prompt: str) -> list[int]:
        """As in training: its control tokens are meant as such only if it looks like this template's rendering."""
        if self.renderer.matches(prompt) or not self.encoder.control.found_in(prompt):
            return self.encoder.encode_prompts([prompt])[0]
        sentinel = free_sentinel([prompt])
        return self.encoder.encode_prompts([self.encoder.control.mark(prompt, sentinel)], sentinel)[0]

    def fit(self, turn: Turn) -> tuple[Turn, int]:
        """`turn` without its oldest pairs, as far as the model's context asks, and how many were left out."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        dropped = 0
        while limit and turn.history and len(self.encode(turn)) + self.sampling.max_new_tokens > limit:
            turn = Turn(turn.question, turn.history[1:], turn.system)
            dropped += 1
        return turn, dropped

    def stream(self, turn: Turn, seed: int, within: Within = nullcontext) -> Generator[str, None, None]:
        """Pieces of the answer as they are written. Closing the iterator stops the model after its next token.

        `within` is entered around the generation. Raises whatever the generation raised.
        """
        pieces = _Pieces(self.tokenizer, self.stops)
        self.cut = True
        ids = torch.tensor([self.encode(turn)], device=self.model.device)

        def generate() -> None:
            try:
                with within():
                    torch.manual_seed(seed)
                    self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        generation_config=self.config,
                        streamer=pieces,
                        stopping_criteria=[lambda ids, scores, **_: pieces.stopped(ids)],
                    )
            except BaseException as error:  # handed to the reader, who raises it
                pieces.fail(error)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from pieces
        finally:
            pieces.stop.set()
            thread.join()
            self.cut = not pieces.ended

    def answers(self, turns: Sequence[Turn], seed: int, within: Within = nullcontext) -> list[str]:
        """The answers to several turns at once."""
        return [text for text, _ in self.draw(turns, seed, within)]

    def draw(self, turns: Sequence[Turn], seed: int, within: Within = nullcontext) -> list[tuple[str, bool]]:
        """(answer, whether its length cut it) to several turns at once, padded on the left."""
        prompts = [self.encode(turn) for turn in turns]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with within():
            torch.manual_seed(seed)
            device = self.model.device
            out = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=self.config
            )
        rows = [answer.tolist() for answer in out[:, width:]]
        return [(self.decode(row), not any(token in self.stops for token in row)) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer up to its first stop token, or to the last whole character where it was cut."""
        end = next((i for i, token in enumerate(ids) if token in self.stops), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False).rstrip(CUT_CHARACTER).strip()


class _Pieces(BaseStreamer):
    """Takes token ids from one thread and gives whole characters to another."""

    def __init__(self, tokenizer: Any, stops: Sequence[int]) -> None:
        self.tokenizer, self.stops = tokenizer, frozenset(stops)
        self.queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self.stop = threading.Event()
        self.ended = False  # by a stop token of the model
        self.ids: list[int] | None = None  # None until generate has handed over the prompt
        self.start = self.shown = 0  # ids[start:] is decoded anew for each token; ids[start:shown] was given out

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        new = value.flatten().tolist()
        self.ended = any(token in self.stops for token in new)
        self.ids += [token for token in new if token not in self.stops]
        self._give(final=False)

    def end(self) -> None:
        self._give(final=True)
        self.queue.put(None)

    def fail(self, error: BaseException) -> None:
        self.queue.put(error)

    def stopped(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.full((len(ids),), self.stop.is_set(), device=ids.device, dtype=torch.bool)

    def _give(self, final: bool) -> None:
        """Decode behind a few tokens of context, so that spaces and characters cut over tokens come out right."""
        ids = self.ids or []
        before = self.tokenizer.decode(ids[self.start : self.shown], skip_special_tokens=False)
        text = self.tokenizer.decode(ids[self.start :], skip_special_tokens=False)
        if len(text) > len(before) and (final or not text.endswith(CUT_CHARACTER)):
            self.queue.put(text[len(before) :].rstrip(CUT_CHARACTER))
            self.start, self.shown = self.shown, len(ids)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def _with_sampling(config: GenerationConfig, sampling: Sampling, stops: list[int], pad: int) -> GenerationConfig:
    """`config` with our sampling; what else it holds (a repetition penalty, top_k) stays, as when it is served."""
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    for name in ("max_length", "min_length", "transformers_version", "_from_model_config"):
        values.pop(name, None)
    greedy = sampling.temperature == 0
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        if greedy:
            values.pop(name, None)
    if not greedy:
        values |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    values |= {"do_sample": not greedy, "max_new_tokens": sampling.max_new_tokens, "use_cache": True}
    return GenerationConfig(**values | {"eos_token_id": stops, "pad_token_id": pad})


def _map_texts(turn: Turn, change: Callable[[str], str]) -> Turn:
    history = tuple((change(user), change(assistant)) for user, assistant in turn.history)
    return Turn(change(turn.question), history, None if turn.system is None else change(turn.system))
