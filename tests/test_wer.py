"""Word errors against brute force and jiwer; references with alternatives; intervals."""

import functools
import itertools

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynsize.wer import Errors, align, count_errors, errors_in, interval, measure_of

words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)
alternatives = st.lists(st.lists(st.sampled_from(["a", "b"]), max_size=2), min_size=1, max_size=3)
references = st.lists(alternatives, max_size=4)


@functools.cache
def fewest_gaps(said: tuple, heard: tuple) -> tuple[int, int]:
    """Errors, and deletions and insertions among them, of the best alignment by definition."""
    if not said or not heard:
        return len(said) + len(heard), len(said) + len(heard)
    errors, gaps = fewest_gaps(said[1:], heard[1:])
    found = [(errors + (said[0] != heard[0]), gaps)]
    for rest in (fewest_gaps(said[1:], heard), fewest_gaps(said, heard[1:])):
        found.append((rest[0] + 1, rest[1] + 1))
    return min(found)


@given(st.lists(st.tuples(words.filter(len), words), min_size=1, max_size=4))
def test_rates_are_those_of_jiwer(pairs):
    said, heard = ([" ".join(side) for side in sides] for sides in zip(*pairs, strict=True))
    errors = [count_errors(s, h) for s, h in pairs]
    assert sum(errors, Errors()).rate == pytest.approx(jiwer.wer(said, heard))
    letters = [count_errors(s, h) for s, h in zip(said, heard, strict=True)]
    assert sum(letters, Errors()).rate == pytest.approx(jiwer.cer(said, heard))
    for (s, h), ours in zip(pairs, errors, strict=True):
        theirs = jiwer.process_words(" ".join(s), " ".join(h))
        total = theirs.substitutions + theirs.deletions + theirs.insertions
        assert ours.total == total  # jiwer's alignment may have more gaps: "a b" against "b a"
        assert ours.substitutions >= theirs.substitutions


@given(references, words)
def test_alternatives_are_those_with_the_fewest_errors(reference, heard):
    pairs = align(reference, heard)
    said = [word for word, _ in pairs if word is not None]
    choices = [list(itertools.chain(*choice)) for choice in itertools.product(*reference)]
    assert said in choices
    assert [word for _, word in pairs if word is not None] == heard
    assert (None, None) not in pairs
    errors = errors_in(pairs)
    assert errors == count_errors(said, heard) and errors.words == len(said)
    gaps = errors.deletions + errors.insertions
    assert (errors.total, gaps) == fewest_gaps(tuple(said), tuple(heard))
    assert errors.total == min(fewest_gaps(tuple(c), tuple(heard))[0] for c in choices)


def test_characters_of_a_long_utterance_need_little_memory():
    text = "abcdefghij" * 1500  # 20 minutes of speech; a table of all pairs would take 1.8 GB
    assert count_errors(text, text[:-3] + "xy") == Errors(2, 1, 0, 15000)


def test_which_languages_write_blanks():
    spaced = [["LOW HIGH", "für 2"], ["안녕하세요 여러분"], [], ["42"]]
    unspaced = [["今天天气很好", "OK"], ["สวัสดีครับ"], ["きょうはいい天気"]]
    assert {measure_of(texts) for texts in spaced} == {"wer"}
    assert {measure_of(texts) for texts in unspaced} == {"cer"}


def test_paired_interval_is_that_of_the_differences():
    draw = np.random.default_rng(2)
    first = [Errors(int(draw.random() < 0.3), 0, 0, 1) for _ in range(2000)]
    # the second makes the first's errors and, for a tenth of the words, others beside
    second = [Errors(min(1, e.substitutions + int(draw.random() < 0.1)), 0, 0, 1) for e in first]
    gaps = np.array([a.total - b.total for a, b in zip(first, second, strict=True)])
    low, high = interval([first], [second])
    half = 1.96 * gaps.std() / 2000**0.5
    assert low == pytest.approx(gaps.mean() - half, abs=0.003)
    assert high == pytest.approx(gaps.mean() + half, abs=0.003)
    assert interval([first], [first]) == (0.0, 0.0)
    assert interval([second], [first]) == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="2000 and 1999"):
        interval([first], [second[1:]])


def test_paired_interval_over_seeds_covers_their_spread():
    def run(errors: int) -> list[Errors]:
        return [Errors(errors, 0, 0, 100)] * 50  # utterances that are all alike

    seeds = [run(errors) for errors in (10, 14, 18, 22)]
    low, high = interval(seeds, [run(5)])
    # all means of 4 draws out of 4 runs: what the bootstrap draws from
    means = [np.mean(d) / 100 - 0.05 for d in itertools.product((10, 14, 18, 22), repeat=4)]
    expected = np.quantile(means, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.011)
    assert low < 0.11 - 0.025 and high > 0.11 + 0.025


def test_interval_of_independent_words_is_the_normal_one():
    draw = np.random.default_rng(1)
    errors = [Errors(int(draw.random() < 0.2), 0, 0, 1) for _ in range(2000)]
    rate = sum(errors, Errors()).rate
    half = 1.96 * (rate * (1 - rate) / 2000) ** 0.5
    low, high = interval([errors])
    assert low == pytest.approx(rate - half, abs=0.003)
    assert high == pytest.approx(rate + half, abs=0.003)
    assert interval([errors]) == (low, high)
    assert interval([[Errors(0, 0, 0, 5)] * 3]) == (0.0, 0.0)
