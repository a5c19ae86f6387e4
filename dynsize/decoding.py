"""Prefix beam search (Hannun et al. 2014), and a language model of words for it.

The language model is an n-gram model in an ARPA file, computed by KenLM (Heafield 2011), which
comes with the extra `lm`: the wheel of flashlight-text has it.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor

from dynsize.config import require_ctc
from dynsize.ctc import BLANK
from dynsize.networks import Facts
from dynsize.supernet import Output
from dynsize.text import clean

LN10 = math.log(10)  # ARPA files hold logarithms to base 10
LM_WEIGHT = 0.5  # of the language model's scores beside the network's
UNKNOWN = "<unk>"
LEAST_SPELLED = 0.1  # share of a language model's words that the labels must be able to spell
MOST_WEIGHT = 1000  # of the weight and the bonus of a language model
LOG_ZERO = -99.0  # what ARPA files write for the logarithm of 0

Emitted = list[tuple[int, int]]  # the labels of an utterance, each with its frame


class ScoredWords(NamedTuple):
    """What a language model says of some words: their score, and its state after them."""

    score: float
    state: object


@dataclass(eq=False)
class Prefix:
    """The labels of an utterance up to now: the last one, and a link to the prefix before it."""

    before: "Prefix | None"
    label: int
    frame: int
    word: bytes = b""  # the unfinished word at its end, in UTF-8
    finished: ScoredWords | None = None  # the words before; None: there is no language model
    ended: ScoredWords | None = None  # all words, as if the unfinished one ended here


class BeamSearch:
    """Prefix beam search (Hannun et al. 2014), whose frames can be given in parts.

    The score of a prefix is the log-probability of its labels, summed over all alignments, plus the
    scores of its words. `beam`: how many prefixes are kept after each frame. `units`: what each of
    the V labels adds to a text, see `Tokenizer`; only a language model, `words`, needs it.

    Each prefix has two log-probabilities, of the alignments that end with a blank and of those that
    end with its last label, because a repeated label is a new one only after a blank.
    """

    def __init__(
        self, beam: int, units: Sequence[bytes] = (), words: "LanguageModel | None" = None
    ) -> None:
        if not isinstance(beam, Integral) or beam < 1:
            raise ValueError(f"beam {beam!r}: must be a whole number, 1 or more")
        self.beam = int(beam)
        self.units = units
        self.words = words
        # (V,): 1 for a label that begins a word
        self.begins = np.array([unit.startswith(b" ") for unit in units], dtype=float)
        nothing = words.start() if words else None
        self.prefixes = [Prefix(None, BLANK, frame=0, finished=nothing, ended=nothing)]
        # Log-probabilities (P,) of the alignments that end with a blank, or with the last label.
        self.after_blank = np.zeros(1)
        self.after_label = np.full(1, -np.inf)
        self.frame = 0
        self.known: WeakValueDictionary[tuple[Prefix, int], Prefix] = WeakValueDictionary()

    def advance(self, log_probs: Tensor) -> None:
        """Advance by the frames of `log_probs`, (T, V)."""
        with np.errstate(invalid="ignore"):  # of −inf − −inf in logaddexp
            for of_frame in log_probs.double().cpu().numpy():
                self.step(of_frame)

    def step(self, log_probs: np.ndarray) -> None:
        """Advance by one frame. `log_probs`: (V,)."""
        last = np.array([prefix.label for prefix in self.prefixes])  # (P,)
        total = np.logaddexp(self.after_blank, self.after_label)
        # the same prefixes
        blank = total + log_probs[BLANK]  # (P,)
        label = self.after_label + log_probs[last]  # (P,)
        # prefixes with one more label; a repeated label needs a blank before it
        longer = total[:, None] + log_probs  # (P, V)
        place = np.arange(len(last))
        longer[place, last] = self.after_blank + log_probs[last]
        longer[:, BLANK] = -np.inf
        self.merge(blank, label, longer)
        scores = np.logaddexp(blank, label)
        scores = np.concatenate([scores, longer.ravel()])  # (P + P · V,)
        if self.words is not None:
            finished = np.array([prefix.finished.score for prefix in self.prefixes])  # (P,)
            ended = np.array([prefix.ended.score for prefix in self.prefixes])
            gain = ended - finished  # of a label that begins a word
            added = finished[:, None] + gain[:, None] * self.begins  # (P, V)
            scores += np.concatenate([finished, added.ravel()])
        best = largest(scores, self.beam)
        self.choose(best, blank, label, longer)
        self.frame += 1

    def merge(self, blank: np.ndarray, label: np.ndarray, longer: np.ndarray) -> None:
        """Where a longer prefix is in the beam already, add its probability there instead."""
        place = {prefix: i for i, prefix in enumerate(self.prefixes)}
        for i, prefix in enumerate(self.prefixes):
            parent = place.get(prefix.before)
            if parent is None:
                continue
            entering = longer[parent, prefix.label]
            if entering > np.logaddexp(blank[i], label[i]):
                prefix.frame = self.frame  # most alignments emit its label only now
            label[i] = np.logaddexp(label[i], entering)
            longer[parent, prefix.label] = -np.inf

    def choose(
        self, best: np.ndarray, blank: np.ndarray, label: np.ndarray, longer: np.ndarray
    ) -> None:
        """Make the next beam of the prefixes and the longer prefixes that `best` names.

        `best`: indices, 0 to P − 1 for the prefixes of the beam, then those of `longer`, (P, V).
        """
        count, vocabulary = longer.shape
        is_old = best < count
        old = best[is_old]
        new = best[~is_old] - count
        longer_ones = [divmod(i, vocabulary) for i in new.tolist()]  # prefix, label
        grown = [self.grown(self.prefixes[i], label) for i, label in longer_ones]
        self.prefixes = [self.prefixes[i] for i in old] + grown
        never = np.full(len(new), -np.inf)
        self.after_blank = np.concatenate([blank[old], never])
        self.after_label = np.concatenate([label[old], longer.ravel()[new]])

    def grown(self, before: Prefix, label: int) -> Prefix:
        """Return the prefix with one more label: the one that exists, or else a new one."""
        prefix = self.known.get((before, label))
        if prefix is not None:
            prefix.frame = self.frame
            return prefix
        prefix = Prefix(before, label, self.frame)
        self.known[before, label] = prefix
        if self.words is not None:
            text = before.word + self.units[label]
            *finished, prefix.word = text.split(b" ")
            prefix.finished = self.words.add(before.finished, finished)
            prefix.ended = self.words.add(prefix.finished, [prefix.word])
        return prefix

    def results(self) -> list[tuple[float, Emitted]]:
        """Return the score and the labels of each prefix of the beam, the best one first."""
        scores = np.logaddexp(self.after_blank, self.after_label)
        if self.words is not None:
            for i, prefix in enumerate(self.prefixes):
                scores[i] += self.words.finish(prefix.ended)
        best = largest(scores, self.beam)
        return [(float(scores[i]), labels_with_frames(self.prefixes[i])) for i in best]


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest scores, the largest first, without −inf."""
    best = np.arange(len(scores))
    if count < len(scores):
        best = np.argpartition(-scores, count)[:count]
    order = np.argsort(-scores[best], kind="stable")
    best = best[order]
    return best[scores[best] > -np.inf]


