"""Simple-Top-k, the paper's first algorithm.

In step 1 the subnet keeps the k layers of highest score. With `--relaxation soft` it keeps all
layers and multiplies each by its relaxed weight. Step 1 consists of equal spans. k is L − Δ in the
first span, L − 2Δ in the second, and so on, but never below the smallest size. The scores learn
through the relaxed weights of `relaxed_top_k`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynsize import kernels
from dynsize.config import Config
from dynsize.schedule import size_at_span_end

size_at = size_at_span_end  # k, the size of the subnet in an update of step 1


def initial_scores(config: Config) -> Tensor:
    """Return (L,) equal scores."""
    return torch.full((config.layers,), config.initial_score)


def layer_weights(
    scores: Tensor, ranking: Sequence[int], update: int, config: Config
) -> list[Tensor]:
    """Return the L gates of the subnet in an update of step 1, each ().

    `scores`: (L,). `straight-through`: the gates are 1 for the k layers of highest score and 0
    for the others, and have the gradient of the relaxed weights. So from the subnet's loss a layer
    with the gate 0 learns nothing, but its score does. `soft`: the relaxed weights.
    """
    k = size_at(update, config)
    relaxed = relaxed_top_k(scores, k)  # (L,)
    if config.relaxation == "soft":
        return list(relaxed.unbind())
    kept = by_score(scores)[:k]
    binary = torch.zeros_like(scores).index_fill(0, kept, 1.0)  # (L,)
    without_value = relaxed - relaxed.detach()  # 0, with the gradient of the relaxed weights
    weights = binary + without_value
    return list(weights.unbind())


def extra_loss(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> Tensor:
    """Return 0: this algorithm has no extra loss."""
    return scores.new_zeros(())


def rank(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> list[int]:
    """Return the layers by falling score; of equal scores the lower layer comes first.

    Note: this waits for the device.
    """
    return by_score(scores).tolist()


def by_score(scores: Tensor) -> Tensor:
    """Return (L,) int64, the layers by falling score, on the scores' device."""
    ordered = scores.detach().sort(descending=True, stable=True)
    return ordered.indices


def relaxed_top_k(scores: Tensor, k: int) -> Tensor:
    """Return the relaxed weights r = p₁ + … + pₖ, (L,), of `scores` s, (L,).

    a₁ = s; pᵢ = softmax(aᵢ); aᵢ₊₁ = aᵢ + log(1 − pᵢ). Each softmax down-weights what the earlier
    ones selected, by 1 − p, but does not exclude it. So several can select the same layer, and its
    weight may exceed 1. The weights are not negative, sum to k, and keep the order of the scores.
    """
    if kernels.triton_runs("relaxed_top_k", scores.device, scores.dtype, len(scores)):
        relaxed, _ = torch.ops.dynsize.relaxed_top_k(scores, k)
        return relaxed
    # log(1 − p) is the log-sum-exp of all other entries of a minus that of all: in this form it
    # stays finite where p is 1 to rounding.
    layers = len(scores)
    itself = torch.eye(layers, dtype=torch.bool, device=scores.device)
    relaxed = torch.zeros_like(scores)
    a = scores
    for _ in range(k):
        relaxed = relaxed + a.softmax(0)
        others = a.expand(layers, -1)  # (L, L)
        others = others.masked_fill(itself, -torch.inf)  # row i: a without its i-th entry
        log_sum_of_others = others.logsumexp(1)  # (L,)
        log_sum_of_all = a.logsumexp(0)
        a = a + log_sum_of_others - log_sum_of_all
    return relaxed
