"""Corpora in LibriSpeech's layout: SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its audio files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

AUDIO_ENDINGS = (".flac", ".wav")


@dataclass(frozen=True)
class Utterance:
    """One utterance: its audio file with the number of samples that the header promises, and its words."""

    id: str
    path: Path
    text: str
    samples: int


class CorruptAudio(ValueError):
    """An audio file that can't be read, or not wholly."""


def read_split(root: Path, split: str, sample_rate: int) -> tuple[list[Utterance], dict[str, str]]:
    """The utterances of one split, sorted by id, and those left out: id → why its audio can't be read.

    Raises ValueError, with file and value, for no corpus at `root`, a missing or empty split, a transcript without
    audio, audio of another sample rate or of several channels.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such directory; --corpus names a corpus in LibriSpeech's layout, or 'spoken'")
    if not (root / split).is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
        raise ValueError(f"{root / split}: no such split; {root} has {there or 'no directories'}")
    lines = [
        (path, *line.partition(" ")[::2])
        for path in sorted((root / split).rglob("*.trans.txt"))
        for line in read_text(path).splitlines()
        if line.strip()
    ]
    utterances, unreadable = [], {}
    for transcript, name, text in tqdm(lines, desc=f"listing {split}", unit="utt", leave=False, delay=2):
        path = audio_file(transcript, name)
        try:
            utterances.append(Utterance(name, path, " ".join(text.split()), count_samples(path, sample_rate)))
        except CorruptAudio as error:
            unreadable[name] = str(error)
    if not utterances:
        raise ValueError(f"{root / split}: no utterances: no *.trans.txt with readable audio beside it")
    return sorted(utterances, key=lambda utterance: utterance.id), unreadable


def read_text(path: Path) -> str:
    """A UTF-8 file; ValueError with its name where it is not one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def audio_file(transcript: Path, name: str) -> Path:
    """The audio of the utterance `name`, which lies beside its transcript."""
    paths = [transcript.parent / (name + ending) for ending in AUDIO_ENDINGS]
    for path in paths:
        if path.parent == transcript.parent and path.exists():
            return path
    raise ValueError(f"{transcript}: the utterance {name} has no audio: {paths[0]} doesn't exist")


def count_samples(path: Path, sample_rate: int) -> int:
    """The number of samples that an audio file's header tells, after a check of what it says of rate and channels."""
    try:
        header = soundfile.info(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise CorruptAudio(f"{path}: not an audio file: {error}") from error
    if header.channels != 1:
        raise ValueError(f"{path}: {header.channels} channels; only mono audio is supported")
    if header.samplerate != sample_rate:
        raise ValueError(f"{path}: {header.samplerate} Hz, but --sample-rate is {sample_rate}")
    if header.frames == 0:
        raise CorruptAudio(f"{path}: no samples")
    return header.frames


def read_audio(utterance: Utterance) -> Tensor:
    """(samples,) float32 from −1 to 1. Raises CorruptAudio where the file doesn't hold what its header promised."""
    try:
        audio = soundfile.read(utterance.path, dtype="float32")[0]
    except (soundfile.SoundFileError, OSError) as error:
        raise CorruptAudio(f"{utterance.path}: damaged audio: {error}") from error
    if audio.shape != (utterance.samples,):
        raise CorruptAudio(f"{utterance.path}: {len(audio)} of {utterance.samples} samples can be read: truncated")
    if not np.isfinite(audio).all():
        raise CorruptAudio(f"{utterance.path}: samples that are no numbers")
    return torch.from_numpy(audio)
