"""Which pair goes into which micro-batch of which rank, and the data loader that packs them.

A plan is a deterministic function of (lengths, seed, epoch) and of the sizes asked for. Each item of the loader is
one rank's share of one optimizer step, so a global batch is the same set of pairs however many ranks and
micro-batches it is cut into.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from preference.engine.packing import MIN_SHARED, pack_pairs
from preference.losses import Objective, Totals

logger = logging.getLogger(__name__)

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# A dataset may have them: a number for each row, which the loss reads. `desirable` (1 or 0): the row has one answer,
# in chosen_ids, good or bad; rejected_ids is an answer to another prompt, for KTO's estimate of the KL divergence
PAIR_COLUMNS = ("pair_weight", "score_margin", "desirable")
# Where answers hold turns that are not learned: how many tokens are, are not, are, ... (null: all are)
RUN_COLUMNS = ("chosen_runs", "rejected_runs")
OPEN_BINS = (
    64  # micro-batches that a pair is tried in before a new one is begun; bounds the planning of a large evaluation set
)


def row_lengths(dataset: Any) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of every row, [n, 3], read from Arrow without making Python lists of the
    ids.
    """
    import pyarrow.compute as pc

    batches = dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(batch_size=1000)
    parts = [
        np.stack([pc.list_value_length(batch[name]).to_numpy() for name in ID_COLUMNS], axis=1) for batch in batches
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros((0, 3), dtype=np.int64)


def learned_lengths(dataset: Any) -> np.ndarray:
    """Tokens of chosen and rejected that are learned, of every row, [n, 2]."""
    lengths = row_lengths(dataset)[:, 1:]
    for side, name in enumerate(RUN_COLUMNS):
        if name in dataset.column_names:
            runs = dataset[name]
            where = [i for i, found in enumerate(runs) if found]
            lengths[where, side] = [sum(runs[i][::2]) for i in where]
    return lengths


def shared_prefix(dataset: Any) -> int:
    """Tokens that the prompts of all rows begin with alike (a system prompt), where packing shares them; else 0."""
    import pyarrow.compute as pc

    if not len(dataset):
        return 0
    first = np.asarray(dataset[0]["prompt_ids"], dtype=np.int64)
    common = len(first) - 1
    for batch in dataset.select_columns(["prompt_ids"]).with_format("arrow").iter(batch_size=1000):
        prompts = batch["prompt_ids"].combine_chunks()
        common = min(common, pc.min(pc.list_value_length(prompts)).as_py() - 1)
        starts = prompts.offsets.to_numpy()[:-1, None]
        heads = prompts.values.to_numpy()[starts + np.arange(common)]
        differs = (heads != first[:common]).any(axis=0)
        common = int(differs.argmax()) if differs.any() else common
    return common if common >= MIN_SHARED else 0


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut.

    Attributes:
        pairs: most pairs in a micro-batch; not looked at where `tokens` is set.
        tokens: most tokens in a micro-batch, 0 for no such limit. A pair longer than that gets a micro-batch of its
            own.
        world: number of ranks.
        share_prompt: whether a pair's prompt is computed once or twice.
        common: tokens that all prompts begin with (`shared_prefix`); a micro-batch with shared prompts has them once.
    """

    pairs: int
    tokens: int = 0
    world: int = 1
    share_prompt: bool = True
    common: int = 0

    def of_tokens(self, tokens: int) -> Cut:
        """The same, into micro-batches of at most so many tokens."""
        return replace(self, tokens=tokens)

    @property
    def once(self) -> int:
        """Tokens of a micro-batch that are there whatever its pairs."""
        return self.common if self.share_prompt else 0

    def cost(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens that each pair of `lengths` [n, 3] adds to a micro-batch besides, at most, [n]."""
        prompts = 1 if self.share_prompt else 2
        return prompts * (lengths[:, 0] - 1) + lengths[:, 1] + lengths[:, 2] - self.once

    def row(self, lengths: np.ndarray) -> int:
        """Tokens of the micro-batch of these pairs, at most."""
        return self.once + int(self.cost(lengths).sum())


@dataclass(frozen=True)
class Step:
    """One rank's share of one optimizer step.

    Attributes:
        micro_batches: rows of the dataset, a tuple per micro-batch.
        filler: for each micro-batch, whether its one row is there only so that all ranks have equally many.
        totals: counts of the global batch.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    filler: tuple[bool, ...]
    totals: Totals


def _least_full(costs: np.ndarray, bins: int, most_pairs: int) -> list[list[int]]:
    """Longest pair first, each into the bin with the fewest tokens that has room: bins of nearly equal size."""
    heap = [(0, i) for i in range(bins)]
    result: list[list[int]] = [[] for _ in range(bins)]
    for pair in np.argsort(-costs, kind="stable").tolist():
        load, i = heapq.heappop(heap)
        result[i].append(pair)
        if len(result[i]) < most_pairs:
            heapq.heappush(heap, (load + int(costs[pair]), i))
    return result


def _first_fit(costs: np.ndarray, tokens: int) -> list[list[int]]:
    """Longest pair first, each into the first bin where it fits: few bins of at most `tokens` tokens."""
    result: list[list[int]] = []
    room: list[int] = []
    for pair in np.argsort(-costs, kind="stable").tolist():
        cost = int(costs[pair])
        recent = range(max(0, len(room) - OPEN_BINS), len(room))
        i = next((i for i in recent if cost <= room[i]), len(room))
        if i == len(room):
            result.append([])
            room.append(max(tokens, cost))
        result[i].append(pair)
        room[i] -= cost
    return result


def cut_batch(costs: np.ndarray, cut: Cut) -> list[list[list[int]]]:
    """Cut a global batch into micro-batches, equally many for each rank and of about equal size.

    Args:
        costs: tokens of each of the n pairs, [n].

    Returns:
        For each rank its micro-batches, each a list of numbers below n. All n appear once; where there are fewer
        pairs than micro-batches, some are empty.
    """
    limit = max(1, cut.tokens - cut.once) if cut.tokens else np.iinfo(np.int64).max
    first = _first_fit(costs, limit) if cut.tokens else None
    bins = len(first) if first is not None else -(-len(costs) // cut.pairs)
    bins = -(-bins // cut.world) * cut.world
    most_pairs = len(costs) if cut.tokens else cut.pairs
    result = _least_full(costs, bins, most_pairs)
    over = any(len(pairs) > 1 and costs[pairs].sum() > limit for pairs in result)
    if over and first is not None:
        result = first + [[] for _ in range(bins - len(first))]
    # Largest first and back and forth over the ranks, so that ranks work on similar sizes at the same time.
    result.sort(key=lambda pairs: -int(costs[pairs].sum()))
    ranks: list[list[list[int]]] = [[] for _ in range(cut.world)]
    for i, pairs in enumerate(result):
        turn, place = divmod(i, cut.world)
        ranks[place if turn % 2 == 0 else cut.world - 1 - place].append(pairs)
    return ranks


def plan_step(
    rows: np.ndarray,
    lengths: np.ndarray,
    objective: Objective,
    cut: Cut,
    rank: int,
    learned: np.ndarray | None = None,
) -> Step:
    """The share of `rank` of the global batch `rows` (numbers of dataset rows, lengths [n, 3] of the whole dataset).

    learned: [n], the tokens of chosen that are learned, where not all are.
    """
    batch = lengths[rows]
    costs = cut.cost(batch)
    chosen = batch[:, 1] if learned is None else learned[rows]
    totals = Totals.of(objective, zip(batch[:, 0].tolist(), chosen.tolist(), strict=True))
    # An empty micro-batch is run on the shortest pair with weight 0: collectives in the model need all ranks to take
    # part.
    spare = int(rows[int(costs.argmin())])
    micro_batches = [tuple(int(rows[i]) for i in pairs) for pairs in cut_batch(costs, cut)[rank]]
    return Step(
        tuple(pairs or (spare,) for pairs in micro_batches), tuple(not pairs for pairs in micro_batches), totals
    )


class TrainingPlan(Sampler[list[Step]]):
    """A batch sampler whose "batches" are `[Step]`: all optimizer steps of an epoch for one rank.

    Args:
        lengths: [n, 3] of the dataset.
        learned: [n], tokens of the chosen answers that are learned, where not all are.
        global_batch: pairs of an optimizer step over all ranks. The last step of an epoch takes what is left, unless
            `drop_last`.
        epoch: called when an epoch starts; the order of the pairs depends on it. Asking, rather than being told, is
            what makes a resumed run see the order of an uninterrupted one, whatever wraps this sampler.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        objective: Objective,
        cut: Cut,
        *,
        rank: int,
        global_batch: int,
        seed: int,
        epoch: Callable[[], int],
        shuffle: bool = True,
        drop_last: bool = False,
        learned: np.ndarray | None = None,
    ) -> None:
        self.learned = learned
        self.lengths, self.objective, self.cut, self.rank = lengths, objective, cut, rank
        self.global_batch, self.seed, self.epoch = global_batch, seed, epoch
        self.shuffle, self.drop_last = shuffle, drop_last
        _report_long_rows(lengths, cut)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.global_batch)
        return whole if self.drop_last or not rest else whole + 1

    def order(self, epoch: int) -> np.ndarray:
        """The rows in the order in which epoch number `epoch` takes them."""
        if not self.shuffle:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def recut(self, rows: np.ndarray, totals: Totals, tokens: int) -> Step:
        """One rank's `rows` of a step as other micro-batches, of at most so many tokens."""
        cut = replace(self.cut, tokens=tokens, world=1)
        [parts] = cut_batch(cut.cost(self.lengths[rows]), cut)
        return Step(tuple(tuple(rows[pairs].tolist()) for pairs in parts), (False,) * len(parts), totals)

    def __iter__(self) -> Iterator[list[Step]]:
        order = self.order(self.epoch())
        for i in range(len(self)):
            rows = order[i * self.global_batch : (i + 1) * self.global_batch]
            yield [plan_step(rows, self.lengths, self.objective, self.cut, self.rank, self.learned)]


