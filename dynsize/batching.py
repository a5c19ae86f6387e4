"""Which utterances form which batch, and the loader that reads them."""

import io
import multiprocessing
import os
import random
import resource
import signal
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from dynsize import features, files
from dynsize.audio import CorruptAudio
from dynsize.config import Config, fields
from dynsize.corpora import Utterance, read_audio
from dynsize.features import feature_frames, log_mel, spec_augment
from dynsize.tokenizer import Tokenizer

# When utterances are sorted, each length is raised by a random share, at most this one, so that
# no two epochs have the same batches.
LENGTH_JITTER = 0.1
MOST_KEPT = 2 << 30  # bytes of features in memory, from which on they are read again
FILES_OF_A_BATCH = 5  # one for each tensor, by which torch shares its memory
# For a worker process, of a training and of its validation: queues, and two batches read ahead.
FILES_OF_A_WORKER = 32
# What a training handles, and its worker processes ignore.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Example:
    """An utterance with its labels, none outside of training, and its features, (T, F) float32.

    Where the audio could not be read, `unreadable` tells why, and there is one frame of zeros.
    """

    utterance: Utterance
    labels: list[int]
    features: Tensor
    seed: int  # of dropout and stochastic depth, drawn by (seed, epoch, id)
    unreadable: str = ""


