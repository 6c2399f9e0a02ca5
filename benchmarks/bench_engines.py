"""The engines side by side on the same pairs: time, memory, and whether their gradients agree.

    python benchmarks/bench_engines.py --model models/SmolLM2-135M-Instruct --data pairs.jsonl --pairs 32 --batch 4 \
        --max_length 512 --dtype bf16 --engines trl,packed [--peft lora] [--loss dpo] [--json out.json]

Each engine trains in a process of its own, with the trainer that the product uses, on the same pairs in the same order,
one optimizer step per batch; learning rate 0, so that every step does the same work on the same weights. The processes
take turns step by step, so whatever else the machine does hits both alike; CPU seconds are told besides, which other
load on the machine moves less. --apart runs one after another, where a GPU cannot hold them together.
The first step warms up and gives the gradients that are compared; it is not timed. dtype bf16 is float32 weights under
bfloat16 autocast; on a GPU, frozen ones in bfloat16.

Reads question/response_chosen/response_rejected or prompt/chosen/rejected rows, as training does. `--random` takes
--model's config with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# rows: the packed engine without sharing, as for models that it cannot share; compiled: with torch_compile
ENGINES = ("trl", "packed", "rows", "compiled")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id; its tokenizer is used too")
    parser.add_argument("--data", required=True, help="a file of pairs")
    parser.add_argument("--pairs", type=int, default=32, help="usable pairs of the file, the first ones")
    parser.add_argument("--skip", type=int, default=0, help="usable pairs to leave out before them")
    parser.add_argument("--shuffle", type=int, help="random order of the usable pairs, drawn with this seed")
    parser.add_argument("--batch", type=int, default=4, help="pairs per optimizer step")
    parser.add_argument("--max_length", type=int, default=512, help="longer pairs are dropped")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast over fp32 weights")
    parser.add_argument("--engines", default="trl,packed", help="which, with commas; the first is the yardstick")
    parser.add_argument("--peft", choices=["lora"], help="train a LoRA adapter (rank 16, all linear layers)")
    parser.add_argument("--loss", choices=["orpo", "dpo"], default="orpo")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--random", action="store_true", help="random weights from --model's config")
    parser.add_argument("--max_tokens_per_micro_batch", type=int, default=0, help="of the packed engine")
    parser.add_argument("--apart", action="store_true", help="one engine after another, not in turns")
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args(words)
    args.engines = [name.strip() for name in args.engines.split(",") if name.strip()]
    unknown = sorted(set(args.engines) - set(ENGINES))
    if unknown or not args.engines:
        parser.error(f"--engines takes {', '.join(ENGINES)}; got {', '.join(unknown) or 'none'}")
    if args.pairs < 2 * args.batch:
        parser.error("--pairs must hold two batches at least: the first one warms up")
    return args


def load_pairs(args: argparse.Namespace) -> Any:
    """The first usable pairs of the file, tokenized as for training."""
    from transformers import AutoTokenizer

    from preference.data.rows import DataReport, load_rows
    from preference.templates.resolve import resolve_template
    from preference.tokens.datasets import build_dataset

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    conversation = resolve_template("auto", tokenizer)[0]
    report = DataReport()
    rows = load_rows([args.data], report)
    half = args.max_length // 2
    lengths = dict(max_source_length=args.max_length - half, max_target_length=half)
    dataset = build_dataset(rows, conversation, tokenizer, report=report, **lengths)
    if args.shuffle is not None:
        dataset = dataset.shuffle(seed=args.shuffle)
    dataset = dataset.select(range(min(args.skip, len(dataset)), len(dataset)))
    count = min(args.pairs, len(dataset)) // args.batch * args.batch
    if count < 2 * args.batch:
        raise SystemExit(f"{args.data}: {len(dataset)} usable pairs of at most {args.max_length} tokens; give more")
    return dataset.select(range(count)), tokenizer


def load_model(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    half = cuda and args.peft and args.dtype == "bf16"  # as a run on a GPU holds frozen weights
    dtype = torch.bfloat16 if half else torch.float32
    if args.random:
        with torch.device("cuda" if cuda else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    if args.peft:
        from peft import LoraConfig, get_peft_model

        # Dropout would draw other numbers in other layouts.
        adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        model = get_peft_model(model, adapter)
    return model


def make_trainer(engine: str, args: argparse.Namespace, callback: Any, folder: str) -> Any:
    import torch
    from transformers import TrainingArguments

    from preference.losses import Objective

    dataset, tokenizer = load_pairs(args)
    training = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=args.batch,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=1e9,  # the norm is computed, as in training, and nothing is scaled
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=args.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        **({"gradient_checkpointing": True} if args.gradient_checkpointing else {}),  # newer versions warn of the name
    )
    common = dict(
        objective=Objective(loss=args.loss), train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]
    )
    if engine == "trl":
        from preference.train.trl_engine import make_trl_trainer

        return make_trl_trainer(load_model(args), training, **common)
    from preference.train.trainer import PairTrainer

    options = dict(
        max_tokens_per_micro_batch=args.max_tokens_per_micro_batch,
        share_prompt=engine != "rows",
        torch_compile=engine == "compiled",
    )
    return PairTrainer(load_model(args), training, **options, **common)


def work(engine: str, args: argparse.Namespace, pipe: Any, folder: str) -> None:
    """One engine's process: a training run whose every step waits for its turn."""
    import torch
    from transformers import PrinterCallback, TrainerCallback, logging

    from preference.screen import clean_logging

    clean_logging()
    logging.set_verbosity_error()
    cuda = torch.cuda.is_available()

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            pipe.send(("ready", None))
            pipe.recv()
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

        def on_pre_optimizer_step(self, _: Any, state: Any, __: Any, model: Any = None, **___: Any) -> None:
            if state.global_step == 0:
                with open(Path(folder) / engine, "wb") as file:
                    for _, p in sorted(model.named_parameters()):
                        if p.grad is not None:
                            p.grad.float().cpu().numpy().tofile(file)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.seconds, self.cpu = time.perf_counter() - self.start, time.process_time() - self.cpu_start

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, Any], **____: Any) -> None:
            if "loss" in logs:
                pipe.send(("step", (self.seconds, self.cpu, float(logs["loss"]))))

    with contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(engine, args, Turns(), f"{folder}/run-{engine}")
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(("done", peak))


