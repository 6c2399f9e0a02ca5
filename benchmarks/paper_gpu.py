"""One micro-batch of the packed engine on an H100 on paper: operators, bytes, products, memory, and about how long.

    python benchmarks/paper_gpu.py --model qwen0.5b --load hh --pairs 64 --peft lora --json out.json

--model: qwen0.5b, qwen1.5b, llama8b, or a folder with a config.json. --load: the tokens of a pair (prompt, chosen,
rejected) of HH-RLHF, Chinese medical pairs, UltraFeedback, summaries and long chats, as `LOADS` has them. --compile
counts besides what torch_compile would make of a layer: the kernels of Inductor's code for it (paper_inductor.py).

The run's own code is called, forward and backward under bf16 autocast, over fake CUDA tensors (paper_cuda.py): no
weight is made, and any machine serves. What such tensors cannot show, reads of values inside C++, is counted in a real
step of a small model of the same architecture on the CPU and added to `syncs`.

The estimate of time adds up the operators. One takes as long as the largest of: a launch, its bytes at the memory's
speed, its floating-point operations at the rate of products. The constants are in `CARDS`. It has never been compared
with a GPU (benchmarks/LOG.md). TRL's column is the usual layout's: the same work for every token of its padded rows,
and its passes over the logits.

Prints a table; --json writes: layer_ops (operators a layer, forward and backward), head_ops, loss_ops (with the
metrics), total_ops, flops, bytes (of all operators but products and attention), syncs, peak_gb (of what the step makes,
beside weights), estimated_peak_gb (the same as the dry run tells it), mfu_h100, and the rest of the table; with
--compile compiled_layer_ops and their kinds.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import Any  # noqa: E402

import paper_cuda  # noqa: E402, F401  before torch
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config  # noqa: E402

from preference.engine.forward import causal_lm, pair_logps  # noqa: E402
from preference.engine.masks import PackedMask  # noqa: E402
from preference.engine.packing import pack_pairs  # noqa: E402
from preference.engine.probe import prepare_model  # noqa: E402
from preference.losses import Objective, Totals, objective_share  # noqa: E402
from preference.plan.tracing import materialize  # noqa: E402
from preference.train.scores import MetricSums  # noqa: E402

QWEN = dict(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768)
MODELS = {
    "qwen0.5b": lambda: Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, **QWEN
    ),
    "qwen1.5b": lambda: Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, **QWEN
    ),
    "llama8b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
    ),
}  # fmt: skip
LOADS = {"hh": (104, 42, 42), "zh": (108, 256, 256), "uf": (400, 320, 300), "summ": (2000, 100, 100),
         "mt4k": (4096, 300, 300)}  # fmt: skip
# The usual layout's tokens over ours, measured on real sets; for other loads rows of equal length are taken.
USUAL = {"hh": 3.8, "zh": 2.4, "uf": 2.5}
USUAL_LOGIT_BYTES = 60  # that TRL's ORPO reads and writes for each logit, forward and backward


@dataclass(frozen=True)
class Card:
    """A GPU: operations a second of bf16 products at their data sheet's rate and as reached, bytes a second, seconds
    that an operator takes to launch.
    """

    peak: float
    reached: float
    bandwidth: float
    launch: float = 6.5e-6


CARDS = {"h100": Card(989e12, 0.72 * 989e12, 2.7e12), "4090": Card(165e12, 0.72 * 165e12, 0.9e12)}
HOST_READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique_dim"}
# Over their tensors: one reads the logits twice and writes them once, the other writes one of its five once more.
PASSES = {"preference::exp_rows": 3, "preference::silu_mul_finish": 1.2}
PHASES = ("embedding", "layers", "head", "loss", "head backward", "layers backward")


@dataclass
class Operator:
    name: str
    phase: str
    flops: float
    moved: int

    def seconds(self, card: Card) -> float:
        return max(card.launch, self.flops / card.reached, self.moved / card.bandwidth)


def is_free(func: Any) -> bool:
    """Views and fresh tensors: no kernel runs."""
    name = func._schema.name
    made = name.startswith("prim::") or func.__name__.startswith(
        ("empty", "new_empty", "detach", "lift", "_unsafe_view")
    )
    return made or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@dataclass
class Step:
    """What a step was seen to do."""

    operators: list[Operator] = field(default_factory=list)
    syncs: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    tokens: int = 0
    targets: int = 0

    def ops(self, *phases: str) -> int:
        return sum(operator.phase in phases for operator in self.operators)

    def seconds(self, card: Card) -> float:
        return sum(operator.seconds(card) for operator in self.operators)


class Meter(TorchDispatchMode):
    """Notes the operators on CUDA tensors and follows the memory of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.phase = Step(), "embedding"
        self.known: dict[int, Any] = {}
        self.now = 0

    def know(self, tensor: Tensor, counted: bool = True) -> None:
        import weakref

        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if counted else 0
        if key in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.step.peak = max(self.step.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        kinds = {x.device.type for x in tensors + made}
        if "cuda" not in kinds:
            return out
        for tensor in made:
            if tensor.device.type == "cuda":
                self.know(tensor)
        self._note_sync(func, args, kwargs, kinds)
        if not is_free(func):
            count = flop_registry.get(func._overloadpacket)
            counted = args[:2] if func._overloadname == "dtype" else args  # without the type of what is written
            flops = count(*counted, **kwargs, out_val=out) if count else 0
            moved = sum(x.numel() * x.element_size() for x in tensors + made)
            moved *= PASSES.get(func._schema.name, 1)
            self.step.operators.append(Operator(func._schema.name, self.phase, float(flops), int(moved)))
        return out

    def _note_sync(self, func: Any, args: Any, kwargs: Any, kinds: set[str]) -> None:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_iter(args[1])
        )
        copies = name in ("_to_copy", "copy_") and "cpu" in kinds
        waits = copies and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if name in HOST_READS or by_mask or waits:
            self.step.syncs[f"{name} in {self.phase}"] += 1


