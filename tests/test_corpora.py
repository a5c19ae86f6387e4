"""Every kind of corpus: what is read, left out, refused, and kept between runs."""

import errno
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, read, tiny, write_tones
from hypothesis import given, settings
from hypothesis import strategies as st

from dynsize import audio, batching, files, readers
from dynsize.audio import CorruptAudio
from dynsize.batching import Examples
from dynsize.config import CORPUS_KINDS
from dynsize.corpora import UNREADABLE, read_audio, read_corpus, summary
from dynsize.tokenizer import train_tokenizer
from dynsize.training import Trainer
from dynsize.wer import in_notation

STM = """;; a comment
talk 1 anna 0.50 1.50 <o,f0,female> it 's LOW 'cause <unk> they don 't
talk 1 inter_segment_gap 1.50 1.75 <NA> ignore_time_segment_in_scoring
talk 1 bert 1.75 2.00 <o,f0,male> <unk> <NA>
call A anna 0.00 1.00 HIGH MID
call B bert 0.25 1.00 <unk> TOP
"""
TSV = (
    "client_id\tpath\tsentence\tup_votes\nanna\tone.mp3\tLow, mid!\t2\nbert\ttwo.mp3\tIt’s HIGH\t\n"
)
MANIFEST = """{"audio_filepath": "talk.wav", "text": "LOW", "duration": 1.0, "speaker": "anna"}
{"audio_filepath": "deep/call.sph", "text": "MID", "offset": 0.5, "duration": 0.25, "channel": 1}
{"audio_filepath": "ABSOLUTE", "text": "HIGH TOP", "offset": 1}
"""
KALDI = {
    "wav.scp": "talk talk.wav\nmore ABSOLUTE\n",
    "text": "anna-1 LOW MID\nbert-1 TOP\n",
    "segments": "anna-1 talk 0.5 1.25\nbert-1 more 0 -1\nbert-2 more 1 2\n",
    "utt2spk": "anna-1 anna\nbert-1 bert\n",
}
TRANSCRIPT = "1-2-0000 LOW MID\n1-2-0001 TOP\n"
SPHERE = dict(format="NIST", subtype="PCM_16")
CALL = SPHERE | dict(channels=2)
AUDIO = {  # kind → file → how it is written
    "librispeech": {f"train/1/2/1-2-000{number}.flac": {} for number in range(2)},
    "stm": {"train/sph/talk.sph": SPHERE, "train/sph/call.sph": CALL},
    "common-voice": {f"clips/{name}.mp3": dict(rate=32000) for name in ("one", "two", "unused")},
    "manifest": {"talk.wav": {}, "deep/call.sph": CALL},
    "kaldi": {"train/talk.wav": {}},
}
TEXTS = {  # kind → file → what it holds; the first one is the list
    "librispeech": {"train/1/2/1-2.trans.txt": TRANSCRIPT},
    "stm": {"train/stm/talks.stm": STM},
    "common-voice": {"train.tsv": TSV},
    "manifest": {"train.jsonl": MANIFEST},
    "kaldi": {f"train/{name}": text for name, text in KALDI.items()},
}
LISTS = {kind: next(iter(texts)) for kind, texts in TEXTS.items()}