class EvaluationPlan(Sampler[list[Step]]):
    """The whole dataset as one global batch, handed out one micro-batch at a time, equally many to each rank."""

    def __init__(
        self, lengths: np.ndarray, objective: Objective, cut: Cut, *, rank: int, learned: np.ndarray | None = None
    ) -> None:
        _report_long_rows(lengths, cut)
        rows = np.arange(len(lengths))
        self.step = plan_step(rows, lengths, objective, cut, rank, learned) if len(lengths) else None

    def __len__(self) -> int:
        return len(self.step.micro_batches) if self.step else 0

    def __iter__(self) -> Iterator[list[Step]]:
        if self.step:
            for rows, filler in zip(self.step.micro_batches, self.step.filler, strict=True):
                yield [Step((rows,), (filler,), self.step.totals)]


def _report_long_rows(lengths: np.ndarray, cut: Cut) -> None:
    if not cut.tokens or not len(lengths):
        return
    rows: np.ndarray = cut.cost(lengths) + cut.once
    if (rows > cut.tokens).any():
        logger.warning(
            "%d of %d pairs are longer than max_tokens_per_micro_batch=%d (the longest has %d tokens): each gets a "
            "micro-batch of its own, which sets the memory that is needed",
            int((rows > cut.tokens).sum()), len(lengths), cut.tokens, int(rows.max()),
        )  # fmt: skip


