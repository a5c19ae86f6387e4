"""The supernet: encoder, layer scores and one CTC output layer for each size. A cut subnet is one with fewer layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynsize.algorithms import ALGORITHMS
from dynsize.config import LAYERS, Config
from dynsize.conformer import Encoder, Gates


class Supernet(nn.Module):
    """Networks of several sizes that share all weights.

    `labels`: V, the CTC labels with the blank, which is label 0. `ranking`: the layers, most important first, from
    which `mask` follows. With `size` it is a standalone subnet: the first `size` layers of the ranking and their
    output layer are all that it has.
    """

    def __init__(
        self,
        config: Config,
        labels: int,
        ranking: Sequence[int] | None = None,
        size: int | None = None,
    ):
        super().__init__()
        self.config, self.size = config, size
        self.ranking = list(range(config.layers)) if ranking is None else list(ranking)
        self.sizes = config.sizes if size is None else (size,)
        self.encoder = Encoder(config, self.ranking[: self.sizes[-1]])
        shared = config.shared_head
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(config.width, labels)
                for name in (["shared"] if shared else map(str, self.sizes))
            }
        )
        learns = size is None and config.method in ALGORITHMS
        scores = ALGORITHMS[config.method].initial_scores(config) if learns else None
        self.scores = None if scores is None else nn.Parameter(scores)

    def get_extra_state(self) -> list[int]:
        """Return the ranking, which is part of `state_dict`."""
        return list(self.ranking)

    def set_extra_state(self, state: list[int]) -> None:
        """Take the ranking of a `state_dict`.

        Raises ValueError where it does not rank the layers, or where this is a cut subnet that
        has other layers.
        """
        if not isinstance(state, list) or sorted(state) != list(range(self.config.layers)):
            raise ValueError(f"not a ranking of {self.config.layers} layers: {state}")
        if self.size is not None and set(state[: self.size]) != set(self.ranking[: self.size]):
            raise ValueError(f"the weights of a subnet with other layers: {state[: self.size]}")
        self.ranking = list(state)

    def ranked_scores(self) -> list[float | None]:
        """Return the score of each layer in the order of the ranking; None where none is learned.

        Where the scores are a matrix, the n-th layer's is the one in row n.
        """
        if self.scores is None:
            return [None] * len(self.ranking)
        rows = self.scores.detach().expand(len(self.ranking), -1).tolist()
        return [row[layer] for row, layer in zip(rows, self.ranking, strict=True)]

    def mask(self, size: int) -> list[bool]:
        """The binary mask of the subnet of `size` layers: the first ones of the ranking."""
        kept = set(self.ranking[:size])
        return [layer in kept for layer in range(self.config.layers)]

    def head(self, size: int) -> nn.Module:
        """The output layer for a network of `size` layers: that of the largest trained size not above it."""
        trained = max((s for s in self.sizes if s <= size), default=self.sizes[0])
        return self.heads["shared" if self.config.shared_head else str(trained)]

    def idle(self, sizes: Sequence[int], learning: bool) -> list[nn.Parameter]:
        """The weights that networks of these sizes do not use: the other sizes' output layers and, except in step 1,
        the scores."""
        used = {id(self.head(size)) for size in sizes}
        weights = [
            weight
            for head in self.heads.values()
            if id(head) not in used
            for weight in head.parameters()
        ]
        return weights + ([self.scores] if self.scores is not None and not learning else [])

    def forward(
        self, features: Tensor, lengths: Tensor, sizes: Sequence[int], gates: Sequence[Gates] | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probabilities of the networks of all `sizes`, largest first.

        `features`: (B, T, F) float32. `lengths`: (B,). `gates`: those of each network; by default its mask.
        `seeds`: (B,) int64, of the dropout; without them nothing is dropped.
        Returns (M, B, T', V) float32, normalised outside of autocast, and the (B,) frames inside each utterance.
        """
        gates = [self.mask(size) for size in sizes] if gates is None else gates
        with precision(self.config, features.device):
            x, lengths = self.encoder(features, lengths, gates, seeds)
            logits = torch.stack(
                [self.head(size)(stream) for size, stream in zip(sizes, x, strict=True)]
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1), lengths


def precision(config: Config, device: torch.device) -> torch.autocast:
    """A context with the configured precision for what runs inside: bfloat16 autocast or float32."""
    capabilities = torch.cpu.get_capabilities()
    fast = device.type == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and fast)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(bfloat16))


def layer_name(layer: int) -> str:
    """The name that people read: layer 0 is `1.ff1`, the first layer of the first block."""
    return f"{layer // 4 + 1}.{LAYERS[layer % 4]}"


LAYER_MAP = "a letter for each layer, blocks from the input on: ff1, conv, mhsa, ff2; a dot: pruned"


def layer_map(mask: Sequence[bool]) -> str:
    """Return a mask for people, as `LAYER_MAP` says: `fcmf f.m.` for two blocks, the second cut."""
    letters = [LAYERS[layer % 4][0] if kept else "." for layer, kept in enumerate(mask)]
    return " ".join("".join(letters[i : i + 4]) for i in range(0, len(letters), 4))
