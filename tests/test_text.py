"""The spelling of texts, the notation of STM files, and what is told of a corpus."""

import unicodedata
from collections import Counter

import pytest
from conftest import RATE, tiny
from hypothesis import given
from hypothesis import strategies as st

from dynsize.corpora import Corpus, Utterance, duration, summary
from dynsize.readers import parse_stm
from dynsize.text import NORMALISERS, clean, counted, quoted
from dynsize.tokenizer import train_tokenizer
from dynsize.training_data import keep_usable
from dynsize.wer import in_notation


def test_one_thing_is_counted_without_an_s():
    told = [counted(number, "utterance") for number in (0, 1, 2, 1000)]
    assert told == ["0 utterances", "1 utterance", "2 utterances", "1,000 utterances"]


RICH = "Don’t STOP: it's ‘five-ish’, naïve हिन्दी"


@pytest.mark.parametrize(
    ("normaliser", "text", "expected"),
    [
        ("none", "e\u0301te\u0301", "été"),  # NFC
        ("none", "no\u200bth\u200ding \ufeffseen", "nothing seen"),
        ("none", "\u202aat\u202c soft\u00adly", "at softly"),
        ("none", "a\x00b \x1b[1mc\x7f", "ab [1mc"),
        ("none", "star\ufe0f e\u200d\u0301", "star é"),
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


def test_what_is_taken_out_of_an_stm_is_counted():
    changes = Counter()
    parse_stm("{NOISE} <sil> (%hesitation) it 's <sil> { a / b }", changes)
    assert +changes == {
        "× {NOISE} taken out": 1,
        "× <sil> taken out": 2,
        "× %hesitation taken out": 1,
        "× words joined, as it 's → it's": 1,
        "× alternatives, of which the first is trained on": 1,
    }


def corpus_of(*texts: str, seconds: float = 2.0) -> Corpus:
    """A corpus in memory, one utterance of `seconds` for each text."""
    samples = round(seconds * RATE)
    return Corpus(
        utterances=[
            Utterance(f"u{i}", f"/u{i}.wav", text, samples, (0, samples), RATE)
            for i, text in enumerate(texts)
        ]
    )


def told(corpus: Corpus, **others: Corpus | str) -> str:
    return summary(corpus, tiny(corpus="here"), others)


def test_the_characters_of_a_corpus_are_told_with_their_counts():
    assert "characters B 2, A 1, C 1" in told(corpus_of("AB", "BC"))
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 99)))
    assert "and 39 more" in told(corpus_of(many))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["LOW", "MID", "low"], ["note: mixed case, l 1, o 1, w 1, as in u2, 'low'; --normaliser"]),
        (["ONE 2"], ["note: signs and digits, 2 1, as in u0, 'ONE 2'"]),
        (["LOW, MID."], ["signs and digits, , 1, . 1, as in u0", "--normaliser plain takes signs"]),
        (["A", ""], ["note: 1 empty transcript, as u1"]),
    ],
)
def test_what_is_odd_in_texts_is_told_with_an_example(texts, words):
    found = told(corpus_of(*texts))
    assert all(word in found for word in words), found


def test_nothing_is_odd_in_plain_texts():
    assert "note" not in told(corpus_of("IT'S LOW", "MID"))


def test_other_splits_are_checked_against_training():
    dev, test = corpus_of("low", "LÖW", ""), corpus_of("LOW")
    found = told(corpus_of("LOW"), dev=dev, test=test, more="no such split").splitlines()
    assert "dev: 3 utterances, 6.0 seconds" in found and "test: 1 utterance, 2.0 seconds" in found
    [new] = [line for line in found if line.startswith("note: dev: characters")]
    assert "never had, l 1, o 1, w 1, Ö 1, as in u0, 'low'; --normaliser lower" in new
    assert "note: more is not checked: no such split" in found
    assert not any(line.startswith("note: test") for line in found)


def test_the_highest_rate_of_labels_is_told():
    corpus, tokenizer = corpus_of("AB", "ABBA", "A"), train_tokenizer(["A", "B"], 1, "characters")
    keep_usable(corpus, tokenizer, tiny())
    assert corpus.densest == (2.5, "u1")
    assert "at most 2.5 labels a second (u1); the encoder has 25.0 frames" in told(corpus)


def test_an_utterance_that_is_much_longer_than_the_rest_is_told():
    corpus = corpus_of(*50 * ["A"], seconds=5)
    assert "--max-seconds" not in told(corpus)
    long = corpus.utterances[0]._replace(id="long", samples=600 * RATE)
    corpus.utterances[0] = long
    assert "note: long has 10.0 minutes, the median 5.0 seconds" in told(corpus)
    assert "--max-seconds 5 leaves out" in told(corpus)


def test_training_leaves_out_what_is_too_short_or_too_long():
    corpus = corpus_of(*5 * ["A"])
    corpus.utterances = [
        u._replace(samples=round(n * RATE)) for n, u in enumerate(corpus.utterances, 1)
    ]
    tokenizer = train_tokenizer(["A"], 1)
    keep_usable(corpus, tokenizer, tiny(min_seconds=2, max_seconds=4))
    assert [u.id for u in corpus.utterances] == ["u1", "u2", "u3"]
    assert corpus.left_out == {
        "shorter than 2 s": {"u0": "/u0.wav: 1.00 s"},
        "longer than 4 s": {"u4": "/u4.wav: 5.00 s"},
    }
    with pytest.raises(ValueError, match="no utterance is left to train on"):
        keep_usable(corpus, tokenizer, tiny(min_seconds=50))
    with pytest.raises(ValueError, match="--max-seconds 1: must be above --min-seconds 2"):
        tiny(min_seconds=2, max_seconds=1)


def test_ids_and_texts_are_printable_where_they_are_told():
    corpus = corpus_of("A\x1b[2J\u202e", "b")
    corpus.utterances[0] = corpus.utterances[0]._replace(id="line\nbreak\x1b")
    assert all(line.isprintable() for line in told(corpus).splitlines())


def test_messages_show_80_characters_of_a_text():
    assert quoted("A" * 80) == repr("A" * 80) and quoted("A" * 81) == repr("A" * 80 + "…")
    with pytest.raises(ValueError) as error:
        train_tokenizer(["A"], 1).encode("A" * 3000 + "B")
    assert len(str(error.value)) < 200 and "'B'" in str(error.value)


def test_durations_are_in_a_unit_that_fits():
    assert [duration(s) for s in (7.24, 90, 5400)] == ["7.2 seconds", "1.5 minutes", "1.50 hours"]
