"""From a corpus on disk to utterances.

Each kind of corpus has one reader, which yields an `Entry` for each utterance that its lists name.
The readers share `lists.py`; `manifests.py` is the reader of JSON. The length of the audio
(`audio.py`), the checks and the spelling of the text (`text.py`) are the same for all.
"""

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from dynsize.audio import Header, headers, read_samples
from dynsize.config import Config
from dynsize.lists import (
    Entry,
    audio_files,
    contents,
    lines,
    missing,
    names_in,
    no_audio,
    placed,
    seconds,
    table,
    walk,
    without_ending,
)
from dynsize.manifests import manifest
from dynsize.spoken import spoken_corpus
from dynsize.text import clean, clean_notation, parse_stm, shown, without_unknown

OVERSHOOT = 0.5  # seconds that a segment may end after its file, where lists are rounded
UNREADABLE = "audio that can't be read"
NO_WORDS = "no words are left"
CHANNELS = {"1": 0, "A": 0, "a": 0, "2": 1, "B": 1, "b": 1}  # as STMs name them


class Utterance(NamedTuple):
    """One utterance: its words, and its span of one channel of an audio file."""

    id: str
    path: str
    text: str
    samples: int  # at the configuration's sample rate
    span: tuple[int, int]  # first sample, and the one after the last, at the file's rate
    rate: int  # of the file, in Hz
    channel: int = 0
    speaker: str = ""
    # What is scored, where it is not simply `text`: words with sclite's notation. `{ a / b c / @ }`
    # are alternatives (@: no word), `(uh)` is a word that may be missing. Split at spaces.
    reference: str = ""


@dataclass
class Corpus:
    """Some splits of a corpus."""

    utterances: list[Utterance] = field(default_factory=list)
    # reason → id → what exactly, with the file
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)  # what was changed in texts → how often
    kinds: dict[str, str] = field(default_factory=dict)  # split → kind
    # What the tokenizer says: the highest rate of labels a second and whose it is, and how many
    # texts its units spell otherwise, with an example.
    densest: tuple[float, str] = (0.0, "")
    respelled: tuple[int, str] = (0, "")

    def leave_out(self, reason: str, name: str, what: str) -> None:
        self.left_out.setdefault(reason, {})[name] = what


def corpus_root(config: Config) -> Path:
    """Return the directory of the configured corpus; speaks the embedded one if it is missing."""
    return spoken_corpus() if config.corpus == "spoken" else Path(os.path.abspath(config.corpus))


def read_corpus(config: Config, splits: Sequence[str], flag: str = "--split") -> Corpus:
    """Return the utterances of splits, each split sorted by id, and what was left out.

    The split `A+B` is the splits A and B. `flag`: the one that names the splits, for messages.

    Raises ValueError, with file and line, for no corpus, a missing or empty split, lines that don't
    follow their format, an utterance without a text, an id that a split has twice, missing audio,
    and several channels of which none is chosen.
    """
    root = corpus_root(config)
    if not root.is_dir():
        raise ValueError(f"--corpus {root}: no such directory; it names a corpus, or is 'spoken'")
    corpus = Corpus()
    listed: list[tuple[Path, list[Entry]]] = []
    for split in "+".join(splits).split("+"):
        kind, source, reader = recognise(root, split, config.corpus_kind, flag)
        corpus.kinds[split] = kind
        bar = tqdm(reader(source, corpus), split, unit="utt", delay=2, leave=False, disable=None)
        listed.append((source, list(bar)))
    found, faults = headers((entry.path for _, entries in listed for entry in entries), root)
    for source, entries in listed:
        before = len(corpus.utterances)
        seen: set[str] = set()  # two splits may have the same ids, as clean and noisy speech
        for entry in entries:
            if entry.id in seen:
                raise ValueError(f"{entry.where}: the utterance {entry.id} is there twice")
            seen.add(entry.id)
            if entry.text is None:
                raise ValueError(f"{entry.where}: the utterance {entry.id} has no text")
            add(corpus, entry, found.get(entry.path) or faults[entry.path], config)
        corpus.utterances[before:] = sorted(corpus.utterances[before:], key=attrgetter("id"))
        if len(corpus.utterances) == before:
            raise ValueError(nothing_in(source, corpus))
    return corpus


def nothing_in(source: Path, corpus: Corpus) -> str:
    """Return the message on a split without utterances."""
    for names in corpus.left_out.values():
        for what in names.values():
            return f"{source}: no utterances are left; the first: {what}"
    return f"{source}: no utterances" + (f"; {contents(source)}" if source.is_dir() else "")


