"""Cutting a subnet out of a supernet, and what a network costs: parameters, MACs, milliseconds."""

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import compress, product

import torch
from torch import Tensor, nn

from dynsize.config import Config, flag_of
from dynsize.conformer import Convolution, FeedForward, SelfAttention
from dynsize.features import feature_frames, log_mel
from dynsize.supernet import Supernet

ROUNDS = 15  # in each of which everything that is timed runs once
TIMED_SECONDS = 10.0  # of the audio on which a network is timed
FRAMES_OF_A_LABEL = 4  # a guess: 6 labels a second with hops of 10 ms


def cut(model: Supernet, size: int) -> Supernet:
    """Return a network that has only the first `size` layers of the ranking, with their weights.

    The weights are copies, on the same device. A size that was not trained gets the output
    that `Supernet.output` names. Raises ValueError for a network that was cut already, and
    for a size that the supernet can't have.
    """
    if model.size is not None:
        advice = "cut the supernet it came from"
        raise ValueError(f"this network was cut already, to {model.size} layers; {advice}")
    most = model.config.layers
    if not 1 <= size <= most:
        raise ValueError(f"the supernet has no size {size}; sizes are 1 to {most} layers")
    output = model.output(size)
    subnet = Supernet(model.config, model.labels, model.ranking, size)
    weights = model.encoder.state_dict()
    kept = {name: weights[name] for name in subnet.encoder.state_dict()}
    subnet.encoder.load_state_dict(kept)
    subnet.output(size).load_state_dict(output.state_dict())
    subnet.eval()
    return subnet.to(next(output.parameters()).device)


def widened(model: Supernet, config: Config) -> Supernet:
    """Return a supernet with the sizes and the method of `config` and the weights of `model`.

    `model` has all its layers; each size's output begins as that of the full size. Raises
    ValueError for a network that was cut.
    """
    if model.size is not None:
        advice = "sizes are learned in one that has all"
        raise ValueError(f"this network was cut to {model.size} layers; {advice}")
    full = model.output(config.layers)
    supernet = Supernet(config, model.labels)
    supernet.encoder.load_state_dict(model.encoder.state_dict())
    for output in supernet.output_layers.values():
        output.load_state_dict(full.state_dict())
    return supernet


BUDGETS = ("max_params", "max_macs", "max_latency_ms")


def largest_within(model: Supernet, budget: str, limit: float, seconds: float) -> int:
    """Return the largest size, trained or not, whose cost is at most `limit`.

    It bisects: the cost must grow with the size. Each size that it tries is cut out; for
    milliseconds it is timed by itself, see `latencies`.

    `budget`: one of `BUDGETS`; milliseconds are those for `seconds` of audio. Raises ValueError
    where a single layer costs more.
    """

    def cost(size: int) -> float:
        subnet = cut(model, size)
        if budget == "max_params":
            return parameters(subnet)
        if budget == "max_macs":
            return macs(subnet, size)
        return latencies([subnet], seconds)[0]

    sizes = range(1, model.config.layers + 1)
    size = bisect_right(sizes, limit, key=cost)
    if size == 0:
        what = f"a subnet of one layer has {cost(1):,.10g} already"
        raise ValueError(f"{flag_of(budget)} {limit:g}: {what}")
    return size


def costs(model: Supernet, size: int) -> dict:
    """Return the `parameters` of a size, its `macs` for 1 s of audio, and the `layers` it keeps."""
    return dict(
        parameters=parameters(model, size),
        macs=macs(model, size),
        layers=kept_names(model, size),
    )


def kept_names(model: Supernet, size: int) -> list[str]:
    """Return the names of the layers that a size keeps, from the input on."""
    return list(compress(model.config.layer_names, model.mask(size)))


def parameters(model: Supernet, size: int | None = None) -> int:
    """Return the number of weights that the network of `size` layers computes with.

    `size`: by default the largest. Layer scores and the other sizes' outputs do not count,
    so a size has the same number inside a supernet and cut out of it.
    """
    if size is None:
        size = model.sizes[-1]
    norms = [block["norm"] for block in model.encoder.blocks]
    layers = layers_of(model, size)
    parts = [model.encoder.front_end, *norms, *layers, model.output(size)]
    return sum(map(weights_in, parts))


