"""What a run will need: memory of its parts and time of a step, before any weight is loaded.

What is exact: parameters, weights, gradients, optimizer states; the tensors that a step makes and frees, followed
through the model's own code on the longest micro-batch that the planner makes (plan/tracing.py). What is a model:
- on a CPU, what a process holds over that: holes between blocks (`CPU_SPREAD`) and libraries (`CPU_LIBRARIES`), both
  fitted to runs;
- on a GPU, an allowance for the CUDA context and the caching allocator; never compared with a GPU;
- what strategies share out or gather, and DDP's buckets: arithmetic, never compared with several devices;
- time: matrix products at the measured rate, everything else at the measured memory speed; without communication.
benchmarks/bench_estimate.py compares with runs; benchmarks/LOG.md has the table.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from preference.arguments import Arguments
from preference.engine.batching import Cut, TrainingPlan
from preference.engine.forward import _score, causal_lm
from preference.engine.layers.lora import hold_frozen
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.losses import Objective
from preference.models.adapters import adapter_on_paper, add_adapter
from preference.models.folder import read_config
from preference.models.hardware import Hardware
from preference.models.loading import weights_dtype
from preference.models.parameters import count_parameters
from preference.plan.tracing import PaperModel, Trace

ENGINES = ("packed", "trl")
SHARDED = ("fsdp", "zero2", "zero3", "zero3_offload")
CPU_LIBRARIES = 90e6  # bytes: code, kernels and buffers that a first training step brings into a process on a CPU
CPU_SPREAD = {"packed": 1.4, "trl": 1.25}  # memory taken for a step's tensors, over what is alive of them at the peak
GPU_CONTEXT = 600 * 2**20  # bytes: CUDA context and libraries
GPU_FRAGMENTS = 1.05  # what the caching allocator holds over what is alive
ZERO_BUCKET = 50e6  # elements of a bucket in train/zero/zero2.json
FOUR_BITS = 0.516  # bytes of a weight in nf4 with double quantization
PLANNED_STEPS = 2000  # steps of the first epoch that are looked at for the longest micro-batch
STATES = {"8bit": 0.5, "adamw": 2, "lion": 1, "sgd": 0, "rmsprop": 1, "adagrad": 1}  # bytes for one of the weight


@dataclass(frozen=True)
class Work:
    """What the planner gives a device, in steps of `pairs` x `accumulation` pairs.

    Attributes:
        longest: lengths [B, 3] (prompt, chosen, rejected) of the micro-batch that costs most.
        tokens_per_step: mean tokens that go through the model in a step, padding included.
        micro_batches: most micro-batches in a step.
        steps: optimizer steps of the run.
    """

    longest: np.ndarray
    tokens_per_step: float
    micro_batches: int
    steps: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. activations: what the layers leave for the backward; head: what output head and loss add at
    their peak; other: buffers of the strategy, allocator and libraries. peak: the most at any time, of gradients and
    activations only what is there together.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    other: float
    peak: float


def paper_model(
    source: str,
    args: Arguments,
    hardware: Hardware,
    half: torch.dtype | None,
    *,
    config: Any = None,
    adapter: str | None = None,
) -> nn.Module:
    """The model of `source` on the meta device, with its adapter, as the run would hold it; reads its config alone."""
    if config is None:
        config = read_config(source, cache_dir=args.model.cache_dir, trust_remote_code=args.model.trust_remote_code)
    dtype = torch.bfloat16 if args.quantized else weights_dtype(args, hardware, half)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=args.model.trust_remote_code
        )
        if args.quantized:
            packed = {id(p) for p in _four_bit(model)}
            for parameter in model.parameters():
                if id(parameter) not in packed:
                    parameter.data = parameter.data.float()
        if args.model.use_peft and adapter and not args.model.new_adapter:
            model = adapter_on_paper(model, adapter)
        elif args.model.use_peft:
            model = add_adapter(model, args.model, args.run.seed)
    if args.run.gradient_checkpointing:
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.x
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        if args.model.use_peft:
            model.enable_input_require_grads()
    return model


def _four_bit(model: nn.Module) -> list[nn.Parameter]:
    """The weights that 4-bit loading packs: linear layers but the head."""
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head and m.weight.ndim == 2]


def plan_work(
    lengths: np.ndarray,
    args: Arguments,
    objective: Objective,
    pairs: int,
    accumulation: int,
    share_prompt: bool,
    common: int = 0,
) -> Work:
    """What one device of one gets to do, from the lengths [n, 3] of the training set and its `shared_prefix`.

    TRL's own order of the rows is drawn when it trains; another random order stands for it here.
    """
    packed = args.objective.engine == "packed"
    cut = Cut(pairs, args.objective.max_tokens_per_micro_batch if packed else 0, 1, share_prompt, common)
    plan = TrainingPlan(
        lengths, objective, cut, rank=0, global_batch=pairs * accumulation, seed=args.run.seed, epoch=lambda: 0
    )
    steps = len(plan) * args.run.num_train_epochs if args.run.max_steps <= 0 else args.run.max_steps
    order = plan.order(0)
    longest, most, tokens, seen, micro_batches = None, -1, 0, 0, 0
    for number, [step] in enumerate(plan if packed else ()):
        for rows in step.micro_batches:
            cost = cut.row(lengths[list(rows)])
            tokens += cost
            if cost > most:
                longest, most = lengths[list(rows)], cost
        micro_batches, seen = max(micro_batches, len(step.micro_batches)), number + 1
        if seen == PLANNED_STEPS:
            break
    if not packed:
        for start in range(0, min(len(order), PLANNED_STEPS * pairs * accumulation), pairs):
            batch = lengths[order[start : start + pairs]]
            cost = padded_tokens(batch)
            tokens += cost
            if cost > most:
                longest, most = batch, cost
        seen = min(len(plan), PLANNED_STEPS)
        micro_batches = accumulation
    return Work(longest, tokens / max(seen, 1), micro_batches, int(np.ceil(steps)))


def padded_tokens(lengths: np.ndarray) -> int:
    """Tokens of a batch in TRL's layout: both answers as rows, all padded to the longest."""
    return 2 * len(lengths) * int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


