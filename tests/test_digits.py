"""The corpus of connected digits: its layout, its repeatability, its levels, its errors."""

import subprocess
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import everything_in, tiny
from measure_word_times import true_words

from dynsize import digits, files
from dynsize.corpora import read_corpus

SMALL = {
    "train": digits.Split(15, range(8, 50), noisy=0.5, snr_db=(0, 20)),
    "dev-clean": digits.Split(10, range(5, 8)),
    "test-other": digits.Split(10, range(5), noisy=1.0),
    "test-unseen": digits.Split(5, range(50), speakers=(digits.UNSEEN,)),
}


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory) -> Path:
    """A checkout of FSDD, each digit of each speaker a tone of its frequency. Not to be changed."""
    checkout = tmp_path_factory.mktemp("fsdd")
    (checkout / "recordings").mkdir()
    speakers = (*digits.SPEAKERS, digits.UNSEEN)
    for (place, speaker), digit, index in product(enumerate(speakers), range(10), range(50)):
        time = np.arange((50 + index) * 8) / digits.SAMPLE_RATE
        tone = 0.1 * np.sin(2 * np.pi * (300 + 250 * digit + 20 * place) * time)
        path = checkout / "recordings" / f"{digit}_{speaker}_{index}.wav"
        soundfile.write(path, tone, digits.SAMPLE_RATE)
    return checkout


@pytest.fixture(scope="module")
def corpus(fsdd, tmp_path_factory) -> Path:
    """Return the small corpus of seed 0, in a directory that was empty."""
    output = tmp_path_factory.mktemp("joined")
    digits.join_corpus(fsdd, output, 0, SMALL)
    return output


def test_the_corpus_is_read_as_librispeech(corpus):
    for split, made in SMALL.items():
        read = read_corpus(tiny(corpus=str(corpus)), [split])
        assert read.kinds == {split: "librispeech"}
        assert len(read.utterances) == made.utterances
        assert not read.left_out
        numbers = {str(digits.NUMBERS[speaker]) for speaker in made.speakers}
        assert {utterance.speaker for utterance in read.utterances} == numbers
        words = true_words(corpus / f"{split}.ctm")
        for utterance in read.utterances:
            said = utterance.text.split()
            assert 3 <= len(said) <= 8
            assert said == [word.text for word in words[utterance.id]]


@pytest.mark.parametrize("split", SMALL)
def test_pauses_and_recordings_are_those_of_the_split(corpus, split):
    for id, words in true_words(corpus / f"{split}.ctm").items():
        (path,) = (corpus / split).rglob(f"{id}.flac")
        seconds = soundfile.info(path).duration
        pauses = [after.start - word.end for word, after in pairwise(words)]
        assert all(0.0185 <= pause <= 0.2515 for pause in pauses)  # times have three decimals
        assert 0.049 <= words[0].start <= 0.301
        assert 0.049 <= seconds - words[-1].end <= 0.301
        for word in words:  # a recording's duration tells its index
            assert round(1000 * (word.end - word.start)) - 50 in SMALL[split].indices


def test_the_ctm_has_the_true_times(corpus):
    for id, words in true_words(corpus / "dev-clean.ctm").items():
        (path,) = (corpus / "dev-clean").rglob(f"{id}.flac")
        audio, rate = soundfile.read(path)
        place = int(id[:3]) - 100
        for word in words:
            span = audio[round(word.start * rate) : round(word.end * rate)]
            spectrum = np.abs(np.fft.rfft(span, rate))  # one bin for each Hz
            expected = 300 + 250 * digits.WORDS.index(word.text) + 20 * place
            assert abs(int(spectrum.argmax()) - expected) <= 10


@pytest.mark.parametrize("name", ["train", "test-other"])
def test_the_speaker_is_above_the_background_by_what_the_split_says(name):
    """Each speaker says a tone, so that a spectrum tells who is heard."""
    time, recordings = np.arange(2000) / digits.SAMPLE_RATE, {}
    tones = {speaker: 500 * (place + 1) for place, speaker in enumerate(digits.SPEAKERS)}
    for (speaker, hz), digit, index in product(tones.items(), range(10), range(50)):
        tone = np.sqrt(2) * np.sin(2 * np.pi * hz * time)
        recordings[digit, speaker, index] = digits.LEVEL * tone
    split, found = SMALL[name]._replace(noisy=1.0), []
    for seed in range(60):
        mixer = digits.Mixer(split, recordings, np.random.default_rng(seed))
        audio, words = mixer.utterance("theo")
        spectra = [np.abs(np.fft.rfft(audio[start:end])) ** 2 for _, start, end in words]
        power = np.sum(spectra, axis=0)  # one bin for each 4 Hz
        heard = [power[hz // 4] for speaker, hz in tones.items() if speaker != "theo"]
        assert sum(np.array(heard) > 1e-3 * max(heard)) <= digits.TALKERS
        speech = power[tones["theo"] // 4]
        found.append(10 * np.log10(speech / (power.sum() - speech)))
    low, high = split.snr_db
    assert low - 1.5 < min(found) < low + 2.5  # the background's pauses are a part of its level
    assert high - 2.5 < max(found) < high + 1.5


def test_the_same_seed_gives_the_same_bytes(fsdd, corpus, tmp_path):
    digits.join_corpus(fsdd / "recordings", tmp_path / "again", 0, SMALL)  # the folder of WAVs
    digits.join_corpus(fsdd, tmp_path / "other", 1, SMALL)
    assert everything_in(tmp_path / "again") == everything_in(corpus)
    assert everything_in(tmp_path / "other") != everything_in(corpus)


def test_train_dev_and_test_share_no_recording():
    parts = [set(digits.SPLITS[name].indices) for name in ("train", "dev-other", "test-other")]
    assert sorted(index for part in parts for index in part) == list(range(50))


def test_what_is_no_checkout_is_refused_and_an_output_that_is_not_empty(fsdd, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        digits.main([str(tmp_path), str(tmp_path / "corpus")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "0_george_0.wav: can't be read; FSDD_CHECKOUT must be a checkout" in line
    with pytest.raises(ValueError, match="not an empty directory"):
        digits.join_corpus(fsdd, tmp_path, 0, SMALL)
    with pytest.raises(ValueError, match="not an empty directory"):
        digits.join_corpus(fsdd, tmp_path / "notes", 0, SMALL)
    assert everything_in(tmp_path) == {Path("notes"): b"mine"}


def test_an_interrupted_run_leaves_nothing(fsdd, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f"corpus.{files.HOST}.{gone.pid}.unfinished").mkdir()  # of a run that was killed
    monkeypatch.setattr(digits.Mixer, "utterance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits.join_corpus(fsdd, tmp_path / "corpus", 0, SMALL)
    assert not list(tmp_path.iterdir())