def layers_of(model: Supernet, size: int) -> list[nn.Module]:
    """Return the layers that a size keeps, from the input on."""
    places = product(model.encoder.blocks, model.config.block)
    kept = compress(places, model.mask(size))
    return [block[kind] for block, kind in kept]


def weights_in(module: nn.Module) -> int:
    """Return the number of weights of a module."""
    return sum(weight.numel() for weight in module.parameters())


def macs(model: Supernet, size: int, seconds: float = 1.0) -> int:
    """Return the multiply-accumulates of the network of `size` layers for `seconds` of audio.

    Products of the attention are included. What an output does for each label is counted for one
    label in every `FRAMES_OF_A_LABEL` encoder frames.
    """
    config = model.config
    front_end = model.encoder.front_end
    samples = round(seconds * config.sample_rate)
    frames_in = feature_frames(samples, config)
    frames = front_end.output_frames(frames_in)
    total = front_end_macs(front_end, frames_in, config.mel_bins)
    for layer in layers_of(model, size):
        total += layer_macs(layer, frames)
    labels = frames // FRAMES_OF_A_LABEL
    return total + model.output(size).macs(frames, labels)


def layer_macs(layer: FeedForward | Convolution | SelfAttention, frames: int) -> int:
    """Return the MACs of one layer: one for each matrix weight and frame.

    Self-attention has 2 · frames² · D more: queries with keys, and weights with values.
    """
    matrices = [weight for weight in layer.parameters() if weight.dim() > 1]
    total = frames * sum(matrix.numel() for matrix in matrices)
    if isinstance(layer, SelfAttention):
        total += 2 * frames**2 * layer.project.out_features
    return total


def front_end_macs(front_end: nn.Module, frames: int, bins: int) -> int:
    """Return the MACs of a front-end for `frames` feature frames of `bins` mel bins."""
    total = front_end.output_frames(frames) * front_end.project.weight.numel()
    for number, convolution in enumerate(front_end.convolutions):
        if convolution.stride[0] == 2:
            frames = (frames + 1) // 2
            bins = (bins + 1) // 2
        elif number == 2:  # after the first max-pooling of the VGG front-end
            frames //= 2
        total += frames * bins * convolution.weight.numel()
    return total


@torch.inference_mode()
def latencies(networks: Sequence[Supernet], seconds: float = TIMED_SECONDS) -> list[float]:
    """Return the milliseconds that each network takes for one utterance of `seconds`.

    The largest size of each network runs, all on one device. Measured on noise, from samples to
    labels, see `in_turn`.
    """
    config = networks[0].config
    device = next(networks[0].parameters()).device
    audio = noise(config, seconds)

    def run(network: Supernet) -> None:
        size = network.sizes[-1]
        features = log_mel(audio, config).to(device)  # (T, F)
        lengths = torch.tensor([len(features)], device=device)
        (emissions,), lengths = network(features[None], lengths, [size])
        network.output(size).decode(emissions, lengths)  # this waits for the device

    calls = {place: partial(run, network) for place, network in enumerate(networks)}
    return list(in_turn(calls).values())


def noise(config: Config, seconds: float = TIMED_SECONDS) -> Tensor:
    """Return noise, always the same, (samples,), on which a network is timed."""
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(round(seconds * config.sample_rate), generator=generator)


def in_turn(calls: Mapping[Hashable, Callable[[], object]], rounds: int = ROUNDS) -> dict:
    """Return the median milliseconds of each call, over rounds in which each is called once.

    Calls that are compared are timed side by side, so that what slows the machine for a while slows
    all of them. One round more, the first, warms up and does not count.
    """
    taken: dict[Hashable, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            taken[name].append(1000 * seconds)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def layer_legend(config: Config) -> str:
    """Return what `layer_map` shows, for people."""
    kinds = ", ".join(config.block)
    return f"a letter for each layer, blocks from the input on: {kinds}; a dot: pruned"


def layer_map(model: Supernet, size: int) -> str:
    """Return the layers that a size keeps, for people: `fcmf f.m.`, two blocks, the second cut."""
    kinds = model.config.block
    letters = ""
    for layer, kept in enumerate(model.mask(size)):
        kind = layer % len(kinds)
        if layer > 0 and kind == 0:
            letters += " "
        letters += kinds[kind][0] if kept else "."
    return letters
