"""Our rows as the padded tensors that TRL's trainers read, each under its own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preference.engine.packing import learned_at


def _pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(ids) for ids in sequences)
    return torch.tensor([[*ids, *[value] * (width - len(ids))] for ids in sequences])


@dataclass(frozen=True)
class OrpoCollator:
    """Right-padded tensors under the names that ORPOTrainer reads; masks come from lengths, so any pad id does."""

    pad_id: int

    def __call__(self, pairs: list[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"source": [str(pair.get("source", "")) for pair in pairs]}
        for side in ("chosen", "rejected"):
            rows = [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs]
            labels = [[-100] * len(pair["prompt_ids"]) + pair[f"{side}_ids"] for pair in pairs]
            batch[f"{side}_input_ids"] = _pad(rows, self.pad_id)
            batch[f"{side}_attention_mask"] = _pad([[1] * len(row) for row in rows], 0)
            batch[f"{side}_labels"] = _pad(labels, -100)
        return batch


@dataclass(frozen=True)
class DpoCollator:
    """Right-padded tensors under the names that DPOTrainer reads: all chosen rows, then all rejected ones."""

    pad_id: int

    def __call__(self, pairs: list[Mapping[str, Any]]) -> dict[str, Any]:
        sides = [(pair, side) for side in ("chosen", "rejected") for pair in pairs]
        answers = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair, side in sides]
        learned = [learned_at(pair, side) for pair, side in sides]
        masks = [[1] * len(answer) if mask is None else mask.astype(int).tolist()
                 for mask, (_, answer) in zip(learned, answers, strict=True)]  # fmt: skip
        return {
            "source": [str(pair.get("source", "")) for pair in pairs],
            "input_ids": _pad([prompt + answer for prompt, answer in answers], self.pad_id),
            "attention_mask": _pad([[1] * (len(prompt) + len(answer)) for prompt, answer in answers], 0),
            "completion_mask": _pad(
                [[0] * len(prompt) + mask for mask, (prompt, _) in zip(masks, answers, strict=True)], 0
            ),
        }


@dataclass(frozen=True)
class KtoCollator:
    """Right-padded tensors under the names that KTOTrainer reads; the mismatched answers are those of our rows."""

    pad_id: int

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "source": [str(row.get("source", "")) for row in rows],
            "label": torch.tensor([row["desirable"] > 0 for row in rows]),
        }
        for prefix, side in (("", "chosen_ids"), ("KL_", "rejected_ids")):
            answers = [(row["prompt_ids"], row[side]) for row in rows]
            batch[f"{prefix}input_ids"] = _pad([prompt + answer for prompt, answer in answers], self.pad_id)
            for name, of_prompt in (("attention_mask", 1), ("completion_mask", 0)):
                masks = [[of_prompt] * len(prompt) + [1] * len(answer) for prompt, answer in answers]
                batch[prefix + name] = _pad(masks, 0)
        return batch
