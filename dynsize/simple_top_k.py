"""Simple-Top-k (the paper's first algorithm): the subnet of step 1 keeps the k layers of highest score, and k falls."""

import torch
from torch import Tensor

from dynsize.config import Config


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


def ranking(scores: Tensor) -> list[int]:
    """The layers by falling score, equal ones by their number. A subnet of size k keeps the first k."""
    return scores.detach().sort(descending=True, stable=True).indices.tolist()


def layer_weights(scores: Tensor, k: int, relaxation: str) -> Tensor:
    """The gates of the subnet of step 1, (L,). `straight-through`: 1 for the k layers of highest score and 0 for the
    others, with the gradient of the relaxed weights. `soft`: the relaxed weights themselves."""
    relaxed = relaxed_top_k(scores, k)
    if relaxation == "soft":
        return relaxed
    binary = torch.zeros_like(scores)
    binary[scores.detach().sort(descending=True, stable=True).indices[:k]] = 1
    return binary + (relaxed - relaxed.detach())


def size_at(update: int, config: Config) -> int:
    """k in an update of step 1: from L − Δ down to the smallest size, Δ layers at a time, in equal spans."""
    spans = max(1, -(-(config.layers - config.sizes[0]) // config.delta))
    span = update * spans // step1_updates(config)
    return max(config.layers - config.delta * (span + 1), config.sizes[0])


def step1_updates(config: Config) -> int:
    """The number of updates of step 1, none where there is one size alone; the rest of the training is step 2."""
    return round(config.step1_share * config.updates) if len(config.sizes) > 1 else 0
