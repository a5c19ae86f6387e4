"""From a corpus on disk to utterances. Each kind has one reader, which yields what its lists say; the audio's headers,
the checks and the text's normalisation are shared."""

import gc
import json
import math
import os
import re
import signal
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from dynsize import cache
from dynsize.config import Config

ENDINGS = (".flac", ".wav", ".sph", ".mp3")
OVERSHOOT = 0.5  # seconds that a segment may end after its file, at most, where lists were rounded; it is cut there
UNREADABLE = "audio that can't be read"
CHANNELS = {"1": 0, "A": 0, "2": 1, "B": 1}  # as STMs name them
THREADS = 8  # that read headers: most of the time they wait for a disk
MANY = (
    1 << 20
)  # bytes of kept headers, those of some 10,000 files, from which on a process of its own compares them
SECONDS = (0, 1, 2, 5, 10, 15, 20, 35, math.inf)  # edges of the histogram of durations


class Utterance(NamedTuple):
    """One utterance: its words, and its span of one channel of an audio file."""

    id: str
    path: str
    text: str
    samples: int  # at the configuration's sample rate
    span: tuple[int, int]  # first sample, and the one after the last, at the file's own rate
    rate: int  # of the file, in Hz
    channel: int = 0
    speaker: str = ""
    reference: str = ""  # what is scored, in sclite's notation, where it is not just the text


class Entry(NamedTuple):
    """What a line of a corpus, `where` as FILE:NUMBER, says of an utterance."""

    where: str
    id: str
    path: str  # empty: the reader found no audio
    text: str
    speaker: str = ""
    start: float = 0.0  # seconds, as `end`; None: the end of the file
    end: float | None = None
    channel: int | None = None  # from 0; None: none is chosen


@dataclass
class Corpus:
    """Some splits of a corpus."""

    utterances: list[Utterance] = field(default_factory=list)
    left_out: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # why → id → what exactly, with the file
    changes: Counter[str] = field(default_factory=Counter)  # what was changed in texts → how often
    kinds: dict[str, str] = field(default_factory=dict)  # split → kind

    def leave_out(self, why: str, name: str, what: str) -> None:
        self.left_out.setdefault(why, {})[name] = what


class CorruptAudio(ValueError):
    """An audio file that can't be read, or not wholly."""


