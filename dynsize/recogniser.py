"""Text, with the time of each word, from audio of any length."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import IO

import numpy as np
import soxr
import torch

from dynsize import checkpoint
from dynsize.audio import LOUDEST, opened
from dynsize.ctc import Ctc
from dynsize.decoding import LM_WEIGHT, LanguageModel, decoder_of
from dynsize.networks import Facts, Network, facts_of, network_of, open_onnx, windowed
from dynsize.subnet import TIMED_SECONDS, in_turn, noise
from dynsize.supernet import Output

LEAD = 0.1  # seconds by which a word starts before its first label's frame
TAIL = 0.2  # seconds by which a word ends after its last label's frame
MOST_RATE = 1_000_000  # Hz, of audio
BLOCK = 10  # seconds of an array that are taken at once


@dataclass(frozen=True)
class Word:
    text: str
    start: float  # seconds
    end: float


@dataclass(frozen=True)
class Transcript:
    words: list[Word]
    seconds: float  # of the audio

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


class Recogniser:
    """Turns audio into text with a network of one size, or with any size of a supernet.

    `output`: gives the output of a size, by default CTC's.

    It computes on the CPU, with as many threads as torch has (an ONNX file keeps the number that
    torch had when it was loaded). Several threads may share one: `transcribe` changes nothing in it
    or in a `language_model`. Call `size_within` before they start, since it measures times.
    """

    def __init__(
        self, network: Network, facts: Facts, output: Callable[[int], Output] = lambda size: Ctc
    ) -> None:
        self.network, self.facts, self.output = network, facts, output
        self.latencies: dict[int, float] = {}  # size → milliseconds, once measured

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that can be chosen, in layers, ascending."""
        return self.facts.sizes

    def transcribe(
        self,
        audio: str | Path | np.ndarray,
        size: int | None = None,
        sample_rate: int | None = None,
        channel: int | None = None,
        beam: int = 1,
        language_model: LanguageModel | None = None,
        progress: Callable[[float], None] = lambda seconds: None,
    ) -> Transcript:
        """Return the text of `audio` with the times of its words.

        `audio`: a file that soundfile reads, `-` for one on standard input, or a float array,
        (samples,) or (samples, channels), with its `sample_rate` in Hz. `size`: in layers, by
        default the largest. `channel`: 0 is the first; by default the mean of all channels.
        `beam`: prefixes that the beam search keeps; with 1 and without a `language_model`, the best
        label of each frame is taken instead. `progress` is called with the seconds of audio that
        were read since its last call. Digital silence has no words. Raises ValueError for a size
        that the network lacks, for other arguments that can't be, and for audio that can't be read.
        """
        size = self.sizes[-1] if size is None else size
        self.check_size(size)
        if channel is not None and not isinstance(channel, Integral):
            raise ValueError(f"channel {channel!r}: must be a whole number; 0 is the first")
        if isinstance(language_model, str | Path):
            raise ValueError(f"language_model {language_model}: Recogniser.language_model opens it")
        decoder = decoder_of(self.output(size), self.facts, beam, language_model)
        read = array_blocks if isinstance(audio, np.ndarray) else file_blocks
        rate = self.facts.config.sample_rate
        samples, silent = 0, True

        def counted() -> Iterator[np.ndarray]:
            nonlocal samples, silent
            for block in read(audio, rate, sample_rate, channel):
                samples += len(block)
                silent = silent and not block.any()
                progress(len(block) / rate)
                yield block

        parts = windowed(partial(self.network, size=size), counted(), self.facts)
        with torch.inference_mode():
            labels = decoder.decode_parts(parts)
        seconds = samples / rate
        words = [] if silent else timed_words(labels, self.facts, seconds)
        return Transcript(words, seconds)

    def language_model(
        self, path: str | Path, weight: float = LM_WEIGHT, bonus: float = 0.0
    ) -> LanguageModel:
        """Return the n-gram model of an ARPA file for `transcribe`.

        Each word adds weight · ln P(word | words before) + bonus to the score of a text.
        """
        letters = self.facts.tokenizer.letters()
        normaliser = self.facts.config.normaliser
        return LanguageModel(Path(path), letters, normaliser, weight, bonus)

    def check_size(self, size: int) -> None:
        """Raise ValueError for a size that the network lacks."""
        if not isinstance(size, Integral) or size not in self.sizes:
            raise ValueError(f"size {size!r}: the sizes are {', '.join(map(str, self.sizes))}")

    def size_within(self, milliseconds: float) -> int:
        """Return the largest size that decodes 10 s of audio within `milliseconds` on this machine.

        Each size is measured once. Raises ValueError where the smallest one takes longer.
        """
        self.latencies = self.latencies or {size: self.latency(size) for size in self.sizes}
        within = [size for size in self.sizes if self.latencies[size] <= milliseconds]
        if not within:
            least = min(self.latencies.values())
            told = f"the fastest size takes {least:.1f} ms on this machine"
            raise ValueError(f"{milliseconds:g} ms for {TIMED_SECONDS:g} s of audio: {told}")
        return max(within)

    def latency(self, size: int) -> float:
        """Return the median milliseconds of seven runs on 10 s of noise, after one to warm up."""
        audio = noise(self.facts.config).numpy()

        @torch.inference_mode()
        def decode() -> None:
            parts = windowed(partial(self.network, size=size), [audio], self.facts)
            self.output(size).decode_parts(parts)

        return in_turn({size: decode}, rounds=7)[size]


