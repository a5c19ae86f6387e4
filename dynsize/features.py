"""From a waveform to normalised log-mel features, and SpecAugment over them. All in float32."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dynsize.config import Config

VERSION = 1  # of the features: a new number where `log_mel` gives others, so that none is kept from before
QUIETEST = 1e-10  # added to the mel energies before the logarithm: digital silence stays finite


def feature_frames(samples: int, config: Config) -> int:
    """Number of feature frames of a waveform of `samples` samples; one at least."""
    window, hop = window_and_hop(config)
    return 1 + max(0, samples - window) // hop


def window_and_hop(config: Config) -> tuple[int, int]:
    """Analysis window and hop in samples."""
    return round(config.window_ms * config.sample_rate / 1000), round(config.hop_ms * config.sample_rate / 1000)


@lru_cache(maxsize=4)
def mel_filters(bins: int, spectrum: int, sample_rate: int, lowest_hz: float, highest_hz: float) -> Tensor:
    """Triangles of equal width on the mel scale, 2595 log10(1 + f / 700): (spectrum // 2 + 1, bins) float32."""

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    corners = torch.linspace(mel(lowest_hz), mel(highest_hz), bins + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)  # in Hz
    hz = torch.linspace(0, sample_rate / 2, spectrum // 2 + 1, dtype=torch.float64)[:, None]
    rising = (hz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - hz) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(waveform: Tensor, config: Config) -> Tensor:
    """Log-mel features with mean 0 and variance 1 in each bin.

    `waveform`: (samples,) float32, one channel at the configuration's sample rate; a waveform shorter than one window
    is filled up with zeros. Returns (T, F) float32 with T = `feature_frames(samples, config)`.
    """
    window, hop = window_and_hop(config)
    waveform = F.pad(waveform, (0, max(0, window - len(waveform))))
    frames = waveform.unfold(0, window, hop)  # (T, window)
    frames = (frames - frames.mean(1, keepdim=True)) * torch.hann_window(window)
    spectrum = 2 ** math.ceil(math.log2(window))
    power = torch.fft.rfft(frames, n=spectrum).abs().square()  # (T, spectrum // 2 + 1)
    filters = mel_filters(config.mel_bins, spectrum, config.sample_rate, config.lowest_hz, config.highest_hz)
    features = (power @ filters + QUIETEST).log()
    return (features - features.mean(0)) / features.var(0, correction=0).add(1e-5).sqrt()


def spec_augment(features: Tensor, lengths: Tensor, config: Config) -> Tensor:
    """Sets random bands of frequency and time to 0, the mean (SpecAugment, Park et al. 2019, without time warping).

    `features`: (B, T, F); `lengths`: (B,) frames of each row, which bound its time masks. Draws from torch's
    generator of the device. Returns a new tensor.
    """
    rows, frames, bins = features.shape
    device = features.device

    def masks(size: int, within: Tensor, count: Tensor, widest: int) -> Tensor:
        """(B, size) True where one of a row's `count` masks of 0 to `widest` lies, all inside [0, within)."""
        most = int(count.max())
        draw = torch.rand(2, rows, most, device=device)
        width = (draw[0] * (widest + 1)).floor().minimum(within[:, None])
        start = (draw[1] * (within[:, None] - width + 1)).floor()
        place = torch.arange(size, device=device)
        hidden = (place >= start[..., None]) & (place < (start + width)[..., None])  # (B, most, size)
        wanted = torch.arange(most, device=device) < count[:, None]
        return (hidden & wanted[..., None]).any(1)

    def counts(most: Tensor) -> Tensor:
        """As many masks for each row as a draw from 2 to `most` says; `most` where that is below 2."""
        least = most.clamp(max=2)
        return (least + torch.rand(rows, device=device) * (most - least + 1)).floor()

    all_bins = torch.full((rows,), bins, device=device)
    hidden = masks(
        bins, all_bins, counts(all_bins.new_full((rows,), config.frequency_masks)), config.frequency_mask_bins
    )
    features = features.masked_fill(hidden[:, None, :], 0.0)
    if config.time_mask_every:
        hidden = masks(
            frames, lengths, counts((lengths // config.time_mask_every).clamp(min=2)), config.time_mask_frames
        )
        features = features.masked_fill(hidden[:, :, None], 0.0)
    return features
