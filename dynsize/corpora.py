"""From a corpus on disk to utterances, and what is told of them before a training.

Each kind of corpus has a reader in `readers.py`, which yields an `Entry` for each utterance that
its lists name. The length of the audio (`audio.py`), the checks and the spelling of the text
(`text.py`) are the same for all.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from dynsize.audio import CorruptAudio, Header, headers, read_samples
from dynsize.config import Config
from dynsize.readers import LAYOUTS, Entry, Notes, contents
from dynsize.spoken import spoken_corpus
from dynsize.text import UNKNOWN_WORD, clean, counted, printable, quoted
from dynsize.wer import Reference

OVERSHOOT = 0.5  # seconds that a segment may end after its file, where lists are rounded
UNREADABLE = "audio that can't be read"
NO_WORDS = "no words are left"
MOST_SHOWN = 60  # characters that are told with their counts


class Utterance(NamedTuple):
    """One utterance: its words, and its span of one channel of an audio file."""

    id: str  # one printable word without parentheses, as files of hypotheses need it
    path: str
    text: str
    samples: int  # at the configuration's sample rate
    span: tuple[int, int]  # first sample, and the one after the last, at the file's rate
    rate: int  # of the file, in Hz
    channel: int = 0
    speaker: str = ""
    reference: Reference = ()  # what is scored, where it has alternatives and is not simply `text`


@dataclass
class Corpus(Notes):
    """Some splits of a corpus."""

    utterances: list[Utterance] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)  # split → kind
    respelled: dict[str, str] = field(default_factory=dict)  # text → what the tokenizer makes of it


def corpus_root(config: Config) -> Path:
    """Return the directory of the configured corpus; speaks the embedded one if it is missing."""
    if config.corpus == "spoken":
        return spoken_corpus()
    return Path(os.path.abspath(config.corpus))


def read_corpus(config: Config, splits: Sequence[str], flag: str = "--split") -> Corpus:
    """Return the utterances of splits, each split sorted by id, and what was left out.

    The split `A+B` is the splits A and B. An id that an earlier split has, too, gets its split's
    name before it. `flag`: the one that names the splits, for messages.

    Raises ValueError, with file and line, for no corpus, a missing or empty split, lines that don't
    follow their format, an utterance without a text, an id that a split has twice, missing audio,
    and several channels of which none is chosen.
    """
    root = corpus_root(config)
    if not root.is_dir():
        raise ValueError(f"--corpus {root}: no such directory; it names a corpus, or is 'spoken'")
    corpus = Corpus()
    listed: list[tuple[str, Path, list[Entry]]] = []
    for split in "+".join(splits).split("+"):
        kind, source, reader = recognise(root, split, config.corpus_kind, flag)
        corpus.kinds[split] = kind
        options = dict(unit="utt", delay=2, leave=False, disable=None)
        entries = list(tqdm(reader(source, corpus), split, **options))
        listed.append((split, source, entries))
    paths = [entry.path for *_, entries in listed for entry in entries]
    found = headers(paths, root)
    seen: set[str] = set()
    for split, source, entries in listed:
        utterances: dict[str, Utterance | None] = {}  # by id
        for entry in entries:
            id = printable(re.sub(r"[\s()]+", "_", entry.id.strip()))
            if id in utterances:
                raise ValueError(f"{entry.where}: the utterance {id} is there twice")
            name = f"{split}-{id}" if id in seen else id
            header = found[entry.path]
            utterances[id] = usable(entry._replace(id=name), header, corpus, config)
        seen.update(utterances)
        good = filter(None, utterances.values())
        corpus.utterances += sorted(good, key=attrgetter("id"))
        if not any(utterances.values()):
            first = corpus.first_left_out()
            there = contents(source if source.is_dir() else source.parent)
            told = f" are left; the first: {first}" if first else f"; {there}"
            raise ValueError(f"{source}: no utterances{told}")
    return corpus


def recognise(root: Path, split: str, kind: str, flag: str) -> tuple[str, Path, Callable]:
    """Return the kind of a split, the file that shows it, and its reader."""
    for name, pattern, reader in LAYOUTS:
        source = root / pattern.format(split)
        if kind in ("auto", name) and source.exists():
            return name, source, reader
    raise ValueError(f"{flag} {split}: no such split (--corpus-kind {kind}); {contents(root)}")


def usable(
    entry: Entry, header: Header | CorruptAudio, corpus: Corpus, config: Config
) -> Utterance | None:
    """Return an utterance, or None where it is left out of the corpus, which then says why."""
    try:
        if isinstance(header, CorruptAudio):
            raise header
        first, last = span_of(entry, header)
    except CorruptAudio as error:
        return corpus.leave_out(UNREADABLE, entry.id, str(error))
    channel = chosen_channel(entry, header)
    raw, unknown = UNKNOWN_WORD.subn(" ", entry.text)
    corpus.changes["× <unk> taken out"] += unknown
    text = clean(raw, config.normaliser)
    reference = [
        [clean(" ".join(words), config.normaliser).split() for words in alternatives]
        for alternatives in entry.reference
    ]
    has_choice = any(len(alternatives) > 1 for alternatives in reference)
    if not text and entry.text.strip() and not has_choice:
        return corpus.leave_out(NO_WORDS, entry.id, f"{entry.where}: {quoted(entry.text)}")
    return Utterance(
        id=entry.id,
        path=entry.path,
        text=text,
        samples=round((last - first) * config.sample_rate / header.rate),
        span=(first, last),
        rate=header.rate,
        channel=channel,
        speaker=printable(entry.speaker),
        reference=reference if has_choice else (),
    )


def span_of(entry: Entry, header: Header) -> tuple[int, int]:
    """Return the first sample of an utterance in its file, and the one after the last.

    Raises ValueError for an end that is not after the start, CorruptAudio where the file lacks
    samples.
    """
    scale, unit = header.rate, "s"
    if entry.in_samples:
        scale, unit = 1, "samples"
    start = entry.start * scale
    end = header.samples if entry.end is None else entry.end * scale
    if entry.end is not None and start >= end:
        at = f"ends at {entry.end:g} {unit}, but begins at {entry.start:g} {unit}"
        raise ValueError(f"{entry.where}: {at}")
    if header.lost and (entry.end is None or end > header.samples):
        raise CorruptAudio(f"{entry.path}: {header.lost}")
    first = round(min(start, header.samples))
    last = round(min(end, header.samples))
    if first >= last or end > header.samples + OVERSHOOT * header.rate:
        asked = f"{entry.start} to {entry.end or 'the last'} {unit}"
        has = f"{entry.path} has {header.samples / scale} {unit}"
        raise CorruptAudio(f"{entry.where}: {asked}, but {has}")
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


# What is told of a corpus before a training: its size, its texts, and what is odd.


def summary(corpus: Corpus, config: Config, others: Mapping[str, Corpus | str]) -> str:
    """Return what a training corpus holds, then what is odd in it and in the other splits.

    `others`: dev and test splits by name; a text instead of a corpus says why there is none.
    """
    counts = characters_of(corpus)
    kinds = ", ".join(f"{split} ({kind})" for split, kind in corpus.kinds.items())
    rows = [f"{config.corpus}: {kinds}", *amounts(corpus, config)]
    rows.append(f"characters {with_counts(counts)}")
    rows += [f"note: {remark}" for remark in remarks(corpus, counts, config)]
    for name, other in others.items():
        if isinstance(other, str):
            rows.append(f"note: {name} is not checked: {other}")
            continue
        rows.append(f"{name}: {size_of(other, config)}")
        if new := only(characters_of(other), lambda c: c not in counts):
            told = f"characters that training never had, {with_example(new, other)}"
            rows.append(f"note: {name}: {told}; --normaliser lower or plain may change them")
    return "\n".join(map(printable, rows))


def size_of(corpus: Corpus, config: Config) -> str:
    """Return how many utterances there are, and how long they are together."""
    samples = sum(utterance.samples for utterance in corpus.utterances)
    hours = samples / config.sample_rate / 3600
    return f"{counted(len(corpus.utterances), 'utterance')}, {hours:.2f} hours"


def amounts(corpus: Corpus, config: Config) -> Iterator[str]:
    """Yield lines on how much there is, how long utterances are, and what was left out."""
    speakers = {utterance.speaker for utterance in corpus.utterances} - {""}
    lost = sum(map(len, corpus.left_out.values()))
    size = size_of(corpus, config)
    yield f"{size}, {counted(len(speakers), 'speaker')}; {lost} left out"
    longest = max(corpus.utterances, key=attrgetter("samples"))
    lengths = [utterance.samples / config.sample_rate for utterance in corpus.utterances]
    shares = (0, 0.5, 0.99, 1)
    least, middle, usual, most = np.quantile(lengths, shares, method="lower")
    told = f"half have at most {middle:.1f}, 99% at most {usual:.1f}"
    yield f"seconds {least:.1f} to {most:.1f} ({longest.id}), {told}; see --max-seconds"
    for what, count in corpus.changes.items():
        if count:
            yield f"{count} {what}"
    for reason, names in corpus.left_out.items():
        name, what = next(iter(names.items()))
        yield f"left out: {len(names)} × {reason}, as {name}: {what}"


def remarks(corpus: Corpus, counts: Counter[str], config: Config) -> Iterator[str]:
    """Yield what is odd in a training corpus, whose characters are counted."""
    if slow := [one for one in corpus.utterances if one.rate < 2 * config.highest_hz]:
        what = f"{counted(len(slow), 'utterance')} of {slow[0].rate} Hz, as {slow[0].id}"
        yield f"{what}: nothing is above {slow[0].rate / 2:g} Hz; see --highest-hz, --sample-rate"
    capitals = only(counts, str.isupper)
    small = only(counts, str.islower)
    if capitals and small:
        rarer = min(capitals, small, key=Counter.total)
        yield f"mixed case, {with_example(rarer, corpus)}; --normaliser lower makes it one"
    if signs := only(counts, lambda c: c != "'" and unicodedata.category(c)[0] not in "LM"):
        advice = "--normaliser plain takes signs out; numbers are learned better spelled out"
        yield f"signs and digits, {with_example(signs, corpus)}; {advice}"
    if empty := [utterance.id for utterance in corpus.utterances if not utterance.text]:
        yield f"{counted(len(empty), 'empty transcript')}, as {empty[0]}, to train silence"
    for text, spelled in list(corpus.respelled.items())[:1]:
        texts = counted(len(corpus.respelled), "text")
        example = f"{quoted(text)} as {quoted(spelled)}"
        yield f"the tokenizer spells {texts} otherwise, {example}; it is scored as an error"


def characters_of(corpus: Corpus) -> Counter[str]:
    """Return how often the texts have each character; spaces are not counted."""
    counts: Counter[str] = Counter()
    for utterance in corpus.utterances:
        counts.update(utterance.text)
    del counts[" "]
    return counts


def only(counts: Counter[str], wanted: Callable[[str], bool]) -> Counter[str]:
    """Return the counts of the characters that are wanted."""
    return Counter({character: n for character, n in counts.items() if wanted(character)})


def with_counts(counts: Counter[str]) -> str:
    """Return characters with their counts for a message, the most frequent first."""
    shown = [f"{character} {n}" for character, n in counts.most_common(MOST_SHOWN)]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def with_example(counts: Counter[str], corpus: Corpus) -> str:
    """Return characters with their counts, and the first text with one of them."""
    texts = ((utterance.id, utterance.text) for utterance in corpus.utterances)
    id, text = next((id, text) for id, text in texts if not counts.keys().isdisjoint(text))
    return f"{with_counts(counts)}, as in {id}, {quoted(text)}"
