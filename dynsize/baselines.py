"""Layers chosen without learning, to compare with: LayerDrop's, the first ones, random ones."""

import random
from collections.abc import Sequence


def every_other(layers: int, sizes: Sequence[int]) -> list[int]:
    """A ranking of which each of the sizes, ascending, keeps layers in equal distances, as LayerDrop does when it
    prunes (Fan et al. 2020)."""
    ranking: list[int] = []
    for size in [*sizes, layers]:
        rest = [layer for layer in range(layers) if layer not in ranking]
        more = size - len(ranking)
        ranking += [rest[i * len(rest) // more] for i in range(more)]
    return ranking


def shuffled(layers: int, seed: int) -> list[int]:
    """A random ranking."""
    return random.Random(f"ranking {seed}").sample(range(layers), layers)
