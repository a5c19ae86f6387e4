"""The Conformer encoder: one forward for networks of several sizes. It knows gates, no algorithms.

Each network of a forward is given by its gates, one for each of the L layers. Layers are numbered
from the input, from 0: of blocks of four, layer i of a block has the number 4 · block + i. A gate
multiplies the output of its layer and is one of:

    False    the layer is pruned: this network does not compute it
    True     the layer is kept
    Tensor   the layer is computed, even where the weight is 0, and its output is multiplied by
             this weight: () or (B,)

Shapes: the stack has R = S·B rows, one for each utterance of each stream (see `Stack`). A layer
computes the first R' of them, those of the streams that keep it. T' counts encoder frames. A
padding mask, `inside`, is True inside the utterance.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynsize.config import Config
from dynsize.kernels import gated_residual_layer_norm, layer_seed

Gate = bool | Tensor
Gates = Sequence[Gate]


# The prunable layers. Each is a residual layer x + scale · gate · dropout(f(norm(x))). `forward` is
# only f. `norm` is its LayerNorm, which `Stack` applies, as it does the rest. `project`, its last
# projection, starts at zero. A new kind is one more class with these, and its name in `LAYER_KINDS`
# below and in `config.KINDS`.


class FeedForward(nn.Module):
    """The feed-forward layer: D → 4D, SiLU, → D."""

    def __init__(self, config: Config, scale: float = 0.5) -> None:
        super().__init__()
        width = config.width
        self.scale = scale
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Return f(x), (R', T', D). `x`: (R', T', D), normalised. `inside` is unused."""
        x = self.expand(x)  # (R', T', 4D)
        x = F.silu(x)
        return self.project(x)


class Convolution(nn.Module):
    """The convolution layer: D → 2D, GLU, depthwise over time, LayerNorm, SiLU, D → D."""

    scale = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        shape = dict(padding=config.kernel // 2, groups=width)
        self.depthwise = nn.Conv1d(width, width, config.kernel, **shape)
        self.depthwise_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Return f(x), (R', T', D). `x`: (R', T', D), normalised. `inside`: (R', T')."""
        x = self.expand(x)  # (R', T', 2D)
        x = F.glu(x)  # (R', T', D)
        x = x * inside[..., None]
        if x.device.type == "cpu":
            x = depthwise_on_cpu(x, self.depthwise)
        else:
            by_channel = x.transpose(1, 2)  # (R', D, T')
            x = self.depthwise(by_channel).transpose(1, 2)
        x = self.depthwise_norm(x)
        x = F.silu(x)
        return self.project(x)


class SelfAttention(nn.Module):
    """The multi-head self-attention layer, over the frames of an utterance."""

    scale = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.rotary = config.rotary
        self.norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Return f(x), (R', T', D). `x`: (R', T', D), normalised. `inside`: (R', T')."""
        x = self.query_key_value(x)  # (R', T', 3D)
        x = x.unflatten(-1, (3, self.heads, -1))  # (R', T', 3, H, D/H)
        q, k, v = x.permute(2, 0, 3, 1, 4)  # (R', H, T', D/H) each
        if self.rotary:
            q, k = rotate(torch.stack([q, k]))
        inside = inside[:, None, None]  # (R', 1, 1, T')
        if x.device.type == "cpu":
            x = attention_on_cpu(q, k, v, inside)
        else:
            x = F.scaled_dot_product_attention(q, k, v, inside)  # (R', H, T', D/H)
        x = x.transpose(1, 2).flatten(2)  # (R', T', D)
        return self.project(x)


def rotate(x: Tensor) -> Tensor:
    """Return `x`, (…, T', d), with rotary positions (RoFormer, Su et al. 2021).

    The pair (i, i + d/2) of frame t turns by the angle t / 10000^(2i/d), computed in float32:
    bfloat16 can't count frames.
    """
    frames, width = x.shape[-2:]
    half = width // 2
    pair = torch.arange(half, device=x.device)  # (d/2,)
    speed = 10000.0 ** (-pair / half)
    frame = torch.arange(frames, device=x.device)[:, None]  # (T', 1)
    angle = frame * speed  # (T', d/2)
    cosine = angle.cos().repeat(1, 2)  # (T', d)
    sine = angle.sin()
    sine = torch.cat([-sine, sine], dim=-1)
    other = x.roll(half, dims=-1)  # of each pair
    turned = other * sine + x * cosine
    return turned.to(x.dtype)


# What a CPU computes in another way. Each is its plain form above, to rounding.


def attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, inside: Tensor) -> Tensor:
    """Return softmax(q·kᵀ / √d) · v over the frames inside, (R', H, T', d).

    `q`, `k`, `v`: (R', H, T', d). `inside`: (R', 1, 1, T'). `baddbmm` adds the products to the mask
    as it computes them, which saves a pass over (R', H, T', T').
    """
    heads = q.shape[1]
    # Finite, so that an utterance without a frame has no NaN.
    outside = torch.where(inside, 0.0, -1e30).to(q.dtype)
    outside = outside.expand(-1, heads, -1, -1)
    outside, q, k, v = (x.flatten(0, 1) for x in (outside, q, k, v))  # (R'·H, 1 or T', ·) each
    scale = 1 / math.sqrt(q.shape[-1])
    products = torch.baddbmm(outside, q, k.mT, alpha=scale)  # (R'·H, T', T')
    weights = products.softmax(-1)
    return (weights @ v).unflatten(0, (-1, heads))


