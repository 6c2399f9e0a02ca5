"""FSDP2 on one device: the same log-probabilities and gradients as the model that is not sharded.

    python benchmarks/gpu_fsdp.py --model FOLDER [--device cuda] --json out.json

A group of one process holds all shards, so that everything of FSDP2 runs but the network: gathered layers, the head
gathered in autocast's type (engine/forward.py), float32 reductions. With all weights trained, and with LoRA. Exit
status 1 where they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
BOUND = 0.02  # of the gradient's norm, in bfloat16


def gradient(model: Any, device: str) -> Any:
    """All gradients of a batch's log-probabilities in float64, and their sum."""
    import torch

    from preference.engine.forward import pair_logps
    from preference.engine.packing import pack_pairs
    from preference.engine.transfer import to_device

    ids = torch.randint(3, 500, (4, 190), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [dict(prompt_ids=row[:100], chosen_ids=row[100:150], rejected_ids=row[150:]) for row in ids]
    with torch.autocast(device, torch.bfloat16):
        logps = pair_logps(model, to_device(pack_pairs(pairs), torch.device(device)))
    (logps.chosen_B - logps.rejected_B / 2).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [(g.full_tensor() if hasattr(g, "full_tensor") else g).double().flatten().cpu() for g in grads]
    return torch.cat(whole), float(logps.chosen_B.detach().sum())


def shard(model: Any, device: str) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from preference.engine.compiled import decoder_layers
    from preference.engine.forward import causal_lm

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    mesh = init_device_mesh(device, (1,))
    for layer in decoder_layers(causal_lm(model)):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def compare(config: Any, lora: bool, device: str) -> dict[str, float]:
    import torch
    from gpu_step import build

    from preference.engine.probe import prepare_model

    found = []
    for sharded in (False, True):
        model = build(config, lora, device).float()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        prepare_model(model, device=device, autocast=torch.bfloat16)
        if sharded:
            shard(model, device)
        found.append(gradient(model, device))
    (want, logp), (got, sharded_logp) = found
    return {"gradient": float((got - want).norm() / want.norm()), "logps": abs(sharded_logp - logp) / abs(logp)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a config.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", help="write the differences to this file")
    args = parser.parse_args()
    import torch
    from transformers import AutoConfig

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    config = AutoConfig.from_pretrained(args.model)
    figures = {name: compare(config, lora, args.device) for name, lora in (("full", False), ("lora", True))}
    torch.distributed.destroy_process_group()
    print(figures, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    worst = max(value for both in figures.values() for value in both.values())
    if not worst <= BOUND:
        raise SystemExit(f"WRONG: sharded and whole differ by {worst:.2g}, over {BOUND}")


if __name__ == "__main__":
    main()
