"""How far the estimates of a dry run are off: peak memory and time per step against runs, a process each, on a CPU.

    python benchmarks/bench_estimate.py [--only starter,lora] [--sizes 2x60+90+80,4x40+150+120] [--steps 3]

Measured is the peak of the process's resident memory (VmHWM, reset before) over what it held just before the model
was made, all imports done; the run has the product's trainers, three steps of one micro-batch, lengths drawn between
0.7 and 1.3 times the given ones. Estimated is what the dry run says for the micro-batch that costs most. `total` has
what was there before in it on both sides. Linux only.

Models: the starter model, and two random ones of 8 layers, untied, with a vocabulary of 32,000: one of Qwen2's kind (55
M parameters), and a hybrid of Qwen3.5's, where three of four layers carry a state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STARTER = "models/SmolLM2-135M-Instruct"
QWEN2 = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip
HYBRID = dict(
    linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64, head_dim=64
)  # fmt: skip
RANDOM = {"small": ("qwen2", QWEN2), "hybrid": ("qwen3_5_text", QWEN2 | HYBRID)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words of the cases to run, with commas: hybrid,lora,bf16,trl")
    parser.add_argument("--sizes", default="2x60+90+80,4x40+150+120", help="pairs x prompt+chosen+rejected tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="append each case's figures to this file, a line each")
    parser.add_argument("--child", choices=["measure", "estimate"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    choices = itertools.product(
        ("small", "starter", "hybrid"), ("full", "lora"), ("fp32", "bf16"), ("packed", "trl"), args.sizes.split(",")
    )
    for model, what, precision, engine, size in choices:
        words = {model, what, precision, engine, size}
        if all(any(word in words for word in wanted.split("|")) for wanted in args.only.split(",") if wanted):
            found.append(
                dict(model=model, what=what, precision=precision, engine=engine, size=size, steps=args.steps,
                     threads=args.threads)
            )  # fmt: skip
    return found


def lengths(case: dict[str, Any]) -> list[tuple[int, int, int]]:
    batch, parts = case["size"].split("x")
    draw, middle = random.Random(0), [int(n) for n in parts.split("+")]
    return [tuple(int(n * draw.uniform(0.7, 1.3)) for n in middle) for _ in range(int(batch) * case["steps"])]


def run_arguments(case: dict[str, Any]) -> Any:
    from preference.arguments import parse_arguments

    words = f"--model_name_or_path {STARTER} --use_peft {case['what'] == 'lora'} --engine {case['engine']}".split()
    return parse_arguments(words)


def model_config(case: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if case["model"] not in RANDOM:
        return AutoConfig.from_pretrained(STARTER)
    kind, values = RANDOM[case["model"]]
    return AutoConfig.for_model(kind, **values)


def _memory(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def measure(case: dict[str, Any]) -> dict[str, float]:
    """One run in this process."""
    import torch
    import torch._dynamo  # the optimizer would import it
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
        TrainingArguments,
        logging,
    )

    from preference.losses import Objective
    from preference.models.adapters import add_adapter
    from preference.train.trainer import PairTrainer
    from preference.train.trl_engine import _orpo_classes, make_trl_trainer

    torch.set_num_threads(case["threads"])
    logging.set_verbosity_error()
    _orpo_classes()
    args = run_arguments(case)
    draw, names = random.Random(0), ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: [draw.randrange(5, 30000) for _ in range(n)] for name, n in zip(names, row, strict=True)}
        | {"prompt": "", "chosen": "", "rejected": "", "source": ""}
        for row in lengths(case)
    ]
    dataset, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(STARTER)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    before = _memory("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    torch.manual_seed(0)
    if case["model"] in RANDOM:
        model = AutoModelForCausalLM.from_config(model_config(case), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32)
    if args.model.use_peft:
        model = add_adapter(model, args.model, 0)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(rows) // case["steps"],
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            learning_rate=1e-6,
            logging_steps=1,
            optim=args.run.optim,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=case["precision"] == "bf16",
            use_cpu=True,
        )
        make = make_trl_trainer if case["engine"] == "trl" else PairTrainer
        trainer = make(
            model, training, objective=Objective(), train_dataset=dataset, processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"before": before, "peak": _memory("VmHWM:") - before, "seconds": statistics.median(seconds[1:])}


def estimate(case: dict[str, Any]) -> dict[str, float]:
    """What the dry run would say."""
    import numpy as np
    import torch

    from preference.losses import Objective
    from preference.models.hardware import detect
    from preference.plan.estimate import Estimator, Work, memory_rate
    from preference.plan.speed import matmul_rate

    torch.set_num_threads(case["threads"])
    half, device = torch.bfloat16 if case["precision"] == "bf16" else None, torch.device("cpu")
    start = time.perf_counter()
    estimator = Estimator("", run_arguments(case), detect(True), Objective(), half, config=model_config(case))
    rows = np.array(lengths(case)).reshape(case["steps"], -1, 3)
    longest = max(rows, key=estimator.tokens)
    trace = estimator.trace(longest, False)
    memory = estimator.memory(trace, False)
    took = time.perf_counter() - start
    rates = matmul_rate(device, half or torch.float32), memory_rate(device)
    work = Work(longest, statistics.median(map(estimator.tokens, rows[1:])), 1, case["steps"])
    return {"seconds": estimator.seconds(trace, work, *rates), "took": took, "alive": trace.peak, **vars(memory)}


def child(kind: str, case: dict[str, Any]) -> dict[str, float]:
    words = [sys.executable, __file__, "--child", kind, "--case", json.dumps(case)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} {case}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps({"measure": measure, "estimate": estimate}[args.child](args.case)))
        return
    print("| model | trains | dtype | engine | pairs x tokens | measured GB | estimated GB | off | total off "
          "| s/step measured | estimated | dry run s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    off = []
    for case in cases(args):
        real, paper = child("measure", case), child("estimate", case)
        off.append(paper["peak"] / real["peak"] - 1)
        total = (paper["peak"] + real["before"]) / (real["peak"] + real["before"]) - 1
        print(
            f"| {case['model']} | {case['what']} | {case['precision']} | {case['engine']} | {case['size']} "
            f"| {real['peak'] / 1e9:.3f} | {paper['peak'] / 1e9:.3f} | {off[-1]:+.1%} | {total:+.1%} "
            f"| {real['seconds']:.2f} | {paper['seconds']:.2f} | {paper['took']:.1f} |",
            flush=True,
        )
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps({"case": case, "measured": real, "estimated": paper}) + "\n")
    worst = max(off, key=abs)
    print(f"\n{len(off)} runs: within 15% {sum(abs(x) <= 0.15 for x in off)}, the worst {worst:+.1%}, "
          f"mean of |off| {statistics.mean(map(abs, off)):.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
