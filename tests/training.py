"""Pairs, arguments and models for tests that train."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from preference.losses import Objective
from preference.tokens.mismatched import partners
from preference.train.trainer import PairTrainer
from preference.train.trl_engine import make_trl_trainer
from tiny import tiny_model, tiny_tokenizer

POISON = 509  # a token id that `poison` turns into NaN


def make_pairs(count: int, seed: int = 0, prompt=(3, 24), answer=(1, 16), low: int = 3, high: int = 500) -> Dataset:
    """`count` pairs of random token ids, lengths drawn between the given ends; row i comes from "pairs.jsonl:i+1"."""
    draw = random.Random(seed)

    def ids(ends: tuple[int, int]) -> list[int]:
        return [draw.randrange(low, high) for _ in range(draw.randint(*ends))]

    return pairs_of((ids(prompt), ids(answer), ids(answer)) for _ in range(count))


def pairs_of(rows: Iterable[tuple[list[int], list[int], list[int]]]) -> Dataset:
    texts = {"prompt": "p", "chosen": "c", "rejected": "r"}
    return Dataset.from_list(
        [
            texts | {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "source": f"pairs.jsonl:{i + 1}"}
            for i, (p, c, r) in enumerate(rows)
        ]
    )


def single_answers(count: int, seed: int = 0) -> Dataset:
    """Rows of random ids, two good ones to each bad one, each beside the answer of its partner."""
    rows = make_pairs(count, seed)
    answers = rows["chosen_ids"]
    found = partners([str(ids) for ids in rows["prompt_ids"]])
    rows = rows.remove_columns("rejected_ids").add_column("rejected_ids", [answers[i] for i in found])
    return rows.add_column("desirable", [float(i % 3 != 1) for i in range(count)])


def arguments(output: Path | str, **changes: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return TrainingArguments(**defaults | changes)


def lora(model: Any, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout)
    return get_peft_model(model, config)


def make_trainer(
    engine: str,
    output: Path | str,
    pairs: Dataset,
    *,
    loss: str = "orpo",
    model: Any = None,
    eval_pairs: Any = None,
    **rest: Any,
) -> Any:
    """A trainer of either engine on a tiny Llama; what PairTrainer takes besides is taken out of `rest`."""
    ours = (
        "max_tokens_per_micro_batch",
        "budget",
        "share_prompt",
        "reference",
        "cache_dir",
        "callbacks",
        "max_length",
        "schedule",
        "send_usage",
    )
    extra = {name: rest.pop(name) for name in ours if name in rest}
    make = PairTrainer if engine == "packed" else make_trl_trainer
    return make(
        tiny_model("llama") if model is None else model,
        arguments(output, **rest),
        objective=loss if isinstance(loss, Objective) else Objective(loss),
        train_dataset=pairs,
        eval_dataset=eval_pairs,
        processing_class=tiny_tokenizer(),
        **extra,
    )


def logged(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """The training logs' values of `names`, step by step."""
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def poison(model: Any) -> Any:
    """Make the model give NaN for every sequence that holds the token POISON; its weights stay finite."""

    def spoil(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == POISON)[..., None], float("nan"))

    model.get_input_embeddings().register_forward_hook(spoil)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def spoil_gradient(model: Any) -> None:
    """Make the model's loss finite and its gradient not."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: _Overflow.apply(output))