def write_audio(
    path: Path, seconds: float = 2.0, rate: int = RATE, channels: int = 1, **how: str
) -> Path:
    """Write a ramp, half as high in channel 1: a sample tells its place and its channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 0.5, round(seconds * rate))
    soundfile.write(path, np.stack([ramp, ramp / 2], 1)[:, :channels], rate, **how)
    return path


def write_corpus(root: Path, kind: str) -> Path:
    """A corpus of each kind with one split, `train`."""
    for name, how in AUDIO[kind].items():
        write_audio(root / name, **how)
    elsewhere = write_audio(root.with_name(root.name + "-elsewhere") / "more.wav")
    for name, text in TEXTS[kind].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.replace("ABSOLUTE", str(elsewhere)), encoding="utf-8")
    return root


EXPECTED = {  # id, text, speaker, span in samples of the file, channel
    "librispeech": [
        ("1-2-0000", "LOW MID", "1", (0, 16000), 0),
        ("1-2-0001", "TOP", "1", (0, 16000), 0),
    ],
    "stm": [
        ("talks.stm:2", "it's LOW 'cause they don't", "anna", (4000, 12000), 0),
        ("talks.stm:5", "HIGH MID", "anna", (0, 8000), 0),
        ("talks.stm:6", "TOP", "bert", (2000, 8000), 1),
    ],
    "common-voice": [
        ("one", "Low, mid!", "anna", (0, 64000), 0),
        ("two", "It’s HIGH", "bert", (0, 64000), 0),
    ],
    "manifest": [
        ("call", "MID", "", (4000, 6000), 1),
        ("more", "HIGH TOP", "", (8000, 16000), 0),
        ("talk", "LOW", "anna", (0, 8000), 0),
    ],
    "kaldi": [
        ("anna-1", "LOW MID", "anna", (4000, 10000), 0),
        ("bert-1", "TOP", "bert", (0, 16000), 0),
    ],
}


@pytest.mark.parametrize("how", ["auto", "named"])
@pytest.mark.parametrize("kind", CORPUS_KINDS)
def test_each_kind_is_recognised_and_read(tmp_path, kind, how):
    root = write_corpus(tmp_path / "corpus", kind)
    corpus = read(root, corpus_kind="auto" if how == "auto" else kind)
    assert corpus.kinds == {"train": kind}
    found = [(u.id, u.text, u.speaker, u.span, u.channel) for u in corpus.utterances]
    assert found == EXPECTED[kind]
    for utterance in corpus.utterances:
        audio = read_audio(utterance, RATE)
        assert audio.dtype == torch.float32 and audio.shape == (utterance.samples,)
        height = 0.25 / utterance.rate / (1 + utterance.channel)  # of the ramp, for each sample
        first, last = (height * place for place in utterance.span)
        if kind != "common-voice":  # MP3 does not keep slow changes
            expected = torch.linspace(first, last, len(audio))
            torch.testing.assert_close(audio, expected, rtol=0, atol=2e-3)


def test_what_is_left_out_and_changed_is_told(tmp_path):
    corpus = read(root := write_corpus(tmp_path / "c", "stm"))
    file = root / LISTS["stm"]
    assert corpus.left_out == {
        "ignore_time_segment_in_scoring": {"talks.stm:3": f"{file}:3"},
        "no words but marks": {"talks.stm:4": f"{file}:4: ' <unk> <NA>'"},
    }
    counts = {what: number for what, number in corpus.changes.items() if number}
    assert sorted(counts.values()) == [1, 2, 3]  # <NA>; it 's, don 't; <unk>
    told = summary(corpus, tiny(corpus="here"), {})
    assert "train (stm)" in told and "3 utterances, 0.00 hours, 2 speakers; 2 left out" in told
    assert "seconds 0.8 to 1.0" in told and "2 × words joined" in told
    assert "3 × <unk> taken out" in told
    assert f"left out: 1 × no words but marks, as talks.stm:4: {file}:4" in told
    kaldi = read(write_corpus(tmp_path / "k", "kaldi"))
    [(what, names)] = kaldi.left_out.items()
    assert what == "no transcript" and list(names) == ["bert-2"]


def test_audio_of_a_rate_below_the_features_is_told(tmp_path):
    corpus = read(write_tones(tmp_path, {"train": 2}))
    told = f"2 utterances of 8000 Hz, as {corpus.utterances[0].id}: nothing is above 4000 Hz"
    assert told in summary(corpus, tiny(sample_rate=16000, highest_hz=4001.0), {})
    assert "nothing is above" not in summary(corpus, tiny(sample_rate=16000, highest_hz=4000.0), {})


def test_splits_are_joined(tmp_path):
    root = write_tones(tmp_path, {"train": 3, "dev-clean": 2})
    joined = read(root, "train+dev-clean").utterances
    assert joined == read(root, "train", "dev-clean").utterances and len(joined) == 5
    shutil.rmtree(root / "dev-clean")
    shutil.copytree(root / "train", root / "dev-clean")  # as where one split adds noise to another
    ids = [u.id for u in read(root, "train").utterances]
    renamed = [f"dev-clean-{id}" for id in ids]
    assert [u.id for u in read(root, "train+dev-clean").utterances] == [*ids, *renamed]


def test_an_id_or_a_speaker_may_be_0(tmp_path):
    write_audio(tmp_path / "talk.wav")
    write_manifest(tmp_path, [NEMO | dict(id=0, speaker=0), NEMO | dict(id=1, speaker=1)])
    found = [(u.id, u.speaker) for u in read(tmp_path).utterances]
    assert found == [("0", "0"), ("1", "1")]


def test_other_sample_rates_are_resampled(tmp_path):
    root, hz, rate = write_corpus(tmp_path / "c", "librispeech"), 440, 48000
    tone = np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate)
    soundfile.write(root / "train/1/2/1-2-0000.flac", tone, rate)
    utterance = read(root).utterances[0]
    audio = read_audio(utterance, RATE)
    assert utterance.rate == rate and utterance.samples == len(audio) == 2 * RATE
    expected = np.sin(2 * np.pi * hz * np.arange(2 * RATE) / RATE)
    np.testing.assert_allclose(audio[500:-500], expected[500:-500], atol=1e-3)


TWICE = '"id": "x (y"}\n{"audio_filepath": "talk.wav", "text": "A", "id": "x_y"}'


@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        ("stm", "talk 1 anna 0.50", "talk 3 anna 0.50", ["talks.stm:2", "channel"]),
        ("stm", "talk 1 anna 0.50", "talk B anna 0.50", ["talks.stm:2", "no channel 1"]),
        ("stm", "0.50 1.50", "1.50 0.50", ["talks.stm:2", "ends at 0.5 s"]),
        ("stm", "0.50 1.50", "0.50 nan", ["talks.stm:2", "'nan'"]),
        ("stm", "call A", "nobody A", ["talks.stm:5", "no audio"]),
        ("stm", STM, ";; nothing\n", ["train/stm", "no utterances"]),
        ("common-voice", "sentence", "words", ["train.tsv:1", "sentence"]),
        ("common-voice", "\t2\n", "\n", ["train.tsv:2", "4 columns"]),
        ("common-voice", "two.mp3", "one.mp3", ["train.tsv:3", "twice"]),
        ("common-voice", "two.mp3", "../three.mp3", ["train.tsv:3", "no audio", "one.mp3"]),
        ("manifest", '"text": "LOW"', '"text": [7]', ["train.jsonl:1", "[7] is no string"]),
        ("manifest", '"text": "LOW"', '"text": "\\ud800"', ["train.jsonl:1", "surrogates"]),
        ("manifest", ', "channel": 1', "", ["train.jsonl:2", "call.sph", "2 channels"]),
        ("manifest", '"channel": 1', '"channel": 2', ["train.jsonl:2", "call.sph", "no channel 2"]),
        ("manifest", "ABSOLUTE", "/no/such.wav", ["train.jsonl:3", "such.wav' doesn't exist"]),
        ("manifest", "talk.wav", "none.wav", ["train.jsonl:1", "none.wav", "doesn't exist"]),
        ("manifest", '"speaker": "anna"}', TWICE, ["train.jsonl:2", "x_y is there twice"]),
        ("manifest", '"offset": 0.5', '"start_time": 1', ["start_time may choose"]),
        ("common-voice", "up_votes", "start", ["train.tsv:1", "start: only whole clips"]),
        ("manifest", MANIFEST[:9], "[" * 99999, ["train.jsonl:1", "JSON"]),
        ("kaldi", "talk talk.wav", "talk cat talk.wav |", ["wav.scp:1", "is a command"]),
        ("kaldi", "talk talk.wav", "talk talk.wav\ntalk talk.wav", ["wav.scp:2", "twice"]),
        ("kaldi", "talk talk.wav", "talks talk.wav", ["segments:1", "anna-1", "no recording"]),
        ("kaldi/segments", "more 0 -1", "more 0 0.5 1", ["segments:2", "RECORDING START END"]),
        ("kaldi/segments", "more 0 -1", "more 0 x", ["segments:2", "'x' is not a time"]),
        ("kaldi/text", "bert-1", "carl-1", ["text:2", "carl-1 has no recording"]),
        ("kaldi/text", "", None, ["wav.scp:1: no file `text` beside it"]),
        ("manifest", '"offset": 0.5', '"offset": -0.5', ["train.jsonl:2", "'-0.5' is not a time"]),
        ("manifest", '"offset": 0.5', '"offset": 1e999', ["'inf' is not a time"]),
        ("manifest", '"offset": 0.5', '"offset": [1]', ["'[1]' is not a time"]),
        ("librispeech", "1-2-0001", "1-2-0000", ["1-2.trans.txt:2", "twice"]),
        ("librispeech", TRANSCRIPT, "\n", ["train: no utterances; in", "train: 1"]),
        ("librispeech", "1-2-0001", "/etc/passwd", ["1-2.trans.txt:2", "no audio"]),
        ("librispeech", "LOW", "\udcff", ["1-2.trans.txt:1: not UTF-8"]),
    ],
)
def test_bad_lines_are_named(tmp_path, kind, old, new, words):
    kind, _, name = kind.partition("/")
    file = (write_corpus(tmp_path / "corpus", kind) / LISTS[kind]).with_name
    file = file(name or Path(LISTS[kind]).name)
    old = str(tmp_path / "corpus-elsewhere/more.wav") if old == "ABSOLUTE" else old
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new or "", 1), errors="surrogateescape")
    if new is None:
        file.unlink()
    with pytest.raises(ValueError) as error:
        read(tmp_path / "corpus")
    assert all(word in str(error.value) for word in words), error.value


def test_a_directory_or_a_pipe_in_place_of_audio_is_left_out(tmp_path):
    folder = write_corpus(tmp_path / "corpus", "librispeech") / "train/1/2"
    (folder / "1-2-0002.flac").mkdir()
    os.mkfifo(folder / "1-2-0003.flac")
    (folder / "1-2.trans.txt").write_text(TRANSCRIPT + "1-2-0002 LOW\n1-2-0003 LOW\n")
    corpus = read(tmp_path / "corpus")
    assert len(corpus.utterances) == 2
    assert list(corpus.left_out[UNREADABLE]) == ["1-2-0002", "1-2-0003"]


@pytest.mark.parametrize(
    "change", [None, dict(seconds=0.6), dict(rate=2 * RATE), dict(channels=1)], ids=str
)
def test_audio_that_changes_after_listing_is_corrupt(tmp_path, change):
    file = write_corpus(tmp_path / "corpus", "manifest") / "deep/call.sph"
    utterance = read(tmp_path / "corpus").utterances[0]
    file.unlink()
    if change:
        write_audio(file, **CALL | change)
    with pytest.raises(CorruptAudio, match=r"call\.sph"):
        read_audio(utterance, RATE)


def write_manifest(
    root: Path, content: list | dict, name: str = "train.json", indent: int | None = 1
) -> Path:
    """Write JSON; `indent` None: a list's values one a line."""
    data = json.dumps(content, indent=indent)
    if isinstance(content, list) and indent is None:
        data = "\n".join(map(json.dumps, content))
    packed = gzip.compress(data.encode()) if name.endswith(".gz") else data.encode()
    (root / name).write_bytes(packed)
    return root


