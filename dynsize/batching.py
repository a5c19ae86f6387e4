"""Which utterances form which batch, and the loader that reads them."""

import io
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from dynsize import cache, features
from dynsize.config import Config, fields
from dynsize.conformer import FRONT_ENDS
from dynsize.corpora import CorruptAudio, Utterance, read_audio
from dynsize.features import feature_frames, log_mel
from dynsize.tokenizer import Tokenizer

LENGTH_JITTER = 0.1  # share by which a length is off when utterances are sorted, so that no two epochs batch alike


@dataclass(frozen=True)
class Example:
    """An utterance, its labels and its features (T, F) float32, or why it could not be read."""

    utterance: Utterance
    labels: list[int]
    features: Tensor | None
    corrupt: str = ""


@dataclass(frozen=True)
class Batch:
    """B utterances, padded with zeros, and the unreadable ones that should have been among them: id → why."""

    utterances: list[Utterance]
    features: Tensor  # (B, T, F) float32
    lengths: Tensor  # (B,) feature frames, int64, as all below
    labels: Tensor  # (B, U)
    label_lengths: Tensor  # (B,)
    corrupt: dict[str, str]

    @property
    def padding(self) -> float:
        """Share of the frames that is padding."""
        return 1 - self.lengths.sum().item() / self.features[..., 0].numel() if self.utterances else 0.0

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, lengths, labels, label lengths on a device."""
        tensors = (self.features, self.lengths, self.labels, self.label_lengths)
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def labels_of(utterance: Utterance, tokenizer: Tokenizer) -> list[int]:
    """The labels of an utterance's text. Raises ValueError, with the file, for characters without a label."""
    try:
        return tokenizer.encode(utterance.text)
    except ValueError as error:
        raise ValueError(f"{utterance.path}: {error}") from error


def features_of(utterance: Utterance, config: Config, speed: float) -> Tensor:
    """(T, F) float32, from the directory `config.cache_features` where they are kept. Raises CorruptAudio."""
    if not config.cache_features:
        return log_mel(read_audio(utterance, config.sample_rate, speed), config)
    try:
        status = os.stat(utterance.path)
    except OSError as error:
        raise CorruptAudio(f"{utterance.path}: {error.strerror}") from error
    settings = [getattr(config, field.name) for field in fields() if field.metadata["section"] == "features"]
    stamp = (utterance.path, utterance.span, utterance.channel, status.st_size, status.st_mtime_ns)
    name = sha256(repr((features.VERSION, settings, stamp, speed)).encode(errors="surrogateescape")).hexdigest()
    path = Path(config.cache_features, name[:2], name[2:])
    if data := cache.read(path):
        return torch.from_numpy(np.load(io.BytesIO(data)))
    data = io.BytesIO()
    computed = log_mel(read_audio(utterance, config.sample_rate, speed), config)
    np.save(data, computed.numpy())
    cache.write(path, data.getvalue())
    return computed


class Examples(Dataset):
    """Utterances, read when asked for; `keep` holds what was read in memory. In an epoch of training, speech has one of
    the configured speeds; where `epoch` is None, its own."""

    epoch: int | None = None

    def __init__(self, utterances: Sequence[Utterance], tokenizer: Tokenizer, config: Config, keep: bool) -> None:
        self.utterances, self.tokenizer, self.config, self.keep = utterances, tokenizer, config, keep
        self.kept: dict[tuple[int, float], Example] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def speed(self, index: int) -> float:
        """How fast an utterance is spoken: a pure function of (seed, epoch, id)."""
        if self.epoch is None or len(self.config.speeds) == 1:
            return 1.0 if self.epoch is None else self.config.speeds[0]
        draw = random.Random(f"speed {self.config.seed} {self.epoch} {self.utterances[index].id}")
        return draw.choice(self.config.speeds)

    def frames(self) -> list[int]:
        """Feature frames of each utterance."""
        samples = (round(utterance.samples / self.speed(i)) for i, utterance in enumerate(self.utterances))
        return [feature_frames(length, self.config) for length in samples]

    def __getitem__(self, index: int) -> Example:
        speed = self.speed(index)
        if (index, speed) in self.kept:
            return self.kept[index, speed]
        utterance = self.utterances[index]
        labels = labels_of(utterance, self.tokenizer)
        try:
            example = Example(utterance, labels, features_of(utterance, self.config, speed))
        except CorruptAudio as error:
            example = Example(utterance, labels, None, str(error))
        if self.keep:
            self.kept[index, speed] = example
        return example


def collate(examples: Sequence[Example]) -> Batch:
    """Pads the examples that could be read to one batch, of zero utterances where none could."""
    corrupt = {example.utterance.id: example.corrupt for example in examples if example.corrupt}
    good = [example for example in examples if not example.corrupt]
    features = pad_sequence([e.features for e in good], batch_first=True) if good else torch.zeros(0, 1, 1)
    labels = pad_sequence([torch.tensor(e.labels) for e in good], batch_first=True) if good else torch.zeros(0, 0)
    lengths = torch.tensor([len(e.features) for e in good], dtype=torch.long)
    label_lengths = torch.tensor([len(e.labels) for e in good], dtype=torch.long)
    return Batch([e.utterance for e in good], features, lengths, labels.long(), label_lengths, corrupt)


def load(examples: Examples, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Reads batch by batch, with the configuration's number of worker processes."""
    workers = examples.config.workers
    return iter(DataLoader(examples, batch_sampler=batches, collate_fn=collate, num_workers=workers))


def batch_plan(frames: Sequence[int], most_frames: float, most_utterances: int) -> list[list[int]]:
    """Indices of utterances in batches of like lengths, longest first: at most `most_frames` frames with the padding,
    a single longer utterance excepted, and at most `most_utterances`."""
    plan: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(frames)), key=lambda i: -frames[i]):
        batch = plan[-1] if plan else []
        longest = max(longest, frames[index])
        if batch and len(batch) < most_utterances and (len(batch) + 1) * longest <= most_frames:
            batch.append(index)
        else:
            plan.append([index])
            longest = frames[index]
    return plan


def epoch_plan(frames: Sequence[int], config: Config, epoch: int) -> list[list[int]]:
    """The batches of one epoch of training: a pure function of the frames and of (seed, epoch)."""
    draw = random.Random(f"batches {config.seed} {epoch}")
    jittered = [length * (1 + LENGTH_JITTER * draw.random()) for length in frames]
    most = config.batch_seconds * 1000 / config.hop_ms
    plan = batch_plan(jittered, most, config.batch_utterances)
    draw.shuffle(plan)
    return plan


def usable(
    utterances: Sequence[Utterance], tokenizer: Tokenizer, config: Config
) -> tuple[list[Utterance], dict[str, str]]:
    """The utterances whose labels CTC can align at the fastest speed, and the others: id → why. A label needs an
    encoder frame, and so does the blank between two equal ones. Raises ValueError for characters without a label."""
    output_frames = FRONT_ENDS[config.front_end].output_frames
    good, left_out = [], {}
    for utterance in utterances:
        labels = labels_of(utterance, tokenizer)
        repeats = sum(a == b for a, b in pairwise(labels))
        frames = output_frames(feature_frames(round(utterance.samples / max(config.speeds)), config))
        if 1 <= frames >= len(labels) + repeats:
            good.append(utterance)
        else:
            left_out[utterance.id] = (
                f"{utterance.path}: {frames} encoder frames can't hold {len(labels)} labels and {repeats} repeats"
            )
    return good, left_out
