"""Distillation: one size trained alone learns the frame posteriors of a larger network too.

Beside the CTC loss it has the divergence KL(teacher ‖ network) of the labels' probabilities in
each frame (Hinton et al. 2015, arXiv 1503.02531, at temperature 1).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dynsize import checkpoint
from dynsize.checkpoint import Checkpoint
from dynsize.config import Config
from dynsize.conformer import padding_mask
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer

# Settings that decide what a network gets as its input and which times its frames have.
SAME = ("sample_rate", "mel_bins", "lowest_hz", "highest_hz", "window_ms", "hop_ms", "front_end")


def load_teacher(config: Config, tokenizer: Tokenizer) -> Checkpoint:
    """Return the checkpoint that `config.teacher` names.

    Raises ValueError where its labels or its features are not those of this training.
    """
    loaded = checkpoint.load(Path(config.teacher))
    if not torch.equal(loaded.tokenizer.model, tokenizer.model):
        raise ValueError(
            f"--teacher {loaded.path}: its labels are not those of this training; "
            "train both on the same corpus with the same --vocabulary"
        )
    for name in SAME:
        here, there = getattr(config, name), getattr(loaded.model.config, name)
        if here != there:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--teacher {loaded.path}: was trained with {flag} {there}, not {here}"
            )
    return loaded


def distillation_loss(
    teacher: Supernet, features: Tensor, lengths: Tensor, log_probs: Tensor
) -> Tensor:
    """Return KL(teacher ‖ network), summed over all frames of the utterances, in nats.

    `features`: (B, T, F). `lengths`: (B,) feature frames. `log_probs`: (B, T', V), the network's.
    The teacher is the largest network of its checkpoint; it learns nothing.
    """
    with torch.no_grad():
        (target,), frames = teacher(features, lengths, [teacher.sizes[-1]])  # (B, T', V)
    divergence = F.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1)  # (B, T')
    inside = padding_mask(frames, divergence.shape[1])
    return (divergence * inside).sum()
