"""From a waveform to normalised log-mel features, and SpecAugment over them. All in float32."""

import math
import random
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dynsize.config import Config

# Of the features: a new number where `log_mel` changes, so that no cached ones are used.
VERSION = 1
QUIETEST = 1e-10  # added to the mel energies before the logarithm: digital silence stays finite


def feature_frames(samples: int, config: Config) -> int:
    """Return the number of feature frames of `samples` samples, at least one."""
    window, hop = window_and_hop(config)
    return 1 + max(0, samples - window) // hop


def window_and_hop(config: Config) -> tuple[int, int]:
    """Return the lengths of the analysis window and of the hop, in samples."""
    samples_per_ms = config.sample_rate / 1000
    return round(config.window_ms * samples_per_ms), round(config.hop_ms * samples_per_ms)


@lru_cache(maxsize=4)
def mel_filters(
    bins: int, spectrum: int, sample_rate: int, lowest_hz: float, highest_hz: float
) -> Tensor:
    """Return triangles of equal width on the mel scale, (spectrum // 2 + 1, bins) float32.

    The mel scale is 2595 log10(1 + f / 700), f in Hz.
    """

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    corners = torch.linspace(mel(lowest_hz), mel(highest_hz), bins + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)  # in Hz
    hz = torch.linspace(0, sample_rate / 2, spectrum // 2 + 1, dtype=torch.float64)[:, None]
    rising = (hz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - hz) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(waveform: Tensor, config: Config) -> Tensor:
    """Return log-mel features, (T, F) float32, with mean 0 and variance 1 in each bin.

    `waveform`: (samples,) float32, one channel at the configuration's sample rate; if it is shorter
    than one window, zeros are added. T is `feature_frames(samples, config)`.
    """
    window, hop = window_and_hop(config)
    waveform = F.pad(waveform, (0, max(0, window - len(waveform))))
    frames = waveform.unfold(0, window, hop)  # (T, window)
    frames = (frames - frames.mean(1, keepdim=True)) * torch.hann_window(window)
    spectrum = 2 ** math.ceil(math.log2(window))
    waves = torch.view_as_real(torch.fft.rfft(frames, n=spectrum))  # (T, spectrum // 2 + 1, 2)
    power = waves.square().sum(-1)  # (T, spectrum // 2 + 1)
    range_hz = (config.lowest_hz, config.highest_hz)
    filters = mel_filters(config.mel_bins, spectrum, config.sample_rate, *range_hz)
    features = (power @ filters + QUIETEST).log()
    return (features - features.mean(0)) / features.var(0, correction=0).add(1e-5).sqrt()


def spec_augment(features: Tensor, config: Config, draw: random.Random) -> Tensor:
    """Return a copy of (T, F) features with random bands of frequency and time set to 0, the mean.

    SpecAugment (Park et al. 2019) without time warping. T bounds the number of time masks.
    """
    features = features.clone()
    time_masks = max(2, len(features) // config.time_mask_every) if config.time_mask_every else 0
    over_bins = (1, config.frequency_masks, config.frequency_mask_bins)
    over_time = (0, time_masks, config.time_mask_frames)
    for axis, most, widest in (over_bins, over_time):
        for _ in range(draw.randint(min(2, most), most)):
            width = draw.randint(0, min(widest, features.shape[axis]))
            start = draw.randint(0, features.shape[axis] - width)
            features.narrow(axis, start, width).zero_()
    return features
