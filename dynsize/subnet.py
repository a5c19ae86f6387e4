"""Cutting a standalone subnet out of a supernet, and what a network costs: parameters, MACs, milliseconds."""

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
    """A network that has only the `size` first layers of the ranking and their output layer, with copies of their
    weights. A size that was not trained gets the output layer of the largest trained one below it.

    Raises ValueError for a network that was cut before, and for a size that the supernet can't have.
    """
    if model.size is not None:
        raise ValueError(
            f"this network was cut already, to {model.size} layers; cut the supernet it came from"
        )
    if not 1 <= size <= model.config.layers:
        raise ValueError(
            f"the supernet has no size {size}; sizes are 1 to {model.config.layers} layers"
        )
    subnet = Supernet(model.config, model.head(size).out_features, model.ranking, size)
    weights = model.state_dict()
    subnet.encoder.load_state_dict(
        {f: weights[f"encoder.{f}"] for f in subnet.encoder.state_dict()}
    )
    subnet.head(size).load_state_dict(model.head(size).state_dict())
    return subnet.eval()


def widened(model: Supernet, config: Config) -> Supernet:
    """A supernet of the sizes and the method of `config`, with the weights of a full-size model; each size's output
    layer begins as that of the full size. Raises ValueError for a network that was cut."""
    if model.size is not None:
        raise ValueError(
            f"a cut network, of {model.size} layers: sizes are learned in one that has all of its layers"
        )
    head = model.head(config.layers)
    supernet = Supernet(config, head.out_features)
    supernet.encoder.load_state_dict(model.encoder.state_dict())
    for own in supernet.heads.values():
        own.load_state_dict(head.state_dict())
    return supernet


COSTS: dict[str, Callable[[Supernet, int, float], float]] = {
    "max_params": lambda subnet, size, seconds: parameters(subnet),
    "max_macs": lambda subnet, size, seconds: macs(subnet, size),
    "max_latency_ms": lambda subnet, size, seconds: latencies([(subnet, size)], seconds)[0],
}


def largest_within(model: Supernet, budget: str, limit: float, seconds: float) -> int:
    """The largest number of layers whose subnet costs `limit` or less of one of the `COSTS`, milliseconds for `seconds`
    of audio. Raises ValueError where a single layer costs more."""
    size = bisect_right(
        range(1, model.config.layers + 1),
        limit,
        key=lambda size: COSTS[budget](cut(model, size), size, seconds),
    )
    if size == 0:
        least = COSTS[budget](cut(model, 1), 1, seconds)
        raise ValueError(
            f"--{budget.replace('_', '-')} {limit:g}: a subnet of one layer has {least:,.10g} already"
        )
    return size


def parameters(model: nn.Module) -> int:
    """The number of weights that the network computes with; layer scores are none of them."""
    return sum(weight.numel() for name, weight in model.named_parameters() if name != "scores")


def macs(model: Supernet, size: int, seconds: float = 1.0) -> int:
    """Multiply-accumulates of the network of `size` layers for `seconds` of audio, attention products included."""
    frames = feature_frames(round(seconds * model.config.sample_rate), model.config)
    total = front_end_macs(model.encoder.front_end, frames, model.config.mel_bins)
    frames = model.encoder.front_end.output_frames(frames)
    mask = model.mask(size)
    for block, layers in enumerate(model.encoder.blocks):
        kept = [layers[kind] for i, kind in enumerate(LAYERS) if mask[4 * block + i]]
        total += sum(layer_macs(layer, frames) for layer in kept)
    return total + frames * model.head(size).weight.numel()


def layer_macs(layer: FeedForward | Convolution | SelfAttention, frames: int) -> int:
    """MACs of one prunable layer: one for each matrix weight in each frame, and frames² D twice in self-attention."""
    total = frames * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
    return total + (
        2 * frames**2 * layer.project.out_features if isinstance(layer, SelfAttention) else 0
    )


def front_end_macs(front_end: nn.Module, frames: int, bins: int) -> int:
    """MACs of a front-end for feature frames of so many mel bins."""
    total, output_frames = 0, front_end.output_frames(frames)
    for number, convolution in enumerate(front_end.convolutions):
        if convolution.stride[0] == 2:
            frames, bins = (frames + 1) // 2, (bins + 1) // 2
        elif number == 2:  # behind the first max-pooling of the VGG front-end
            frames //= 2
        total += frames * bins * convolution.weight.numel()
    return total + output_frames * front_end.project.weight.numel()


@torch.inference_mode()
def latencies(
    networks: Sequence[tuple[Supernet, int]], seconds: float = 10.0, repeats: int = 15
) -> list[float]:
    """Milliseconds in which each network, given with the size that runs, turns the features of one utterance of so
    many seconds into log-probabilities: the median of `repeats` rounds in turn, after one to warm up."""
    config = networks[0][0].config
    frames = feature_frames(round(seconds * config.sample_rate), config)
    features, lengths = torch.randn(1, frames, config.mel_bins), torch.tensor([frames])
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(repeats + 1):
        for (network, size), taken in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(features, lengths, [size])
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken[1:]) for taken in times]
