"""Word errors against brute force, and their interval."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynsize.wer import Errors, count_errors, interval, paired_interval

words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@functools.cache
def fewest(said: tuple, heard: tuple) -> int:
    """The edit distance by its recursive definition."""
    if not said or not heard:
        return len(said) + len(heard)
    return min(
        fewest(said[1:], heard[1:]) + (said[0] != heard[0]),
        fewest(said[1:], heard) + 1,
        fewest(said, heard[1:]) + 1,
    )


@given(words, words)
def test_counts(said, heard):
    errors = count_errors(" ".join(said), " ".join(heard))
    assert errors.total == fewest(tuple(said), tuple(heard))
    assert min(errors.substitutions, errors.deletions, errors.insertions) >= 0
    assert errors.insertions - errors.deletions == len(heard) - len(said)
    assert errors.words == len(said) and errors.substitutions + errors.deletions <= len(said)


def test_known_alignments():
    assert count_errors("one two three", "one too three four") == Errors(1, 0, 1, 3)
    assert count_errors("one two three", "three") == Errors(0, 2, 0, 3)
    assert count_errors("", "one") == Errors(0, 0, 1, 0) and count_errors("", "one").rate == float(
        "inf"
    )
    assert sum([Errors(1, 2, 3, 4), Errors(1, 0, 0, 6)], Errors()) == Errors(2, 2, 3, 10)
    assert Errors(1, 2, 3, 4).rate == 1.5


def test_paired_interval_is_that_of_the_differences():
    draw = np.random.default_rng(2)
    first = [Errors(int(draw.random() < 0.3), 0, 0, 1) for _ in range(2000)]
    # the second makes the first's errors and, for a tenth of the words, others beside
    second = [Errors(min(1, e.substitutions + int(draw.random() < 0.1)), 0, 0, 1) for e in first]
    gaps = np.array([a.total - b.total for a, b in zip(first, second, strict=True)])
    low, high = paired_interval(first, second)
    half = 1.96 * gaps.std() / 2000**0.5
    assert low == pytest.approx(gaps.mean() - half, abs=0.003) and high == pytest.approx(
        gaps.mean() + half, abs=0.003
    )
    assert paired_interval(first, first) == (0.0, 0.0)
    assert paired_interval(second, first) == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="2000 and 1999"):
        paired_interval(first, second[1:])


def test_interval_of_independent_words_is_the_normal_one():
    draw = np.random.default_rng(1)
    errors = [Errors(int(draw.random() < 0.2), 0, 0, 1) for _ in range(2000)]
    rate = sum(errors, Errors()).rate
    half = 1.96 * (rate * (1 - rate) / 2000) ** 0.5
    low, high = interval(errors)
    assert low == pytest.approx(rate - half, abs=0.003) and high == pytest.approx(
        rate + half, abs=0.003
    )
    assert interval(errors) == interval(errors)
    assert interval([Errors(0, 0, 0, 5)] * 3) == (0.0, 0.0)
