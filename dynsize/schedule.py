"""What depends on an update's number alone: learning rate, step, sizes of step 1.

These are pure functions, so that a resumed training repeats them.
"""

import math
from itertools import pairwise

from dynsize.config import Config

LAST_LEARNING_RATE = 1e-8


def learning_rate(update: int, config: Config) -> float:
    """Return the learning rate of an update.

    It is linear from peak / 100 to the peak, back to peak / 100, then to 1e-8.
    """
    peak = config.peak_learning_rate
    done = (update + 1) / config.updates
    corners = [
        (0.0, peak / 100),
        (config.warmup, peak),
        (config.warmup + config.cooldown, peak / 100),
        (1.0, LAST_LEARNING_RATE),
    ]
    for (left, low), (right, high) in pairwise(corners):
        if done <= right and left < right:
            return low + (high - low) * (done - left) / (right - left)
    return LAST_LEARNING_RATE


def step1_updates(config: Config) -> int:
    """Return the number of updates of step 1; the rest of the training is step 2.

    It is 0 where no layers are learned: for a baseline, and for a single size.
    """
    return round(config.step1_share * config.updates) if config.learns else 0


def in_step1(update: int, config: Config) -> bool:
    """Return whether an update is one of step 1."""
    return update < step1_updates(config)


def size_at_span_start(update: int, config: Config) -> int:
    """Return the size at the start of an update's span.

    Step 1 is divided into equal spans: Iterative-Zero-Out's iterations, or the values of k in
    Simple-Top-k. In each the size falls by Δ layers, in the last one perhaps by fewer. Example:
    with L = 8, Δ = 3, and the smallest size 3, the size is 8 at the start of the first span and 5
    at its end; it is 5 at the start of the second span and 3 at its end. With n spans in S updates,
    span j begins at update ⌈j · S / n⌉, both from 0.
    """
    smallest = config.sizes[0]
    lost = config.layers - smallest
    spans = max(1, math.ceil(lost / config.delta))
    span = update * spans // max(1, step1_updates(config))
    return max(config.layers - config.delta * span, smallest)


def size_at_span_end(update: int, config: Config) -> int:
    """Return the size at the end of an update's span: 5, then 3 in the example.

    Simple-Top-k's subnet has this size throughout the span. Iterative-Zero-Out zeroes out the
    layers when the span ends.
    """
    size = size_at_span_start(update, config) - config.delta
    return max(size, config.sizes[0])


def ends_span(update: int, config: Config) -> bool:
    """Return whether an update of step 1 is the last one of its span, after which layers are lost.

    The last update of step 1 ends a span too.
    """
    size = size_at_span_start(update, config)
    return size_at_span_start(update + 1, config) < size