def labels_with_frames(prefix: Prefix) -> Emitted:
    """Return the labels of a prefix, each with its frame; frames never fall."""
    pairs = []
    frame = prefix.frame
    while prefix.before is not None:
        frame = min(frame, prefix.frame)
        pairs.append((prefix.label, frame))
        prefix = prefix.before
    return pairs[::-1]


@dataclass(frozen=True)
class BeamDecoder:
    """Decodes as an output does, but by beam search. It is for CTC. `begin`: begins a search."""

    begin: Callable[[], BeamSearch]

    def decode(self, emissions: Tensor, lengths: Tensor) -> list[Emitted]:
        """Return the best labels of each utterance, each with the frame in which it is emitted.

        `emissions`: (B, T', V) log-probabilities. `lengths`: (B,) frames.
        """
        utterances = zip(emissions, lengths.tolist(), strict=True)
        return [self.decode_parts([log_probs[:length]]) for log_probs, length in utterances]

    def decode_parts(self, parts: Iterable[Tensor]) -> Emitted:
        """Return the same for one utterance, given by parts (T', V) that follow each other."""
        search = self.begin()
        for log_probs in parts:
            search.advance(log_probs)
        _, best = search.results()[0]
        return best


def decoder_of(
    output: Output, facts: Facts, beam: int, words: "LanguageModel | None"
) -> Output | BeamDecoder:
    """Return what decodes: the output itself, or a beam search where one is asked for.

    `beam`: prefixes that the search keeps; 1 without `words`: none. Raises ValueError for a beam
    that can't be, and where a search is asked for and the output is not CTC.
    """
    begin = partial(BeamSearch, beam, facts.tokenizer.units, words)
    begin()  # raises ValueError for the beam, before anything is decoded
    if beam == 1 and words is None:
        return output
    require_ctc(facts.config, "a beam search or a language model")
    return BeamDecoder(begin)


# The language model.


