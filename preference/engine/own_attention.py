"""Families whose attention is code of their own, over a packed row: under one mask for the whole row.

Their attention neither goes through transformers' AttentionInterface nor looks at anything but the mask and, for
biases that grow with distance (ALiBi, Press et al. 2021, arXiv 2108.12409), the place of a key. The mask says what
each token sees; a key's place is its position id, not its place in the row. Softmax does not mind a shift that is the
same for all keys, so these biases are exact.

Scores are computed for all pairs of tokens of a row, also those that do not see each other: their memory grows with
the square of the row (max_tokens_per_micro_batch bounds it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from preference.engine.states.tree import Tree

# Each was read: windows, tables of a fixed size or an order of keys in this code would be wrong in silence.
FAMILIES = {"bloom", "codegen", "falcon", "gpt_neox_japanese", "gptj", "mpt", "xglm"}


def has_own_attention(model: PreTrainedModel) -> bool:
    """Whether the attention of `model` is run as described above."""
    return model.config.get_text_config().model_type in FAMILIES


def row_inputs(backbone: PreTrainedModel, tree: Tree, position_ids: Tensor) -> dict[str, Tensor]:
    """What the forward of such a model is given for a packed row: its mask, [1, 1, N, N], and position ids."""
    visible = tree.visible(position_ids.device)
    mask = torch.zeros(visible.shape, dtype=backbone.dtype, device=visible.device)
    mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[None, None]
    takes_positions = "position_ids" in inspect.signature(type(backbone).forward).parameters
    return {"attention_mask": mask} | ({"position_ids": position_ids} if takes_positions else {})


def alibi(tree: Tree, plain: Callable[..., Tensor], attention_mask: Tensor, num_heads: int, dtype: Any) -> Tensor:
    """Bloom's and Falcon's bias, [heads, 1, N], from that of the longest sequence."""
    at = tree.positions(attention_mask.device)
    ones = torch.ones(1, tree.longest, dtype=torch.long, device=at.device)
    return plain(ones, num_heads, dtype).index_select(2, at)


def mpt_alibi(tree: Tree, plain: Callable[..., Tensor], num_heads: int, _: int, *args: Any, **kwargs: Any) -> Tensor:
    """MPT's bias, [heads, 1, N]."""
    bias = plain(num_heads, tree.longest, *args, **kwargs)
    return bias.index_select(2, tree.positions(bias.device))


FUNCTIONS: dict[str, Callable[..., Any]] = {"build_alibi_tensor": alibi, "build_mpt_alibi_tensor": mpt_alibi}