def read_corpus(root: Path, splits: Sequence[str], config: Config) -> Corpus:
    """The utterances of splits, each split sorted by id, and what was left out. `A+B` is the splits A and B.

    Raises ValueError, with file and line, for no corpus at `root`, a missing or empty split, lines that don't follow
    their format, an id that a split has twice, missing audio, several channels of which none is chosen.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise ValueError(
            f"{root}: no such directory; --corpus names the directory of a corpus, or 'spoken'"
        )
    corpus = Corpus()
    for split in "+".join(splits).split("+"):
        corpus.kinds[split], source, reader = recognise(root, split, config.corpus_kind)
        before, seen = (
            len(corpus.utterances),
            set(),
        )  # two splits may have the same ids: clean and noisy, say
        for entry, header in with_headers(reader(source, corpus), source):
            if entry.id in seen:
                raise ValueError(f"{entry.where}: the utterance {entry.id} is there twice")
            seen.add(entry.id)
            add(corpus, entry, header, config)
        corpus.utterances[before:] = sorted(corpus.utterances[before:], key=attrgetter("id"))
        if len(corpus.utterances) == before:
            faults = [fault for names in corpus.left_out.values() for fault in names.values()]
            raise ValueError(
                f"{source}: no utterances{' are left: ' if faults else ''}{''.join(faults[:1])}"
            )
    return corpus


def recognise(root: Path, split: str, kind: str) -> tuple[str, Path, Callable]:
    """The kind of a split, what it is recognised by, and its reader. ValueError where there is none."""
    for name, pattern, reader in KINDS:
        source = root / pattern.format(split)
        if kind in ("auto", name) and source.exists():
            return name, source, reader
    there = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
    raise ValueError(f"{root / split}: no such split (--corpus-kind {kind}); in {root} is {there}")


def add(corpus: Corpus, entry: Entry, header: tuple[int, ...] | Exception, config: Config) -> None:
    """Adds an utterance to a corpus, or to what is left out of it; `header`: as `with_headers` gives it."""
    where, id, path, raw, speaker, start, end, channel = entry
    if end is not None and start >= end:
        raise ValueError(f"{where}: ends at {end} s, but begins at {start} s")
    if isinstance(header, FileNotFoundError):
        raise ValueError(
            f"{where}: the utterance {id} has no audio; {path or 'a file of its name'} doesn't exist"
        )
    if isinstance(header, Exception):
        return corpus.leave_out(UNREADABLE, id, f"{path}: not an audio file: {header}")
    _, _, samples, rate, channels = header
    if channels > 1 and channel is None:
        raise ValueError(
            f"{where}: {path} has {channels} channels; a manifest or an STM can choose one"
        )
    if channel is not None and channel not in range(channels):
        raise ValueError(
            f"{where}: {path} has no channel {channel!r}: the first of {channels} is 0"
        )
    length = samples / rate
    last = samples if end is None or end > length else round(end * rate)
    if start > length or (first := round(start * rate)) >= last or (end or 0) > length + OVERSHOOT:
        what = f"{where}: {start} to {end or 'the last'} s, but {path} has {length} s"
        return corpus.leave_out(UNREADABLE, id, what)
    text = NORMALISERS[config.normaliser](raw).strip()
    if "  " in text or not text.isprintable():  # which takes half the time of splitting every text
        text = " ".join(text.split())
    if not text and raw.strip():
        return corpus.leave_out("no words are left", id, f"{where}: {raw!r}")
    samples = round((last - first) * config.sample_rate / rate)
    spoken = Utterance(
        id, path, text, samples, (first, last), rate, int(channel or 0), sys.intern(speaker)
    )
    corpus.utterances.append(spoken)


# The readers. Each takes what its kind is recognised by, and the corpus, for remarks.


def librispeech(split: Path, corpus: Corpus) -> Iterator[Entry]:
    """SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID WORDS`, and ID.flac beside it."""
    for folder, folders, files in os.walk(split):
        audio = audio_files(folder, folders + files)
        for where, line in lines(
            *(f"{folder}/{name}" for name in files if name.endswith(".trans.txt"))
        ):
            name, *text = line.split(maxsplit=1)
            yield Entry(where, name, audio.get(name, ""), "".join(text), name.partition("-")[0])


def stm(folder: Path, corpus: Corpus) -> Iterator[Entry]:
    """TED-LIUM 2, Switchboard: stm/*.stm with lines `NAME CHANNEL SPEAKER START END [<LABEL>] WORDS`, sph/NAME.sph."""
    audio = audio_files(folder.parent / "sph")
    for where, line in lines(*folder.glob("*.stm")):
        if line.startswith(";;"):
            continue
        name, channel, speaker, start, end, raw = [*line.split(maxsplit=5), *6 * [""]][:6]
        if channel not in CHANNELS or not end:
            raise ValueError(
                f"{where}: not NAME CHANNEL SPEAKER START END [<LABEL>] WORDS, channel 1, 2, A, B: {line}"
            )
        text, unknown = re.subn(r"<unk>|<NA>", " ", re.sub(r"^<(?!unk>)[^>]*>(?!\S)", "", raw))
        text, joined = re.subn(
            r"(?<=\S)\s+('(?:s|re|ve|ll|d|m|t))(?!\S)", r"\1", text
        )  # it 's → it's
        corpus.changes.update(
            {"× <unk> or <NA> taken out": unknown, "× words joined, as it 's → it's": joined}
        )
        id = os.path.basename(where)
        if "ignore_time_segment_in_scoring" in text.lower():
            corpus.leave_out("ignore_time_segment_in_scoring", id, where)
        elif unknown and not text.strip():
            corpus.leave_out("no words but <unk> or <NA>", id, where)
        else:
            span = seconds(start, where), seconds(end, where)
            yield Entry(where, id, audio.get(name, ""), text, speaker, *span, CHANNELS[channel])


def common_voice(tsv: Path, corpus: Corpus) -> Iterator[Entry]:
    """SPLIT.tsv with a line of column names, among them `path` and `sentence`; clips/PATH."""
    audio, columns = audio_files(tsv.parent / "clips"), []
    for where, line in lines(tsv):
        values = line.split("\t")
        row = dict(zip(columns or values, values, strict=False))
        if len(values) != len(columns or values) or not {"path", "sentence"} <= row.keys():
            raise ValueError(
                f"{where}: not {columns or 'the columns path and sentence'}, tabs between them: {line}"
            )
        if columns:
            name = row["path"].removesuffix(".mp3")
            yield Entry(where, name, audio.get(name, ""), row["sentence"], row.get("client_id", ""))
        columns = columns or values


def manifest(file: Path, corpus: Corpus) -> Iterator[Entry]:
    """NeMo's lines of JSON: `audio_filepath` and `text`, if need be `offset` and `duration` in seconds, `speaker`,
    `channel` (from 0)."""
    for where, line in lines(file):
        try:
            row = json.loads(line)
            path, text, speaker = row["audio_filepath"], row["text"], str(row.get("speaker") or "")
            (path + text + speaker).encode()  # JSON can hold halves of characters
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{where}: not JSON with the strings audio_filepath and text: {error!r}"
            ) from error
        start, length, channel = (
            seconds(row.get("offset") or 0, where),
            row.get("duration"),
            row.get("channel"),
        )
        end = None if length is None else start + seconds(length, where)
        yield Entry(
            where,
            os.path.basename(where),
            placed(file, path, where),
            text,
            speaker,
            start,
            end,
            channel,
        )


def kaldi(scp: Path, corpus: Corpus) -> Iterator[Entry]:
    """wav.scp `RECORDING PATH`, text `UTTERANCE WORDS`, and if they are there segments `UTTERANCE RECORDING START END`
    and utt2spk `UTTERANCE SPEAKER`."""
    recordings, texts = table(scp), table(scp.with_name("text"))
    speakers, segments = (
        table(path) if path.exists() else {} for path in map(scp.with_name, ("utt2spk", "segments"))
    )
    spans = segments or {name: (where, f"{name} 0 inf") for name, (where, _) in recordings.items()}
    for name, (where, text) in texts.items():
        where, segment = spans.get(name, (where, ""))
        if len(columns := segment.split()) != 3 or columns[0] not in recordings:
            raise ValueError(
                f"{where}: {name} has no recording of {scp}, or not RECORDING START END: {segment!r}"
            )
        start, end = (
            seconds(columns[1], where),
            None if columns[2] == "inf" else seconds(columns[2], where),
        )
        line, path = recordings[columns[0]]
        if path.endswith("|"):
            raise ValueError(f"{line}: {path} is a command; only paths of audio files are read")
        yield Entry(
            where, name, placed(scp, path, line), text, speakers.get(name, ("", ""))[1], start, end
        )
    for name in spans.keys() - texts:
        corpus.leave_out("no transcript", name, spans[name][0])


KINDS = (  # kind, what it is recognised by, reader; the first that is there
    ("stm", "{}/stm", stm),
    ("kaldi", "{}/wav.scp", kaldi),
    ("common-voice", "{}.tsv", common_voice),
    ("manifest", "{}.jsonl", manifest),
    ("manifest", "{}.json", manifest),
    ("librispeech", "{}", librispeech),
)


# What readers share.


def lines(*paths: Path | str) -> Iterator[tuple[str, str]]:
    """The lines of UTF-8 files that are not blank, each after its place, FILE:NUMBER."""
    for path in map(os.fspath, paths):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode().removeprefix("\ufeff").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}:{number}: not UTF-8 text: {error}") from error
                if text and not text.isspace():
                    yield f"{path}:{number}", text


def table(path: Path) -> dict[str, tuple[str, str]]:
    """The lines of a file, `KEY VALUE`, by key: FILE:NUMBER, value."""
    found: dict[str, tuple[str, str]] = {}
    for where, line in lines(path):
        key, *value = line.split(maxsplit=1)
        if found.setdefault(key, (where, "".join(value)))[0] != where:
            raise ValueError(f"{where}: {key} is there twice, first in {found[key][0]}")
    return found


def audio_files(folder: Path | str, names: Sequence[str] | None = None) -> dict[str, str]:
    """The audio files in a directory, by their names without ending: no name that a list has can lead out of it."""
    names = sorted(
        names or os.listdir(folder), reverse=True
    )  # of several endings, the last one stays: .flac
    return {name.rpartition(".")[0]: f"{folder}/{name}" for name in names if name.endswith(ENDINGS)}


def placed(file: Path, name: str, where: str) -> str:
    """A path that the user wrote in a file: an absolute one, or one inside the file's directory."""
    folder = os.path.dirname(file)
    path = os.path.normpath(os.path.join(folder, name))
    if "\0" in name or not (os.path.isabs(name) or path.startswith(os.path.join(folder, ""))):
        raise ValueError(
            f"{where}: {name!r} is not inside {folder}; write an absolute path if it is meant"
        )
    return path


def seconds(value: object, where: str) -> float:
    """A time, given as a number or its digits."""
    try:
        if 0 <= (time := float(value)) < math.inf:
            return time
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: {value!r} is not a time in seconds")


def plain(text: str) -> str:
    """Lower case, and of the rest only letters with their marks, digits, and apostrophes inside words."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    for character in set(text):
        if unicodedata.category(character)[0] not in "LMN" and character != "'":
            text = text.replace(character, " ")
    return " ".join(word.strip("'") for word in text.split())


NORMALISERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": str.lower,
    "upper": str.upper,
    "plain": plain,
}


def with_headers(
    entries: Iterator[Entry], source: Path
) -> Iterator[tuple[Entry, tuple[int, ...] | Exception]]:
    """Each entry with its audio file's size in bytes, time in ns, samples of a channel, rate and channels, or with why
    they can't be told. What was read for `source` before is read again only from files whose size or time differs."""
    kept = cache.user_cache() / f"durations-{sha256(os.fsencode(source)).hexdigest()[:16]}"
    collecting = gc.isenabled()
    gc.disable()  # hundreds of thousands of objects, all in use: the search for garbage takes a quarter of the time
    try:
        content = cache.read(kept)
        if len(content) > MANY:
            beside = ProcessPoolExecutor(
                1, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
            )
        else:
            beside = ThreadPoolExecutor(
                1
            )  # starts at once, but takes longer to get its turn than the disk to answer
        with beside:
            outdated = beside.submit(changed, content)
            headers = kept_headers(content)
            listed = list(tqdm(entries, "listing", leave=False, unit=" utterances", delay=2))
            for path in outdated.result():
                del headers[path]
        new = dict.fromkeys(
            entry.path for entry in listed if entry.path not in headers
        )  # each once, in their order
        faults = read_headers(list(new), headers, kept)
        yield from ((entry, headers.get(entry.path) or faults[entry.path]) for entry in listed)
    finally:
        if collecting:
            gc.enable()


def kept_headers(content: bytes) -> dict[str, tuple[int, ...]]:
    """What `read_headers` kept; nothing where it did not."""
    paths, *columns = json.loads(
        content or "[[]]"
    )  # six long lists are read faster than one for each file
    return dict(zip(paths, zip(*columns, strict=True), strict=True))


def changed(content: bytes) -> list[str]:
    """The files that are gone, or no longer of the size and time that were kept."""

    def same(path: str, size: int, time: int) -> bool:
        try:
            status = os.stat(path)
        except OSError:
            return False
        return size == status.st_size and time == status.st_mtime_ns

    return [
        path
        for path, (size, time, *_) in kept_headers(content).items()
        if not same(path, size, time)
    ]


def read_headers(
    paths: Sequence[str], headers: dict[str, tuple[int, ...]], kept: Path
) -> dict[str, Exception]:
    """Adds to the headers those of some files, and keeps all, also when it is interrupted. Returns which can't be read,
    and why."""
    faults: dict[str, Exception] = {}
    before = len(headers)
    try:
        with ThreadPool(THREADS) as pool:
            bar = tqdm(
                pool.imap(read_header, paths, 100),
                "headers",
                len(paths),
                leave=False,
                unit=" files",
                delay=2,
            )
            for path, found in zip(paths, bar, strict=True):
                (faults if isinstance(found, Exception) else headers)[path] = found
    finally:
        if len(headers) > before:
            names, rows = zip(*sorted(headers.items()), strict=True)
            cache.write(kept, json.dumps([names, *zip(*rows, strict=True)]).encode())
    return faults


def read_header(path: str) -> tuple[int, ...] | Exception:
    """Of an audio file: size in bytes, time in ns, samples of a channel, rate, channels; or why they can't be told."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return CorruptAudio("not a file")  # opening a pipe would wait
        with soundfile.SoundFile(path) as file:
            return status.st_size, status.st_mtime_ns, file.frames, file.samplerate, file.channels
    except (
        soundfile.SoundFileError,
        OSError,
        TypeError,
    ) as error:  # TypeError: an ending of files without header
        return error


def read_audio(utterance: Utterance, sample_rate: int, speed: float = 1.0) -> Tensor:
    """(samples,) float32 at `sample_rate`, spoken `speed` times as fast, with the pitch changed alike.

    Raises CorruptAudio where the file doesn't hold what its header promised.
    """
    start, stop = utterance.span
    try:
        audio, rate = soundfile.read(
            utterance.path, dtype="float32", start=start, stop=stop, always_2d=True
        )
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise CorruptAudio(f"{utterance.path}: damaged audio: {error}") from error
    if len(audio) != stop - start or rate != utterance.rate or audio.shape[1] <= utterance.channel:
        found = f"{len(audio)} of {stop - start} samples can be read, {rate} Hz, {audio.shape[1]} channels"
        raise CorruptAudio(f"{utterance.path}: {found}: truncated, or changed since it was listed")
    audio = audio[:, utterance.channel]
    if not np.isfinite(audio).all():
        raise CorruptAudio(f"{utterance.path}: samples that are no numbers")
    if rate * speed != sample_rate:
        audio = soxr.resample(audio, rate * speed, sample_rate)
    return torch.from_numpy(np.ascontiguousarray(audio))


def summary(corpus: Corpus, config: Config) -> str:
    """For people: what was recognised, how much it is, how long utterances are, what was left out and why."""
    lengths = [utterance.samples / config.sample_rate for utterance in corpus.utterances]
    speakers = len({utterance.speaker for utterance in corpus.utterances} - {""})
    lost = sum(map(len, corpus.left_out.values()))
    bars = zip(pairwise(SECONDS), np.histogram(lengths, SECONDS)[0], strict=True)
    rows = [
        f"{config.corpus}: "
        + ", ".join(f"{split} ({kind})" for split, kind in corpus.kinds.items())
    ]
    rows.append(
        f"{len(lengths)} utterances, {sum(lengths) / 3600:.2f} hours, {speakers} speakers; {lost} left out"
    )
    rows.append(
        "seconds " + ", ".join(f"{low} to {high}: {count}" for (low, high), count in bars if count)
    )
    rows += [f"{count} {what}" for what, count in corpus.changes.items() if count]
    for why, names in corpus.left_out.items():
        rows += [
            f"left out: {len(names)} × {why}, as {name}: {what}"
            for name, what in [*names.items()][:1]
        ]
    return "\n".join(rows)