def cut(**changes) -> dict:
    """One of lhotse's cuts as its manifests hold it."""
    recording = dict(id="talk", sampling_rate=RATE, num_samples=2 * RATE, duration=2.0)
    source = dict(type="file", channels=[0], source="talk.wav")
    recording |= dict(channel_ids=[0], sources=[source])
    said = dict(id="talk-s", recording_id="talk", start=0.0, duration=1.0, channel=0, text="LOW")
    said |= dict(speaker="anna", language="English")
    whole = dict(id="talk-0", start=0.5, duration=1.0, channel=0, type="MonoCut")
    return whole | dict(supervisions=[said], recording=recording) | changes


NEMO = dict(audio_filepath="talk.wav", text="LOW", duration=2.0)
SPEECHBRAIN = {"u-1": dict(wav="{data_root}/talk.wav", length=2.0, words="LOW", spk_id="anna")}
TOOLKITS = "nemo wenet speechbrain lhotse kaldi common-voice".split()
EIGHTHS = st.integers(0, 24).map(lambda number: number / 8)  # of a second: whole samples
PARTS = st.sampled_from(["", "", "begin", "segment_start", "stop_time", "onset_sec", "Offset"])


@settings(max_examples=250)
@given(
    st.sampled_from(TOOLKITS),
    st.lists(st.tuples(EIGHTHS, st.none() | EIGHTHS), min_size=2, max_size=2),
    st.sampled_from([-0.5, 0, 0.25]),
    PARTS,
    st.sampled_from([".json", ".jsonl", ".json.gz", ".jsonl.gz"]),
    st.sampled_from([None, 2]),
)
def test_spans_of_toolkits_are_right_or_refused(talk, toolkit, times, shift, part, ending, indent):
    """Two utterances, each (start, length or None) in s; `part`: a field that isn't read."""
    spans, rows, texts = {}, {}, dict(zip(["LOW", "MID"], times, strict=True))
    for text, (start, length) in texts.items():
        if toolkit == "common-voice" or (length is None and toolkit in ("wenet", "speechbrain")):
            start, length = 0, None
        end = None if length is None else start + length
        given_start = None if end is None else start
        row = {part: 0.5} if part else {}
        if toolkit == "nemo":
            row |= dict(audio_filepath="talk.wav", text=text, offset=start, duration=length)
        elif toolkit == "wenet":
            row |= dict(key=text, wav="talk.wav", txt=text, start=given_start, end=end)
        elif toolkit == "speechbrain":
            stop = None if end is None else end * RATE
            row |= dict(wav="{data_root}/talk.wav", words=text, length=2.0, spk_id="anna")
            row |= dict(start=given_start and start * RATE, stop=stop)
        elif toolkit == "lhotse":
            end = start + (1 if length is None else length)
            said = cut()["supervisions"][0] | dict(text=text, start=shift, duration=0.75)
            row = cut(id=text, start=start, duration=end - start, supervisions=[said])
            start, end = start + max(shift, 0), min(end, start + shift + 0.75)
        elif toolkit == "kaldi":
            row = f"{text} talk {start} {-1 if end is None else end} {part}"
        else:
            row = "\t".join(["anna", f"{text}.mp3", text, "Benchmark", part])
        rows[text], spans[text] = row, (start, end)
    split = write_toolkit(talk, toolkit, rows, part, ending, indent)
    if part and toolkit != "lhotse":
        words = "RECORDING START END" if toolkit == "kaldi" else part
    elif any(end is not None and start >= end for start, end in spans.values()):
        words = "but begins at|is not a time"
    else:
        there = [(s, e) for s, e in spans.values() if s < 2 and (e is None or e <= 2.5)]
        words = "" if there else "no utterances are left"
    if words:
        with pytest.raises(ValueError, match=words):
            read(talk, split)
        return
    found = [utterance.span for utterance in read(talk, split).utterances]
    expected = [(start * RATE, min(2 if end is None else end, 2) * RATE) for start, end in there]
    assert found == expected


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    """A directory with a recording of 2 s and Common Voice's clips of it."""
    root = tmp_path_factory.mktemp("toolkits")
    for name in ("talk.wav", "clips/LOW.wav", "clips/MID.wav", "kaldi/talk.wav"):
        write_audio(root / name)
    return root