def _autocast(batch: dict[str, Any]) -> torch.autocast:
    return torch.autocast(batch["input_ids"].device.type, batch["half"], enabled=batch["half"] is not None)


def _packed_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with _autocast(batch):
        return model(input_ids=batch["input_ids"], packed=batch).sum()


def _trl_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The tensors of ORPOTrainer's loss; for DPO those of a head that makes no logits."""
    from trl.trainer.utils import selective_log_softmax

    ids, mask = batch["input_ids"], batch["mask"]
    half = len(ids) // 2
    with _autocast(batch):
        if batch["dpo"]:
            lm = causal_lm(model)
            hidden = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            head, config = lm.get_output_embeddings(), lm.config.get_text_config()
            return _score(head, hidden.flatten(0, 1), ids[:, 1:].flatten(), config).sum()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits.float()  # as accelerate does to what leaves autocast
    chosen = logits[:half][:, :-1].contiguous()
    nll = F.cross_entropy(chosen.view(-1, chosen.shape[-1]), ids[:half, 1:].reshape(-1))
    del chosen
    return nll - selective_log_softmax(logits[:, :-1], ids[:, 1:]).mean()


def stand_ins(lengths: np.ndarray, common: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of these lengths [B, 3] whose prompts have their first `common` tokens in common, and no others."""
    return [
        {
            "prompt_ids": [0] * common + [number + 1] * int(prompt - common),
            "chosen_ids": [0] * int(chosen),
            "rejected_ids": [0] * int(rejected),
        }
        for number, (prompt, chosen, rejected) in enumerate(lengths)
    ]


class Estimator:
    """Follows the step of a run on paper.

    Args:
        common: the `shared_prefix` of the training set.
        config: of the model, where it is not to be read from `source`. adapter: that the run resumes.
    """

    def __init__(
        self,
        source: str,
        args: Arguments,
        hardware: Hardware,
        objective: Objective,
        half: torch.dtype | None,
        *,
        config: Any = None,
        common: int = 0,
        adapter: str | None = None,
    ) -> None:
        self.common = common
        self.args, self.hardware, self.objective, self.half = args, hardware, objective, half
        model = paper_model(source, args, hardware, half, config=config, adapter=adapter)
        self.share_prompt = False
        self.cast_away = 0  # bytes of the loaded weights that the engine lets go; a process on a CPU keeps most of them
        if args.objective.engine == "packed":  # as train/trainer.py does
            engine = prepare_model(
                model,
                share_prompt=args.objective.share_prompt,
                device=hardware.device,
                attention=args.objective.attn_implementation,
                lighten=not args.run.torch_compile,
            )
            self.share_prompt = engine.share_prompt
            loaded = _bytes(model)
            if half and hardware.device == "cpu" and args.run.strategy == "ddp":
                hold_frozen(model, half)
            self.cast_away = loaded - _bytes(model)
        self.trainable, self.parameters = count_parameters(model)
        self.vocabulary = causal_lm(model).config.get_text_config().vocab_size
        four_bit = {id(p) for p in _four_bit(causal_lm(model))} if args.quantized else set()
        four_bit -= {id(p) for p in model.parameters() if p.requires_grad}
        self.weights = float(
            sum(p.numel() * (FOUR_BITS if id(p) in four_bit else p.element_size()) for p in model.parameters())
        )
        self.gradient_sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
        self.shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        self.layer_weights = _largest_layer(model)
        self.model = PaperModel(model, _paper_device(hardware))

    @property
    def gradients(self) -> float:
        return float(sum(self.gradient_sizes))

    def optimizer_sizes(self) -> list[float]:
        """Bytes of the optimizer's states, one entry each."""
        name = self.args.run.optim
        if "adafactor" in name:
            return [4.0 * (sum(s) if len(s) > 1 else s[0]) for s in self.shapes]
        states = STATES[next((kind for kind in STATES if kind in name), "adamw")]
        whole = [float(size) for size in self.gradient_sizes for _ in range(int(states))]
        return whole + [size * (states % 1) for size in self.gradient_sizes if states % 1]

    def trace(self, lengths: np.ndarray, accumulating: bool) -> Trace:
        """The step over one micro-batch of pairs with these lengths [B, 3]."""
        batch: dict[str, Any] = {"half": self.half, "dpo": self.args.objective.loss != "orpo"}
        if self.args.objective.engine == "packed":
            pairs = stand_ins(lengths, self.common)
            batch |= pack_pairs(pairs, share_prompt=self.share_prompt, prompt_logps=self.objective.needs_prompt)
            return self.model.trace(batch, _packed_loss, accumulating=accumulating)
        ids = torch.zeros(2 * len(lengths), padded_tokens(lengths) // (2 * len(lengths)), dtype=torch.long)
        batch |= {"input_ids": ids, "mask": ids}
        return self.model.trace(batch, _trl_loss, accumulating=accumulating)

    def memory(self, trace: Trace, accumulating: bool, strategy: str = "ddp", world: int = 1) -> Memory:
        """Memory of one of `world` devices; `trace` is of the micro-batch that costs most."""
        weights = self.weights * (2 if self._keeps_reference() else 1)
        gradients, optimizer, buffers = self.gradients, float(sum(self.optimizer_sizes())), 0.0
        step, before = trace.peak, gradients if accumulating else 0.0
        if world > 1 and strategy in SHARDED:  # gradients are reduced layer by layer into their shards
            weights, gradients, optimizer, buffers = self._shares(strategy, 1 / world, weights)
            step, before = trace.forward_peak, gradients
        elif world > 1:
            buffers = gradients  # DDP's buckets
        held = weights + optimizer + buffers
        alive = max(before + step, gradients)
        if self.hardware.device == "cpu":
            peak = held + self.cast_away + alive * CPU_SPREAD[self.args.objective.engine] + CPU_LIBRARIES
        elif self.hardware.device == "cuda":
            peak = (held + alive) * GPU_FRAGMENTS + GPU_CONTEXT
        else:
            peak = held + alive
        head = max(0.0, trace.forward_peak - trace.activations)
        return Memory(weights, gradients, optimizer, trace.activations, head, peak - held - alive + buffers, peak)

    def _keeps_reference(self) -> bool:
        """Whether the engine holds a second copy of the model."""
        choice = self.args.objective
        return choice.engine == "trl" and choice.loss in ("dpo", "kto") and not self.args.model.use_peft

    def _shares(self, strategy: str, share: float, weights: float) -> tuple[float, float, float, float]:
        """(weights, gradients, optimizer, buffers) of a device under a strategy that shares them out."""
        gradients, optimizer = self.gradients, float(sum(self.optimizer_sizes()))
        gathered = 2 * self.layer_weights  # the layer at work and the one fetched ahead
        if strategy.startswith("zero") and self.half:  # DeepSpeed computes in 16-bit copies of fp32 masters
            optimizer += 4.0 * self.trainable
            weights, gradients = 2.0 * self.parameters if not self.args.quantized else weights, 2.0 * self.trainable
        if strategy == "zero2":
            return weights, gradients * share, optimizer * share, 4 * ZERO_BUCKET
        if strategy == "zero3_offload":
            return 0.0, 0.0, 0.0, 2 * gathered
        return weights * share, gradients * share, optimizer * share, gathered

    def seconds(self, trace: Trace, work: Work, rate: float, bandwidth: float) -> float:
        """Seconds of an optimizer step: `rate` operations a second in matrix products, `bandwidth` bytes a second."""
        tokens = self.tokens(work.longest)
        updates = 2.5 * (self.gradients + sum(self.optimizer_sizes()))
        return (trace.flops / rate + trace.moved / bandwidth) * work.tokens_per_step / tokens + updates / bandwidth

    def tokens(self, lengths: np.ndarray) -> int:
        """Tokens that the engine runs for a micro-batch of these pairs."""
        if self.args.objective.engine == "trl":
            return padded_tokens(lengths)
        return Cut(1, share_prompt=self.share_prompt, common=self.common).row(lengths)


def _paper_device(hardware: Hardware) -> str:
    """The kind of device that a step is followed on: the run's, so that its own kernels are called, where torch here
    can make fake tensors of it with gradients; else a CPU.
    """
    here = torch.accelerator.current_accelerator()
    return hardware.device if here is not None and here.type == hardware.device else "cpu"


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _largest_layer(model: nn.Module) -> float:
    """Bytes of the largest part that sharded strategies gather at once: a layer, or embeddings."""
    lm = causal_lm(model)
    layers = [m for m in lm.modules() if isinstance(m, nn.ModuleList)]
    parts = [child for found in layers for child in found] + [lm.get_input_embeddings()]
    return float(max(sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts))


def memory_rate(device: torch.device, seconds: float = 0.2) -> float:
    """Bytes a second that a large element-wise operation reads and writes, the best of what fits in `seconds`."""
    size = 2**24 if device.type == "cpu" else 2**28
    source, target = (torch.ones(size, device=device) for _ in range(2))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        target.copy_(source)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def changed(args: Arguments, changes: Mapping[str, Any]) -> Arguments:
    """`args` with other values of some flags."""
    groups = {}
    for name in ("model", "data", "objective", "run"):
        group = getattr(args, name)
        mine = {key: value for key, value in changes.items() if hasattr(group, key)}
        groups[name] = replace(group, **mine) if mine else group
    return replace(args, **groups)