def recognise(root: Path, split: str, kind: str, flag: str) -> tuple[str, Path, Callable]:
    """Return the kind of a split, the file that shows it, and its reader."""
    path = Path(split)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{flag} {shown(split)}: names no split; A+B joins splits, and no part may be empty"
        )
    for name, pattern, reader in KINDS:
        source = root / pattern.format(split)
        if kind in ("auto", name) and source.exists():
            return name, source, reader
    raise ValueError(f"{flag} {split}: no such split (--corpus-kind {kind}); {contents(root)}")


def add(corpus: Corpus, entry: Entry, header: Header | Exception, config: Config) -> None:
    """Add an utterance to a corpus, or to what is left out of it."""
    if isinstance(header, FileNotFoundError):
        raise no_audio(entry.where, entry.id, entry.path)
    if isinstance(header, Exception):
        return corpus.leave_out(UNREADABLE, entry.id, str(header))
    span = span_of(entry, header)
    if header.lost and (entry.end or math.inf) > header.samples / header.rate:
        return corpus.leave_out(UNREADABLE, entry.id, f"{entry.path}: {header.lost}")
    if span is None:
        times = f"{entry.start} to {entry.end or 'the last'} s"
        has = f"{entry.path} has {header.samples / header.rate} s"
        return corpus.leave_out(UNREADABLE, entry.id, f"{entry.where}: {times}, but {has}")
    channel = chosen_channel(entry, header)
    raw, unknown = without_unknown(entry.text or "")
    corpus.changes["× <unk> taken out"] += unknown
    text = clean(raw, config.normaliser)
    if not text and (entry.text or "").strip() and not entry.reference:
        return corpus.leave_out(NO_WORDS, entry.id, f"{entry.where}: {shown(entry.text)}")
    spoken = Utterance(
        id="_".join(entry.id.split()),  # one word, as files of hypotheses need it
        path=entry.path,
        text=text,
        samples=round((span[1] - span[0]) * config.sample_rate / header.rate),
        span=span,
        rate=header.rate,
        channel=channel,
        speaker=sys.intern(entry.speaker),
        reference=clean_notation(entry.reference, config.normaliser),
    )
    corpus.utterances.append(spoken)


def span_of(entry: Entry, header: Header) -> tuple[int, int] | None:
    """Return the samples of an utterance in its file; None where the file does not hold them.

    Raises ValueError for an end that is not after the start.
    """
    length = header.samples / header.rate
    if entry.end is not None and entry.start >= entry.end:
        raise ValueError(f"{entry.where}: ends at {entry.end} s, but begins at {entry.start} s")
    end = length if entry.end is None else min(entry.end, length)
    first, last = round(min(entry.start, length) * header.rate), round(end * header.rate)
    if first >= last or (entry.end or 0) > length + OVERSHOOT:
        return None
    return first, last


def chosen_channel(entry: Entry, header: Header) -> int:
    """Return the channel of an utterance. Raises ValueError where it is open, or not there."""
    has = f"{entry.where}: {entry.path} has {header.channels} channels"
    if entry.channel is None and header.channels > 1:
        raise ValueError(f"{has}, of which a manifest or an STM can choose one")
    if entry.channel is not None and entry.channel not in range(header.channels):
        raise ValueError(f"{has}, but no channel {entry.channel!r}; the first one is 0")
    return int(entry.channel or 0)


def read_audio(utterance: Utterance, sample_rate: int, speed: float = 1.0) -> Tensor:
    """Return (samples,) float32 at `sample_rate`, `speed` times as fast, its pitch changed too.

    Raises CorruptAudio where the file doesn't hold what it did when it was listed.
    """
    audio = read_samples(utterance.path, utterance.span, utterance.rate, utterance.channel)
    if utterance.rate * speed != sample_rate:
        audio = soxr.resample(audio, utterance.rate * speed, sample_rate)
    return torch.from_numpy(np.ascontiguousarray(audio))


# The readers. Each takes what its kind is recognised by, and the corpus, for remarks.


def librispeech(split: Path, corpus: Corpus) -> Iterator[Entry]:
    """Read SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID WORDS`, and ID.flac beside."""
    for folder, names in walk(split):
        lists = [f"{folder}/{name}" for name in names if name.endswith(".trans.txt")]
        audio = audio_files(folder, names) if lists else {}
        for where, line in lines(*lists):
            name, *text = line.split(maxsplit=1)
            path = audio.get(name) or missing(where, name, folder)
            yield Entry(where, name, path, "".join(text), name.partition("-")[0])