@dataclass(frozen=True)
class Batch:
    """B utterances, padded with zeros."""

    utterances: list[Utterance]
    features: Tensor  # (B, T, F) float32
    lengths: Tensor  # (B,) feature frames, int64, as all below
    labels: Tensor  # (B, U)
    label_lengths: Tensor  # (B,)
    seeds: Tensor  # (B,), of dropout and stochastic depth
    unreadable: dict[str, str]  # id → why, of the batch's utterances that could not be read

    @property
    def padding(self) -> float:
        """The share of the frames that is padding."""
        frames = self.features[..., 0].numel()
        return 1 - self.lengths.sum().item() / frames if frames else 0.0

    def pin_memory(self) -> "Batch":
        """Return the same batch in pinned memory, from which a GPU copies by itself."""
        tensors = {n: v.pin_memory() for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return features, lengths, labels, label lengths and seeds on a device."""
        tensors = (self.features, self.lengths, self.labels, self.label_lengths, self.seeds)
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def text_labels(utterance: Utterance, tokenizer: Tokenizer) -> list[int]:
    """Return the labels of an utterance's text.

    Raises ValueError, with the file, for characters without a label.
    """
    try:
        return tokenizer.encode(utterance.text)
    except ValueError as error:
        advice = "leave out --tokenizer, or with --init-from name --vocabulary, for a new one"
        where = f"{utterance.path}: the utterance {utterance.id}"
        raise ValueError(f"{where}: {error}; {advice}") from error


def features_of(utterance: Utterance, config: Config, speed: float) -> Tensor:
    """Return (T, F) float32, from the directory `config.cache_features` if they are kept there.

    Raises CorruptAudio where the audio can't be read.
    """
    folder = Path(config.cache_features)
    name = cached_name(utterance, config, speed) if config.cache_features else ""
    if name and (data := files.kept(folder / name)):
        return torch.from_numpy(np.load(io.BytesIO(data)))
    computed = log_mel(read_audio(utterance, config.sample_rate, speed), config)
    if name:
        data = io.BytesIO()
        np.save(data, computed.numpy())
        files.keep(folder, name, data.getvalue())
    return computed


def cached_name(utterance: Utterance, config: Config, speed: float) -> str:
    """Return the name of the file that keeps the features of an utterance as its audio is now."""
    try:
        status = os.stat(utterance.path)
    except OSError as error:
        raise CorruptAudio(f"{utterance.path}: {error.strerror}") from error
    names = [field.name for field in fields() if field.metadata["section"] == "features"]
    settings = [getattr(config, name) for name in names]
    span = (utterance.path, utterance.span, utterance.channel)
    stamp = (*span, status.st_size, status.st_mtime_ns)
    key = repr((features.VERSION, settings, stamp, speed))
    name = sha256(key.encode(errors="surrogateescape")).hexdigest()
    return f"{name[:2]}/{name[2:]}"


class Examples(Dataset):
    """Utterances, read when asked for; `keep` keeps features in memory, up to 2 GB.

    In an epoch of training, an utterance has labels, one of the configured speeds and SpecAugment's
    masks, if `masks`; where `epoch` is None, it has none of these. All that is drawn for an
    utterance is a function of (seed, epoch, id): the same in every batch, on every process, and
    after resuming.

    Worker processes have `epoch` and `masks` as they are when `read_batches` begins.
    """

    epoch: int | None = None
    masks: bool = True

    def __init__(
        self, utterances: Sequence[Utterance], tokenizer: Tokenizer, config: Config, keep: bool
    ) -> None:
        self.utterances, self.tokenizer = utterances, tokenizer
        self.config, self.keep = config, keep
        self.in_memory: dict[tuple[int, float], Tensor] = {}
        self.bytes_in_memory = 0

    def __len__(self) -> int:
        return len(self.utterances)

    def speed(self, index: int) -> float:
        """Return how fast an utterance is spoken."""
        if self.epoch is None:
            return 1.0
        return self.draw("speed", index).choice(self.config.speeds)

    def draw(self, what: str, index: int) -> random.Random:
        return random.Random(f"{what} {self.config.seed} {self.epoch} {self.utterances[index].id}")

    def frames(self) -> list[int]:
        """Return the number of feature frames of each utterance."""
        frames = []
        for index, utterance in enumerate(self.utterances):
            samples = round(utterance.samples / self.speed(index))
            frames.append(feature_frames(samples, self.config))
        return frames

    def __getitem__(self, index: int) -> Example:
        utterance, draw = self.utterances[index], self.draw("masks", index)
        labels = [] if self.epoch is None else text_labels(utterance, self.tokenizer)
        seed = draw.getrandbits(62)
        try:
            features = self.features(index, self.speed(index))
        except CorruptAudio as error:
            nothing = torch.zeros(1, self.config.mel_bins)
            return Example(utterance, labels, nothing, seed, str(error))
        if self.epoch is not None and self.masks:
            features = spec_augment(features, self.config, draw)
        return Example(utterance, labels, features, seed)

    def features(self, index: int, speed: float) -> Tensor:
        """Return (T, F) of an utterance. Raises CorruptAudio."""
        if (index, speed) in self.in_memory:
            return self.in_memory[index, speed]
        features = features_of(self.utterances[index], self.config, speed)
        if self.keep and self.bytes_in_memory + features.nbytes <= MOST_KEPT:
            self.in_memory[index, speed] = features
            self.bytes_in_memory += features.nbytes
        return features


def collate(examples: Sequence[Example]) -> Batch:
    """Return the examples that could be read, padded, as one batch; it may have no utterance."""
    good = [example for example in examples if not example.unreadable]
    padded = good or examples[:1]  # gives a batch without utterances its other dimensions
    features = pad_sequence([e.features for e in padded], batch_first=True)[: len(good)]
    labels = [torch.LongTensor(e.labels) for e in padded]
    labels = pad_sequence(labels, batch_first=True)[: len(good)]
    lengths = torch.LongTensor([len(e.features) for e in good])
    label_lengths = torch.LongTensor([len(e.labels) for e in good])
    seeds = torch.LongTensor([e.seed for e in good])
    unreadable = {e.utterance.id: e.unreadable for e in examples if e.unreadable}
    utterances = [e.utterance for e in good]
    return Batch(utterances, features, lengths, labels, label_lengths, seeds, unreadable)


def read_batches(
    examples: Examples, batches: Sequence[Sequence[int]], pin: bool = False
) -> Iterator[Batch]:
    """Yield batch after batch, read by the configured number of worker processes.

    `pin`: into memory from which a GPU copies while the CPU goes on. Raises ValueError where the
    system allows too few open files or processes, and ChildProcessError where a worker process
    died. torch tells so itself, or by an error of the connection over which the batch's memory is
    handed over.
    """
    check_open_files(examples.config)
    loader = DataLoader(
        examples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=examples.config.workers,
        worker_init_fn=ignore_signals,
        pin_memory=pin,
    )
    iterator = started(loader)
    try:
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        raised_in_worker = str(error).startswith("Caught")
        of_loader = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
        if raised_in_worker or not of_loader:
            raise
        advice = f"where memory was short, lower --workers {examples.config.workers}"
        raise ChildProcessError(f"a loader process died: {error}; {advice}") from error


def check_open_files(config: Config) -> None:
    """Raise ValueError where worker processes could not send their batches.

    A worker process that can't open a file for a tensor would let this process wait for ever.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_OF_A_WORKER * config.workers + FILES_OF_A_BATCH * (config.accumulate + 1)
    needed += len(os.listdir("/dev/fd"))
    if config.workers and needed > most != resource.RLIM_INFINITY:
        what = f"needs {needed} open files, but the limit is {most}"
        raise ValueError(f"--workers {config.workers}: {what}; raise it by ulimit -n, or lower it")


def started(loader: DataLoader) -> Iterator[Batch]:
    """Return the iterator of a loader, without torch's handler of SIGCHLD.

    By it a worker's death would interrupt this process anywhere, in the middle of an update too.
    Without it the death is seen when the next batch is read.

    Where this process ends before the iterator does, it kills the workers. Python would send them
    SIGTERM, which they ignore, and wait for ever.
    """
    others = set(multiprocessing.active_children())
    before = signal.getsignal(signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in workers too, until they ignore them
    try:
        iterator = iter(loader)
    except OSError as error:  # too few processes are allowed; some may have been started
        kill(set(multiprocessing.active_children()) - others)
        what = f"--workers {loader.num_workers}: a worker process can't be started"
        raise ValueError(f"{what}: {error.strerror}; lower it") from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    weakref.finalize(iterator, kill, set(multiprocessing.active_children()) - others)
    return iterator


def kill(workers: set[multiprocessing.Process]) -> None:
    """End the worker processes that still run."""
    for worker in workers:
        worker.kill()


def ignore_signals(worker: int) -> None:
    """Let a worker process ignore what asks its training to save and end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batch_plan(frames: Sequence[int], most_frames: float, most_utterances: int) -> list[list[int]]:
    """Return the indices of utterances in batches of similar lengths, longest first.

    A batch has at most `most_frames` frames with its padding, but for a single longer utterance,
    and at most `most_utterances` utterances.
    """
    plan: list[list[int]] = []
    for index in sorted(range(len(frames)), key=lambda i: -frames[i]):
        batch = plan[-1] if plan else []
        more = len(batch) + 1
        if batch and more <= most_utterances and more * frames[batch[0]] <= most_frames:
            batch.append(index)
        else:
            plan.append([index])
    return plan


def epoch_plan(frames: Sequence[int], config: Config, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch of training, a pure function of frames, seed and epoch."""
    draw = random.Random(f"batches {config.seed} {epoch}")
    jittered = [length * (1 + LENGTH_JITTER * draw.random()) for length in frames]
    most = config.batch_seconds * 1000 / config.hop_ms
    plan = batch_plan(jittered, most, config.batch_utterances)
    draw.shuffle(plan)
    return plan
