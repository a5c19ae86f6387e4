"""The table of the algorithms that learn in step 1 which layers a subnet keeps, and baselines.

A new algorithm is one module, one entry here, and its settings in config.py. Its module has five
functions:

    initial_scores(config)    the layer scores before the first update
    size_at(update, config)   the subnet's number of layers, which also chooses its output
    layer_weights(scores, ranking, update, config)   the L gates of that subnet
    extra_loss(scores, ranking, update, config)      what is added to the two losses
    rank(scores, ranking, update, config)            the layers, most important first

`update` is the number of an update of step 1, from 0. The scores are (L,) or (L, L). `size_at` is
below L and at least the smallest size; `schedule.size_at_span_end` can serve. A gate is `False`,
which saves the layer's work, or a tensor, () or (B,); `extra_loss` is (). `ranking` is the result
of the last `rank`, at first the layers in their order, or that of `--init-from`. The layers are
ranked after the last update of each of the schedule's spans, and before a checkpoint and a
validation. The log shows what `rank` gives, so none of the functions keeps anything. None but
`rank` waits for the device.
"""

import random
from collections.abc import Sequence
from types import ModuleType

from dynsize import iterative_zero_out, ortho_softmax, simple_top_k

ALGORITHMS: dict[str, ModuleType] = {
    "simple-top-k": simple_top_k,
    "iterative-zero-out": iterative_zero_out,
    "ortho-softmax": ortho_softmax,
}

# Rankings that are not learned, to compare with.


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
    draw = random.Random(f"ranking {seed}")
    return draw.sample(range(layers), layers)