def run(args: argparse.Namespace, folder: str) -> dict[str, dict[str, Any]]:
    """Seconds and loss of every step, and peak bytes, of every engine."""
    groups = [[engine] for engine in args.engines] if args.apart else [args.engines]
    return {engine: values for group in groups for engine, values in take_turns(group, args, folder).items()}


def take_turns(engines: list[str], args: argparse.Namespace, folder: str) -> dict[str, dict[str, Any]]:
    context = mp.get_context("spawn")
    pipes, processes = {}, {}
    for engine in engines:
        pipes[engine], child = context.Pipe()
        processes[engine] = context.Process(target=work, args=(engine, args, child, folder), daemon=True)
        processes[engine].start()
        child.close()
    found: dict[str, dict[str, Any]] = {engine: {"steps": []} for engine in engines}
    waiting = list(engines)
    for engine in waiting:  # all are loaded before one is timed
        _expect(pipes[engine], engine, "ready")
    while waiting:
        for engine in list(waiting):
            pipes[engine].send("go")
            found[engine]["steps"].append(_expect(pipes[engine], engine, "step"))
            kind, value = _receive(pipes[engine], engine)
            if kind == "done":
                found[engine]["peak_bytes"] = value
                waiting.remove(engine)
    for process in processes.values():
        process.join()
    return found


def _receive(pipe: Any, engine: str) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"engine {engine} stopped; its error stands above") from None


def _expect(pipe: Any, engine: str, kind: str) -> Any:
    got, value = _receive(pipe, engine)
    if got != kind:
        raise SystemExit(f"engine {engine}: expected {kind}, got {got}")
    return value


