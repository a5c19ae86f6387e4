"""The corpus of connected digits: recordings of the Free Spoken Digit Dataset, joined to strings.

`python -m dynsize.digits FSDD_CHECKOUT OUTPUT` writes it in LibriSpeech's layout. The dataset
(FSDD) is the Git repository https://github.com/Jakobovski/free-spoken-digit-dataset. Its licence
is CC BY-SA 4.0, and the joined corpus has the same licence.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from dynsize import files
from dynsize.spoken import add_utterance
from dynsize.terminal import reported

SAMPLE_RATE = 8000  # Hz, of every recording of the dataset
WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
SPEAKERS = ("george", "jackson", "nicolas", "theo", "yweweler")
UNSEEN = "lucas"  # no other split has this speaker; older versions of the dataset lack him
LEVEL = 0.06  # root mean square of each recording before the gain; full scale is 1
GAIN_DB = (-6, 6)  # of a whole utterance
NOISE_DB = (-62, -46)  # white noise, relative to full scale
DIGITS = (3, 8)  # in one string
PAUSE_MS = (20, 250)  # between two words
EDGE_MS = (50, 300)  # before the first word and after the last
TALKERS = 3  # in the background
UTTERANCES_IN_CHAPTER = 25


class Split(NamedTuple):
    """How one split is made."""

    utterances: int
    indices: range  # of the recordings that it takes: FSDD's DIGIT_SPEAKER_INDEX.wav
    noisy: float = 0.0  # share of the utterances with people talking in the background
    snr_db: tuple[float, float] = (0, 10)  # the speaker's level above the background's
    speakers: tuple[str, ...] = SPEAKERS


SPLITS = {
    "train": Split(2000, range(8, 50), noisy=0.7, snr_db=(0, 20)),
    "dev-clean": Split(120, range(5, 8)),
    "dev-other": Split(120, range(5, 8), noisy=1.0),
    "test-clean": Split(300, range(5)),  # 0 to 4 are FSDD's test part
    "test-other": Split(300, range(5), noisy=1.0),
    "test-unseen": Split(300, range(50), speakers=(UNSEEN,)),
}
NUMBERS = {speaker: 100 + place for place, speaker in enumerate((*SPEAKERS, UNSEEN))}
ABOUT = """\
Connected digits, joined by `python -m dynsize.digits --seed {seed}` from the recordings of
the Free Spoken Digit Dataset, https://github.com/Jakobovski/free-spoken-digit-dataset.
Its licence is CC BY-SA 4.0, and this corpus has the same licence.
Speakers: {speakers}
SPLIT.ctm has the times of the words: utterance, channel, start and duration in seconds, word.
"""
Recordings = dict[tuple[int, str, int], np.ndarray]  # (digit, speaker, index) → (samples,)


def read_recordings(checkout: Path) -> Recordings:
    """Read a checkout of the dataset, or its folder `recordings`.

    Each recording is float64 with the root mean square `LEVEL`. Raises ValueError, with the path,
    for a recording that is missing or unusable.
    """
    folder = checkout / "recordings" if (checkout / "recordings").is_dir() else checkout
    recordings = {}
    for speaker in (*SPEAKERS, UNSEEN):
        if speaker == UNSEEN and not any(folder.glob(f"*_{UNSEEN}_*.wav")):
            continue
        for digit, index in product(range(10), range(50)):
            path = folder / f"{digit}_{speaker}_{index}.wav"
            try:
                audio, rate = soundfile.read(path)
            except (soundfile.SoundFileError, OSError) as error:
                what = "FSDD_CHECKOUT must be a checkout of the dataset, or its folder recordings"
                raise ValueError(f"{path}: can't be read; {what}") from error
            if rate != SAMPLE_RATE or audio.ndim != 1:
                raise ValueError(f"{path}: must have one channel of {SAMPLE_RATE} Hz")
            recordings[digit, speaker, index] = at_level(audio)
    return recordings


def at_level(audio: np.ndarray) -> np.ndarray:
    """Return the audio scaled to the root mean square `LEVEL`."""
    level = np.sqrt(np.mean(audio**2))
    return audio * (LEVEL / level)


def join_corpus(
    checkout: Path, output: Path, seed: int = 0, splits: dict[str, Split] = SPLITS
) -> None:
    """Write all splits; `test-unseen` only where the dataset has its speaker.

    The same seed gives the same files. `output` appears when it is complete. Raises ValueError,
    before anything is written, for an output that is not empty and for unusable recordings.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty directory; name another OUTPUT")
    files.clean(output.parent)
    recordings = read_recordings(checkout)
    speakers = {speaker for _, speaker, _ in recordings}
    splits = {name: split for name, split in splits.items() if speakers.issuperset(split.speakers)}
    with files.whole(output) as unfinished:
        unfinished.mkdir(parents=True)
        total = sum(split.utterances for split in splits.values())
        with tqdm(total=total, desc="joining digits", unit="utt") as bar:
            for number, (name, split) in enumerate(splits.items()):
                for _ in write_split(unfinished, name, split, recordings, [seed, number]):
                    bar.update()
        names = ", ".join(f"{NUMBERS[speaker]} {speaker}" for speaker in sorted(speakers))
        (unfinished / "README.txt").write_text(ABOUT.format(seed=seed, speakers=names))


