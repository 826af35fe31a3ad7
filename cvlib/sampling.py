"""Logits in, next-token probabilities out: the five dials of decoding.

A model gives one number for every token of its vocabulary. Each function here is one published way of reshaping those
numbers before a token is drawn, in a few lines; `probabilities` applies them in the order that transformers uses.

* `penalised`: tokens said already lose (Keskar et al. 2019, CTRL).
* temperature: the logits are divided by it.
* `top_k`: only the k likeliest stay (Fan et al. 2018).
* `top_p`: only the likeliest that together hold p (Holtzman et al. 2020).
* `min_p`: only those not much less likely than the likeliest (Nguyen et al. 2024).

What is dropped gets the logit −∞, so that its probability is exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvlib.recipes import Decoding


def probabilities(logits: torch.Tensor, said: Sequence[Sequence[int]], decoding: Decoding) -> torch.Tensor:
    """Next-token probabilities after repetition penalty, temperature, top-k, top-p and min-p, in this order.

    Args:
        logits: (rows, vocabulary) as the model gives them; they are not changed.
        said: for each row the tokens that are penalised. `generation.tokens` gives those of the answer, and the
            prompt's too only if `decoding.penalise` is "all".

    Returns:
        (rows, vocabulary), each row summing to 1.

    >>> probabilities(torch.tensor([[2.0, 1.0, 0.0]]), [[]], Decoding(temperature=0)).tolist()
    [[1.0, 0.0, 0.0]]
    """
    logits = penalised(logits.float(), said, decoding.repetition_penalty)
    if decoding.temperature < 1e-5:  # 0, or so near to it that float32 would overflow
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = top_k(logits / decoding.temperature, decoding.top_k)
    return min_p(top_p(logits, decoding.top_p), decoding.min_p).softmax(-1)


def penalised(logits: torch.Tensor, said: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Positive logits of said tokens divided by the penalty, negative ones multiplied: both become less likely.

    >>> penalised(torch.tensor([[2.0, -2.0, 2.0]]), [[0, 1, 1]], 2.0).tolist()
    [[1.0, -4.0, 2.0]]
    """
    logits = logits.clone()
    for row, tokens in enumerate(said):
        seen = torch.tensor(sorted(set(tokens)), dtype=torch.long, device=logits.device)
        kept = logits[row, seen]
        logits[row, seen] = torch.where(kept > 0, kept / penalty, kept * penalty)
    return logits


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest logits of each row, and all that equal the k-th; 0 keeps everything.

    >>> top_k(torch.tensor([[3.0, 1.0, 2.0]]), 2).tolist()
    [[3.0, -inf, 2.0]]
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = logits.topk(k).values[:, -1:]  # (rows, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """The smallest set of likeliest tokens that holds the probability p; 1 keeps everything.

    >>> top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.7).isfinite().tolist()
    [[True, True, False]]
    """
    if p >= 1:
        return logits
    ordered, order = logits.softmax(-1).sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= p  # what stands before this token holds p already
    return logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)


def min_p(logits: torch.Tensor, share: float) -> torch.Tensor:
    """Tokens at least `share` times as likely as the likeliest one; 0 keeps everything.

    >>> min_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5).isfinite().tolist()
    [[True, True, False]]
    """
    if share == 0:
        return logits
    chances = logits.softmax(-1)
    return logits.masked_fill(chances < share * chances.amax(-1, keepdim=True), -torch.inf)
