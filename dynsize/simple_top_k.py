"""Simple-Top-k (the paper's first algorithm): the subnet of step 1 keeps the k layers of highest score, and k falls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynsize.config import Config
from dynsize.schedule import size_at


def layer_weights(
    scores: Tensor, ranking: Sequence[int], update: int, config: Config
) -> list[bool | Tensor]:
    """The L gates of the subnet in an update of step 1. `scores`: (L,). `straight-through`: 1 for the k layers of
    highest score and 0 for the others, with the gradient of the relaxed weights. `soft`: the relaxed weights."""
    k = size_at(update, config)
    relaxed = relaxed_top_k(scores, k)
    if config.relaxation == "soft":
        return list(relaxed)
    binary = torch.zeros_like(scores)
    binary[rank(scores, ranking, update, config)[:k]] = 1
    return list(binary + (relaxed - relaxed.detach()))


def extra_loss(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> Tensor:
    """None: 0."""
    return scores.new_zeros(())


def rank(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> list[int]:
    """The layers by falling score, equal ones by their number. A subnet of size k keeps the first k."""
    return scores.detach().sort(descending=True, stable=True).indices.tolist()


def relaxed_top_k(scores: Tensor, k: int) -> Tensor:
    """The sum of k softmaxes, each with what the ones before it took removed: not negative, sums to k.

    `scores`: (L,). a₁ = s; pᵢ = softmax(aᵢ); aᵢ₊₁ = aᵢ + log(1 − pᵢ); returns r = p₁ + … + pₖ, (L,).
    log(1 − p) is the log-sum-exp of the other scores minus that of all, which is right for scores of any size.
    """
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    relaxed, a = torch.zeros_like(scores), scores
    for _ in range(k):
        relaxed = relaxed + a.softmax(0)
        others = a.expand(len(a), -1).masked_fill(itself, -torch.inf).logsumexp(1)
        a = a + others - a.logsumexp(0)
    return relaxed
