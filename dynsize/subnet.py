"""Cutting a subnet out of a supernet, and what a network costs: parameters, MACs, milliseconds."""

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import nn

from dynsize.config import LAYERS, Config
from dynsize.conformer import Convolution, FeedForward, SelfAttention
from dynsize.features import feature_frames
from dynsize.supernet import Supernet


def cut(model: Supernet, size: int) -> Supernet:
    """Return a network that has only the first `size` layers of the ranking, with their weights.

    The weights are copies, on the same device. A size that was not trained gets the output layer of
    the largest trained size below it. Raises ValueError for a network that was cut already, and for
    a size that the supernet can't have.
    """
    if model.size is not None:
        raise ValueError(
            f"this network was cut already, to {model.size} layers; cut the supernet it came from"
        )
    if not 1 <= size <= model.config.layers:
        raise ValueError(
            f"the supernet has no size {size}; sizes are 1 to {model.config.layers} layers"
        )
    subnet = Supernet(model.config, model.output_layer(size).out_features, model.ranking, size)
    weights = model.encoder.state_dict()
    kept = {name: weights[name] for name in subnet.encoder.state_dict()}
    subnet.encoder.load_state_dict(kept)
    subnet.output_layer(size).load_state_dict(model.output_layer(size).state_dict())
    return subnet.eval().to(next(model.parameters()).device)


def widened(model: Supernet, config: Config) -> Supernet:
    """Return a supernet with the sizes and the method of `config` and the weights of `model`.

    `model` has all its layers; each size's output layer begins as that of the full size. Raises
    ValueError for a network that was cut.
    """
    if model.size is not None:
        raise ValueError(
            f"this network was cut to {model.size} layers; sizes are learned in one that has all"
        )
    full = model.output_layer(config.layers)
    supernet = Supernet(config, full.out_features)
    supernet.encoder.load_state_dict(model.encoder.state_dict())
    for output_layer in supernet.output_layers.values():
        output_layer.load_state_dict(full.state_dict())
    return supernet


# Budget → the cost of a cut subnet of some size, for so many seconds of audio.
COSTS: dict[str, Callable[[Supernet, int, float], float]] = {
    "max_params": lambda subnet, size, seconds: parameters(subnet, size),
    "max_macs": lambda subnet, size, seconds: macs(subnet, size),
    "max_latency_ms": lambda subnet, size, seconds: latencies([(subnet, size)], seconds)[0],
}


def largest_within(model: Supernet, budget: str, limit: float, seconds: float) -> int:
    """Return the largest size whose cost is at most `limit`.

    `budget`: one of `COSTS`; milliseconds are those for `seconds` of audio. Raises ValueError where
    a single layer costs more.
    """

    def cost(size: int) -> float:
        return COSTS[budget](cut(model, size), size, seconds)

    size = bisect_right(range(1, model.config.layers + 1), limit, key=cost)
    if size == 0:
        flag = budget.replace("_", "-")
        raise ValueError(f"--{flag} {limit:g}: a subnet of one layer has {cost(1):,.10g} already")
    return size


def parameters(model: Supernet, size: int | None = None) -> int:
    """Return the number of weights that the network of `size` layers computes with.

    `size`: by default the largest. Layer scores and the other sizes' output layers do not count,
    so a size has the same number inside a supernet and cut out of it.
    """
    size = model.sizes[-1] if size is None else size
    blocks = model.encoder.blocks
    pruned = [layer for layer, kept in enumerate(model.mask(size)) if not kept]
    names = [(layer // 4, LAYERS[layer % 4]) for layer in pruned]
    modules = [blocks[block][kind] for block, kind in names if kind in blocks[block]]
    return (
        weights_in(model.encoder)
        + weights_in(model.output_layer(size))
        - sum(map(weights_in, modules))
    )


def weights_in(module: nn.Module) -> int:
    """Return the number of weights of a module."""
    return sum(weight.numel() for weight in module.parameters())


def macs(model: Supernet, size: int, seconds: float = 1.0) -> int:
    """Return the multiply-accumulates of the network of `size` layers for `seconds` of audio.

    Products of the attention are included.
    """
    config, encoder = model.config, model.encoder
    feature_count = feature_frames(round(seconds * config.sample_rate), config)
    total = front_end_macs(encoder.front_end, feature_count, config.mel_bins)
    frames = encoder.front_end.output_frames(feature_count)
    for layer, kept in enumerate(model.mask(size)):
        if kept:
            module = encoder.blocks[layer // 4][LAYERS[layer % 4]]
            total += layer_macs(module, frames)
    return total + frames * model.output_layer(size).weight.numel()


def layer_macs(layer: FeedForward | Convolution | SelfAttention, frames: int) -> int:
    """Return the MACs of one layer: one for each matrix weight and frame.

    Self-attention has 2 · frames² · D more: queries with keys, and weights with values.
    """
    total = frames * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
    if isinstance(layer, SelfAttention):
        total += 2 * frames**2 * layer.project.out_features
    return total


def front_end_macs(front_end: nn.Module, frames: int, bins: int) -> int:
    """Return the MACs of a front-end for `frames` feature frames of `bins` mel bins."""
    total = front_end.output_frames(frames) * front_end.project.weight.numel()
    for number, convolution in enumerate(front_end.convolutions):
        if convolution.stride[0] == 2:
            frames, bins = (frames + 1) // 2, (bins + 1) // 2
        elif number == 2:  # after the first max-pooling of the VGG front-end
            frames //= 2
        total += frames * bins * convolution.weight.numel()
    return total


@torch.inference_mode()
def latencies(
    networks: Sequence[tuple[Supernet, int]], seconds: float = 10.0, repeats: int = 15
) -> list[float]:
    """Return the milliseconds that each network takes for one utterance of `seconds`.

    `networks`: pairs of a network, on one device, and the size that runs. Measured from features to
    log-probabilities: the median of `repeats` rounds in turn, after one round to warm up.
    """
    config = networks[0][0].config
    device = next(networks[0][0].parameters()).device
    frames = feature_frames(round(seconds * config.sample_rate), config)
    features = torch.randn(1, frames, config.mel_bins, device=device)
    lengths = torch.tensor([frames], device=device)
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(repeats + 1):
        for (network, size), taken in zip(networks, times, strict=True):
            start = time.perf_counter()
            log_probs, _ = network(features, lengths, [size])
            log_probs[0, 0, 0, 0].item()  # wait for the device
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken[1:]) for taken in times]
