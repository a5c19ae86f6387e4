"""Word error rates: alignment of words, counts, and the interval that a test set of this size allows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Errors:
    """Counts of one utterance or of many."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # of the reference

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors for each word of the reference; infinite where only the hypothesis has words."""
        return self.total / self.words if self.words else (float("inf") if self.total else 0.0)


def count_errors(reference: str, hypothesis: str) -> Errors:
    """The fewest substitutions, deletions and insertions that turn the reference's words into the hypothesis's; of
    several ways the one with the fewest deletions and insertions."""
    said, heard = reference.split(), hypothesis.split()
    # for each prefix of `heard`: (errors, deletions + insertions, deletions) against the words of `said` so far
    row = [(j, j, 0) for j in range(len(heard) + 1)]
    for i, word in enumerate(said, start=1):
        above, row = row, [(i, i, i)]
        for j, other in enumerate(heard, start=1):
            errors, gaps, deletions = above[j - 1]
            same = (errors + (word != other), gaps, deletions)
            errors, gaps, deletions = above[j]
            deleted = (errors + 1, gaps + 1, deletions + 1)
            errors, gaps, deletions = row[j - 1]
            row.append(min(same, deleted, (errors + 1, gaps + 1, deletions)))
    errors, gaps, deletions = row[-1]
    return Errors(errors - gaps, deletions, gaps - deletions, len(said))


def interval(errors: Sequence[Errors]) -> tuple[float, float]:
    """95% bootstrap interval of the word error rate (Bisani and Ney 2004): utterances drawn anew, with replacement."""
    low, high = np.quantile(redrawn_rates(errors), [0.025, 0.975])
    return float(low), float(high)


def paired_interval(first: Sequence[Errors], second: Sequence[Errors]) -> tuple[float, float]:
    """95% bootstrap interval of the first's word error rate minus the second's, on the same utterances: both rates of
    a draw are those of the same utterances. Raises ValueError for different numbers of utterances."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} utterances can't be compared in pairs")
    low, high = np.quantile(redrawn_rates(first) - redrawn_rates(second), [0.025, 0.975])
    return float(low), float(high)


def redrawn_rates(errors: Sequence[Errors]) -> np.ndarray:
    """Word error rates of `DRAWS` draws of utterances, with replacement; the n-th draw of two systems is the same."""
    counts = np.array([(e.total, e.words) for e in errors], dtype=float)
    draw, rates = np.random.default_rng(0), np.empty(DRAWS)
    for i in range(DRAWS):
        total, words = counts[draw.integers(len(errors), size=len(errors))].sum(0)
        rates[i] = total / max(words, 1)
    return rates
