"""An n-gram language model of words from an ARPA file, computed by KenLM (Heafield 2011).

KenLM comes with the extra `lm`: the wheel of flashlight-text has it.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dynsize.ctc import WORD

LM_WEIGHT = 0.5  # of the language model's scores beside the network's
UNKNOWN = "<unk>"
MOST_UNKNOWN = 0.2  # share of a text's words that may be missing in a language model
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
        """Returns the state at the beginning of an utterance."""
        return self.model.start(False)

    def score(self, state: object, word: str) -> tuple[object, float]:
        """Returns the state after a word, and the word's score."""
        state, score = self.model.score(state, self.numbers.get(word, self.unknown))
        return state, self.weight * TO_NATURAL * score + self.bonus

    def finish(self, state: object) -> float:
        """Returns the score of the utterance's end."""
        return self.weight * TO_NATURAL * self.model.finish(state)[1]

    def missing(self, texts: Iterable[str], most: float = 1.0) -> str:
        """Returns a line that says how many of the texts' words the model lacks.

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
    """Keeps from the terminal what compiled code writes to standard error, as KenLM's progress."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def unigrams(path: Path) -> Iterator[str]:
    """Yields the words of an ARPA file, without the three that are marks."""
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
    """Raises ValueError where the labels can spell hardly any word of a language model."""
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