def stm(folder: Path, corpus: Corpus) -> Iterator[Entry]:
    """Read stm/*.stm and sph/NAME.sph, as of TED-LIUM 2 and Switchboard.

    A line is `NAME CHANNEL SPEAKER START END [<LABEL>] WORDS`.
    """
    sph = folder.parent / "sph"
    audio = audio_files(sph, names_in(sph))
    for where, line in lines(*sorted(folder.glob("*.stm"))):
        if line.startswith(";;"):
            continue
        name, channel, speaker, start, end, raw = [*line.split(maxsplit=5), *6 * [""]][:6]
        if channel not in CHANNELS or not end:
            form = "NAME CHANNEL SPEAKER START END [<LABEL>] WORDS, channel 1, 2, A or B"
            raise ValueError(f"{where}: not {form}: {shown(line)}")
        id = os.path.basename(where)
        if "ignore_time_segment_in_scoring" in raw.lower():
            corpus.leave_out("ignore_time_segment_in_scoring", id, where)
            continue
        words = re.sub(r"^<(?!unk>|na>|sil>)[^<>\s]*>(?!\S)", "", raw, flags=re.IGNORECASE)
        try:
            text, reference = parse_stm(words, corpus.changes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; in {shown(raw)}") from error
        if words.strip() and not text and not reference:
            corpus.leave_out("no words but marks", id, f"{where}: {shown(words)}")
            continue
        path = audio.get(name) or missing(where, name, sph)
        span = seconds(start, where), seconds(end, where)
        yield Entry(where, id, path, text, speaker, *span, CHANNELS[channel], reference)


def common_voice(tsv: Path, corpus: Corpus) -> Iterator[Entry]:
    """Read SPLIT.tsv, whose first line names columns, among them `path` and `sentence`."""
    clips = tsv.parent / "clips"
    audio, columns = audio_files(clips, names_in(clips)), []
    for where, line in lines(tsv):
        values = line.split("\t")
        columns = columns or values
        if not {"path", "sentence"} <= set(columns):
            raise ValueError(f"{where}: no columns path and sentence: {shown(line)}")
        if len(values) != len(columns):
            raise ValueError(f"{where}: not {len(columns)} columns, tabs between: {shown(line)}")
        if values is not columns:
            row = dict(zip(columns, values, strict=True))
            name = without_ending(row["path"])
            path = audio.get(name) or missing(where, name, clips)
            yield Entry(where, name, path, row["sentence"], row.get("client_id", ""))


def kaldi(scp: Path, corpus: Corpus) -> Iterator[Entry]:
    """Read wav.scp, `RECORDING PATH`, and `text`, `UTTERANCE WORDS`, beside it.

    Optional: segments, `UTTERANCE RECORDING START END`, and utt2spk, `UTTERANCE SPEAKER`.
    """
    recordings = table(scp)
    texts, speakers, segments = map(table, map(scp.with_name, ("text", "utt2spk", "segments")))
    whole = {name: (where, f"{name} 0 inf") for name, (where, _) in recordings.items()}
    spans = segments or whole
    has_texts = scp.with_name("text").exists()
    for name, (where, text) in (texts if has_texts else spans).items():
        where, segment = spans.get(name, (where, ""))
        columns = segment.split()
        if len(columns) != 3 or columns[0] not in recordings:
            form = f"{name} has no recording of {scp}, or not RECORDING START END"
            raise ValueError(f"{where}: {form}: {shown(segment)}")
        start, end = columns[1:]
        line, path = recordings[columns[0]]
        if path.endswith("|"):
            advice = "write the audio file's path in its place; most kinds of audio are read"
            raise ValueError(f"{line}: {shown(path)} is a command, which is not run: {advice}")
        yield Entry(
            where,
            name,
            placed(scp, path, line),
            text if has_texts else None,
            speakers.get(name, ("", ""))[1],
            seconds(start, where),
            None if end == "inf" else seconds(end, where),
        )
    for name in spans.keys() - texts if has_texts else ():
        corpus.leave_out("no transcript", name, spans[name][0])


KINDS = (  # kind, what it is recognised by, reader; the first that is there
    ("stm", "{}/stm", stm),
    ("kaldi", "{}/wav.scp", kaldi),
    ("common-voice", "{}.tsv", common_voice),
    ("manifest", "{}.jsonl", manifest),
    ("manifest", "{}.jsonl.gz", manifest),
    ("manifest", "{}.json", manifest),
    ("manifest", "{}.json.gz", manifest),
    ("librispeech", "{}", librispeech),
)