def pairs_of(load: str, count: int) -> list[dict[str, list[int]]]:
    """`count` pairs of arbitrary tokens whose prompts have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    sizes = LOADS[load]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {n: torch.randint(100, 50000, (k,), generator=generator).tolist() for n, k in zip(names, sizes, strict=True)}
        for _ in range(count)
    ]


def configuration(model: str) -> Any:
    return MODELS[model]() if model in MODELS else AutoConfig.from_pretrained(model)


def paper_model(config: Any, lora: bool) -> nn.Module:
    """On the meta device, as a CUDA run under bf16 holds it: frozen weights in bf16, trained ones in fp32."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
        if lora:
            from peft import LoraConfig, get_peft_model

            adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            model = get_peft_model(model, adapter)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    return model


def _mark_phases(model: nn.Module, meter: Meter) -> None:
    """Have the meter told when the layers and the head begin and end, both ways."""
    lm = causal_lm(model)
    layers = next(m for m in lm.modules() if isinstance(m, nn.ModuleList))

    def enter(phase: str) -> Any:
        def hook(*_: Any) -> None:
            meter.phase = phase

        return hook

    def layers_ran(_: nn.Module, __: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden.register_hook(enter("layers backward"))
        meter.phase = "head"

    def scored(_: nn.Module, __: Any, logps: Tensor) -> None:
        logps.register_hook(enter("head backward"))
        meter.phase = "loss"

    layers[0].register_forward_pre_hook(enter("layers"))
    layers[-1].register_forward_hook(layers_ran)
    model.register_forward_hook(scored)


def trace(config: Any, pairs: list[dict[str, Any]], lora: bool, objective: Objective) -> Step:
    """Follow one micro-batch, forward and backward, with the metrics that are kept of it."""
    model = paper_model(config, lora)
    engine = prepare_model(model, device="cuda", autocast=torch.bfloat16)
    mode, meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
    with mode:
        materialize(model, "cuda")
        packed = pack_pairs(pairs, share_prompt=engine.share_prompt, prompt_logps=objective.needs_prompt)
        batch = {k: torch.empty_like(v, device="cuda") if isinstance(v, Tensor) else v for k, v in packed.items()}
        reference = (
            tuple(torch.empty(len(pairs), device="cuda") for _ in range(2)) if objective.needs_reference else None
        )
    for tensor in (*model.parameters(), *model.buffers()):
        meter.know(tensor, counted=False)
    model.train()
    _mark_phases(model, meter)
    totals = Totals.of(objective, [(len(p["prompt_ids"]), len(p["chosen_ids"])) for p in pairs])
    with mode, meter:
        with torch.autocast("cuda", torch.bfloat16):
            logps = pair_logps(model, batch)
        loss, metrics = objective_share(objective, logps, totals, reference)
        del logps
        MetricSums().add(metrics, 1 / totals.pairs)
        loss.backward()
    meter.step.tokens, meter.step.targets = batch["input_ids"].numel(), len(batch["target_ids"])
    return meter.step


def with_layers(config: Any, count: int) -> Any:
    import copy

    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    return config


def layer_ops(config: Any, pairs: list[dict[str, Any]], lora: bool, objective: Objective) -> float:
    """Operators that one more layer adds, forward and backward."""
    counts = [len(trace(with_layers(config, n), pairs, lora, objective).operators) for n in (2, 4)]
    return (counts[1] - counts[0]) / 2


def compiled_layer(config: Any, pairs: list[dict[str, Any]], lora: bool, objective: Objective) -> dict[str, int]:
    """Kernels of a layer as `torch_compile` has it, by kind."""
    from paper_inductor import kernels_of

    model = paper_model(with_layers(config, 1), lora)
    engine = prepare_model(model, device="cuda", autocast=torch.bfloat16, lighten=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        materialize(model, "cuda")
        packed = pack_pairs(pairs, share_prompt=engine.share_prompt, prompt_logps=objective.needs_prompt)
        batch = {k: torch.empty_like(v, device="cuda") if isinstance(v, Tensor) else v for k, v in packed.items()}
        tokens, width = batch["input_ids"].numel(), config.hidden_size
        size = getattr(config, "head_dim", None) or width // config.num_attention_heads
        dtype = torch.bfloat16 if lora else torch.float32
        hidden = torch.empty(1, tokens, width, device="cuda", dtype=dtype, requires_grad=True)
        cos, sin = (torch.empty(1, tokens, size, device="cuda", dtype=dtype) for _ in range(2))
    layer = next(m for m in causal_lm(model).modules() if isinstance(m, nn.ModuleList))[0]
    arguments = {
        "attention_mask": PackedMask(batch), "position_embeddings": (cos, sin), "position_ids": batch["position_ids"]
    }  # fmt: skip
    return dict(kernels_of(layer.train(), hidden, arguments, mode))


def host_reads(config: Any, objective: Objective) -> int:
    """aten::item in a step of a small model of this architecture on the CPU, forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    small = with_layers(config, 2)
    for name, value in dict(vocab_size=512, hidden_size=64, intermediate_size=96, head_dim=16).items():
        if getattr(small, name, None) is not None:
            setattr(small, name, value)
    small.num_attention_heads, small.num_key_value_heads = 4, 2
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    prepare_model(model)
    pairs = [{"prompt_ids": [*range(3, 9 + i)], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]} for i in range(3)]
    batch = pack_pairs(pairs, prompt_logps=objective.needs_prompt)
    totals = Totals.of(objective, [(len(p["prompt_ids"]), 3) for p in pairs])
    reference = (torch.zeros(3), torch.zeros(3)) if objective.needs_reference else None
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        objective_share(objective, pair_logps(model, batch), totals, reference)[0].backward()
    return sum(event.count for event in seen.key_averages() if event.key == "aten::item")


def useful_flops(config: Any, pairs: list[dict[str, Any]], step: Step, lora: bool) -> float:
    """Of the weights' products on each token, of attention on each pair of tokens that see each other, of the head on
    each target: what the mathematics needs, nothing computed twice.
    """
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    keys = getattr(config, "num_key_value_heads", heads)
    weights = layers * (2 * width * heads * size + 2 * width * keys * size + 3 * width * config.intermediate_size)
    seen = 0.0
    for pair in pairs:
        p, c, r = (len(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        seen += (p - 1) * p / 2 + sum(n * (p - 1) + n * (n + 1) / 2 for n in (c, r))
    per_weight = 4 if lora else 6
    attention = layers * 3.5 * 4 * seen * heads * size
    return per_weight * weights * step.tokens + attention + per_weight * width * config.vocab_size * step.targets


def usual_seconds(config: Any, load: str, step: Step, lora: bool, useful: float, card: Card) -> float:
    """The same pairs in the usual layout: TRL's tokens through the layers and their logits through memory."""
    prompt, chosen, rejected = LOADS[load]
    more = USUAL.get(load, 2 * (prompt + max(chosen, rejected)) / (prompt - 1 + chosen + rejected))
    head = [o for o in step.operators if o.phase in ("head", "loss", "head backward")]
    layers = sum(o.seconds(card) for o in step.operators) - sum(o.seconds(card) for o in head)
    tokens = step.tokens * more
    products = (4 if lora else 6) * config.hidden_size * config.vocab_size * tokens / card.reached
    return layers * more + products + tokens * config.vocab_size * USUAL_LOGIT_BYTES / card.bandwidth


def dry_run_peak(config: Any, load: str, pairs: int, lora: bool) -> float:
    """Bytes of the same step, weights aside, as the dry run tells them."""
    import numpy as np

    from preference.arguments import parse_arguments
    from preference.models.hardware import Hardware
    from preference.plan.estimate import Estimator

    adapter = ["--use_peft=true", "--lora_rank=16", "--lora_dropout=0"] if lora else ["--use_peft=false"]
    args = parse_arguments([*adapter, "--bf16=true"])
    hardware = Hardware("cuda", "H100", 80 * 2**30, True)
    estimator = Estimator("", args, hardware, Objective(), torch.bfloat16, config=config)
    return estimator.trace(np.array([LOADS[load]] * pairs), False).peak


def report(model: str, load: str, pairs: int, peft: str, loss: str = "orpo", compiled: bool = False) -> dict[str, Any]:
    config, lora, objective = configuration(model), peft == "lora", Objective(loss=loss)
    rows = pairs_of(load, pairs)
    step = trace(config, rows, lora, objective)
    useful = useful_flops(config, rows, step, lora)
    seconds = {name: step.seconds(card) for name, card in CARDS.items()}
    by_kind = compiled_layer(config, rows, lora, objective) if compiled else {}
    found = {f"compiled_{kind.lower()}": count for kind, count in by_kind.items()}
    usual = {name: usual_seconds(config, load, step, lora, useful, card) for name, card in CARDS.items()}
    return {
        "model": model, "load": load, "pairs": pairs, "peft": peft, "loss": loss,
        "tokens": step.tokens, "targets": step.targets,
        "layer_ops": layer_ops(config, rows, lora, objective),
        "head_ops": step.ops("head", "head backward"),
        "loss_ops": step.ops("loss"),
        "total_ops": len(step.operators),
        "flops": sum(o.flops for o in step.operators),
        "bytes": sum(o.moved for o in step.operators if not o.flops),
        "syncs": step.syncs.total() + host_reads(config, objective),
        "peak_gb": step.peak / 1e9,
        "estimated_peak_gb": dry_run_peak(config, load, pairs, lora) / 1e9,
        **{f"mfu_{name}": useful / seconds[name] / CARDS[name].peak for name in CARDS},
        **{f"ms_{name}": 1e3 * value for name, value in seconds.items()},
        **{f"ms_{name}_trl": 1e3 * value for name, value in usual.items()},
        **({"compiled_layer_ops": sum(by_kind.values())} | found if compiled else {}),
    }  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("--load", required=True, choices=LOADS, help="tokens of a pair")
    parser.add_argument("--pairs", required=True, type=int, help="pairs of the micro-batch")
    parser.add_argument("--peft", required=True, choices=["lora", "full"], help="rank 16 on all linear layers, or none")
    parser.add_argument("--loss", default="orpo", choices=["orpo", "dpo"])
    parser.add_argument("--compile", action="store_true", help="count what torch_compile would make of a layer besides")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(words)
    if args.pairs < 1:
        parser.error("--pairs is 1 at least")
    if args.model not in MODELS and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model: {args.model} is none of {', '.join(MODELS)} and no folder with a config.json")
    return args


def main() -> None:
    args = parse()
    logging.disable(logging.WARNING)
    figures = report(args.model, args.load, args.pairs, args.peft, args.loss, args.compile)
    for name, value in figures.items():
        print(f"{name:<20}{value if isinstance(value, (str, int)) else f'{value:,.4g}'}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the device on paper cannot be joined


if __name__ == "__main__":
    main()
