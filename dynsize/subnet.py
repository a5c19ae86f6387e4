"""Cutting a standalone subnet out of a supernet, and what a network costs: parameters, MACs, milliseconds."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from dynsize.config import LAYERS
from dynsize.conformer import Convolution, FeedForward, SelfAttention
from dynsize.features import feature_frames
from dynsize.supernet import Supernet


def cut(model: Supernet, size: int) -> Supernet:
    """A network that has only the layers and the output layer of one trained size, with copies of their weights.

    Raises ValueError for a network that was cut before, and for a size that the supernet does not have.
    """
    if model.scores is None:
        raise ValueError(f"this network was cut already, to {model.sizes[0]} layers; cut the supernet it came from")
    if size not in model.sizes:
        raise ValueError(f"the supernet has no size {size}; it has {', '.join(map(str, model.sizes))}")
    labels = model.head(size).out_features
    subnet = Supernet(model.config, labels, model.ranking, size)
    weights = model.state_dict()
    subnet.load_state_dict({name: weights[name] for name in subnet.state_dict()})
    return subnet.eval()


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
    return total + (2 * frames**2 * layer.project.out_features if isinstance(layer, SelfAttention) else 0)


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
def latencies(networks: Sequence[tuple[Supernet, int]], seconds: float = 10.0, repeats: int = 15) -> list[float]:
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
