"""The paper's step 2: which sizes train in an update, with which loss weights, and stochastic depth."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dynsize.config import Config
from dynsize.conformer import Gates


def loss_weights(update: int, sizes: Sequence[int], config: Config) -> dict[int, float]:
    """Size → weight of its loss, largest first, by the sandwich rule: the largest, one between that is drawn from
    (seed, update), and the smallest. `sizes`: ascending."""
    *smaller, largest = sizes
    draw = random.Random(f"sandwich {config.seed} {update}")
    between = [draw.choice(smaller[1:])] if smaller[1:] else []
    return {largest: 1.0} | dict.fromkeys(between + smaller[:1], config.subnet_loss)


def stochastic_depth(
    utterances: int, smallest: Sequence[bool], config: Config, device: torch.device
) -> list[bool | Tensor]:
    """The supernet's gates for `utterances` utterances: each skips each layer outside the smallest subnet, given by
    its mask, with the configured probability. Drawn from torch's generator of the device."""
    if config.stochastic_depth == 0:
        return [True] * len(smallest)
    stays = torch.rand(len(smallest), utterances, device=device) >= config.stochastic_depth
    return [True if always else stay.float() for always, stay in zip(smallest, stays, strict=True)]


def gates(masks: Sequence[Gates], utterances: int, config: Config, device: torch.device) -> list[Gates]:
    """The gates of one update from its masks, largest first."""
    if len(masks) == 1:
        return [masks[0]]
    return [stochastic_depth(utterances, masks[-1], config, device), *masks[1:]]
