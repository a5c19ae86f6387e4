"""The spelling of texts, the notation of STM files, and what is told of a corpus."""

import unicodedata
from collections import Counter

import pytest
from conftest import RATE, tiny
from hypothesis import given
from hypothesis import strategies as st

from dynsize.corpora import Corpus, Utterance, summary
from dynsize.readers import parse_stm
from dynsize.text import NORMALISERS, clean
from dynsize.tokenizer import train_tokenizer
from dynsize.training_data import keep_usable
from dynsize.wer import in_notation

RICH = "Don’t STOP: it's ‘five-ish’, naïve हिन्दी"


@pytest.mark.parametrize(
    ("normaliser", "text", "expected"),
    [
        ("none", "e\u0301te\u0301", "été"),  # NFC
        ("none", "no\u200bth\u200ding \ufeffseen", "nothing seen"),
        ("none", "\u202aat\u202c soft\u00adly", "at softly"),
        ("none", "a\x00b \x1b[1mc\x7f", "ab [1mc"),
        ("none", "star\ufe0f e\u200d\u0301", "star é"),
        ("none", "star\ufe0fs", "stars"),
        ("plain", "İSTANBUL'da I\u0307", "istanbul'da i"),
        ("lower", "İİ", "ii"),
        ("plain", "Ｆｕｌｌ “width” ‘quotes’", "full width quotes"),
        ("plain", "мʼята м’ята м‘ята м`ята м´ята м'ята", "м'ята " * 5 + "м'ята"),
        ("plain", "a ´ b ` ʼc´ ŉ", "a b c n"),
        ("none", " LOW\t MID\n\u00a0TOP\u2028A\u3000B\x1f", "LOW MID TOP A B"),
        ("none", RICH, RICH),
        ("lower", RICH, "don’t stop: it's ‘five-ish’, naïve हिन्दी"),
        ("upper", RICH, "DON’T STOP: IT'S ‘FIVE-ISH’, NAÏVE हिन्दी"),
        ("plain", RICH, "don't stop it's five ish naïve हिन्दी"),
        ("upper", "Straße e\u0301", "STRASSE É"),
        ("lower", "ΟΔΟΣ", "οδος"),
    ],
)  # fmt: skip
def test_texts_have_one_spelling(normaliser, text, expected):
    assert clean(text, normaliser) == expected


@given(st.text(max_size=30), st.sampled_from(sorted(NORMALISERS)))
def test_any_text_becomes_words_between_single_spaces_in_nfc(text, normaliser):
    cleaned = clean(text, normaliser)
    assert cleaned == " ".join(cleaned.split())
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(c) == "Cc" for c in cleaned)
    assert clean(cleaned, "none") == cleaned


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("one two", "one two"),
        ("{ a / b c / @ } d", "{ a / b c / @ } d"),
        ("{a/b} d", "{ a / b } d"),
        ("{ @ / uh } d", "{ @ / uh } d"),
        ("yes (uh) no", "yes (uh) no"),
        ("yes (%hesitation) %hesitation no", "yes no"),
        ("{ uh / %hesitation / (ah) } no", "{ uh / @ / ah } no"),
        ("{NOISE} one {BREATH} <sil> two(2) <NA>", "one two"),
        ("it 's and/or { they / it } 're", "it's and/or { they / it } 're"),
    ],
)
def test_the_notation_of_stm_files(raw, read):
    assert in_notation(parse_stm(raw, Counter())) == read


@pytest.mark.parametrize("raw", ["{ a", "a }", "{ { a } }", "{ a b }", "a / b", "(a b)", "a(b)",
                                 "[noise]", "<a b>", "a <", "()", "{ a / [b] }"])  # fmt: skip
def test_what_is_not_understood_in_an_stm_is_refused(raw):
    with pytest.raises(ValueError):
        parse_stm(raw, Counter())


def corpus_of(*texts: str) -> Corpus:
    """A corpus in memory, one utterance of 2 s for each text."""
    samples, corpus = 2 * RATE, Corpus()
    for i, text in enumerate(texts):
        corpus.utterances.append(Utterance(f"u{i}", "/a.wav", text, samples, (0, samples), RATE))
    return corpus


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["AB", "BC"], ["characters B 2, A 1, C 1"]),
        (["".join(map(chr, range(0x4E00, 0x4E00 + 99)))], ["and 39 more"]),
        (["LOW", "MID", "low"], ["note: mixed case, l 1, o 1, w 1, as in u2, 'low'; --normaliser"]),
        (["ONE 2"], ["note: signs and digits, 2 1, as in u0, 'ONE 2'"]),
        (["LOW, MID."], ["signs and digits, , 1, . 1, as in u0", "--normaliser plain takes signs"]),
        (["A", ""], ["note: 1 empty transcript, as u1"]),
    ],
)
def test_what_texts_hold_and_what_is_odd_in_them_is_told(texts, words):
    told = summary(corpus_of(*texts), tiny(corpus="here"), {})
    assert all(word in told for word in words), told
    assert "note" not in summary(corpus_of("IT'S LOW", "MID"), tiny(), {})


def test_training_leaves_out_what_is_too_short_or_too_long():
    corpus, tokenizer = corpus_of(*5 * ["A"]), train_tokenizer(["A"], 1)
    corpus.utterances = [u._replace(samples=(1 + int(u.id[1:])) * RATE) for u in corpus.utterances]
    told = summary(corpus, tiny(), {})
    assert "seconds 1.0 to 5.0 (u4), half have at most 3.0, 99% at most 4.0; see --max-s" in told
    keep_usable(corpus, tokenizer, tiny(min_seconds=2, max_seconds=4))
    assert [u.id for u in corpus.utterances] == ["u1", "u2", "u3"]
    assert corpus.left_out == {
        "shorter than 2 s": {"u0": "/a.wav: 1.00 s"},
        "longer than 4 s": {"u4": "/a.wav: 5.00 s"},
    }
    with pytest.raises(ValueError, match="no utterance is left to train on"):
        keep_usable(corpus, tokenizer, tiny(min_seconds=50))
    with pytest.raises(ValueError, match="--max-seconds 1: must be above --min-seconds 2"):
        tiny(min_seconds=2, max_seconds=1)


def test_ids_and_texts_are_printable_where_they_are_told():
    corpus = corpus_of("A\x1b[2J\u202e", "b")
    corpus.utterances[0] = corpus.utterances[0]._replace(id="line\nbreak\x1b")
    assert all(line.isprintable() for line in summary(corpus, tiny(), {}).splitlines())