def gradient_difference(reference: Path, other: Path) -> float:
    """|a - b| / |a| over all gradients."""
    import numpy as np

    a, b = (np.memmap(path, dtype=np.float32, mode="r") for path in (reference, other))
    if len(a) != len(b):
        raise SystemExit(f"{len(a)} gradients against {len(b)}")
    parts = [(a[i : i + 2**24].astype(np.float64), b[i : i + 2**24]) for i in range(0, len(a), 2**24)]
    return float((sum(((x - y) ** 2).sum() for x, y in parts) / sum((x**2).sum() for x, _ in parts)) ** 0.5)


def matmul_rate(dtype: str) -> float:
    """FLOP/s of this machine's matrix product at the size of a packed row."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]),) * 2
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * size**3 / best


def useful(args: argparse.Namespace) -> tuple[float, float, dict[str, float]]:
    """Per step: tokens that must be computed (what prompts share once), the FLOPs of their matrix products; lengths."""
    import torch

    from preference.engine.packing import pack_pairs

    dataset = load_pairs(args)[0]
    lengths = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in dataset]
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = model.num_parameters() - (0 if tied else model.get_input_embeddings().weight.numel())
    batches = [dataset.select(range(i, i + args.batch)).to_list() for i in range(args.batch, len(dataset), args.batch)]
    tokens = statistics.mean(pack_pairs(batch)["input_ids"].numel() for batch in batches)
    middle = {
        name: statistics.median(values)
        for name, values in zip(("prompt", "chosen", "rejected"), zip(*lengths, strict=True), strict=True)
    }
    return tokens, (4 if args.peft else 6) * tokens * weights, middle


def summarize(args: argparse.Namespace, found: dict[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    tokens, flops, lengths = useful(args)
    rate = matmul_rate(args.dtype)
    rows: dict[str, Any] = {}
    for engine, values in found.items():
        seconds = [s for s, _, _ in values["steps"][1:]]
        middle = statistics.median(seconds)
        total = sum(seconds)
        rows[engine] = {
            "seconds_per_step": middle,
            "seconds_of_steps": seconds,
            "cpu_seconds_per_step": statistics.median(cpu for _, cpu, _ in values["steps"][1:]),
            "pairs_per_second": args.batch * len(seconds) / total,
            "useful_tokens_per_second": tokens * len(seconds) / total,
            "matmul_share": flops * len(seconds) / total / rate,
            "peak_memory_bytes": values["peak_bytes"],
            "loss": values["steps"][0][2],
            "losses": [loss for _, _, loss in values["steps"]],
        }
    result = {"arguments": vars(args), "median_tokens": lengths, "matmul_flops_per_second": rate, "engines": rows}
    if len(args.engines) > 1:
        first, second = (rows[name] for name in args.engines[:2])
        a, b = (Path(folder) / name for name in args.engines[:2])
        result |= {
            "speedup": second["pairs_per_second"] / first["pairs_per_second"],
            "memory_ratio": second["peak_memory_bytes"] / first["peak_memory_bytes"],
            "grad_rel_err": gradient_difference(a, b),
        }
    return result


def show(result: dict[str, Any]) -> None:
    lengths = result["median_tokens"]
    print("median tokens: " + ", ".join(f"{name} {value:g}" for name, value in lengths.items()))
    print(f"matrix product: {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s\n")
    print("| engine | s/step (median) | CPU s/step | pairs/s | useful tokens/s | of matmul rate | peak GB | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in result["engines"].items():
        print(
            f"| {name} | {row['seconds_per_step']:.2f} | {row['cpu_seconds_per_step']:.2f} "
            f"| {row['pairs_per_second']:.2f} "
            f"| {row['useful_tokens_per_second']:.0f} | {row['matmul_share']:.0%} "
            f"| {row['peak_memory_bytes'] / 1e9:.2f} | {row['loss']:.6f} |"
        )
    if "speedup" in result:
        print(
            f"\nspeedup {result['speedup']:.2f}, memory ratio {result['memory_ratio']:.2f}, "
            f"relative gradient difference {result['grad_rel_err']:.1e}"
        )


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = summarize(args, run(args, folder), folder)
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