def write_toolkit(root: Path, toolkit: str, rows: dict, part: str, ending: str, indent) -> str:
    """Write two utterances as a toolkit's lists; return the name of the split."""
    if toolkit == "kaldi":
        (root / "kaldi/wav.scp").write_text("talk talk.wav")
        (root / "kaldi/segments").write_text("\n".join(rows.values()))
        (root / "kaldi/text").write_text("LOW LOW\nMID MID\n")
        return toolkit
    if toolkit == "common-voice":
        columns = "\t".join(["client_id", "path", "sentence", "segment", part])
        (root / "common-voice.tsv").write_text("\n".join([columns, *rows.values()]))
        (root / "clip_durations.tsv").write_text("clip\tduration[ms]\nLOW.mp3\t1\n")
        return toolkit
    split = toolkit + ending.replace(".", "-")
    content = rows if toolkit == "speechbrain" else [*rows.values()]
    write_manifest(root, content, split + ending, indent)
    return split


def test_lhotses_cuts_give_an_utterance_for_each_supervision(tmp_path):
    said = cut()["supervisions"][0]
    parts = [said | dict(id="a", start=-0.25, duration=0.5), said | dict(id="b", start=0.5)]
    write_audio(tmp_path / "talk.wav")
    write_manifest(tmp_path, [cut(supervisions=parts), cut(id="c", supervisions=[])])
    corpus = read(tmp_path)
    assert [(u.id, u.span, u.speaker) for u in corpus.utterances] == [
        ("a", (4000, 6000), "anna"),
        ("b", (8000, 12000), "anna"),
    ]
    assert corpus.left_out == {"no transcript": {"c": f"{tmp_path}/train.json: utterance 2"}}


