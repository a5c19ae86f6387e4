"""Iterative-Zero-Out (the paper's second algorithm): each iteration of step 1 zeroes out the layers of least weight.

The end of the ranking holds the layers that are zeroed out. How many they are is a function of the update, so that an
iteration ends when that number grows, and nothing but the ranking needs to be kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynsize.config import Config
from dynsize.schedule import size_at, size_before

SPARSITY_LOSS = 5.0  # weight of the extra loss, the paper's


def layer_weights(
    scores: Tensor, ranking: Sequence[int], update: int, config: Config
) -> list[bool | Tensor]:
    """The L gates of the subnet in an update of step 1: sigmoid(s), and False for a layer that is zeroed out."""
    alive = set(ranking[: size_before(update, config)])
    return [weight if layer in alive else False for layer, weight in enumerate(scores.sigmoid())]


def extra_loss(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> Tensor:
    """5 · |(L − Σ layer weights) / L − nᵢ / L|, which draws the weights to the sum at which nᵢ layers are lost."""
    alive = torch.as_tensor(ranking[: size_before(update, config)], device=scores.device)
    return (
        SPARSITY_LOSS
        * (scores[alive].sigmoid().sum() - size_at(update, config)).abs()
        / len(scores)
    )


def rank(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> list[int]:
    """The survivors by falling score, equal ones by their number, then the layers zeroed out, the last ones first."""
    survivors = sorted(ranking[: size_before(update, config)])
    order = scores.detach()[survivors].sort(descending=True, stable=True).indices.tolist()
    return [survivors[i] for i in order] + list(ranking[len(survivors) :])
