"""An n-gram language model of words from an ARPA file, computed by KenLM (Heafield 2011).

KenLM comes with the extra `lm`: the wheel of flashlight-text has it.
"""

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dynsize.text import WORD

LM_BEAM = 16  # prefixes, where a language model is given
LM_WEIGHT = 0.5  # of the language model's scores beside the network's
UNKNOWN = "<unk>"
LEAST_SPELLED = 0.1  # share of a language model's words that the labels must be able to spell
TO_NATURAL = math.log(10)  # ARPA files hold logarithms to base 10


class LanguageModel:
    """Scores of words, for the beam search: weight · ln P(word | words before) + bonus.

    `labels`: the network's SentencePiece units. Raises ValueError for a file that is no ARPA file,
    and where its words cannot be spelled with the labels, as in the other case.
    """

    def __init__(self, path: Path, labels: Sequence[str], weight: float, bonus: float) -> None:
        try:
            from flashlight.lib.text.decoder.kenlm import KenLM
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError as error:
            install = "pip install 'dynsize[lm]'"
            raise ValueError(
                f"{path}: a language model needs flashlight-text: {install}"
            ) from error
        if not (math.isfinite(weight) and math.isfinite(bonus)):
            raise ValueError(f"{path}: weight {weight} and bonus {bonus} must be finite numbers")
        self.path, self.weight, self.bonus = path, weight, bonus
        self.known = set(unigrams(path))
        check_spelling(path, self.known, labels)
        dictionary = Dictionary()
        for word in [UNKNOWN, *sorted(self.known)]:
            dictionary.add_entry(word)
        self.numbers = {word: dictionary.get_index(word) for word in self.known}
        self.unknown = dictionary.get_index(UNKNOWN)
        try:
            with silent():
                self.model = KenLM(str(path), dictionary)
        except RuntimeError as error:  # with the place in KenLM's source, then what is wrong
            raise ValueError(f"{path}: {str(error).splitlines()[-1]}") from error

    def start(self) -> object:
        """Return the state at the beginning of an utterance."""
        return self.model.start(False)

    def score(self, state: object, word: str) -> tuple[object, float]:
        """Return the state after a word, and the word's score."""
        state, score = self.model.score(state, self.numbers.get(word, self.unknown))
        return state, self.weight * TO_NATURAL * score + self.bonus

    def finish(self, state: object) -> float:
        """Return the score of the utterance's end."""
        return self.weight * TO_NATURAL * self.model.finish(state)[1]

    def missing(self, texts: Iterable[str], most: float = 1.0) -> str:
        """Return a line that says how many of the texts' words the model lacks.

        Raises ValueError where that is more than the share `most` of them.
        """
        words = Counter(word for text in texts for word in text.split())
        lacking = Counter({word: n for word, n in words.items() if word not in self.known})
        told = f"{self.path}: lacks {lacking.total()} of {words.total()} words"
        if lacking:
            told += f", most often {' '.join(word for word, _ in lacking.most_common(3))}"
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


def unigrams(path: Path) -> Iterator[str]:
    """Yield the words of an ARPA file, without the three that are marks."""
    try:
        with open(path, encoding="utf-8") as file:
            inside = False
            for line in file:
                fields = line.split()
                if line.startswith("\\") and inside:
                    return
                if line.startswith("\\1-grams:"):
                    inside = True
                elif inside and len(fields) > 1 and fields[1] not in ("<s>", "</s>", UNKNOWN):
                    yield fields[1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text, as an ARPA file is") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not inside:
        raise ValueError(f"{path}: not an ARPA file: it has no line \\1-grams:")


def check_spelling(path: Path, words: set[str], labels: Sequence[str]) -> None:
    """Raise ValueError where the labels can spell hardly any word of a language model."""
    letters = set("".join(labels[1:])) - {WORD}

    def share(spelled: Iterable[str]) -> float:
        return sum(letters.issuperset(word) for word in spelled) / max(1, len(words))

    if share(words) >= LEAST_SPELLED:
        return
    for case in (str.upper, str.lower):
        if share(map(case, words)) >= LEAST_SPELLED:
            wanted = f"write them in {case.__name__} case"
            raise ValueError(f"{path}: its words are not in the network's case; {wanted}")
    raise ValueError(f"{path}: the network's labels cannot spell its words")


# The flags of the beam search, the same for every command.


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the beam search."""
    add = parser.add_argument
    add("--beam", type=int, help=f"prefixes that beam search keeps (1; with --lm {LM_BEAM})")
    add("--lm", type=Path, metavar="FILE", help="language model of words: an n-gram ARPA file")
    add("--lm-weight", type=float, metavar="X", help=f"of the language model ({LM_WEIGHT})")
    add("--word-bonus", type=float, metavar="X", help="added to a text's score for each word (0)")


def contradiction(options: argparse.Namespace) -> str:
    """Return what is wrong with these flags, or an empty text."""
    if options.beam is not None and options.beam < 1:
        return f"--beam {options.beam}: must be 1 or more"
    if not options.lm and (options.lm_weight is not None or options.word_bonus is not None):
        return "--lm-weight and --word-bonus are a language model's: --lm names it"
    return ""


def beam_of(options: argparse.Namespace) -> int:
    """Return how many prefixes the beam search keeps; 1 means greedy decoding."""
    return options.beam or (LM_BEAM if options.lm else 1)


def from_flags(options: argparse.Namespace, labels: Sequence[str]) -> LanguageModel | None:
    """Return the language model that the flags name."""
    if not options.lm:
        return None
    weight = LM_WEIGHT if options.lm_weight is None else options.lm_weight
    return LanguageModel(options.lm, labels, weight, options.word_bonus or 0.0)
