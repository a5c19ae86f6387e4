"""The Conformer encoder, with one forward for networks of many sizes. It knows gates, and no algorithm.

Every network of a forward is given by its gates, one for each of the L layers, numbered from the input:

    False    the layer is pruned: it is not computed
    True     the layer is kept
    Tensor   kept, and its output multiplied by this weight: () for all utterances or (B,) for each

A padding mask, `inside`, is True inside the utterance.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dynsize.config import LAYERS, Config
from dynsize.kernels import gated_residual

Gates = Sequence[bool | Tensor]
UTTERANCES_AT_ONCE = 4  # in attention on a CPU: the weights of many, (R, H, T, T), leave its cache between two operations


class FeedForward(nn.Module):
    """D → 4D, SiLU, → D."""

    scale = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.project = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """`x`: (R, T, D). `inside`: (R, T), not needed here. Returns (R, T, D)."""
        return self.project(F.silu(self.expand(self.norm(x))))


class Convolution(nn.Module):
    """Pointwise D → 2D, GLU, depthwise over time, LayerNorm, SiLU, pointwise D → D."""

    scale = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, 2 * config.width)
        self.depthwise = nn.Conv1d(
            config.width,
            config.width,
            config.kernel,
            padding=config.kernel // 2,
            groups=config.width,
        )
        self.depthwise_norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """`x`: (R, T, D). `inside`: (R, T). Returns (R, T, D)."""
        x = F.glu(self.expand(self.norm(x))) * inside[..., None]
        return self.project(F.silu(self.depthwise_norm(self.over_time(x))))

    def over_time(self, x: Tensor) -> Tensor:
        """The depthwise convolution over time. `x`: (R, T, D). Returns (R, T, D).

        On a CPU, a 2-D convolution over images of height 1 with the channels last, as they lie in
        `x`, takes a quarter of the time of `conv1d`, forward and backward. It runs in float32:
        oneDNN's bfloat16 kernel for it never returns for some shapes (torch 2.13, AVX512-BF16).
        """
        if x.device.type != "cpu":
            return self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        x = x.to(self.depthwise.weight.dtype).transpose(1, 2)[:, :, None]  # (R, D, 1, T)
        weight = self.depthwise.weight[:, :, None]  # (D, 1, 1, K)
        weight = weight.contiguous(memory_format=torch.channels_last)
        padding = (0, weight.shape[-1] // 2)
        with torch.autocast("cpu", enabled=False):
            x = F.conv2d(x, weight, self.depthwise.bias, padding=padding, groups=len(weight))
        return x[:, :, 0].transpose(1, 2)  # (R, T, D)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the frames of an utterance."""

    scale = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.rotary = config.rotary
        self.norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """`x`: (R, T, D). `inside`: (R, T). Returns (R, T, D)."""
        x = self.query_key_value(self.norm(x))
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # each (R, H, T, D / H)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        x = attention(q, k, v, inside[:, None, None])
        return self.project(x.transpose(1, 2).flatten(2))  # (R, T, D)


