"""The answer to another prompt that stands beside each single answer, for KTO's estimate of the KL divergence.

KTO (arXiv 2402.01306, section 4.1) takes for its reference point the mean log-ratio of answers that do not belong to
their prompts: those of the batch, moved on by one. TRL's KTOTrainer fixes them when it prepares its rows, by moving on
the answers of each block of neighbours. Here too they are fixed, so that a step's loss depends on its rows alone,
however it is cut: the answers of each block of at most 1,024 neighbours are moved on among its prompts, taken in the
order of a hash, by as many places as the commonest prompt has rows. So each answer is used once, and none goes to its
own prompt, unless half of the block is one prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from preference.data.row import Row
from preference.tokens.encoding import Ids


def partners(prompts: Sequence[str]) -> list[int]:
    """For each row, given by its prompt, the row whose answer is put beside it."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    by_hash = sorted(groups, key=lambda prompt: hashlib.blake2b(prompt.encode("utf-8", "surrogatepass")).digest())
    order = [i for prompt in by_hash for i in groups[prompt]]
    most = max(map(len, groups.values()), default=0)
    step = most if 2 * most <= len(order) else max(1, len(order) // 2)
    found = [0] * len(order)
    for place, i in enumerate(order):
        found[i] = order[(place + step) % len(order)]
    return found


def mismatch(rows: Sequence[Row], kept: Sequence[int], texts: dict[str, list[str]], ids: dict[str, list[Ids]],
             limit: int) -> None:  # fmt: skip
    """Puts into the rejected texts and ids of the kept single answers those of their partners.

    One that would not fit behind the prompt in `limit` tokens is cut, as TRL cuts it.
    """
    single = [i for i in kept if rows[i].label is not None]
    for i, j in zip(single, (single[k] for k in partners([texts["prompt"][i] for i in single])), strict=True):
        texts["rejected"][i] = texts["chosen"][j]
        ids["rejected"][i] = ids["chosen"][j][: limit - len(ids["prompt"][i])]
