"""The reference model's log-probabilities, for losses that compare with it, without a second model in memory.

With a fresh PEFT adapter the reference is the model with its adapter switched off, asked batch by batch. Otherwise it
is the model as it stands before the first step: each row's two numbers are computed once, before training, and kept in
a file whose name is a hash of everything that they depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from preference.engine.batching import ID_COLUMNS, RUN_COLUMNS
from preference.integrity import read_checked, write_checked
from preference.train.watchdog import TrainingError

logger = logging.getLogger(__name__)

FORMAT = 2  # part of the key; raise it when the numbers that a file holds change their meaning
CHUNK = 1 << 22


def is_fresh_adapter(model: nn.Module) -> bool:
    """Whether the model is PEFT-wrapped and its adapter adds nothing yet, so that the model without it is the
    reference.

    Adapters that begin otherwise (PiSSA, OLoRA, one that was trained before) are not; nor are kinds other than LoRA.
    """
    if not hasattr(model, "disable_adapter"):
        return False
    parts = {"lora_B", "lora_embedding_B"}
    weights = [p for name, p in model.named_parameters() if parts & set(name.split("."))]
    return bool(weights) and not any(bool(p.detach().any()) for p in weights)


@contextlib.contextmanager
def reference_model(model: nn.Module, peft_model: Any) -> Iterator[nn.Module]:
    """`model` without its adapter, without dropout and without gradient; as it was afterwards.

    Args:
        model: what to call; `peft_model`, or a wrapper around it.
    """
    training = model.training
    model.eval()  # dropout, and gradient checkpointing, which has nothing to recompute here
    try:
        with torch.no_grad(), peft_model.disable_adapter():
            yield model
    finally:
        model.train(training)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as a flat tensor of integers."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])


def _tensor_sums(tensor: Tensor) -> list[int]:
    """Two exact sums over a tensor's bits, one of them weighted by position: the same on every device, at memory
    speed.
    """
    plain = weighted = 0
    for i, chunk in enumerate(_bits(tensor).split(CHUNK)):
        values = chunk.to(torch.int64)
        positions = torch.arange(1, len(values) + 1, device=values.device)
        plain += int(values.sum())
        weighted += (i + 1) * int((values * positions).sum())  # wraps around alike everywhere
    return [plain, weighted]


def weights_fingerprint(model: nn.Module) -> str:
    """Identity of a model's weights, adapter included; the same on all ranks, whether each holds all of them or a
    shard.
    """
    digest, sharded = hashlib.sha256(), False
    digest.update(str(any(getattr(module, "disable_adapters", False) is True for module in model.modules())).encode())
    for name, parameter in model.named_parameters():
        sharded |= hasattr(parameter, "ds_tensor") or hasattr(parameter, "to_local")
        local = getattr(parameter, "ds_tensor", parameter)
        local = local.to_local() if hasattr(local, "to_local") else local
        sums = [] if local.is_meta else _tensor_sums(local)
        digest.update(json.dumps([name, list(local.shape), str(local.dtype), sums]).encode())
    digests = gather_object([digest.hexdigest()])
    return hashlib.sha256("".join(digests).encode()).hexdigest() if sharded else digests[0]


def data_fingerprint(dataset: Any) -> str:
    """Identity of the token ids of a dataset's rows in their order, and so of its template, tokenizer and lengths."""
    digest = hashlib.sha256()
    names = [*ID_COLUMNS, *(name for name in RUN_COLUMNS if name in dataset.column_names)]
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            for chunk in batch[name].chunks:
                lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
                digest.update(lengths.astype(np.int64).tobytes())
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


class References:
    """The reference log-probabilities of a run's datasets.

    Args:
        model: the model as it stands before training.
        compute: makes the [n, 2] float32 sums (chosen, rejected) of a dataset with the model as it stands, on all
            ranks together.
        how: "adapter" (ask the model without its adapter, batch by batch), "precompute", or "auto": adapter where
            that is exact.
        cache_dir: folder for precomputed numbers; None: they are not kept.
        precision: what the numbers depend on besides weights and data ("bf16", say).
    """

    def __init__(
        self,
        model: nn.Module,
        compute: Callable[[Any], np.ndarray],
        *,
        how: str = "auto",
        cache_dir: str | Path | None = None,
        precision: str = "",
    ) -> None:
        if how not in ("auto", "adapter", "precompute"):
            raise ValueError(f"reference is auto, adapter or precompute; got {how!r}")
        fresh = is_fresh_adapter(model)
        if how == "adapter" and not fresh:
            raise ValueError(
                "reference=adapter needs a LoRA adapter that adds nothing yet; reference=precompute serves any model"
            )
        self.live = how == "adapter" or (how == "auto" and fresh)
        self.model, self.compute, self.precision = model, compute, precision
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.frozen = False
        self.weights: str | None = None
        self.known: dict[int, tuple[Any, np.ndarray]] = {}

    def freeze(self) -> None:
        """Called when training begins: from now on the model is no longer the reference."""
        self.frozen = True

    def of(self, dataset: Any) -> np.ndarray | None:
        """[n, 2] float32 for the rows of `dataset`; None where the adapter is asked batch by batch.

        Raises:
            TrainingError: the dataset is new, and the model has been trained since.
        """
        if self.live:
            return None
        if id(dataset) not in self.known:
            self.known[id(dataset)] = dataset, self._load_or_compute(dataset)
        return self.known[id(dataset)][1]

    def _load_or_compute(self, dataset: Any) -> np.ndarray:
        if self.weights is None and not self.frozen:
            self.weights = weights_fingerprint(self.model)
        parts = [FORMAT, self.weights, data_fingerprint(dataset), self.precision]
        path = (
            self.cache_dir
            and self.cache_dir / f"reference-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.bin"
        )
        stored = [_read(path, len(dataset)) if path else None]
        broadcast_object_list(stored)  # one rank's look at the disk decides for all
        if stored[0] is not None:
            return stored[0]
        if self.frozen:
            raise TrainingError(
                "a dataset that was not there before training has no reference log-probabilities: the reference is the "
                "model as it was. Give the trainer all evaluation sets at the start"
            )
        values = self.compute(dataset)
        if path:
            write_checked(path, values.tobytes())  # ranks write the same; who comes last replaces the whole file
        return values


def _read(path: Path, rows: int) -> np.ndarray | None:
    """The numbers of `rows` pairs; None if they were never computed, or are no longer what was written."""
    try:
        return np.frombuffer(read_checked(path), dtype=np.float32).reshape(rows, 2).copy()
    except FileNotFoundError:
        return None
    except ValueError as damage:
        logger.warning("%s is damaged: %s. The reference log-probabilities are computed again", path, damage)
        return None
