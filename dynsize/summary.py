"""What a corpus holds, told to people before a training: its size, its texts, and what is odd."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import numpy as np

from dynsize.config import Config
from dynsize.corpora import Corpus, Utterance
from dynsize.features import window_and_hop
from dynsize.terminal import printable
from dynsize.text import counted, plain, shown

SECONDS = (0, 1, 2, 5, 10, 15, 20, 35, 60, math.inf)  # edges of the histogram of durations
MOST_SHOWN = 60  # characters with their counts
MOST_NAMED = 10  # odd characters in one remark
RARE = 3  # occurrences of a character, at most, and at most one in 10,000 characters
MUCH_LONGER = 4  # times the median: an utterance of over a minute that is told


@dataclass
class Characters:
    """The characters of some texts, without spaces: how often each is there, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, Utterance] = field(default_factory=dict)

    def like(self, wanted: Callable[[str], bool]) -> list[str]:
        """Return the characters that are wanted, the most frequent first."""
        return [character for character, _ in self.counts.most_common() if wanted(character)]


def characters_of(utterances: Iterable[Utterance]) -> Characters:
    """Return the characters of the utterances' texts."""
    found = Characters()
    for utterance in utterances:
        found.counts.update(utterance.text)
        for character in set(utterance.text) - found.first.keys():
            found.first[character] = utterance
    del found.counts[" "]
    return found


def summary(corpus: Corpus, config: Config, others: Mapping[str, Corpus | str]) -> str:
    """Return what a training corpus holds, then what is odd in it and in the other splits.

    `others`: dev and test splits by name; a text instead of a corpus says why there is none.
    """
    characters = characters_of(corpus.utterances)
    kinds = ", ".join(f"{split} ({kind})" for split, kind in corpus.kinds.items())
    rows = [f"{config.corpus}: {kinds}", *amounts(corpus, config)]
    shares = [f"{c} {n}" for c, n in characters.counts.most_common(MOST_SHOWN)]
    more = len(characters.counts) - len(shares)
    rows.append("characters " + ", ".join(shares) + (f" and {more} more" if more > 0 else ""))
    rows += [f"note: {remark}" for remark in remarks(corpus, characters, config)]
    for name, other in others.items():
        if isinstance(other, str):
            rows.append(f"note: {name} is not checked: {other}")
        else:
            rows.append(f"{name}: {size_of(other.utterances, config)}")
            rows += [f"note: {name}: {remark}" for remark in differences(other, characters)]
    return "\n".join(map(printable, rows))


def amounts(corpus: Corpus, config: Config) -> Iterator[str]:
    """Yield lines on how much there is, how long utterances are, and what was left out."""
    lengths = [utterance.samples / config.sample_rate for utterance in corpus.utterances]
    names = {utterance.speaker for utterance in corpus.utterances} - {""}
    speakers = counted(len(names), "speaker")
    lost = sum(map(len, corpus.left_out.values()))
    yield f"{size_of(corpus.utterances, config)}, {speakers}; {lost} left out"
    bars = zip(pairwise(SECONDS), np.histogram(lengths, SECONDS)[0], strict=True)
    yield "seconds " + ", ".join(f"{low} to {high}: {n}" for (low, high), n in bars if n)
    yield from (f"{count} {what}" for what, count in corpus.changes.items() if count)
    for reason, names in corpus.left_out.items():
        for name, what in [*names.items()][:1]:
            yield f"left out: {len(names)} × {reason}, as {name}: {what}"


def size_of(utterances: list[Utterance], config: Config) -> str:
    """Return how many utterances there are, and how long they are together."""
    seconds = sum(utterance.samples for utterance in utterances) / config.sample_rate
    return f"{counted(len(utterances), 'utterance')}, {duration(seconds)}"


