"""Word error rates: alignment of words, counts, and the interval that a test set of this size allows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Errors:
    """Counts of one utterance or of many."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # of the reference

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

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


def interval(errors: Sequence[Errors], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the word error rate (Bisani and Ney 2004): utterances drawn anew, with replacement."""
    counts = np.array([(e.total, e.words) for e in errors], dtype=float)
    chosen = np.random.default_rng(seed).integers(len(errors), size=(draws, len(errors)))
    total, words = counts[chosen].sum(1).T
    low, high = np.quantile(total / np.maximum(words, 1), [0.025, 0.975])
    return float(low), float(high)
