"""The embedded corpus: sentences of a small grammar, spoken by espeak-ng, in LibriSpeech's layout.

`python -m dynsize.spoken DIRECTORY` writes it there; `spoken_corpus` does so once, into the user's
cache.
"""

import argparse
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from ctypes import CDLL, CFUNCTYPE, POINTER, Array, c_int, c_short, c_void_p
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from dynsize import files
from dynsize.terminal import reported

NAME = "dynsize.spoken"
SAMPLE_RATE = 16000  # Hz
VERSION = 1  # of the grammar, the voices and the drawing: a new number makes a new corpus
# Rule → its alternatives. A word in capitals is replaced by one of that rule's alternatives.
GRAMMAR = {
    "SENTENCE":
        "turn STATE the DEVICE in the ROOM | please turn STATE the DEVICE WHEN | "
        "set the ROOM DEVICE to NUMBER percent | open the PART of the ROOM | "
        "close the PART of the ROOM WHEN | make the ROOM lights COLOUR | "
        "make the lights COLOUR and the DEVICE COLOUR | we need TEEN FOOD and TEEN FOOD | "
        "call PERSON at TIME | send a message to PERSON | tell PERSON that dinner is at TIME | "
        "ask PERSON about the EVENT | remind me to call PERSON DAY at TIME | "
        "add FOOD and FOOD to the shopping list | we need NUMBER more FOOD | "
        "play song number TEEN in the ROOM | what time is the EVENT with PERSON | "
        "move the EVENT from TIME to TIME | the EVENT with PERSON is on the ORDINAL of MONTH | "
        "PERSON was born on the ORDINAL of MONTH | PERSON and PERSON will be here at TIME | "
        "my number is DIGIT DIGIT DIGIT DIGIT DIGIT DIGIT | NUMBER plus NUMBER is NUMBER | "
        "start a timer for NUMBER minutes | is the PART of the ROOM open | "
        "lock the PART and wake PERSON",
    "STATE": "on | off",
    "WHEN": "DAY | at TIME | in NUMBER minutes | now",
    "DAY": "today | tonight | tomorrow | on WEEKDAY | next WEEKDAY",
    "WEEKDAY": "monday | tuesday | wednesday | thursday | friday | saturday | sunday",
    "TIME":
        "HOUR | HOUR MINUTES | half past HOUR | quarter to HOUR | quarter past HOUR | "
        "HOUR in the PERIOD",
    "PERIOD": "morning | afternoon | evening",
    "HOUR":
        "two | three | four | five | six | seven | eight | nine | ten | eleven | noon | midnight",
    "MINUTES": "ten | fifteen | TENS | TENS five",
    "TENS": "twenty | thirty | forty | fifty",
    "NUMBER":
        "DIGIT | TEEN | TEEN | TENS | TENS DIGIT | HIGH | HIGH DIGIT | one hundred | two hundred",
    "HIGH": "sixty | seventy | eighty | ninety",
    "TEEN":
        "ten | eleven | twelve | thirteen | fourteen | fifteen | sixteen | seventeen | "
        "eighteen | nineteen",
    "DIGIT": "one | two | three | four | five | six | seven | eight | nine",
    "ORDINAL": "first | second | third | fourth | fifth | twentieth",
    "MONTH":
        "january | february | march | april | may | june | july | august | september | "
        "october | november | december",
    "DEVICE": "lights | heater | fan | radio | television | lamp",
    "PART": "door | window | curtains",
    "ROOM": "kitchen | bedroom | bathroom | garage | garden | office",
    "COLOUR": "red | green | blue | yellow | white",
    "PERSON":
        "anna | ben | carol | david | emma | frank | grace | henry | julia | laura | peter | "
        "rachel",
    "FOOD": "bread | butter | cheese | coffee | eggs | milk | rice | sugar",
    "EVENT": "meeting | party | lesson",
}  # fmt: skip
# espeak-ng's voices: American (en-us) and British (en) English, in variants of different sex, age
# and timbre
VOICES = {
    "train": "en-us en-us+m2 en-us+m5 en-us+f2 en-us+f4 en en+m1 en+m6 en+f1 en+f3".split(),
    "dev-other": "en-us+m4 en+f5".split(),
    "test-other": "en-us+m3 en-us+f1 en+m7 en+f2".split(),
}
# Of speech in each split.
MINUTES = {"train": 60, "dev-clean": 4, "dev-other": 3, "test-clean": 15, "test-other": 10}
SENTENCES_IN_CHAPTER = 10
CHOICE = 5  # sentences from which each one is chosen
# The rate of speaking is drawn between these, in words a minute as espeak-ng counts them; they are
# 130 to 200 words in fact.
RATE = (100, 155)
PITCH = (35, 65)  # drawn between these, of 0 to 99
# Constants of espeak-ng's speak_lib.h
ESPEAK_SYNCHRONOUS, ESPEAK_UTF8 = 2, 1
ESPEAK_RATE, ESPEAK_PITCH = 1, 3


def spoken_corpus() -> Path:
    """Return the corpus's directory in the user's cache; the first call speaks it.

    Raises ValueError, which says why, where that fails.
    """
    directory = files.user_cache() / f"spoken-{VERSION}"
    if not directory.exists():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"{directory.parent}: {error.strerror}; XDG_CACHE_HOME names another place"
            raise ValueError(what) from error
        # espeak-ng carries random state from one utterance to the next: in a new process the
        # speech is always the same
        command = [sys.executable, "-m", NAME, str(directory), "--parent", str(os.getpid())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment)
        if done.returncode != 0 and not directory.exists():  # else another process was faster
            *_, why = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            why = why.removeprefix(f"{NAME}: ")
            raise ValueError(f"the embedded corpus could not be spoken: {why}")
    return directory