@pytest.mark.parametrize(
    ("content", "which", "words"),
    [
        ([NEMO, dict(text="LOW")], 2, "no path"),
        ([NEMO, NEMO | dict(text=[7])], 2, "no string"),
        ([NEMO, dict(audio_filepath="talk.wav", sentence="A")], 2, "no text, in a field text, txt"),
        ([NEMO, NEMO | dict(id=["x"])], 2, "no string"),
        ([NEMO, 7], 2, "expected is a line of JSON"),
        ({"u": SPEECHBRAIN["u-1"] | dict(wav=dict(file="talk.wav", start=0))}, "'u'", "no string"),
        ([cut(type="MixedCut")], 1, "only cuts of one recording"),
        ([cut(recording=cut()["recording"] | dict(transforms=[dict(name="Speed")]))], 1, "as it"),
        ([dict(id="r", recording_id="r", sources=[], sampling_rate=8000)], 1, "lhotse's cuts"),
        ([cut(recording=cut()["recording"] | dict(sources=[dict(type="url", channels=[0])]))], 1,
         "no audio file for the channel 0"),
    ],
)  # fmt: skip
def test_what_a_manifest_lacks_is_told_with_its_number(tmp_path, content, which, words):
    write_audio(tmp_path / "talk.wav")
    write_manifest(tmp_path, content)
    with pytest.raises(ValueError, match=rf"train\.json: utterance {which}: .*{words}"):
        read(tmp_path)


