"""From a waveform to normalised log-mel features, and SpecAugment over them. All in float32."""

import math
import random
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dynsize.config import Config

# Cached features have this number. Whoever changes `log_mel` raises it, so they are made again, and
# changes `export.Features` too.
VERSION = 1
QUIETEST = 1e-10  # added to the mel energies before the logarithm: digital silence stays finite


def feature_frames(samples: int, config: Config) -> int:
    """Return the number of feature frames of `samples` samples, at least one."""
    window, hop = window_and_hop(config)
    return 1 + max(0, samples - window) // hop


def window_and_hop(config: Config) -> tuple[int, int]:
    """Return the lengths of the analysis window and of the hop, in samples."""
    samples_per_ms = config.sample_rate / 1000
    window = round(config.window_ms * samples_per_ms)
    hop = round(config.hop_ms * samples_per_ms)
    return window, hop


def spectrum_points(config: Config) -> int:
    """Return N, the points of the discrete Fourier transform: the least power of 2 for a window."""
    window, _ = window_and_hop(config)
    return 2 ** math.ceil(math.log2(window))


@lru_cache(maxsize=4)
def mel_filters(config: Config) -> Tensor:
    """Return triangles of equal width on the mel scale, (N // 2 + 1, F) float32.

    The mel scale is 2595 log10(1 + f / 700), f in Hz.
    """

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    lowest = mel(config.lowest_hz)
    highest = mel(config.highest_hz)
    corners = torch.linspace(lowest, highest, config.mel_bins + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)  # in Hz
    left, peak, right = corners.unfold(0, 3, 1).T  # (F,) each
    frequencies = spectrum_points(config) // 2 + 1
    hz = torch.linspace(0, config.sample_rate / 2, frequencies, dtype=torch.float64)
    hz = hz[:, None]  # (N // 2 + 1, 1)
    rising = (hz - left) / (peak - left)
    falling = (right - hz) / (right - peak)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles.float()


def log_mel(waveform: Tensor, config: Config) -> Tensor:
    """Return log-mel features, (T, F) float32, with mean 0 and variance 1 in each bin.

    `waveform`: (samples,) float32, one channel at the configuration's sample rate; if it is shorter
    than one window, zeros are added. T is `feature_frames(samples, config)`.
    """
    window, hop = window_and_hop(config)
    missing = max(0, window - len(waveform))
    waveform = F.pad(waveform, (0, missing))
    frames = waveform.unfold(0, window, hop)  # (T, window)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames * torch.hann_window(window)
    waves = torch.fft.rfft(frames, n=spectrum_points(config))  # (T, N // 2 + 1), complex
    waves = torch.view_as_real(waves)  # (T, N // 2 + 1, 2)
    power = waves.square().sum(-1)  # (T, N // 2 + 1)
    energies = power @ mel_filters(config)  # (T, F)
    features = (energies + QUIETEST).log()
    mean = features.mean(0)  # (F,)
    variance = features.var(0, correction=0)
    deviation = variance.add(1e-5).sqrt()
    return (features - mean) / deviation


def spec_augment(features: Tensor, config: Config, draw: random.Random) -> Tensor:
    """Return a copy of (T, F) features with random bands of frequency and time set to 0, the mean.

    SpecAugment (Park et al. 2019) without time warping. T bounds the number of time masks.
    """
    features = features.clone()
    zero_bands(features, 1, config.frequency_masks, config.frequency_mask_bins, draw)
    time_masks = 0
    if config.time_mask_every > 0:
        time_masks = max(2, len(features) // config.time_mask_every)
    zero_bands(features, 0, time_masks, config.time_mask_frames, draw)
    return features


def zero_bands(features: Tensor, axis: int, most: int, widest: int, draw: random.Random) -> None:
    """Set two to `most` bands of `features`, each at most `widest` wide along `axis`, to 0."""
    size = features.shape[axis]
    number = draw.randint(min(2, most), most)
    for _ in range(number):
        width = draw.randint(0, min(widest, size))
        start = draw.randint(0, size - width)
        features.narrow(axis, start, width).zero_()
