"""What is drawn at random for an utterance, all from its seed.

An utterance has one seed in each epoch, an int64. Two things are drawn, by one convention:

    seed + l    dropout of layer l = 0, 1, …, L − 1                                  `layer_seed`
    seed − 1    the layers that the utterance skips: stochastic depth, LayerDrop     `layer_gates`

So dropout is the same for all sizes of an utterance, and all draws are the same in every batch, on
every device, and after resuming. Letters: B utterances, T frames, D model width, L layers.
"""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014): its three constants as signed numbers
WEYL = -0x61C8864680B583EB
FIRST = -0x40A7B892E31B1A47
SECOND = -0x6B2FB644ECCEEE15


def layer_seed(seed: Tensor, layer: int) -> Tensor:
    """Return the seeds, (B,), from which layer number `layer` draws its dropout: seed + layer."""
    return seed + layer


def layer_gates(seed: Tensor, layers: int, dropped: float) -> Tensor:
    """Return gates, (L, B) float32: 0 where an utterance skips a layer, and 1 elsewhere.

    Each utterance skips each layer with probability `dropped`, drawn from seed − 1, which no
    layer's dropout uses. Stochastic depth and LayerDrop are such gates. `seed`: (B,) int64.
    """
    stays = kept(seed - 1, 1, layers, dropped)  # (B, 1, L)
    return stays[:, 0].T.float()


def kept(seed: Tensor, frames: int, width: int, dropout_p: float) -> Tensor:
    """Return what dropout keeps in the frames of each seed, (B,) int64, as (B, T, D) bool.

    Each of SplitMix64's words of 64 bits gives four draws of 16 bits. The draw of column d in
    frame t is number d mod 4 of word t · ⌈D/4⌉ + d // 4. It is dropped where it is among the
    lowest 65536 · p. On a CPU this takes a seventh of the time of torch's Bernoulli draws.
    """
    words = -(-width // 4)  # of a frame
    number = torch.arange(frames * words, device=seed.device)
    z = number * WEYL + seed[:, None]
    z = (z ^ shifted(z, 30)) * FIRST
    z = (z ^ shifted(z, 27)) * SECOND
    z = z ^ shifted(z, 31)
    draws = z.view(torch.int16)
    draws = draws.view(len(seed), frames, 4 * words)
    return draws[..., :width] >= lowest_kept(dropout_p)


def shifted(z: Tensor, places: int) -> Tensor:
    """Return int64 `z` shifted to the right; zeros come in, where torch repeats the sign."""
    low_bits = (1 << (64 - places)) - 1
    return (z >> places) & low_bits


def lowest_kept(dropout_p: float) -> int:
    """Return the lowest of the 65536 draws, −32768 to 32767, that is kept."""
    dropped = min(round(65536 * dropout_p), 65535)
    return dropped - 32768