def test_an_utterance_without_an_id_has_the_name_of_its_file(tmp_path):
    write_audio(tmp_path / "talk.wav"), write_audio(tmp_path / "deep/a b.wav")
    rows = [NEMO, NEMO | dict(offset=1, duration=0.5), dict(audio_filepath="deep/a b.wav", text="")]
    write_manifest(tmp_path, rows)
    assert [u.id for u in read(tmp_path).utterances] == ["a_b", "talk-1", "talk-2"]


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    (tmp_path / "train.json.gz").write_bytes(gzip.compress(b"[" + b" " * 2000))
    with pytest.raises(ValueError, match=r"train\.json\.gz:1: longer than 1,000 bytes"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["kaldi", "manifest"])
def test_paths_relative_to_the_working_directory_are_found(tmp_path, monkeypatch, kind):
    root = write_corpus(tmp_path / "corpus", kind)
    here = write_audio(tmp_path / "recipe/audio/here.wav")
    file = root / LISTS[kind]
    file.write_text(file.read_text().replace("talk.wav", "audio/../audio/here.wav"))
    monkeypatch.chdir(tmp_path / "recipe")
    assert any(os.path.samefile(utterance.path, here) for utterance in read(root).utterances)
    monkeypatch.chdir(tmp_path / "recipe/audio")
    with pytest.raises(ValueError) as error:
        read(root)
    looked = f"looked for in {file.parent} and {tmp_path}/recipe/audio"
    assert f"{file}:1: no audio: " in str(error.value) and looked in str(error.value)


def test_links_are_followed_and_each_directory_is_read_once(tmp_path):
    root = write_tones(tmp_path / "corpus", {"train": 3})
    (root / "train/0/7").rename(tmp_path / "elsewhere")
    (root / "train/0/7").symlink_to(tmp_path / "elsewhere")
    (root / "train/0/again").symlink_to(root / "train")  # a circle
    (root / "linked").symlink_to(root / "train")
    assert len(read(root).utterances) == 3
    assert len(read(root, "linked").utterances) == 3


def test_a_directory_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    root = write_tones(tmp_path / "corpus", {"train": 3})
    hidden, scandir = f"{root}/train/0/7", os.scandir

    def refuse(path: str):
        if path == hidden:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=f"{hidden}: can't be listed: Permission denied"):
        read(root)
    shutil.rmtree(write_corpus(tmp_path / "stm", "stm") / "train/sph")
    with pytest.raises(ValueError, match=r"train/sph: can't be listed: No such file"):
        read(tmp_path / "stm")


def test_a_pipe_in_place_of_a_list_is_refused(tmp_path):
    file = write_corpus(tmp_path, "manifest") / LISTS["manifest"]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"{file}:1: not a regular file"):
        read(tmp_path)