def depthwise_on_cpu(x: Tensor, depthwise: nn.Conv1d) -> Tensor:
    """Return the depthwise convolution of `x`, (R', T', D), over time, (R', T', D).

    It is a float32 convolution over images of height 1 with the channels last, the memory layout of
    `x`: a quarter of the time of `conv1d`, forward and backward. In bfloat16, oneDNN's kernel for
    it never returns for some shapes (torch 2.13, AVX512-BF16).
    """
    x = x.to(depthwise.weight.dtype)
    x = x.transpose(1, 2)[:, :, None]  # (R', D, 1, T')
    weight = depthwise.weight[:, :, None]  # (D, 1, 1, K)
    weight = weight.contiguous(memory_format=torch.channels_last)
    padding = (0, weight.shape[-1] // 2)
    with torch.autocast("cpu", enabled=False):
        x = F.conv2d(x, weight, depthwise.bias, padding=padding, groups=len(weight))
    return x[:, :, 0].transpose(1, 2)  # (R', T', D)


LAYER_KINDS = {
    "ff1": FeedForward,
    "conv": Convolution,
    "mhsa": SelfAttention,
    "ff2": FeedForward,
    "ff": partial(FeedForward, scale=1.0),  # of a Transformer's block
}


# The front-ends, which lower the frame rate by a factor of 4 (`networks.SUBSAMPLING`). A new one is
# one more class, with its name in `FRONT_ENDS` below and in `config.CHANNELS`. `subnet` counts the
# MACs of `convolutions` and `project`; `export.Features` gives it four frames or more.


class Conv2dFrontEnd(nn.Module):
    """Two 3×3 convolutions of stride 2, each with ReLU, then a linear layer to D."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = (1, *config.front_end_channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1) for c_in, c_out in pairwise(channels)
        )
        bins = -(-config.mel_bins // 4)
        self.project = nn.Linear(channels[-1] * bins, config.width)

    @staticmethod
    def output_frames(frames: Tensor | int) -> Tensor | int:
        """Return the number of frames that `frames` feature frames become: ⌈frames / 4⌉."""
        return (frames + 3) // 4

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return (B, ⌈T/4⌉, D). `features`: (B, T, F). `lengths`: (B,) feature frames."""
        x = features[:, None]  # (B, 1, T, F)
        for convolution in self.convolutions:
            x = zero_outside(x, lengths)
            x = convolution(x)
            x = F.relu(x)
            lengths = (lengths + 1) // 2
        x = x.transpose(1, 2).flatten(2)  # (B, ⌈T/4⌉, channels · ⌈F/4⌉)
        return self.project(x)


class VggFrontEnd(nn.Module):
    """The paper's front-end: four 3×3 convolutions, then a linear layer to D.

    After every second convolution come ReLU and max-pooling over two frames.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = (1, *config.front_end_channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, padding=1) for c_in, c_out in pairwise(channels)
        )
        self.project = nn.Linear(channels[-1] * config.mel_bins, config.width)

    @staticmethod
    def output_frames(frames: Tensor | int) -> Tensor | int:
        """Return the number of frames that `frames` feature frames become: ⌊frames / 4⌋."""
        return frames // 4

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return (B, ⌊T/4⌋, D), one frame where T < 4. `features`: (B, T, F). `lengths`: (B,)."""
        missing = max(0, 4 - features.shape[1])
        x = F.pad(features, (0, 0, 0, missing))  # (B, T, F), T ≥ 4
        x = x[:, None]  # (B, 1, T, F)
        for number, convolution in enumerate(self.convolutions):
            x = zero_outside(x, lengths)
            x = convolution(x)
            if number % 2 == 1:
                x = F.relu(x)
                x = F.max_pool2d(x, (2, 1))
                lengths = lengths // 2
        x = x.transpose(1, 2).flatten(2)  # (B, ⌊T/4⌋, channels · F)
        return self.project(x)


FRONT_ENDS = {"conv2d": Conv2dFrontEnd, "vgg": VggFrontEnd}


def padding_mask(lengths: Tensor, frames: int) -> Tensor:
    """Return the mask (B, frames) of utterances with these `lengths`, (B,): True inside."""
    frame = torch.arange(frames, device=lengths.device)  # (frames,)
    return frame < lengths[:, None]


def zero_outside(x: Tensor, lengths: Tensor) -> Tensor:
    """Return `x`, (B, C, T, F), with zeros in the frames outside each utterance."""
    inside = padding_mask(lengths, x.shape[2])  # (B, T)
    inside = inside[:, None, :, None]  # (B, 1, T, 1)
    # Expanded over F, because onnxruntime multiplies by (B, 1, T, 1) three times as slowly.
    inside = inside.expand(-1, -1, -1, x.shape[3])
    return x * inside


def initialise(module: nn.Module) -> None:
    """Set a module's initial weights.

    Each layer's last projection starts at zero, so the layer starts as the identity and a deep
    encoder learns as soon as a shallow one. With PyTorch's initial weights, the frames of an
    utterance look alike after 6 blocks, and CTC stays at its plateau of blanks for hundreds of
    updates.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)
    if hasattr(module, "scale"):  # a prunable layer
        nn.init.zeros_(module.project.weight)
        nn.init.zeros_(module.project.bias)


class Encoder(nn.Module):
    """Front-end and N blocks, which have only the layers whose numbers are in `layers`."""

    def __init__(self, config: Config, layers: Sequence[int]) -> None:
        super().__init__()
        self.front_end = FRONT_ENDS[config.front_end](config)
        self.blocks = nn.ModuleList()
        for block in range(config.blocks):
            modules = nn.ModuleDict()
            for i, kind in enumerate(config.block):
                if len(config.block) * block + i in layers:
                    modules[kind] = LAYER_KINDS[kind](config)
            modules["norm"] = nn.LayerNorm(config.width)
            self.blocks.append(modules)
        self.kinds = config.block
        self.dropout = config.dropout
        self.recompute = config.checkpoint_activations
        self.apply(initialise)

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        gates: Sequence[Gates],
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run M networks, nested and largest first, on the same utterances at once.

        `features`: (B, T, F) float32. `lengths`: (B,) feature frames. `gates`: M times L. `seeds`:
        (B,) int64, from which dropout is drawn, the same for all networks; None: no dropout.

        Returns (M, B, T', D) float32 and the (B,) encoder frames, T' or fewer, inside each
        utterance. Raises ValueError where the networks are not nested.
        """
        x = self.front_end(features, lengths)  # (B, T', D)
        lengths = self.front_end.output_frames(lengths)
        inside = padding_mask(lengths, x.shape[1]).repeat(len(gates), 1)  # (M·B, T')
        dropout = 0.0 if seeds is None else self.dropout
        stack = Stack(x, len(gates), dropout)
        for block, layers in enumerate(self.blocks):
            for i, kind in enumerate(self.kinds):
                number = len(self.kinds) * block + i
                by_network = [of_network[number] for of_network in gates]
                keeping = count_keeping(by_network, number)
                if keeping:
                    layer = layers[kind]
                    normed = stack.normalise(layer.norm, keeping)  # (R', T', D)
                    branch = self.run(layer, normed, inside[: len(normed)])  # (R', T', D)
                    seed = None if seeds is None else layer_seed(seeds, number)
                    stack.leave_pending(branch, by_network, layer.scale, seed)
            stack.end_block(layers["norm"])
        return stack.outputs(), lengths

    def run(self, layer: nn.Module, normed: Tensor, inside: Tensor) -> Tensor:
        """Return `layer(normed, inside)`, with activations computed again if so configured."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, normed, inside, use_reentrant=False)
        return layer(normed, inside)


class Pending(NamedTuple):
    """A layer's output that is not added yet: scale · gate · dropout(branch)."""

    branch: Tensor  # (R', T', D): for the first R' rows of the stack; in the others it is pruned
    gate_by_row: Tensor | None  # (R',); None: 1 for each of these rows
    scale: float
    dropout: float
    seed: Tensor | None  # (B,) int64: what dropout is drawn from


class Stack:
    """The activations of all networks of one forward, stacked along the batch, largest first.

    Two networks are one *stream* up to the first layer whose gates differ, and two from there on.
    A tensor counts as different from every other gate, as its values are not looked at. The stack
    has S streams of B rows. Because the networks are nested, those that keep a layer are the first
    ones, so their streams are the first rows of the stack: a slice, without a gather.

    A layer does not add its output to the stack. It leaves the output *pending*, and the next
    LayerNorm adds it and normalises the sum in one op. On a GPU this op is one pass over memory.

    Example: three networks of one block, with 4, 2, and 1 of its four layers. The streams are a, b,
    and c, written with the sizes that they serve.

        layer   gates of 4, 2, 1       stack before         computed for   stack after
        ff1     True  True   True      a: 4 2 1             a              a: 4 2 1
        conv    True  False  False     a: 4 2 1             a              a: 4   b: 2 1
        mhsa    True  True   False     a: 4   b: 2 1        a b            a: 4   b: 2   c: 1
        ff2     True  False  False     a: 4   b: 2   c: 1   a              a: 4   b: 2   c: 1

    At conv, the sizes 2 and 1 go on together without the layer. At mhsa they part. Its input was
    still the same for both, so it was computed once, as b. Size 2 stays b and gets the output; size
    1 becomes c, a copy of b without it. Four layers of three networks take 5 computations of a
    layer for B rows instead of 7.
    """

    def __init__(self, x: Tensor, networks: int, dropout: float) -> None:
        self.utterances = len(x)
        self.dropout = dropout
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.x = x.to(dtype)  # (R, T', D), with R = S·B and S = 1 here
        self.streams = [0] * networks  # the stream of each network, from 0, not falling
        self.pending: Pending | None = None
        self.branch_dtype = x.dtype  # the front-end's last layer has the dtype of all branches

    def normalise(self, norm: nn.LayerNorm, networks: int) -> Tensor:
        """Add what is pending; return LayerNorm of the rows of the first `networks` networks."""
        last_stream = self.streams[networks - 1]
        rows = (last_stream + 1) * self.utterances
        return self.add_and_normalise(norm, rows, self.branch_dtype)

    def end_block(self, norm: nn.LayerNorm) -> None:
        """Add what is pending, and replace all rows by their LayerNorm, which ends a block."""
        self.x = self.add_and_normalise(norm, len(self.x), self.x.dtype)

    def add_and_normalise(self, norm: nn.LayerNorm, rows: int, dtype: torch.dtype) -> Tensor:
        """Add what is pending to `x`; return LayerNorm of the first `rows` rows, in `dtype`."""
        if self.pending is None:
            return norm(self.x[:rows]).to(dtype)
        into = (norm.weight, norm.bias, rows, dtype, norm.eps)
        self.x, normed = gated_residual_layer_norm(self.x, *self.pending, *into)
        self.pending = None
        return normed

    def leave_pending(
        self, branch: Tensor, by_network: Gates, scale: float, seed: Tensor | None
    ) -> None:
        """Leave a layer's output pending, and part the streams of networks whose gates differ.

        `branch`: (R', T', D), the layer's output for the streams of the networks that keep it.
        `by_network`: the gates of all M networks in this layer.
        """
        before = self.streams
        self.streams = part(before, by_network)
        # Of each stream from here on: its first network, the stream it comes from, its gate.
        firsts = [self.streams.index(stream) for stream in range(self.streams[-1] + 1)]
        sources = [before[network] for network in firsts]
        gates = [by_network[network] for network in firsts]
        kept = [gate for gate in gates if gate is not False]
        if self.streams != before:
            self.x = self.repeated(self.x, sources)
            branch = self.repeated(branch, sources[: len(kept)])
        self.pending = Pending(branch, self.by_row(kept), scale, self.dropout, seed)

    @staticmethod
    def repeated(x: Tensor, sources: Sequence[int]) -> Tensor:
        """Return `x` with its streams in the order of `sources`, where one may occur twice."""
        parts = x.chunk(sources[-1] + 1)  # (B, T', D) each
        return torch.cat([parts[source] for source in sources])

    def by_row(self, by_stream: Gates) -> Tensor | None:
        """Return the gates of several streams as those of their rows, (R',); None if all are 1."""
        if all(isinstance(gate, bool) for gate in by_stream):
            return None
        ones = self.x.new_ones(self.utterances)  # on the device: nothing is copied to it
        return torch.cat([gate * ones for gate in by_stream])

    def outputs(self) -> Tensor:
        """Return the activations of each network, (M, B, T', D)."""
        return self.repeated(self.x, self.streams).unflatten(0, (-1, self.utterances))


def count_keeping(by_network: Gates, layer: int) -> int:
    """Return how many networks keep a layer; with nested masks they are the first ones.

    Raises ValueError where the networks are not nested.
    """
    keeping = sum(gate is not False for gate in by_network)
    if any(gate is False for gate in by_network[:keeping]):
        raise ValueError(f"layer {layer}: a network keeps it that a larger network prunes")
    return keeping


def part(streams: Sequence[int], by_network: Gates) -> list[int]:
    """Return the stream of each network after a layer with these gates.

    Two networks stay one stream where they were one and both have the gate True, or both False. The
    values of a tensor lie on the device, so a tensor counts as different from any gate, even from
    an equal tensor.
    """
    stream = 0
    parted = [stream]
    pairs = pairwise(zip(streams, by_network, strict=True))
    for (larger, larger_gate), (smaller, smaller_gate) in pairs:
        known = isinstance(larger_gate, bool) and isinstance(smaller_gate, bool)
        together = known and larger == smaller and larger_gate == smaller_gate
        if not together:
            stream += 1
        parted.append(stream)
    return parted