class LanguageModel:
    """Scores of words, for the beam search: weight · ln P(word | words before) + bonus.

    `letters`: the characters that the network can write. `normaliser`: that of the training, by
    which the model's words are cleaned as transcripts are. A word that the model lacks scores at
    least a tenth of its rarest word's probability. Raises ValueError for a file that is no ARPA
    file, and where the letters spell hardly any of its words, for example because one is in
    capitals and the other is not.
    """

    def __init__(
        self,
        path: Path,
        letters: set[str],
        normaliser: str = "none",
        weight: float = LM_WEIGHT,
        bonus: float = 0.0,
    ) -> None:
        try:
            from flashlight.lib.text.decoder.kenlm import KenLM
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError as error:
            what = "needs flashlight-text, on Python up to 3.12: pip install -e '.[lm]'"
            raise ValueError(f"{path}: {what}") from error
        for name, value in dict(weight=weight, bonus=bonus).items():
            if not (isinstance(value, Real) and abs(value) <= MOST_WEIGHT):
                limits = f"must be from -{MOST_WEIGHT} to {MOST_WEIGHT}"
                raise ValueError(f"{path}: {name} {value}: {limits}")
        self.path, self.weight, self.bonus = path, weight, bonus
        logs = dict(unigrams(path))  # word → log10 of its probability
        self.has_unknown = logs.pop(UNKNOWN, None) is not None
        possible = [log for log in logs.values() if log > LOG_ZERO]
        self.least = min(possible, default=0.0) - 1
        # Cleaned word → the likeliest of the words that become it.
        spelled = {clean(word, normaliser): word for word in sorted(logs, key=logs.get)}
        known = sum(letters.issuperset(word) for word in spelled)
        if known <= LEAST_SPELLED * len(spelled):
            what = f"the network's labels spell {known} of its {len(spelled)} words"
            raise ValueError(f"{path}: {what}; are they written in the other case?")
        dictionary = Dictionary([UNKNOWN, *spelled.values()])
        self.unknown = 0
        self.numbers = {word: number for number, word in enumerate(spelled, start=1)}
        try:
            with silent():
                self.model = KenLM(str(path), dictionary)
        except RuntimeError as error:  # with the place in KenLM's source, then what is wrong
            raise ValueError(f"{path}: {str(error).splitlines()[-1]}") from error

    def start(self) -> ScoredWords:
        """Return the beginning of an utterance, which has no words."""
        return ScoredWords(0.0, self.model.start(False))

    def add(self, before: ScoredWords, words: Iterable[bytes]) -> ScoredWords:
        """Return what was scored with some more words, each in UTF-8; empty ones do not count."""
        score, state = before
        for word in filter(None, words):
            number = self.numbers.get(word.decode(errors="replace"), self.unknown)
            state, log = self.model.score(state, number)
            if number == self.unknown:
                log = max(log, self.least)
            score += self.weight * LN10 * log + self.bonus
        return ScoredWords(score, state)

    def finish(self, before: ScoredWords) -> float:
        """Return the score of a whole utterance, from that of its words."""
        _, log = self.model.finish(before.state)
        return before.score + self.weight * LN10 * log

    def missing(self, texts: Iterable[str], most: float = 1.0) -> str:
        """Return a line that says how many of the texts' words the model lacks.

        Raises ValueError where that is more than the share `most` of them.
        """
        words = Counter(word for text in texts for word in text.split())
        lacking = Counter({word: n for word, n in words.items() if word not in self.numbers})
        told = f"{self.path}: lacks {lacking.total()} of {words.total()} words"
        if lacking:
            told += f", most often {' '.join(word for word, _ in lacking.most_common(3))}"
        if lacking and not self.has_unknown:
            told += "; it has no <unk>, so they count as a tenth as likely as its rarest word"
        if lacking.total() > most * words.total():
            raise ValueError(f"{told}; at most {most:.0%} may be missing")
        return told


@contextmanager
def silent() -> Iterator[None]:
    """Keep from the terminal what compiled code writes to standard error, as KenLM's progress."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def unigrams(path: Path) -> Iterator[tuple[str, float]]:
    """Yield the words of an ARPA file, but for the marks of a sentence, and log10 of each P."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")  # a device may have no end
    inside = False
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                fields = line.split()
                if line.startswith("\\") and inside:
                    return
                if line.startswith("\\1-grams:"):
                    inside = True
                elif inside and len(fields) > 1 and fields[1] not in ("<s>", "</s>"):
                    yield fields[1], float(fields[0])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        what = f"not an ARPA file, or compressed; gunzip -k unpacks it: {error}"
        raise ValueError(f"{path}: {what}") from error
    raise ValueError(f"{path}: not an ARPA file: it has no line \\1-grams: and one after it")