def test_names_and_ids_are_the_same_where_the_locale_is_not_utf8(tmp_path):
    for name in ("tälk.wav", "train/ü.flac", "test/sph/ö.wav"):
        write_audio(tmp_path / name)
    write_manifest(tmp_path, [NEMO | dict(audio_filepath="tälk.wav")], "dev.json")
    (tmp_path / "train/ü.trans.txt").write_text("ü LOW\n", encoding="utf-8")
    (tmp_path / "test/stm").mkdir()
    (tmp_path / "test/stm/ö.stm").write_text("ö 1 x 0 0.2 LOW\n", encoding="utf-8")
    code = """
import sys
from dynsize.config import Config
from dynsize.corpora import read_corpus
corpus = read_corpus(Config(corpus=sys.argv[1]), ["train", "dev", "test"])
print(ascii([utterance.id for utterance in corpus.utterances]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    ids = ["ü", "tälk", "ö.stm:1"]
    for utf8 in "01":
        environment = dict(LC_ALL="C", PYTHONUTF8=utf8, PYTHONCOERCECLOCALE="0")
        found = subprocess.check_output(command, env=os.environ | environment, text=True)
        assert found == ascii(ids) + "\n"


def test_the_notation_of_an_stm_reaches_the_utterance(tmp_path):
    file = write_corpus(tmp_path / "corpus", "stm") / LISTS["stm"]
    lines = ["talk a anna 0 1 <o,f0,male> { Um-Er / … / UH } Yes (Eh) (…) {NOISE} no(2)"]
    file.write_text("\n".join([*lines, "call b bert 0 1 Top", "call A bert 0 1 {NOISE} <sil>"]))
    corpus = read(tmp_path / "corpus", normaliser="plain")
    noted, plain = corpus.utterances
    assert noted.text == "um er yes eh no"
    assert in_notation(noted.reference) == "{ um er / @ / uh } yes (eh) no"
    assert (plain.text, plain.reference, plain.channel) == ("top", (), 1)
    assert list(corpus.left_out["no words but marks"]) == ["talks.stm:3"]
    file.write_text("talk a anna 0 1 yes\ntalk a anna 1 2 [laughter] no\n")
    with pytest.raises(ValueError, match=r"talks\.stm:2: '\[laughter\]' is not understood; in"):
        read(tmp_path / "corpus")


NASTY = rb"0 | { [ null -1 nan 1e999 ../../x /dev/zero / \ud800 \u0000 ;; <unk> 1 B inf".split()
NASTY += b'true } ( ) 1_0 " \0 \xff \xed\xa0\x80 \xe2\x80\xa8 \xef\xbb\xbf \xd9\xa3'.split()
NASTY += [b"\n", b"\t", b" ", b"\r", b"\x1c", b" / ", b"{ a / b }", b"[" * 5000, b"9" * 400]
inserted = st.sampled_from(NASTY) | st.binary(max_size=4)
edits = st.tuples(st.integers(0, 400), st.integers(0, 30), inserted)


@pytest.fixture(scope="module")
def all_forms(tmp_path_factory) -> dict[str, Path]:
    """The list of a corpus of each kind and form; one test after the other changes it."""
    folder = tmp_path_factory.mktemp("mutated")
    files = {kind: write_corpus(folder / kind, kind) / LISTS[kind] for kind in CORPUS_KINDS}
    notation = "talk 1 anna 0 1 <o,f0,male> { um / @ } LOW (uh) {NOISE} MID(2) <sil>\n"
    files["stm"].write_text(STM + notation)
    forms = {"array": [NEMO, NEMO], "dictionary": SPEECHBRAIN, "cuts": [cut(), cut(id="b")]}
    for name, content in forms.items():
        write_audio(folder / name / "talk.wav")
        files[name] = write_manifest(folder / name, content) / "train.json"
    write_audio(folder / "gzip/talk.wav")
    files["gzip"] = write_manifest(folder / "gzip", [NEMO], "train.json.gz") / "train.json.gz"
    return files


@pytest.mark.parametrize("form", [*CORPUS_KINDS, "array", "dictionary", "cuts", "gzip"])
@settings(max_examples=225)
@given(st.sampled_from(sorted(KALDI)), st.lists(edits, min_size=1, max_size=3), st.booleans())
def test_mutated_lists_are_read_or_refused_by_line(all_forms, form, name, edits, doubled):
    file = all_forms[form]
    root = file.parents[len(Path(LISTS.get(form, "")).parts) - 1 if form in LISTS else 0]
    file = file.with_name(name) if form == "kaldi" else file
    whole = file.read_bytes()
    mutated = whole * 2 if doubled else whole
    for start, length, new in edits:
        first = start % len(mutated or b"-")
        mutated = mutated[:first] + new + mutated[first + length :]
    file.write_bytes(mutated)
    try:
        corpus, said = read(root), ""
    except ValueError as error:  # and no other
        corpus, said = None, str(error)
    finally:
        file.write_bytes(whole)
    if corpus is None:
        place = re.escape(str(root)) + r"\S*:(\d+| utterance .*): "
        assert re.search(place + "|no utterances", said), said
        return
    assert corpus.utterances or corpus.left_out  # what is read is never empty without a word
    for utterance in corpus.utterances:
        assert utterance.span[0] < utterance.span[1]
        assert (utterance.id + utterance.path + utterance.text + utterance.speaker).encode()


def test_headers_are_read_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    opened, original = [], audio.opened
    monkeypatch.setattr(audio, "opened", lambda x: opened.append(Path(x).name) or original(x))
    root = write_corpus(tmp_path / "corpus", "librispeech")
    first = read(root)
    assert sorted(opened) == ["1-2-0000.flac", "1-2-0001.flac"]
    assert read(root) == first and len(opened) == 2
    file = root / "train/1/2/1-2-0001.flac"
    write_audio(file, seconds=1.0)
    assert [u.samples for u in read(root).utterances] == [2 * RATE, RATE]
    os.utime(file, ns=(0, 1))
    assert read(root).utterances[1].samples == RATE and opened[2:] == 2 * ["1-2-0001.flac"]
    name = str(file).encode()
    [kept] = [path for path in files.user_cache().iterdir() if name in path.read_bytes()]
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-9], whole.replace(b"8000", b"9000"), b"x" + whole, b"noise" * 99):
        kept.write_bytes(damaged)
        assert [u.samples for u in read(root).utterances] == [2 * RATE, RATE]
        assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root = write_corpus(tmp_path / "corpus", "librispeech")
    with pytest.warns(UserWarning, match="for later runs: Not a directory; XDG_CACHE_HOME names"):
        assert len(read(root).utterances) == 2
    config = tiny(corpus=str(root), cache_features=str(tmp_path / "file"))
    kept = Examples(read_corpus(config, ["train"]).utterances, None, config, keep=False)
    with pytest.warns(UserWarning, match="file: nothing is kept there for later runs: N") as told:
        assert len(kept[0].features) == len(kept[1].features)
    assert len({str(warning.message) for warning in told}) == 1  # Python shows it once


def examples(root: Path, **changes) -> Examples:
    tokenizer = train_tokenizer(["LOW MID HIGH TOP"], 12)
    return Examples(read(root).utterances, tokenizer, tiny(**changes), keep=False)


def test_features_are_kept_checked_and_made_again(tmp_path, monkeypatch):
    root, folder = write_tones(tmp_path / "corpus", {"train": 3}), str(tmp_path / "kept")
    plain, kept = examples(root), examples(root, cache_features=folder)
    expected = [plain[i].features for i in range(3)]

    def is_right() -> bool:
        return all(torch.equal(kept[i].features, expected[i]) for i in range(3))

    assert is_right()
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert len(files) == 3
    with monkeypatch.context() as patch:
        patch.setattr(batching, "read_audio", None)
        assert is_right()
    draw = random.Random(0)
    for trial in range(60):
        file, other = draw.sample(files, 2)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        place = draw.randrange(len(whole))
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes([damaged, whole[:place], other.read_bytes()][trial % 3])
        assert is_right() and file.read_bytes() == whole
    assert examples(root, cache_features=folder, mel_bins=10)[0].features.shape[1] == 10
    path = Path(kept.utterances[0].path)
    soundfile.write(path, soundfile.read(path)[0][::-1], RATE)
    again = examples(root, cache_features=folder)
    assert torch.equal(again[0].features, examples(root)[0].features)
    assert not torch.equal(again[0].features, expected[0])
    path.unlink()
    assert path.name in again[0].unreadable and torch.equal(again[0].features, torch.zeros(1, 12))


def test_speeds_are_a_function_of_seed_epoch_and_utterance(tones):
    speeds, drawn = (0.9, 1.0, 1.1), []
    plain = examples(tones).frames()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        some = examples(tones, speeds=speeds, seed=seed)
        assert {some.speed(i) for i in range(24)} == {1.0}  # outside training
        some.epoch = epoch
        drawn.append([some.speed(i) for i in range(24)])
        assert set(drawn[-1]) == set(speeds) and drawn[-1] == [some.speed(i) for i in range(24)]
        for i, (frames, speed) in enumerate(zip(some.frames(), drawn[-1], strict=True)):
            assert abs(len(some[i].features) - frames) <= 1
            assert (frames > plain[i], frames < plain[i]) == (speed < 1, speed > 1)
    assert len(set(map(tuple, drawn))) == 3
    tone = read_audio(some.utterances[0], RATE, 1.1)
    assert abs(len(tone) - some.utterances[0].samples / 1.1) <= 1
    with pytest.raises(ValueError, match="--speeds"):
        tiny(speeds=())


def test_a_training_tells_how_its_dev_and_test_splits_differ(tmp_path):
    root = write_tones(tmp_path / "corpus")
    file = root / "dev-other/2/7/2-7.trans.txt"
    file.write_text(file.read_text().replace("W", "w").replace("O", "Ö"))
    shutil.rmtree(root / "test-other")
    Trainer(tiny(corpus=str(root)), tmp_path / "run").begin()
    told = (tmp_path / "run/corpus.txt").read_text()
    assert "note: dev-other: characters that training never had, Ö " in told
    assert "test-clean: 6 utterances" in told
    assert "note: test-other is not checked: --test-splits test-other: no such split" in told
