"""Rankings that are not learned, to compare with: LayerDrop's and random ones."""

import random
from collections.abc import Sequence


def every_other(layers: int, sizes: Sequence[int]) -> list[int]:
    """Return a ranking of which each size keeps layers at equal distances, as LayerDrop does.

    Example: of 8 layers, sizes 4 and 8, the size 4 keeps layers 0, 2, 4, 6. `sizes`: ascending.
    Each size keeps the layers of the smaller ones and takes the further ones at equal distances
    from the rest. (Fan et al. 2020.)
    """
    ranking: list[int] = []
    for size in [*sizes, layers]:
        rest = [layer for layer in range(layers) if layer not in ranking]
        more = size - len(ranking)
        for i in range(more):
            place = i * len(rest) // more
            ranking.append(rest[place])
    return ranking


def shuffled(layers: int, seed: int) -> list[int]:
    """Return a random ranking."""
    ranking = list(range(layers))
    draw = random.Random(f"ranking {seed}")
    return draw.sample(ranking, layers)
