"""export_model.py called as a program, and what models answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import export_model

IDS = torch.arange(3, 63)[None]


def export(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export_model.py", *map(str, words)])
    export_model.main()


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def adapted(run: Path, base: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).eval())
