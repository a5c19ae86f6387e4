"""Iterative-Zero-Out, the paper's second algorithm.

Step 1 has iterations. At the end of each, the Δ layers of smallest weight among those left are
zeroed out. After the i-th iteration nᵢ = i · Δ layers are zeroed out. The last iteration may zero
out fewer, because it leaves as many as the smallest size has.

A layer that is zeroed out is no longer computed in the subnet of step 1, and never comes back. The
supernet computes all layers in every update.

The ranking is all that has to be stored: the zeroed-out layers are its end, and how many they are
follows from the update.

The paper's values, Δ = 4 and scores that start at 10, are the `METHOD_DEFAULTS` of config.py; in
the presets for short trainings the scores start lower, and learn faster.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynsize.config import Config
from dynsize.schedule import size_at_span_end, size_at_span_start

# An iteration loses Δ layers. The size of its subnet counts the layers that are left at its end,
# L − nᵢ: this is the size in the log, and the one whose output the subnet uses. Until then the
# subnet also runs the layers that the iteration will zero out; the extra loss lowers their weights.
size_at = size_at_span_end
SPARSITY_LOSS = 5.0  # weight of the extra loss, the paper's


def initial_scores(config: Config) -> Tensor:
    """Return (L,) equal scores; the paper's are 10, whose sigmoid is nearly 1."""
    return torch.full((config.layers,), config.initial_score)


def layer_weights(
    scores: Tensor, ranking: Sequence[int], update: int, config: Config
) -> list[bool | Tensor]:
    """Return the L gates of the subnet: sigmoid(s), () each, or False if zeroed out.

    `scores`: (L,).
    """
    left = size_at_span_start(update, config)
    weights = scores.sigmoid()  # (L,)
    gates: list[bool | Tensor] = list(weights.unbind())
    for layer in ranking[left:]:
        gates[layer] = False
    return gates


def extra_loss(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> Tensor:
    """Return 5 · |(L − Σ layer weights) / L − nᵢ / L|: 5 · |Σ layer weights − (L − nᵢ)| / L.

    It is 0 where the layer weights sum to L − nᵢ, the number of layers left at the end of the
    iteration.
    """
    gates = layer_weights(scores, ranking, update, config)
    weights = torch.stack([gate for gate in gates if gate is not False])  # (layers left,)
    target = size_at(update, config)
    distance = weights.sum() - target
    return SPARSITY_LOSS * distance.abs() / len(scores)


def rank(scores: Tensor, ranking: Sequence[int], update: int, config: Config) -> list[int]:
    """Return the layers that are left by falling score, then the zeroed-out ones, latest first.

    Of equal scores the lower layer comes first. Note: this waits for the device.
    """
    left = size_at_span_start(update, config)
    score = scores.tolist()
    survivors = sorted(ranking[:left], key=lambda layer: (-score[layer], layer))
    return [*survivors, *ranking[left:]]