def sentence(draw: random.Random, rule: str = "SENTENCE") -> str:
    """Return a sentence of the grammar, in lower case."""
    words = draw.choice(GRAMMAR[rule].split(" | ")).split()
    return " ".join(sentence(draw, word) if word in GRAMMAR else word for word in words)


class Espeak:
    """espeak-ng's library from the package espeakng-loader."""

    def __init__(self, seed: int) -> None:
        try:
            import espeakng_loader  # only the demo needs it
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}; pip install -e '.[demo]' installs it") from error
        self.library = CDLL(espeakng_loader.get_library_path())
        data = os.fsencode(espeakng_loader.get_data_path())
        self.rate = self.library.espeak_Initialize(ESPEAK_SYNCHRONOUS, 0, data, 0)
        # of the voices' breath and jitter; without it, the time of day
        self.library.espeak_ng_SetRandSeed(seed)
        callback = CFUNCTYPE(c_int, POINTER(c_short), c_int, c_void_p)
        self.callback = callback(self.receive)  # kept alive as long as the library may call it
        self.library.espeak_SetSynthCallback(self.callback)

    def receive(self, samples: Array, count: int, events: int) -> int:
        """Keep a piece of speech; the library calls this while it speaks."""
        if count:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        """Return speech, (samples,) float32 at `SAMPLE_RATE`."""
        self.pieces: list[np.ndarray] = []
        self.library.espeak_SetVoiceByName(voice.encode())
        self.library.espeak_SetParameter(ESPEAK_RATE, rate, 0)
        self.library.espeak_SetParameter(ESPEAK_PITCH, pitch, 0)
        data = text.encode()
        failed = self.library.espeak_Synth(data, len(data) + 1, 0, 0, 0, ESPEAK_UTF8, None, None)
        if failed or not self.pieces:
            raise ValueError(f"espeak-ng could not speak {text!r} with the voice {voice}")
        audio = np.concatenate(self.pieces).astype(np.float32) / 2**15
        return soxr.resample(audio, self.rate, SAMPLE_RATE)


def speak_corpus(
    directory: Path, seed: int = 0, minutes: dict[str, float] = MINUTES, parent: int = 0
) -> None:
    """Write all splits, in which no sentence is there twice.

    They are the same in every new process for the same seed and minutes. The progress bar is on
    standard output: `spoken_corpus` reads the errors from the other stream. `parent`: the
    process that waits for the corpus, if any. Raises ValueError where that has ended, where
    `directory` exists, and where espeak-ng or libsndfile fails.
    """
    if directory.exists():
        raise ValueError(f"{directory}: exists; name a new DIRECTORY")
    espeak, draw = Espeak(seed), random.Random(seed)
    said: set[str] = set()
    bar_options = dict(unit="s", unit_scale=True, leave=False, disable=None, file=sys.stdout)
    bar = tqdm(total=60 * sum(minutes.values()), desc="speaking the corpus", **bar_options)
    try:
        with bar, files.whole(directory) as unfinished:
            for split, length in minutes.items():
                folder = unfinished / split
                for seconds in speak_split(folder, split, length, espeak, draw, said):
                    bar.update(seconds)
                    if parent and os.getppid() != parent:
                        raise ValueError(f"process {parent}, which waits for it, has ended")
    except soundfile.SoundFileError as error:
        raise ValueError(str(error)) from error


def speak_split(
    directory: Path, split: str, minutes: float, espeak: Espeak, draw: random.Random, said: set[str]
) -> Iterator[float]:
    """Write chapters of one voice each, the voices in turn; yield the seconds of each utterance."""
    voices = VOICES.get(split, VOICES["train"])
    names = [name for names in VOICES.values() for name in names]
    seconds, number = 0.0, 0
    heard: Counter[str] = Counter()
    while seconds < 60 * minutes:
        drawn = [sentence(draw) for _ in range(CHOICE)]
        new = [text for text in drawn if text not in said]
        if not new:
            continue
        # the one with the rarest word: no word should have few examples
        text = min(new, key=lambda text: min(heard[word] for word in text.split()))
        said.add(text)
        heard.update(text.split())
        chapter, place = divmod(number, SENTENCES_IN_CHAPTER)
        voice = voices[chapter % len(voices)]
        audio = espeak.speak(text, voice, draw.randint(*RATE), draw.randint(*PITCH))
        id = f"{100 + names.index(voice)}-{chapter}-{place:04}"
        add_utterance(directory, id, text.upper(), audio.clip(-1, 1), SAMPLE_RATE)
        number += 1
        length = len(audio) / SAMPLE_RATE
        seconds += length
        yield length


def add_utterance(split: Path, id: str, text: str, audio: np.ndarray, rate: int) -> None:
    """Add an utterance to a split in LibriSpeech's layout. `id`: SPEAKER-CHAPTER-NUMBER.

    `audio`: (samples,) from -1 to 1, which is written in 16 bits. `rate`: in Hz.
    """
    speaker, chapter, _ = id.split("-")
    folder = split / speaker / chapter
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"{id}.flac", audio, rate)
    with open(folder / f"{speaker}-{chapter}.trans.txt", "a") as file:
        file.write(f"{id} {text}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 and one line where the corpus can't be spoken."""
    parser = argparse.ArgumentParser(
        prog="python -m dynsize.spoken", description="Speaks the embedded corpus with espeak-ng."
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="written by this command")
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with reported(NAME, "stopped; nothing is left of the corpus"):
        speak_corpus(options.directory, parent=options.parent)


if __name__ == "__main__":
    main()