def open_recogniser(path: str | Path) -> Recogniser:
    """Return the recogniser of a run directory, of one checkpoint, or of an ONNX file.

    Raises ValueError where `path` is none of these.
    """
    if Path(path).suffix == ".onnx":
        file = open_onnx(Path(path))
        return Recogniser(file.network, file.facts)
    loaded = checkpoint.load(Path(path))
    return Recogniser(network_of(loaded.model), facts_of(loaded), loaded.model.output)


def file_blocks(
    path: str | Path, to_rate: int, sample_rate: int | None, channel: int | None
) -> Iterator[np.ndarray]:
    """Yield the audio of a file, or of one on standard input, resampled to `to_rate`.

    Raises ValueError for what can't be read, is truncated, or has no such channel.
    """
    if not isinstance(path, str | Path):
        kind = type(path).__name__
        raise ValueError(f"audio must be a path or a numpy array of floats, not {kind}")
    name = "standard input" if path == "-" else str(path)
    if sample_rate is not None:
        raise ValueError(f"{name}: a file has a sample rate; sample_rate is for arrays")
    try:
        with opened(standard_input() if path == "-" else path, name) as file:
            yield from resampled(file.blocks(), file.samplerate, to_rate, channel, name)
    except OSError as error:
        raise ValueError(f"{name}: can't be read: {error.strerror}") from error


def standard_input() -> IO[bytes]:
    """Return standard input, opened again. Raises ValueError for a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        advice = "pipe audio into it: cat talk.flac | dynsize -"
        raise ValueError(f"standard input: is closed, or a terminal; {advice}")
    return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)


def array_blocks(
    audio: np.ndarray, to_rate: int, sample_rate: int | None, channel: int | None
) -> Iterator[np.ndarray]:
    """Yield an array, resampled to `to_rate`. Raises ValueError as `file_blocks` does."""
    if not isinstance(sample_rate, Integral) or not 1 <= sample_rate <= MOST_RATE:
        what = f"of an array must be a whole number, 1 to {MOST_RATE} Hz"
        raise ValueError(f"sample_rate {sample_rate}: {what}")
    if audio.ndim not in (1, 2) or not np.issubdtype(audio.dtype, np.floating):
        found = f"{audio.dtype} of shape {audio.shape}"
        raise ValueError(f"audio must be floats, (samples,) or (samples, channels), not {found}")
    audio = audio[:, None] if audio.ndim == 1 else audio  # (samples, channels)
    samples, channels = audio.shape
    if channels == 0 or 0 < samples < channels:
        found = f"{samples} samples of {channels} channels"
        raise ValueError(f"audio must be (samples, channels); this array has {found}")
    audio = audio.astype(np.float32, copy=False)
    step = BLOCK * int(sample_rate)  # a narrow numpy integer has no room for the product
    parts = (audio[i : i + step] for i in range(0, len(audio), step))
    yield from resampled(parts, sample_rate, to_rate, channel, "the array")


def resampled(
    blocks: Iterable[np.ndarray], from_rate: int, to_rate: int, channel: int | None, name: str
) -> Iterator[np.ndarray]:
    """Yield one channel, (samples,) float32 at `to_rate`, of blocks of (samples, channels)."""
    if from_rate > MOST_RATE:
        raise ValueError(f"{name}: its sample rate is {from_rate} Hz; at most {MOST_RATE} is read")
    stream = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32")
    for block in blocks:
        if channel is not None and not 0 <= channel < block.shape[1]:
            raise ValueError(f"{name}: has no channel {channel}; it has {block.shape[1]}")
        mono = block.mean(1) if channel is None else np.ascontiguousarray(block[:, channel])
        if not (np.abs(mono) <= LOUDEST).all():  # nor for what is no number
            raise ValueError(f"{name}: samples that are no numbers, or above {LOUDEST:g}")
        yield mono if from_rate == to_rate else stream.resample_chunk(mono)
    if from_rate != to_rate:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def timed_words(labels: list[tuple[int, int]], facts: Facts, seconds: float) -> list[Word]:
    """Return the words of labels given with the encoder frame of each.

    CTC's labels are short peaks inside a word. So a word starts `LEAD` before its first label and
    ends `TAIL` after the frame of its last one, but words do not overlap and stay inside the audio.
    """
    frames = [frame for _, frame in labels]
    spans = facts.tokenizer.words([label for label, _ in labels])
    frame_seconds = facts.step / facts.config.sample_rate
    starts, earliest = [], 0.0
    for _, first, last in spans:
        start = frames[first] * frame_seconds - LEAD
        starts.append(min(max(start, earliest), seconds))
        earliest = frames[last] * frame_seconds
    words = []
    limits = [*starts[1:], seconds]
    for (text, _, last), start, limit in zip(spans, starts, limits, strict=False):
        end = min((frames[last] + 1) * frame_seconds + TAIL, limit)
        words.append(Word(text, round(start, 3), round(end, 3)))
    return words