class StepDataset(Dataset):
    """A dataset of pairs that is indexed by `Step`. Its length is the number of pairs, which is what progress is
    counted in.
    """

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, step: Step) -> tuple[Step, list[list[dict[str, Any]]]]:
        return step, [[self.pairs[row] for row in rows] for rows in step.micro_batches]


def _tokens(batch: dict[str, Any], share_prompt: bool) -> int:
    """Tokens that a packed batch pushes through the model, without padding."""
    return batch["input_ids"].numel() if share_prompt else int((batch["lengths"] * torch.tensor([2, 1, 1])).sum())


@dataclass(frozen=True)
class PackSteps:
    """Collates one `Step`: packs its micro-batches. Runs on the loader's worker processes.

    Makes a dict: micro_batches, a list of packed batches (engine/packing.py), each with `rows` [B], the numbers of
    its rows in the dataset, and, with `reference` given, reference [B, 2]; source, for each micro-batch the
    "file:line" of its rows; totals; num_tokens, the tokens that this rank's micro-batches push through the model.

    Args:
        reference: the reference model's (chosen, rejected) sums of log-probabilities for the whole dataset, [n, 2].
    """

    share_prompt: bool
    prompt_logps: bool
    reference: np.ndarray | None = None

    def __call__(self, items: Sequence[tuple[Step, list[list[dict[str, Any]]]]]) -> dict[str, Any]:
        [(step, batches)] = items
        packed = []
        for rows, pairs, filler in zip(step.micro_batches, batches, step.filler, strict=True):
            pairs = [pair | {"weight": 0.0} for pair in pairs] if filler else pairs
            batch = pack_pairs(pairs, share_prompt=self.share_prompt, prompt_logps=self.prompt_logps)
            batch["rows"] = torch.tensor(rows)
            for name in PAIR_COLUMNS:
                if name in pairs[0]:
                    batch[name] = torch.tensor([float(pair[name]) for pair in pairs])
            if self.reference is not None:
                batch["reference"] = torch.from_numpy(self.reference[list(rows)])
            packed.append(batch)
        return {
            "micro_batches": packed,
            "source": [
                [] if filler else [str(pair.get("source", "")) for pair in pairs]
                for pairs, filler in zip(batches, step.filler, strict=True)
            ],
            "totals": step.totals,
            "num_tokens": sum(_tokens(batch, self.share_prompt) for batch in packed),
        }


def plan_loader(pairs: Any, plan: Sampler[list[Step]], collate: PackSteps, **options: Any) -> DataLoader:
    """The loader of a plan. It is already this rank's share: it must not be given to `Accelerator.prepare`.

    It has a random generator of its own, so that starting an epoch does not move the global one (dropout after a
    resume).
    """
    columns = [name for name in (*PAIR_COLUMNS, *RUN_COLUMNS) if name in pairs.column_names]
    return DataLoader(
        StepDataset(pairs.select_columns([*ID_COLUMNS, "source", *columns])),
        batch_sampler=plan,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