def attention(*operands: Tensor) -> Tensor:
    """Of queries, keys and values, (R, H, T, d) each, and the mask (R, 1, 1, T), as each kind of device likes it. On
    CPUs flash attention takes 1.5 (float32) to 3 times (bfloat16) as long as plain one, forward and backward."""
    if operands[0].device.type != "cpu":
        return F.scaled_dot_product_attention(*operands)
    parts = zip(*(tensor.split(UTTERANCES_AT_ONCE) for tensor in operands), strict=True)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (RoFormer, Su et al. 2021) of `x`, (R, H, T, d): turns (i, i + d/2) by t / 10000^(2i/d)."""
    frames, half = x.shape[-2], x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = (
        torch.arange(frames, device=x.device)[:, None] * speed
    )  # (T, d / 2), float32: bfloat16 can't count frames
    first, second = x.float().chunk(2, dim=-1)
    turned = (
        first * angle.cos() - second * angle.sin(),
        first * angle.sin() + second * angle.cos(),
    )
    return torch.cat(turned, dim=-1).to(x.dtype)


LAYER_KINDS = {"ff1": FeedForward, "conv": Convolution, "mhsa": SelfAttention, "ff2": FeedForward}


class Conv2dFrontEnd(nn.Module):
    """Two 3×3 convolutions of stride 2, each with ReLU, then a linear layer to D. T frames become ⌈⌈T/2⌉/2⌉."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        first, second = config.front_end_channels
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
            for c_in, c_out in ((1, first), (first, second))
        )
        self.project = nn.Linear(second * -(-config.mel_bins // 4), config.width)

    @staticmethod
    def output_frames(frames: Tensor | int) -> Tensor | int:
        return (frames + 3) // 4

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """`features`: (B, T, F). `lengths`: (B,) frames. Returns (B, ⌈T/4⌉, D)."""
        x = features[:, None]  # (B, 1, T, F)
        for convolution in self.convolutions:
            x = F.relu(convolution(zero_outside(x, lengths)))
            lengths = (lengths + 1) // 2
        return self.project(x.transpose(1, 2).flatten(2))


class VggFrontEnd(nn.Module):
    """The paper's: four 3×3 convolutions, ReLU and max-pooling over two frames after every second one, linear to D."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = (1, *config.front_end_channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, padding=1) for c_in, c_out in pairwise(channels)
        )
        self.project = nn.Linear(channels[-1] * config.mel_bins, config.width)

    @staticmethod
    def output_frames(frames: Tensor | int) -> Tensor | int:
        return frames // 4

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """`features`: (B, T, F). `lengths`: (B,) frames. Returns (B, T // 4, D), or one frame for fewer than 4."""
        x = F.pad(features, (0, 0, 0, max(0, 4 - features.shape[1])))[:, None]  # (B, 1, T, F)
        for number, convolution in enumerate(self.convolutions):
            x = convolution(zero_outside(x, lengths))
            if number % 2 == 1:
                x = F.max_pool2d(F.relu(x), (2, 1))
                lengths = lengths // 2
        return self.project(x.transpose(1, 2).flatten(2))


FRONT_ENDS = {"conv2d": Conv2dFrontEnd, "vgg": VggFrontEnd}


def padding_mask(lengths: Tensor, frames: int) -> Tensor:
    """(B,) lengths → (B, frames), True inside the utterance."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def zero_outside(x: Tensor, lengths: Tensor) -> Tensor:
    """`x`, (B, C, T, F), with zeros in the frames outside each utterance."""
    return x * padding_mask(lengths, x.shape[2])[:, None, :, None]


def start(module: nn.Module) -> None:
    """Weights to start with. Every layer starts as nothing, so that a deep encoder learns as soon as a shallow one:
    as PyTorch starts them, the frames of an utterance look alike behind 6 blocks, and CTC stays at its plateau of
    blanks for hundreds of updates."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, FeedForward | Convolution | SelfAttention):
        nn.init.zeros_(module.project.weight)
        nn.init.zeros_(module.project.bias)


class Encoder(nn.Module):
    """Front-end and N blocks of four layers, of which `layers` (numbers from the input) exist."""

    def __init__(self, config: Config, layers: Sequence[int]) -> None:
        super().__init__()
        self.front_end = FRONT_ENDS[config.front_end](config)
        self.blocks = nn.ModuleList()
        for block in range(config.blocks):
            kinds = [kind for i, kind in enumerate(LAYERS) if 4 * block + i in layers]
            modules = nn.ModuleDict({kind: LAYER_KINDS[kind](config) for kind in kinds})
            modules["norm"] = nn.LayerNorm(config.width)
            self.blocks.append(modules)
        self.dropout, self.recompute = config.dropout, config.checkpoint_activations
        self.apply(start)

    def forward(
        self, features: Tensor, lengths: Tensor, gates: Sequence[Gates], seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the M networks given by their gates, nested and largest first, on the same utterances at once.

        `features`: (B, T, F) float32. `lengths`: (B,) feature frames. `gates`: M times L. `seeds`: (B,) int64, of the
        dropout, the same for all networks; without them nothing is dropped.
        Returns (M, B, T', D) with T' about T / 4, and the (B,) encoder frames inside each utterance. Raises ValueError
        for networks that are not nested.
        """
        x = self.front_end(features, lengths)[
            None
        ]  # (S, B, T', D): a stack of S distinct streams, one up to now
        lengths = self.front_end.output_frames(lengths)
        inside = padding_mask(lengths, x.shape[2])
        streams = [0] * len(gates)  # which stream of the stack each network is
        for block, layers in enumerate(self.blocks):
            for i, kind in enumerate(LAYERS):
                gate = [network[4 * block + i] for network in gates]
                kept = sum(g is not False for g in gate)
                if any(g is False for g in gate[:kept]):
                    raise ValueError(
                        f"layer {kind} of block {block + 1}: a network keeps it that a larger one prunes"
                    )
                if kept:
                    own = (
                        None if seeds is None else seeds + (4 * block + i)
                    )  # SplitMix64 tells neighbours apart
                    x, streams = self.residual(layers[kind], x, inside, gate, kept, streams, own)
            x = layers["norm"](x)
        return torch.stack([x[stream] for stream in streams]), lengths

    def residual(
        self, layer: nn.Module, x: Tensor, inside: Tensor, gate: Gates, kept: int, streams: list[int],
        seeds: Tensor | None,
    ) -> tuple[Tensor, list[int]]:  # fmt: skip
        """x + scale · gate · layer(x) for the `kept` first networks, which keep the layer: a prefix of the stack. A
        stream that serves networks with different gates is computed once, then parted."""
        rows = streams[kept - 1] + 1  # of the stack, in batches
        computing, rest = x.split([rows, len(x) - rows])
        run = (
            partial(checkpoint, layer, use_reentrant=False)
            if self.recompute and torch.is_grad_enabled()
            else layer
        )
        branch = run(computing.flatten(0, 1), inside.repeat(rows, 1)).unflatten(
            0, (rows, inside.shape[0])
        )
        parted = part(streams, gate)
        if parted[-1] > streams[-1]:
            origin = [streams[parted.index(stream)] for stream in range(parted[-1] + 1)]
            rows = parted[kept - 1] + 1
            x, branch = (
                torch.stack([x[o] for o in origin]),
                torch.stack([branch[o] for o in origin[:rows]]),
            )
            computing, rest = x.split([rows, len(x) - rows])
        gates = stacked([gate[parted.index(stream)] for stream in range(rows)], x)
        dropout = 0.0 if seeds is None else self.dropout
        flat = computing.flatten(0, 1), branch.flatten(0, 1)  # (rows · B, T', D) both
        computing = gated_residual(*flat, gates, layer.scale, dropout, seeds).unflatten(
            0, (rows, inside.shape[0])
        )
        return torch.cat([computing, rest]) if len(rest) else computing, parted


def part(streams: list[int], gate: Gates) -> list[int]:
    """The streams behind a layer: two networks stay one where they were one and their gates are the same object."""
    parted = [0]
    for m in range(1, len(streams)):
        same = streams[m] == streams[m - 1] and gate[m] is gate[m - 1]
        parted.append(parted[-1] + (not same))
    return parted


def stacked(weights: Gates, x: Tensor) -> Tensor | None:
    """Gates of several streams of the stack `x` as those of its rows, (streams · B,); None where all are 1."""
    if all(weight is True for weight in weights):
        return None
    like = dict(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.cat([torch.as_tensor(weight, **like).expand(x.shape[1]) for weight in weights])
