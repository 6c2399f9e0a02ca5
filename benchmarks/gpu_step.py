"""One micro-batch on a real GPU beside what paper_gpu.py says of it: milliseconds, MFU, memory, waits.

    python benchmarks/gpu_step.py --model qwen0.5b --load hh --pairs 64 --peft lora [--compile] --json out.json

Random weights, no download; options as of paper_gpu.py. It fails (exit status 1) where a number is wrong rather than
slow: log-probabilities that differ from a plain forward's by more than rounding (`prepare_model` compares them), a
loss that is not finite, a step that waits for the card, memory that the dry run's trace tells by more than 10%
wrongly. `--device cpu` runs the same on a CPU, for a look at the program itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

STEPS, WARM_UP = 10, 4


def build(config: Any, lora: bool, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
        if lora:
            from peft import LoraConfig, get_peft_model

            adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            model = get_peft_model(model, adapter)
    for parameter in model.parameters():
        if lora and parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def waits_of(step: Any, device: str) -> int:
    """How often a step waits for the card."""
    import torch

    if device == "cpu":
        return 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import paper_gpu
    import torch

    from preference.engine.compiled import compile_layers
    from preference.engine.forward import pair_logps
    from preference.engine.packing import pack_pairs
    from preference.engine.probe import prepare_model
    from preference.engine.transfer import to_device
    from preference.losses import Objective, Totals, objective_share

    device, lora, objective = torch.device(args.device), args.peft == "lora", Objective()
    config = paper_gpu.configuration(args.model)
    model = build(config, lora, args.device)
    engine = prepare_model(model, device=args.device, autocast=torch.bfloat16, lighten=not args.compile)
    if args.compile:
        compile_layers(model)
    pairs = paper_gpu.pairs_of(args.load, args.pairs)
    for pair in pairs:
        for name in pair:
            pair[name] = [token % config.vocab_size for token in pair[name]]
    host = pack_pairs(pairs, share_prompt=engine.share_prompt, prompt_logps=objective.needs_prompt)
    totals = Totals.of(objective, [(len(p["prompt_ids"]), len(p["chosen_ids"])) for p in pairs])
    losses = []

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            logps = pair_logps(model, to_device(host, device))
        loss = objective_share(objective, logps, totals, None)[0]
        loss.backward()
        losses.append(loss.detach())
        model.zero_grad(set_to_none=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step()
    wait()
    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    launched = time.perf_counter()
    wait()
    seconds = (time.perf_counter() - start) / STEPS
    peak = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else 0
    paper = paper_gpu.Step(tokens=host["input_ids"].numel(), targets=len(host["target_ids"]))
    useful = paper_gpu.useful_flops(config, pairs, paper, lora)
    return {
        "model": args.model, "load": args.load, "pairs": args.pairs, "peft": args.peft, "compile": args.compile,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "tokens": paper.tokens, "attention": engine.attention, "shared": engine.share_prompt,
        "ms": 1e3 * seconds, "host_ms": 1e3 * (launched - start) / STEPS,
        "mfu_of_h100": useful / seconds / paper_gpu.CARDS["h100"].peak,
        "peak_gb": peak / 1e9,
        "estimated_peak_gb": paper_gpu.dry_run_peak(config, args.load, args.pairs, lora) / 1e9,
        "waits": waits_of(step, args.device),
        "loss": float(losses[-1]),
    }  # fmt: skip


def faults(figures: dict[str, Any]) -> list[str]:
    """What is wrong with the figures, rather than slow."""
    found = []
    if figures["loss"] != figures["loss"] or abs(figures["loss"]) == float("inf"):
        found.append(f"the loss is {figures['loss']}")
    if not figures["shared"]:
        found.append("prompts are not shared: the packed row gave other log-probabilities than a plain forward")
    if figures["waits"]:
        found.append(f"a micro-batch waits {figures['waits']} times for the card")
    said, used = figures["estimated_peak_gb"], figures["peak_gb"]
    if used and not figures["compile"] and abs(said - used) > 0.1 * used:
        found.append(f"the dry run says {said:.2f} GB beside the weights, {used:.2f} were used")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as of paper_gpu.py")
    parser.add_argument("--load", required=True, help="as of paper_gpu.py")
    parser.add_argument("--pairs", required=True, type=int, help="pairs of the micro-batch")
    parser.add_argument("--peft", required=True, choices=["lora", "full"])
    parser.add_argument("--compile", action="store_true", help="with compiled layers")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    import paper_cuda  # noqa: F401  before torch; it changes nothing where torch has CUDA
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; benchmarks/paper_gpu.py follows the step on paper")
    figures = measure(args)
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    if wrong := faults(figures):
        print("WRONG: " + "; ".join(wrong), file=sys.stderr, flush=True)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
