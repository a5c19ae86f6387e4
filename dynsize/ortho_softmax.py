"""OrthoSoftmax, in its layer-wise form.

Xu, Beck, Yang, Schlüter: Efficient Supernet Training with Orthogonal Softmax for Scalable ASR
Model Compression, ICASSP 2025, arXiv 2501.18895.

The scores S are an L × L matrix. Row i, Pᵢ = softmax(Sᵢ / τ), is a distribution over the layers:
which of them is the i-th most important. A subnet of size k has the layer weights P₁ + … + Pₖ.
The extra loss makes the first k rows orthogonal and one-hot, so that they choose k different
layers, and the temperature τ falls, so that the layer weights become 0 or 1.

The subnet is never the largest size, so rows beyond the largest size below it learn nothing: the
end of the ranking follows from the initial scores.

Rows that are equal get equal gradients, and only rounding would separate them, differently on each
machine. So the scores start with a little noise, drawn from the seed: the extra loss and the
falling temperature make its differences grow.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dynsize.config import Config
from dynsize.schedule import step1_updates

NOISE = 1e-3  # standard deviation of the initial scores
LAST_TEMPERATURE = 0.1  # τ in the last update of step 1; in the first one it is 1
RISE = 0.5  # share of step 1 in which the weight of the extra loss grows from 0 to 1


def initial_scores(config: Config) -> Tensor:
    """Return (L, L) scores: the initial score with noise that is drawn from the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(config.layers, config.layers, generator=generator)
    return config.initial_score + NOISE * noise


def size_at(update: int, config: Config) -> int:
    """Return the size of the subnet, drawn from all but the largest by (seed, update)."""
    draw = random.Random(f"ortho-softmax {config.seed} {update}")
    return draw.choice(config.sizes[:-1])


def layer_weights(
    scores: Tensor, ranking: Sequence[int], update: int, config: Config
) -> list[Tensor]:
    """Return the L gates of the subnet of size k, () each: P₁ + … + Pₖ. `scores`: (L, L)."""
    weights = first_rows(scores, update, config).sum(0)  # (L,)
    return list(weights.unbind())


def extra_loss(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> Tensor:
    """Return the weighted orthogonality loss of the first k rows.

    It is Σ_{i<j≤k} (Pᵢ · Pⱼ)² + Σ_{i≤k} (Pᵢ · Pᵢ − 1)²: 0 where the rows are one-hot and differ.
    """
    rows = first_rows(scores, update, config)  # (k, L)
    products = rows @ rows.T  # (k, k)
    orthogonal = products.triu(diagonal=1).square().sum()
    lengths = products.diagonal() - 1  # (k,)
    one_hot = lengths.square().sum()
    return extra_loss_weight(update, config) * (orthogonal + one_hot)


def rank(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> list[int]:
    """Return the layers in the order of the rows: from each row its largest that is not taken.

    Of equal scores the lower layer comes first. Note: this waits for the device.
    """
    ordered = scores.detach().sort(descending=True, stable=True)
    rows = ordered.indices.tolist()  # of layers, the largest score first
    ranked: list[int] = []
    for row in rows:
        not_taken = [layer for layer in row if layer not in ranked]
        ranked.append(not_taken[0])
    return ranked


def first_rows(scores: Tensor, update: int, config: Config) -> Tensor:
    """Return the distributions Pᵢ = softmax(Sᵢ / τ) of the first k rows, (k, L)."""
    k = size_at(update, config)
    scaled = scores[:k] / temperature(update, config)
    return scaled.softmax(1)


def temperature(update: int, config: Config) -> float:
    """Return τ, which is multiplied by one constant each update, from 1 to 0.1 in step 1."""
    last = max(1, step1_updates(config) - 1)
    return LAST_TEMPERATURE ** (update / last)


def extra_loss_weight(update: int, config: Config) -> float:
    """Return the weight of the extra loss: it grows linearly from 0 to 1, then stays 1."""
    rise = RISE * step1_updates(config)
    return min(1.0, update / rise)