def duration(seconds: float) -> str:
    """Return a duration in hours, in minutes below one hour, in seconds below one minute."""
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def remarks(corpus: Corpus, characters: Characters, config: Config) -> Iterator[str]:
    """Yield what is odd in the texts and durations of a training corpus."""
    capitals, small = characters.like(str.isupper), characters.like(str.islower)
    if capitals and small:
        rarer = min(capitals, small, key=lambda cs: sum(characters.counts[c] for c in cs))
        yield f"mixed case, {named(rarer, characters)}; --normaliser lower makes it one"
    if digits := characters.like(lambda c: unicodedata.category(c)[0] == "N"):
        advice = "a text that spells numbers out, as they are spoken, is learned better"
        yield f"digits, {named(digits, characters)}; {advice}"
    if signs := characters.like(is_sign):
        yield f"punctuation, {named(signs, characters)}; --normaliser plain takes it out"
    most = min(RARE, characters.counts.total() / 10_000)
    letters = characters.like(lambda c: not is_sign(c) and characters.counts[c] <= most)
    if letters:
        yield f"rare characters, {named(letters, characters)}; {help_for(letters)}"
    if empty := [u for u in corpus.utterances if not u.text]:
        yield f"{counted(len(empty), 'empty transcript')}, as {empty[0].id}, to train silence"
    rate, id = corpus.densest
    frames = config.sample_rate / (4 * window_and_hop(config)[1])
    if rate:
        yield f"at most {rate:.1f} labels a second ({id}); the encoder has {frames:.1f} frames"
    count, example = corpus.respelled
    if count:
        texts = counted(count, "text")
        yield f"the tokenizer spells {texts} otherwise, {example}; it is scored as an error"
    yield from longer_than_the_rest(corpus.utterances, config)


def longer_than_the_rest(utterances: list[Utterance], config: Config) -> Iterator[str]:
    """Yield a warning where an utterance is much longer than most: memory grows with it."""
    lengths = [utterance.samples / config.sample_rate for utterance in utterances]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > max(60, MUCH_LONGER * median(lengths)):
        most = math.ceil(np.quantile(lengths, 0.99, method="lower"))
        name = f"{utterances[longest].id} has {duration(lengths[longest])}"
        advice = f"--max-seconds {most} leaves out what is longer than 99% of the utterances"
        yield f"{name}, the median {duration(median(lengths))}, and takes memory; {advice}"


def differences(other: Corpus, training: Characters) -> Iterator[str]:
    """Yield how the texts of a dev or test split differ from those of training."""
    characters = characters_of(other.utterances)
    new = characters.like(lambda c: c not in training.counts)
    cased = [c for c in new if c.swapcase() in training.counts]
    unknown = [c for c in new if c not in cased]
    if cased:
        yield f"other case than in training, {named(cased, characters)}; --normaliser lower"
    if unknown:
        names = named(unknown, characters)
        yield f"characters that training never had, {names}; {help_for(unknown)}"
    if empty := [u for u in other.utterances if not u.text]:
        yield f"{counted(len(empty), 'empty transcript')}, as {empty[0].id}"


def is_sign(character: str) -> bool:
    """Return whether `--normaliser plain` takes a character out."""
    return character != "'" and unicodedata.category(character)[0] not in "LMN"


def help_for(characters: list[str]) -> str:
    """Return advice on characters: what `--normaliser plain` changes of them."""
    helped = [c for c in characters if plain(c) != c.lower()]
    if not helped:
        return "no normaliser changes them"
    return f"--normaliser plain changes {' '.join(helped[:MOST_NAMED])}"


def named(characters: list[str], texts: Characters) -> str:
    """Return characters with their counts, and the first text with the first of them."""
    counts = ", ".join(f"{c} {texts.counts[c]}" for c in characters[:MOST_NAMED])
    more = f" and {len(characters) - MOST_NAMED} more" if len(characters) > MOST_NAMED else ""
    first = texts.first[characters[0]]
    return f"{counts}{more}, as in {first.id}, {shown(first.text)}"
