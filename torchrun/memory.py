#!/usr/bin/env python3
"""What each GPU must hold, for models of several sizes under each strategy: the table in README.md here.

    python torchrun/memory.py                   GPUs of 80 GB
    python torchrun/memory.py --gpu_gb 24 --gradient_checkpointing false

It follows a training step on paper, as `--dry_run true` does for a run of your own; no model is loaded. The models have
the shapes of Qwen2.5 (model cards), a micro-batch is 4 pairs of 300 prompt and 2 x 200 answer tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import Qwen2Config

from preference.arguments import STRATEGIES, Arguments, parse_arguments
from preference.losses import Objective
from preference.models.hardware import Hardware
from preference.plan.dry_run import Setup

# name: hidden size, layers, heads, key-value heads, intermediate size, tied embeddings
MODELS = {
    "0.5 B": (896, 24, 14, 2, 4864, True),
    "1.5 B": (1536, 28, 12, 2, 8960, True),
    "7 B": (3584, 28, 28, 4, 18944, False),
    "14 B": (5120, 48, 40, 8, 13824, False),
    "32 B": (5120, 64, 40, 8, 27648, False),
    "72 B": (8192, 80, 64, 8, 29568, False),
}
PAIRS = np.array([[300, 200, 200]] * 4)
WORLDS = dict.fromkeys(STRATEGIES, (4, 8)) | {"ddp": (1, 8)}


def config_of(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152064, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, tie_word_embeddings=tied,
    )  # fmt: skip


def rows(args: Arguments, gpu: Hardware) -> list[str]:
    """A line of the table for each model: GB on each GPU; what does not fit is in brackets."""
    lines = []
    for name, shape in MODELS.items():
        plan = Setup(name, gpu, Objective("orpo"), torch.bfloat16, PAIRS, config_of(*shape)).plan(args, len(PAIRS), 2)
        cells = [plan.memory(strategy, world).peak / 1e9 for strategy, worlds in WORLDS.items() for world in worlds]
        room = gpu.memory / 1e9
        lines.append(" | ".join([f"| {name}", *(f"{c:.0f}" if c <= room else f"({c:.0f})" for c in cells)]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu_gb", type=float, default=80, help="memory of a GPU")
    parser.add_argument("--gradient_checkpointing", default="true", choices=["true", "false"])
    options = parser.parse_args()
    gpu = Hardware("cuda", "a GPU", int(options.gpu_gb * 1e9), True)
    columns = [f"{strategy} x {world}" for strategy, worlds in WORLDS.items() for world in worlds]
    for use_peft in ("true", "false"):
        words = ["--use_peft", use_peft, "--gradient_checkpointing", options.gradient_checkpointing]
        print(f"\nGB on each GPU, use_peft={use_peft}, gradient_checkpointing={options.gradient_checkpointing}\n")
        print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        print("\n".join(rows(parse_arguments(words), gpu)), flush=True)


if __name__ == "__main__":
    main()
