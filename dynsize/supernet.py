"""The supernet: encoder, layer scores, and an output for each size.

An output turns an encoder's frames into text. It is a module for one size, made by
`kind(config, labels, like)`, where `like` is another size's output, whose modules it may share:

    forward(x)                     what it makes of each frame, its *emissions*: of CTC (…, T', V)
                                   log-probabilities. `x`: (…, T', D)
    losses(outputs, emissions, lengths, labels, label_lengths)
                                   the losses (M, B) of M networks. `emissions`: (M, B, T', ·)
    decode(emissions, lengths)     the labels of each utterance, each with its frame
    decode_parts(parts)            the same for one long utterance, in parts (T', ·)
    least_frames(labels)           the frames that a text of these labels needs
    macs(frames, labels)           multiply-accumulates of decoding

Its name stands in `OUTPUTS` and among the choices of `output` in config.py. The encoder and the
algorithms know nothing of outputs.

A subnet that was cut out of a supernet is a `Supernet` with fewer layers and one output.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor, nn

from dynsize.algorithms import ALGORITHMS
from dynsize.attention_decoder import AttentionDecoder
from dynsize.config import Config
from dynsize.conformer import Encoder, Gates
from dynsize.ctc import Ctc
from dynsize.transducer import Transducer

OUTPUTS = {"ctc": Ctc, "transducer": Transducer, "attention": AttentionDecoder}
Output = Ctc | Transducer | AttentionDecoder


class Supernet(nn.Module):
    """Networks of several sizes that share one encoder; each has its output.

    `labels`: V, the number of labels; label 0 is the blank. `ranking`: the layers, most
    important first; by default in their order. The ranking decides every mask, so it is part of
    `state_dict`, under `_extra_state`. `size`: None for a supernet. Otherwise this is the subnet of
    that size: it has the first `size` layers of the ranking and one output.
    """

    def __init__(
        self,
        config: Config,
        labels: int,
        ranking: Sequence[int] | None = None,
        size: int | None = None,
    ):
        super().__init__()
        if ranking is None:
            ranking = range(config.layers)
        self.config = config
        self.labels = labels
        self.size = size
        self.sizes = config.sizes if size is None else (size,)
        self.ranking = list(ranking)
        layers = self.ranking[: self.sizes[-1]]
        self.encoder = Encoder(config, layers)
        names = [str(size) for size in self.sizes]
        if config.shared_output_layer:
            names = ["shared"]
        self.output_layers = nn.ModuleDict()
        output = None
        for name in names:
            output = OUTPUTS[config.output](config, labels, output)
            self.output_layers[name] = output
        self.scores = None
        if size is None and config.method in ALGORITHMS:
            self.scores = nn.Parameter(self.algorithm.initial_scores(config))

    @property
    def algorithm(self) -> ModuleType:
        """The algorithm that learns the ranking in step 1, see `algorithms.py`."""
        return ALGORITHMS[self.config.method]

    def get_extra_state(self) -> list[int]:
        """Return the ranking, which is part of `state_dict`."""
        return list(self.ranking)

    def set_extra_state(self, state: list[int]) -> None:
        """Take the ranking of a `state_dict`.

        Raises ValueError where it does not rank these layers, or where this is a subnet that has
        other layers.
        """
        layers = range(self.config.layers)
        if not isinstance(state, list) or sorted(state) != list(layers):
            raise ValueError(f"not a ranking of {len(layers)} layers: {state}")
        kept = state[: self.size]  # all in a supernet
        if set(kept) != set(self.ranking[: self.size]):
            raise ValueError(f"weights of a subnet with the layers {kept}")
        self.ranking = list(state)

    def ranked_scores(self) -> list[float | None]:
        """Return the score of each layer in the order of the ranking; None where none is learned.

        Where the scores are a matrix, the n-th layer of the ranking has its score from row n.
        """
        layers = len(self.ranking)
        if self.scores is None:
            return [None] * layers
        rows = self.scores.detach().expand(layers, -1)  # (L, L)
        return rows[torch.arange(layers), self.ranking].tolist()

    def mask(self, size: int) -> list[bool]:
        """Return the binary mask of a size: True for the first `size` layers of the ranking."""
        kept = set(self.ranking[:size])
        return [layer in kept for layer in range(len(self.ranking))]

    def output(self, size: int) -> Output:
        """Return the output for a network of `size` layers.

        A size that was not trained uses the output of the largest trained size below it; where none
        is below, that of the smallest trained size. The same holds for the subnet of step 1.

        Example: of trained sizes 16, 32, 48, size 40 uses the output of 32.
        """
        if self.config.shared_output_layer:
            return self.output_layers["shared"]
        at_most = [trained for trained in self.sizes if trained <= size]  # ascending
        nearest = at_most[-1] if at_most else self.sizes[0]
        return self.output_layers[str(nearest)]

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        sizes: Sequence[int],
        gates: Sequence[Gates] | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the emissions of the networks of all `sizes`, largest first.

        `features`: (B, T, F) float32. `lengths`: (B,) frames inside each utterance. `gates`: the L
        gates of each network; by default the masks of the sizes. `seeds`: (B,) int64 of the
        dropout; without them nothing is dropped.

        Returns (M, B, T', ·) float32, of CTC log-probabilities of V labels, and (B,) the encoder
        frames inside each utterance.
        """
        if gates is None:
            gates = [self.mask(size) for size in sizes]
        with precision(self.config, features.device):
            x, lengths = self.encoder(features, lengths, gates, seeds)  # (M, B, T', D)
            pairs = zip(sizes, x, strict=True)
            emissions = torch.stack([self.output(size)(of_size) for size, of_size in pairs])
        return emissions, lengths

    def losses(
        self,
        emissions: Tensor,
        lengths: Tensor,
        sizes: Sequence[int],
        labels: Tensor,
        label_lengths: Tensor,
    ) -> Tensor:
        """Return the loss of each utterance by the networks of all `sizes`, (M, B) float32.

        `emissions`, `lengths`: what `forward` returned for these sizes. `labels`: (B, U), padded.
        `label_lengths`: (B,).
        """
        outputs = [self.output(size) for size in sizes]
        with precision(self.config, emissions.device):
            return outputs[0].losses(outputs, emissions, lengths, labels, label_lengths)


def precision(config: Config, device: torch.device) -> AbstractContextManager:
    """Return a context in which layers compute in the configured precision.

    `auto` is bfloat16 where the hardware computes it, else float32.
    """
    bfloat16 = config.precision == "bfloat16"
    if config.precision == "auto":
        bfloat16 = has_bfloat16(device)
    if bfloat16:
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16 itself, without emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
