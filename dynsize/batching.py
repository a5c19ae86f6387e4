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
from dynsize.features import feature_frames, log_mel, spec_augment
from dynsize.tokenizer import Tokenizer

LENGTH_JITTER = 0.1  # share by which a length is off when utterances are sorted, so that no two epochs batch alike


@dataclass(frozen=True)
class Example:
    """An utterance, its labels, its features (T, F) float32; where it could not be read, a frame of zeros, and why."""

    utterance: Utterance
    labels: list[int]
    features: Tensor
    seed: int  # of what the network draws for it in this epoch
    corrupt: str = ""


@dataclass(frozen=True)
class Batch:
    """B utterances, padded with zeros, and the unreadable ones that should have been among them: id → why."""

    utterances: list[Utterance]
    features: Tensor  # (B, T, F) float32
    lengths: Tensor  # (B,) feature frames, int64, as all below
    labels: Tensor  # (B, U)
    label_lengths: Tensor  # (B,)
    seeds: Tensor  # (B,)
    corrupt: dict[str, str]

    @property
    def padding(self) -> float:
        """Share of the frames that is padding."""
        return (
            1 - self.lengths.sum().item() / self.features[..., 0].numel()
            if self.utterances
            else 0.0
        )

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Features, lengths, labels, label lengths, seeds on a device."""
        tensors = (self.features, self.lengths, self.labels, self.label_lengths, self.seeds)
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
    settings = [
        getattr(config, field.name) for field in fields() if field.metadata["section"] == "features"
    ]
    stamp = (utterance.path, utterance.span, utterance.channel, status.st_size, status.st_mtime_ns)
    name = sha256(
        repr((features.VERSION, settings, stamp, speed)).encode(errors="surrogateescape")
    ).hexdigest()
    path = Path(config.cache_features, name[:2], name[2:])
    if data := cache.read(path):
        return torch.from_numpy(np.load(io.BytesIO(data)))
    data = io.BytesIO()
    computed = log_mel(read_audio(utterance, config.sample_rate, speed), config)
    np.save(data, computed.numpy())
    cache.write(path, data.getvalue())
    return computed


class Examples(Dataset):
    """Utterances, read when asked for; `keep` holds what was read in memory. In an epoch of
    training, speech has labels, one of the configured speeds and SpecAugment's masks; where `epoch`
    is None, none of these: decoding needs no labels. All that is drawn for an utterance is a
    function of (seed, epoch, id): it is the same in every batch, on every process, and after
    resuming."""

    epoch: int | None = None

    def __init__(
        self, utterances: Sequence[Utterance], tokenizer: Tokenizer, config: Config, keep: bool
    ) -> None:
        self.utterances, self.tokenizer, self.config, self.keep = (
            utterances,
            tokenizer,
            config,
            keep,
        )
        self.kept: dict[tuple[int, float], Tensor] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def speed(self, index: int) -> float:
        """How fast an utterance is spoken."""
        return 1.0 if self.epoch is None else self.draw("speed", index).choice(self.config.speeds)

    def draw(self, what: str, index: int) -> random.Random:
        return random.Random(f"{what} {self.config.seed} {self.epoch} {self.utterances[index].id}")

    def frames(self) -> list[int]:
        """Feature frames of each utterance."""
        samples = (
            round(utterance.samples / self.speed(i)) for i, utterance in enumerate(self.utterances)
        )
        return [feature_frames(length, self.config) for length in samples]

    def __getitem__(self, index: int) -> Example:
        utterance, draw = self.utterances[index], self.draw("masks", index)
        labels = [] if self.epoch is None else labels_of(utterance, self.tokenizer)
        seed = draw.getrandbits(62)
        try:
            features = self.features(index, self.speed(index))
        except CorruptAudio as error:
            return Example(
                utterance, labels, torch.zeros(1, self.config.mel_bins), seed, str(error)
            )
        if self.epoch is not None:
            features = spec_augment(features, self.config, draw)
        return Example(utterance, labels, features, seed)

    def features(self, index: int, speed: float) -> Tensor:
        """(T, F) of an utterance. Raises CorruptAudio."""
        if (index, speed) in self.kept:
            return self.kept[index, speed]
        features = features_of(self.utterances[index], self.config, speed)
        if self.keep:
            self.kept[index, speed] = features
        return features


def collate(examples: Sequence[Example]) -> Batch:
    """Pads the examples that could be read to one batch, of zero utterances where none could."""
    good = [example for example in examples if not example.corrupt]
    padded = good or examples[:1]
    features = pad_sequence([e.features for e in padded], batch_first=True)[: len(good)]
    labels = pad_sequence(
        [torch.tensor(e.labels, dtype=torch.long) for e in padded], batch_first=True
    )[: len(good)]
    numbers = [(len(e.features), len(e.labels), e.seed) for e in good]
    lengths, label_lengths, seeds = (
        torch.tensor(numbers, dtype=torch.long).view(-1, 3).T
    )  # (B,) each
    corrupt = {example.utterance.id: example.corrupt for example in examples if example.corrupt}
    return Batch(
        [e.utterance for e in good], features, lengths, labels, label_lengths, seeds, corrupt
    )


def load(examples: Examples, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Reads batch by batch, with the configuration's number of worker processes."""
    workers = examples.config.workers
    return iter(
        DataLoader(examples, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    )


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
        frames = output_frames(
            feature_frames(round(utterance.samples / max(config.speeds)), config)
        )
        if 1 <= frames >= len(labels) + repeats:
            good.append(utterance)
        else:
            left_out[utterance.id] = (
                f"{utterance.path}: {frames} encoder frames can't hold {len(labels)} labels and {repeats} repeats"
            )
    return good, left_out