def write_split(
    root: Path, name: str, split: Split, recordings: Recordings, seed: list[int]
) -> Iterator[str]:
    """Write a split and its CTM; yield the id of each utterance. The speakers take turns."""
    with open(root / f"{name}.ctm", "w") as ctm:
        for number in range(split.utterances):
            turn, place = divmod(number, len(split.speakers))
            speaker = split.speakers[place]
            chapter, line = divmod(turn, UTTERANCES_IN_CHAPTER)
            id = f"{NUMBERS[speaker]}-{1000 + chapter}-{line:04}"
            draw = np.random.default_rng([*seed, number])
            audio, words = Mixer(split, recordings, draw).utterance(speaker)
            text = " ".join(word for word, _, _ in words)
            add_utterance(root / name, id, text, audio, SAMPLE_RATE)
            for word, start, end in words:
                seconds = f"{start / SAMPLE_RATE:.3f} {(end - start) / SAMPLE_RATE:.3f}"
                ctm.write(f"{id} 1 {seconds} {word}\n")
            yield id


class Mixer:
    """Draws the audio of one utterance of a split from `draw`."""

    def __init__(self, split: Split, recordings: Recordings, draw: np.random.Generator) -> None:
        self.split, self.recordings, self.draw = split, recordings, draw

    def utterance(self, speaker: str) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
        """Return the audio of one utterance, (samples,) in [-1, 1], and its words.

        A word comes with its first sample and the one after its last.
        """
        pieces = [self.silence(EDGE_MS)]
        words = []
        for place in range(self.draw.integers(*DIGITS, endpoint=True)):
            if place:
                pieces.append(self.silence(PAUSE_MS))
            start = sum(map(len, pieces))
            word, audio = self.recording(speaker)
            pieces.append(audio)
            words.append((word, start, start + len(audio)))
        pieces.append(self.silence(EDGE_MS))
        speech = np.concatenate(pieces)
        if self.draw.random() < self.split.noisy:
            snr = self.factor(self.split.snr_db)
            speech = speech + self.background(speaker, len(speech)) / snr
        noise = self.factor(NOISE_DB) * self.draw.standard_normal(len(speech))
        audio = self.factor(GAIN_DB) * speech + noise
        return audio.clip(-1, 1), words

    def recording(self, speaker: str) -> tuple[str, np.ndarray]:
        """Draw a digit of a speaker; return the word and its audio."""
        digit = int(self.draw.integers(10))
        index = int(self.draw.choice(self.split.indices))
        return WORDS[digit], self.recordings[digit, speaker, index]

    def background(self, speaker: str, samples: int) -> np.ndarray:
        """Return `TALKERS` other speakers who say digits at once, (samples,), scaled to `LEVEL`."""
        others = [other for other in self.split.speakers if other != speaker]
        mixed = np.zeros(samples)
        for other in self.draw.choice(others, TALKERS, replace=False):
            pieces: list[np.ndarray] = []
            while sum(map(len, pieces)) < samples:
                pieces.append(self.silence(PAUSE_MS))
                _, audio = self.recording(other)
                pieces.append(audio)
            mixed += np.concatenate(pieces)[:samples]
        return at_level(mixed)

    def silence(self, bounds_ms: tuple[float, float]) -> np.ndarray:
        """Return zeros, (samples,), with a random duration between these bounds in ms."""
        ms = self.draw.uniform(*bounds_ms)
        samples = round(ms * SAMPLE_RATE / 1000)
        return np.zeros(samples)

    def factor(self, bounds_db: tuple[float, float]) -> float:
        """Draw a gain between these bounds in dB; return the factor of the amplitude."""
        return 10 ** (self.draw.uniform(*bounds_db) / 20)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 and one line for unusable input."""
    parser = argparse.ArgumentParser(
        prog="python -m dynsize.digits",
        description="Joins recordings of the Free Spoken Digit Dataset to connected digits.",
    )
    parser.add_argument("checkout", type=Path, metavar="FSDD_CHECKOUT")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new or empty directory")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: must be 0 or more")
    with reported("dynsize.digits", "stopped; nothing is left of the corpus"):
        join_corpus(options.checkout, options.output, options.seed)


if __name__ == "__main__":
    main()
