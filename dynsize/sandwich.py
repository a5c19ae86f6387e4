"""The paper's step 2: which sizes train in an update, with which loss weights; stochastic depth."""

import random
from collections.abc import Sequence

from torch import Tensor

from dynsize.config import Config
from dynsize.kernels import layer_gates


def loss_weights(update: int, sizes: Sequence[int], config: Config) -> dict[int, float]:
    """Return size → weight of its loss, largest size first, by the sandwich rule.

    The largest size trains with weight 1. The smallest one and one between, drawn from
    (seed, update), train with the weight `subnet_loss`. `sizes`: ascending.
    """
    smallest = sizes[0]
    between = sizes[1:-1]
    largest = sizes[-1]
    weights = {largest: 1.0}
    if between:
        draw = random.Random(f"sandwich {config.seed} {update}")
        drawn = draw.choice(between)
        weights[drawn] = config.subnet_loss
    if smallest != largest:
        weights[smallest] = config.subnet_loss
    return weights


def stochastic_depth(
    smallest: Sequence[bool], seeds: Tensor, config: Config
) -> list[bool | Tensor]:
    """Return the supernet's L gates: True inside the smallest subnet's mask, else (B,) float32.

    Only layers outside the smallest subnet are skipped, also those that a middle size keeps: each
    with the probability `stochastic_depth`, drawn for each utterance. A skipped layer has gate
    0 for this utterance; it is computed all the same. The layers that are not skipped have gate 1:
    they are not scaled up.

    `smallest`: the mask of the smallest subnet. `seeds`: (B,) int64, one for each utterance.
    """
    if config.stochastic_depth == 0:
        return [True] * len(smallest)
    stays = layer_gates(seeds, len(smallest), config.stochastic_depth)  # (L, B)
    gates: list[bool | Tensor] = list(stays)
    for layer, kept in enumerate(smallest):
        if kept:
            gates[layer] = True
    return gates


def gates(
    masks: Sequence[Sequence[bool]], seeds: Tensor, config: Config
) -> list[Sequence[bool | Tensor]]:
    """Return the gates of the networks of one update from their masks, largest first.

    The largest network has stochastic depth. The gates of the others are their masks. A network
    that trains alone has no stochastic depth.
    """
    if len(masks) == 1:
        return [masks[0]]
    return [stochastic_depth(masks[-1], seeds, config), *masks[1:]]
