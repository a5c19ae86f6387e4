"""What follows from an update's number: learning rate, whether it is in step 1, the subnet's size.

These are pure functions, so that a resumed training repeats them.
"""

import math
from itertools import pairwise

from dynsize.config import METHOD_DEFAULTS, Config

LAST_LEARNING_RATE = 1e-8


def learning_rate(update: int, config: Config) -> float:
    """Return the learning rate of an update.

    It is linear from peak / 100 to the peak, back to peak / 100, then to 1e-8, in one curve over
    both steps.
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
        if done <= right:
            return low + (high - low) * (done - left) / (right - left)
    return LAST_LEARNING_RATE


def step1_updates(config: Config) -> int:
    """Return the number of updates of step 1; the other updates are step 2.

    It is 0 for a baseline and for a single size, which learn no layer scores.
    """
    learns_scores = config.method in METHOD_DEFAULTS and len(config.sizes) > 1
    return round(config.step1_share * config.updates) if learns_scores else 0


def in_step1(update: int, config: Config) -> bool:
    """Return whether an update is one of step 1."""
    return update < step1_updates(config)


def size_at_span_start(update: int, config: Config) -> int:
    """Return the size at the start of the span in which an update lies.

    Step 1 consists of equal spans. The size drops by Δ from a span's start to its end, but never
    below the smallest size. Simple-Top-k's k is the size at the end, in the whole span. In
    Iterative-Zero-Out a span is an iteration: its subnet runs the layers of the start, and the size
    at the end is its target. With n spans in S updates, span j begins at update ⌈j · S / n⌉, both
    from 0.

    Example: L = 8, Δ = 3, the smallest size 3, 10 updates of step 1.

        span   updates   size at its start   size at its end
        0      0 to 4    8                   5
        1      5 to 9    5                   3
    """
    smallest, largest = config.sizes[0], config.sizes[-1]
    lost = largest - smallest
    spans = math.ceil(lost / config.delta)
    span = update * spans // step1_updates(config)
    return max(largest - config.delta * span, smallest)


def size_at_span_end(update: int, config: Config) -> int:
    """Return the size at the end of the span in which an update lies.

    See `size_at_span_start`.
    """
    size = size_at_span_start(update, config) - config.delta
    return max(size, config.sizes[0])


def ends_span(update: int, config: Config) -> bool:
    """Return whether an update of step 1 is the last one of its span."""
    size = size_at_span_start(update, config)
    return size_at_span_start(update + 1, config) < size
