"""A flattened row in, attention of each conversation on its own out.

Conversations laid end to end share one row of T tokens, but no token may look into another conversation. A mask says
so: it takes a square of T × T and throws most of it away. We compute only what is kept, a causal triangle for each
conversation, n(n + 1) / 2 scores for n tokens instead of its share of T². The result is the same to rounding.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "by_conversation"


def starts(position_ids: torch.Tensor) -> list[int]:
    """Where each conversation of a flattened row begins, and where the last one ends.

    >>> starts(torch.tensor([[0, 1, 2, 0, 1]]))
    [0, 3, 5]
    """
    return [*(position_ids[0] == 0).nonzero().flatten().tolist(), position_ids.shape[1]]


def by_conversation(module, query, key, value, attention_mask, conversations=None, **options):
    """torch's fused attention for `transformers`, once for each conversation of a flattened row.

    Args:
        query: (1, heads, T, head_dim); `key` and `value` (1, kv_heads, T, head_dim).
        attention_mask: used where no conversations are named, as in generation.
        conversations: `starts` of the row.
    """
    if not conversations or len(conversations) == 2:  # one conversation is all of its row
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = ([x[:, :, start:end] for x in (query, key, value)] for start, end in pairwise(conversations))
    return torch.cat([sdpa_attention_forward(module, *row, None, **options)[0] for row in rows], dim=1), None


AttentionInterface.register(NAME, by_conversation)
AttentionMaskInterface.register(NAME, sdpa_mask)
