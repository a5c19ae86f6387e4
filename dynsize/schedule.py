"""What an update does by its number alone: learning rate, step, size. Pure functions, so that resuming repeats them."""

from itertools import pairwise

from dynsize.config import LEARNING_METHODS, Config

LAST_LEARNING_RATE = 1e-8


def learning_rate(update: int, config: Config) -> float:
    """Linear from peak / 100 to the peak, back to peak / 100, then to 1e-8."""
    peak, done = config.peak_learning_rate, (update + 1) / config.updates
    corners = [
        (0.0, peak / 100),
        (config.warmup, peak),
        (config.warmup + config.cooldown, peak / 100),
    ]
    corners.append((1.0, LAST_LEARNING_RATE))
    for (left, low), (right, high) in pairwise(corners):
        if done <= right and left < right:
            return low + (high - low) * (done - left) / (right - left)
    return LAST_LEARNING_RATE


def step1_updates(config: Config) -> int:
    """The number of updates of step 1, none where no layers are to be learned; the rest of the training is step 2."""
    learns = config.method in LEARNING_METHODS and len(config.sizes) > 1
    return round(config.step1_share * config.updates) if learns else 0


def size_before(update: int, config: Config) -> int:
    """The size to which step 1 has come before the equal span (Iterative-Zero-Out: the iteration) of this update."""
    delta = config.zero_out_delta if config.method == "iterative-zero-out" else config.delta
    spans = max(1, -(-(config.layers - config.sizes[0]) // delta))
    span = update * spans // max(1, step1_updates(config))
    return max(config.layers - delta * span, config.sizes[0])


def size_at(update: int, config: Config) -> int:
    """k in an update of step 1: from L − Δ down to the smallest size, Δ layers at a time, in equal spans."""
    delta = config.zero_out_delta if config.method == "iterative-zero-out" else config.delta
    return max(size_before(update, config) - delta, config.sizes[0])
