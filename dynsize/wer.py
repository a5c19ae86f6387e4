"""Word and character error rates: alignment, counts, and the interval that a test set allows."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import accumulate
from operator import add
from typing import NamedTuple

import numpy as np

# A reference is a list of slots, a slot a list of alternatives, an alternative a list of words:
# `a (b)` is [[["a"]], [["b"], []]].
Reference = Sequence[Sequence[Sequence[str]]]
Pair = tuple[str | None, str | None]  # word of the reference, word of the hypothesis

DRAWS = 1000  # of the bootstrap
# The cost of an alignment is one integer: errors, then gaps (deletions and insertions), then
# deletions, 21 bits each. So the smallest cost has the fewest errors, and of these the fewest gaps.
GAP = 1 << 21
SUBSTITUTION = GAP * GAP
INSERTION = SUBSTITUTION + GAP
DELETION = SUBSTITUTION + GAP + 1
# Unicode's names of scripts that have no spaces between words.
NO_SPACES = "CJK HIRAGANA KATAKANA THAI LAO KHMER MYANMAR TIBETAN".split()


class Errors(NamedTuple):
    """Counts of one utterance or of many, in words or in characters."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # of the reference

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(*map(add, self, other))

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per word of the reference; for a reference without words, the errors."""
        return self.total / max(1, self.words)


def in_notation(reference: Reference) -> str:
    """Return a reference in sclite's notation.

    `{ a / b c / @ }` are the alternatives `a`, `b c` and nothing; `(a)` is `a` or nothing.
    """
    parts = []
    for alternatives in reference:
        written = [" ".join(words) or "@" for words in alternatives]
        if len(written) == 1:
            parts += alternatives[0]
        elif written[1:] == ["@"] and len(alternatives[0]) == 1:
            parts.append(f"({written[0]})")
        elif set(written) != {"@"}:
            parts.append(f"{{ {' / '.join(written)} }}")
    return " ".join(parts)


def align(reference: Reference, heard: Sequence[str]) -> list[Pair]:
    """Return the words of the reference beside those of a hypothesis, with the fewest errors.

    A deleted word stands beside None, and None beside an inserted one. Each slot takes the
    alternative with the fewest errors. Among alignments with equally many errors, one with the
    fewest deletions and insertions is taken. It needs 8 bytes of memory for each pair of words.
    """
    row, after = first_row_and_step(heard)
    table = []  # slot → alternative → rows: before its first word, then after each word
    for slot in reference:
        rows = [list(accumulate(words, after, initial=row)) for words in slot]
        last_rows = [of_words[-1] for of_words in rows]
        row = np.min(last_rows, axis=0)
        table.append(rows)
    pairs: list[Pair] = []  # the last one first
    j = len(heard)
    for slot, rows in zip(reversed(reference), reversed(table), strict=True):
        costs = [of_words[-1][j] for of_words in rows]
        best = int(np.argmin(costs))
        traced = trace(slot[best], heard[:j], rows[best])
        pairs += traced
        j -= sum(word is not None for _, word in traced)
    inserted = reversed(heard[:j])
    pairs += [(None, word) for word in inserted]
    return pairs[::-1]


def trace(said: Sequence[str], heard: Sequence[str], rows: Sequence[np.ndarray]) -> list[Pair]:
    """Return the pairs of a cheapest alignment, from the last back to the first word of `said`.

    `rows`: the costs before the first word and after each word.
    """
    pairs: list[Pair] = []
    i = len(said)
    j = len(heard)
    while i > 0:
        said_word = said[i - 1]
        heard_word = heard[j - 1] if j > 0 else None
        cost = rows[i][j]
        diagonal = rows[i - 1][j - 1] if j > 0 else np.inf
        if said_word != heard_word:
            diagonal = diagonal + SUBSTITUTION
        if cost == diagonal:
            pairs.append((said_word, heard_word))
            i -= 1
            j -= 1
        elif cost == rows[i - 1][j] + DELETION:
            pairs.append((said_word, None))
            i -= 1
        else:
            pairs.append((None, heard_word))
            j -= 1
    return pairs


def first_row_and_step(heard: Sequence[str]) -> tuple[np.ndarray, Callable]:
    """Return row 0 and the step of the search for the cheapest alignment.

    Row i holds, for each j, the smallest cost of turning the reference's first i words into the
    hypothesis's first j (Wagner and Fischer 1974). The step takes row i and the reference's next
    word, and returns row i + 1.
    """
    different_words = dict.fromkeys(heard)
    numbers = {word: number for number, word in enumerate(different_words)}
    codes = np.array([numbers[word] for word in heard], dtype=np.int64)
    insertions = INSERTION * np.arange(len(heard) + 1)  # row 0

    def after(row: np.ndarray, word: str) -> np.ndarray:
        code = numbers.get(word, -1)
        substituted = row[:-1] + SUBSTITUTION * (codes != code)
        costs = row + DELETION
        costs[1:] = np.minimum(costs[1:], substituted)
        # the cheapest entry to the left, with an insertion for each step from it
        costs = np.minimum.accumulate(costs - insertions)
        return costs + insertions

    return insertions, after


def errors_in(pairs: Sequence[Pair]) -> Errors:
    """Return the errors of an alignment; `words` are those of the alternatives that it has."""
    deletions = sum(heard is None for _, heard in pairs)
    insertions = sum(said is None for said, _ in pairs)
    different = sum(said != heard for said, heard in pairs)
    substitutions = different - deletions - insertions
    return Errors(substitutions, deletions, insertions, len(pairs) - insertions)


def count_errors(said: Sequence[str], heard: Sequence[str]) -> Errors:
    """Return the errors of `align` for one reference: a list of words, or a string of characters.

    Keeps one row, so memory grows with the length and not with its square.
    """
    row, after = first_row_and_step(heard)
    last_row = reduce(after, said, row)
    cost = int(last_row[-1])
    errors = cost // SUBSTITUTION
    gaps = cost // GAP % GAP
    deletions = cost % GAP
    return Errors(errors - gaps, deletions, gaps - deletions, len(said))


def measure_of(texts: Iterable[str]) -> str:
    """Return what counts: cer where most letters are of scripts without spaces, else wer."""
    scripts = tuple(NO_SPACES)
    letters = [c for text in texts for c in text if c.isalpha()]
    names = [unicodedata.name(letter, "") for letter in letters]
    without = sum(name.startswith(scripts) for name in names)
    return "cer" if 2 * without > len(letters) else "wer"


def interval(*sides: Sequence[Sequence[Errors]]) -> tuple[float, float]:
    """Return the 95% interval of an error rate, or of the first side's minus the second's.

    It is a bootstrap (Bisani and Ney 2004). A side is a list of runs, one for each seed; a run
    has the errors of each utterance, and all runs have the same utterances. The rate of a side is
    the mean over its runs. Each of 1000 draws takes utterances with replacement, the same ones for
    all runs. It also takes the runs of each side with replacement: n runs of a side that has n. So
    the interval covers other utterances and other seeds. With few seeds it is too narrow: the
    bootstrap of n runs has (n − 1) / n of the variance between seeds. With one run a side it covers
    only other utterances.

    Raises ValueError for different numbers of utterances.
    """
    lengths = {len(run) for side in sides for run in side}
    if len(lengths) > 1:
        numbers = " and ".join(map(str, sorted(lengths, reverse=True)))
        raise ValueError(f"{numbers} utterances can't be compared in pairs")
    counts = []  # of each side: errors and words, (runs, utterances, 2)
    for side in sides:
        pairs = [[(errors.total, errors.words) for errors in run] for run in side]
        counts.append(np.array(pairs, dtype=float))
    draw = np.random.default_rng(0)
    utterances = counts[0].shape[1]
    rates = np.empty((len(sides), DRAWS))
    for i in range(DRAWS):
        drawn = draw.integers(utterances, size=utterances)
        for side, of_side in enumerate(counts):
            runs = draw.integers(len(of_side), size=len(of_side))
            by_run = of_side[:, drawn].sum(1)  # (runs, 2)
            errors, words = by_run[runs].T  # (runs,) each
            rates[side, i] = np.mean(errors / np.maximum(words, 1))
    first, *second = rates
    low, high = np.quantile(first - sum(second), [0.025, 0.975])
    return float(low), float(high)


def difference(first: list[list[Errors]], second: list[list[Errors]]) -> dict:
    """Return the rates of two sides, given as the errors of each run, and what they tell.

    The `verdict` is on the first side: better, worse, or not significantly different.
    """
    rates = [mean_rate(first), mean_rate(second)]
    low, high = interval(first, second)
    verdict = "not significantly different"  # the interval contains 0
    if high < 0:
        verdict = "better"
    elif low > 0:
        verdict = "worse"
    return dict(
        rates=rates,
        difference=rates[0] - rates[1],
        interval=(low, high),
        verdict=verdict,
    )


def mean_rate(side: list[list[Errors]]) -> float:
    """Return the mean error rate of several runs."""
    totals = [sum(run, Errors()) for run in side]
    return sum(total.rate for total in totals) / len(side)
