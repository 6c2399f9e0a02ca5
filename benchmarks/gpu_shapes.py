"""Models with random weights and pairs of random letters, for gpu_campaign.sh: nothing is downloaded.

    python benchmarks/gpu_shapes.py FOLDER --shapes qwen0.5b,qwen1.5b,llama8b --tokens 1024,4096 [--weights qwen0.5b]

Writes FOLDER/SHAPE (config, a byte-level tokenizer, weights where --weights names it) and FOLDER/pairs-TOKENS.jsonl:
rows whose prompt and answer have about that many tokens together. `tiny` is a shape of two layers, for rehearsals.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
LETTERS = "zxqj"  # that the tokenizer keeps apart: one token each
OVERHEAD = 20  # tokens of the template, about


def configuration(shape: str) -> Any:
    from transformers import Qwen2Config

    if shape == "tiny":
        config = Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True)  # fmt: skip
    else:
        from paper_gpu import MODELS

        config = MODELS[shape]()
    config.vocab_size = 151936 if shape != "tiny" else config.vocab_size
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, 0
    return config


def write_model(folder: Path, shape: str, weights: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tiny import tiny_tokenizer

    config = configuration(shape)
    config.architectures = ["LlamaForCausalLM" if shape == "llama8b" else "Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_pairs(path: Path, tokens: int, count: int) -> None:
    draw = random.Random(tokens)

    def text(length: int) -> str:
        return "".join(draw.choice(LETTERS) for _ in range(max(4, length)))

    prompt = tokens // 2 - OVERHEAD
    rows = [
        {"question": text(prompt), "response_chosen": text(tokens // 2), "response_rejected": text(tokens // 2 - i % 9)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", required=True, help="tiny, qwen0.5b, qwen1.5b, llama8b; with commas")
    parser.add_argument("--tokens", required=True, help="of prompt and answer; with commas")
    parser.add_argument("--weights", default="", help="the shape whose weights are written too")
    parser.add_argument("--pairs", type=int, default=24)
    args = parser.parse_args()
    for shape in args.shapes.split(","):
        write_model(args.folder / shape, shape, shape == args.weights)
    for tokens in map(int, args.tokens.split(",")):
        write_pairs(args.folder / f"pairs-{tokens}.jsonl", tokens, args.pairs)


if __name__ == "__main__":
    main()
