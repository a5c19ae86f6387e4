"""The paper's step 2: which sizes train in an update, with which loss weights, and stochastic depth."""

import random
from collections.abc import Sequence

from torch import Tensor

from dynsize.config import Config
from dynsize.conformer import Gates
from dynsize.kernels.reference import kept


def loss_weights(update: int, sizes: Sequence[int], config: Config) -> dict[int, float]:
    """Size → weight of its loss, largest first, by the sandwich rule: the largest, one between that is drawn from
    (seed, update), and the smallest. `sizes`: ascending."""
    *smaller, largest = sizes
    draw = random.Random(f"sandwich {config.seed} {update}")
    between = [draw.choice(smaller[1:])] if smaller[1:] else []
    return {largest: 1.0} | dict.fromkeys(between + smaller[:1], config.subnet_loss)


def stochastic_depth(
    smallest: Sequence[bool], seeds: Tensor, config: Config
) -> list[bool | Tensor]:
    """The supernet's gates: each of the utterances, given by their seeds, (B,) int64, skips each layer outside the
    smallest subnet, given by its mask, with the configured probability."""
    if config.stochastic_depth == 0:
        return [True] * len(smallest)
    stays = layers_kept(seeds, len(smallest), config.stochastic_depth)
    return [True if always else stay for always, stay in zip(smallest, stays, strict=True)]


def layers_kept(seeds: Tensor, layers: int, dropped: float) -> Tensor:
    """1 where an utterance keeps a layer, 0 where it skips it: (L, B) float32. The draw beside those of the layers'
    dropout, which have the next L seeds."""
    return kept(seeds - 1, 1, layers, dropped)[:, 0].T.float()


def gates(masks: Sequence[Gates], seeds: Tensor, config: Config) -> list[Gates]:
    """The gates of one update from its masks, largest first."""
    if len(masks) == 1:
        return [masks[0]]
    return [stochastic_depth(masks[-1], seeds, config), *masks[1:]]
