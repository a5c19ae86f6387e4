"""Text from audio: a detector of tones as the network, then the command with networks of ours."""

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import in_process
import numpy as np
import pytest
import sentencepiece
import soundfile
import soxr
import torch
import torch.nn.functional as F
from conftest import RATE, TONES, random_supernet, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import ROOT, done_well, refused
from torch import Tensor

import dynsize
from dynsize import __main__ as command
from dynsize import checkpoint
from dynsize.networks import Facts, facts_of, windowed
from dynsize.recogniser import Recogniser, Transcript, Word, file_blocks, timed_words
from dynsize.subnet import cut
from dynsize.tokenizer import Tokenizer

WINDOW, HOP = 200, 80  # samples
STEP = 4 * HOP
TONE = 0.2  # seconds
WORDS = tuple(TONES)


class Units(Tokenizer):
    """A tokenizer that only turns labels into text."""

    def __init__(self, *units: bytes) -> None:
        self.units = [b"", *units]


def facts(longest_seconds: float = 3.0, tokenizer: Tokenizer | None = None) -> Facts:
    tokenizer = tokenizer or Units(*(f" {word}".encode() for word in WORDS))
    return Facts(tiny(), tokenizer, (1, 2), longest_seconds)


def detect(audio: Tensor, size: int = 1) -> Tensor:
    """Log-probabilities of the tones in each encoder frame, from it and one frame on each side."""
    frames = (1 + max(0, len(audio) - WINDOW) // HOP + 3) // 4
    audio = F.pad(audio, (0, max(0, frames * STEP - len(audio))))[: frames * STEP]
    spectrum = torch.fft.rfft(audio.view(frames, STEP)).abs()  # bins of 25 Hz
    power = torch.stack([spectrum[:, tone // 25] for tone in TONES.values()], 1)  # (T', 4)
    power = F.avg_pool1d(power.T[None], 3, stride=1, padding=1, count_include_pad=False)[0].T
    quiet = torch.full((frames, 1), 12.0)
    return torch.cat([quiet, power], 1).log_softmax(-1)


def speech(words: list[str], pauses: list[float], rate: int = RATE) -> np.ndarray:
    """Tones of 0.2 s with a pause before each, and 0.3 s of silence at the end."""
    time = np.arange(round(TONE * rate)) / rate
    parts = []
    for word, pause in zip(words, pauses, strict=True):
        parts += [np.zeros(round(pause * rate)), 0.4 * np.sin(2 * np.pi * TONES[word] * time)]
    audio = np.concatenate([*parts, np.zeros(round(0.3 * rate))])
    noise = np.random.default_rng(0).standard_normal(len(audio))  # no digital silence
    return (audio + 1e-4 * noise).astype(np.float32)


words_and_pauses = st.tuples(st.sampled_from(WORDS), st.floats(0.15, 2.0))
sentences = st.lists(words_and_pauses, min_size=1, max_size=12)


@given(sentences, st.floats(0.3, 4.0), st.lists(st.integers(0, 9000), max_size=8))
@settings(max_examples=60)
def test_windows_give_what_the_whole_gives_at_every_cut(sentence, longest_seconds, lengths):
    audio = speech(*map(list, zip(*sentence, strict=True)))
    blocks = np.split(audio, np.cumsum(lengths))
    parts = list(windowed(detect, blocks, facts(longest_seconds)))
    torch.testing.assert_close(torch.cat(parts), detect(torch.from_numpy(audio)))
    assert max(map(len, parts)) <= facts(longest_seconds).window_frames


def test_every_length_around_a_window_has_every_frame_once():
    shape = facts(0.5)
    window = shape.window_frames * STEP + WINDOW - HOP
    generator = np.random.default_rng(0)
    for samples in [0, 1, WINDOW, *range(window - 2 * STEP, window + 9 * STEP, 61)]:
        audio = generator.standard_normal(samples).astype(np.float32)
        parts = list(windowed(detect, [audio], shape))
        assert sum(map(len, parts)) == len(detect(torch.from_numpy(audio)))


def test_digital_silence_becomes_faint_noise_in_windows_alone():
    audio = np.random.default_rng(0).standard_normal(90 * HOP + 7).astype(np.float32)
    audio[3 * HOP - 9 : 9 * HOP + 9] = 0.0
    seen = []

    def network(window: Tensor) -> Tensor:
        seen.append(window)
        return detect(window)

    list(windowed(network, [audio], facts(0.1)))
    full = facts(0.1).window_frames * STEP + WINDOW - HOP
    assert len(seen) > 1 and {len(window) for window in seen[:-1]} == {full}
    first = seen[0].numpy()
    changed = first != audio[: len(first)]
    assert changed[3 * HOP : 9 * HOP].all() and changed.sum() == 6 * HOP
    assert 0 < np.abs(first[changed]).max() < 1e-3
    assert (audio[3 * HOP : 9 * HOP] == 0).all()
    list(windowed(network, [audio], facts(60.0)))
    assert np.array_equal(seen[-1].numpy(), audio)  # in one piece: as evaluation decodes it


def test_memory_does_not_grow_with_the_audio():
    def peak(seconds: int) -> int:
        blocks = (np.zeros(RATE, np.float32) for _ in range(seconds))
        tracemalloc.start()
        for _ in windowed(lambda audio: torch.zeros(1000, 1), blocks, facts()):
            pass
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest

    assert peak(400) < 1.1 * peak(40) < 1e6


@given(sentences, st.floats(0.5, 3.0))
def test_words_and_times_are_those_of_the_tones(sentence, longest_seconds):
    words, pauses = map(list, zip(*sentence, strict=True))
    audio = speech(words, pauses)
    result = Recogniser(detect, facts(longest_seconds)).transcribe(audio, sample_rate=RATE)
    assert result.text == " ".join(words)
    assert result.seconds == pytest.approx(len(audio) / RATE)
    start = 0.0
    for word, pause in zip(result.words, pauses, strict=True):
        start += pause
        assert word.start == pytest.approx(start, abs=0.08 + 2 * STEP / RATE)
        start += TONE


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), max_size=20), st.floats(0, 1))
def test_times_are_ordered_and_inside_the_audio(steps, share):
    units = (b" a", b"b", b" ", b" cd", b"e")
    labels, frame = [], -1
    for label, gap in steps:
        frame += 1 + gap
        labels.append((label, frame))
    seconds = (frame + share) * STEP / RATE if steps else share
    words = timed_words(labels, facts(tokenizer=Units(*units)), seconds)
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times) and all(0 <= time <= seconds + 5e-4 for time in times)
    text = b"".join(units[label - 1] for label, _ in labels).decode()
    assert [word.text for word in words] == text.split()


KINDS = {
    "unigram": {},
    "byte fallback": dict(byte_fallback=True, vocab_size=320, character_coverage=0.98),
    "pieces across blanks": dict(split_by_whitespace=False, vocab_size=90),
    "the blank as suffix": dict(treat_whitespace_as_suffix=True),
    "symbols": dict(user_defined_symbols=["▁[x]", "A▁B"]),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    """A SentencePiece model of a kind that a user may bring."""
    texts = ["THE CAT IS ON THE MAT", "JÜLIA IS ON THE ROOF", "ON THE 日本 IS THE MAT"] * 20
    model = io.BytesIO()
    options = dict(vocab_size=40, hard_vocab_limit=False, normalization_rule_name="identity")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, bos_id=-1, eos_id=-1, minloglevel=2,
        **(options | KINDS[request.param]),
    )  # fmt: skip
    return Tokenizer(model.getvalue())


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_is_what_sentencepiece_decodes(tokenizer, data):
    labels = data.draw(st.lists(st.integers(1, tokenizer.labels - 1), max_size=20))
    expected = re.sub("\ufffd+", "\ufffd", tokenizer.pieces.decode(labels))
    expected = b" ".join(expected.encode().split()).decode()  # splits at ASCII's blanks alone
    assert re.sub("\ufffd+", "\ufffd", tokenizer.decode(labels)) == expected
    pairs = [(label, i) for i, label in enumerate(labels)]
    timed = timed_words(pairs, facts(tokenizer=tokenizer), 99.0)
    assert " ".join(word.text for word in timed) == tokenizer.decode(labels)


def test_a_word_of_any_tokenizer_has_the_frames_of_its_letters(tokenizer):
    text = "THE CAT IS ON"
    labels = tokenizer.encode(text)
    words = tokenizer.words(labels)
    assert [word.text for word in words] == text.split()
    for word in words:
        assert word.text in tokenizer.decode(labels[word.first : word.last + 1]).split()
        shorter = tokenizer.decode(labels[word.first + 1 : word.last + 1])
        assert word.first == word.last or word.text not in shorter.split()


def test_resampling_in_blocks_is_resampling_at_once(tmp_path):
    audio = np.random.default_rng(0).standard_normal(25 * 11025).astype(np.float32) / 10
    soundfile.write(tmp_path / "noise.wav", audio, 11025, subtype="FLOAT")
    blocks = list(file_blocks(tmp_path / "noise.wav", RATE, None, None))
    assert len(blocks) > 2 and len(np.concatenate(blocks)) == round(25 * RATE)
    expected = soxr.resample(audio, 11025, RATE)
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-4)


def test_channels_are_averaged_or_chosen(tmp_path):
    both = np.stack([speech(["LOW"], [0.3]), speech(["TOP"], [0.3])], 1)
    soundfile.write(tmp_path / "two.wav", both, RATE)
    recogniser = Recogniser(detect, facts())
    assert recogniser.transcribe(tmp_path / "two.wav", channel=0).text == "LOW"
    assert recogniser.transcribe(both, sample_rate=RATE, channel=1).text == "TOP"
    triple = np.repeat(both, 3, axis=0)
    expected = recogniser.transcribe(triple, sample_rate=3 * RATE)
    assert recogniser.transcribe(triple, sample_rate=np.int16(3 * RATE)) == expected
    with pytest.raises(ValueError, match=r"two\.wav: has no channel 2; it has 2"):
        recogniser.transcribe(tmp_path / "two.wav", channel=2)
    same = np.stack([speech(["MID"], [0.3])] * 2, 1)
    assert recogniser.transcribe(same, sample_rate=RATE).text == "MID"


ZEROS = np.zeros(9, np.float32)


@pytest.mark.parametrize(
    "given, why",
    [
        (dict(sample_rate=None), "sample_rate None: of an array must be"),
        (dict(sample_rate=0), "sample_rate 0: of an array must be a whole number"),
        (dict(sample_rate=10**18), "sample_rate 1000000000000000000: of an"),
        (dict(sample_rate=8000.5), "sample_rate 8000.5: of an"),
        (dict(audio=np.zeros(9, np.int16)), "must be floats"),
        (dict(audio=np.full(9, np.nan, np.float32)), "samples that are no numbers"),
        (dict(audio=np.full(9, 1e30)), "samples that are no numbers, or above 1e"),
        (dict(audio=np.zeros((2, 9))), "this array has 2 samples of 9 channels"),
        (dict(audio=[0.0, 0.1]), "must be a path or a numpy array of floats, not list"),
        (dict(audio="a.wav"), "a.wav: a file has a sample rate"),
        (dict(audio="missing.wav", sample_rate=None), "missing.wav: can't be read: No such file"),
        (dict(size=3), "size 3: the sizes are 1, 2"),
        (dict(size=2.0), "size 2.0: the sizes are 1, 2"),
        (dict(language_model="a.arpa"), "language_model a.arpa: Recogniser.language_model opens"),
        (dict(channel="0"), "channel '0': must be a whole number"),
        (dict(beam=2.5), "beam 2.5: must be a whole number"),
        (dict(beam=0), "beam 0: must be a whole number, 1 or more"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(given, why):
    arguments = dict(audio=ZEROS, sample_rate=RATE) | given
    with pytest.raises(ValueError, match=re.escape(why)):
        Recogniser(detect, facts()).transcribe(**arguments)


def test_audio_without_sound_has_no_words():
    for audio in (ZEROS[:0], np.zeros(RATE, np.float32)):
        assert Recogniser(detect, facts()).transcribe(audio, sample_rate=RATE).words == []


def test_the_size_within_a_latency_is_the_largest_that_is_fast_enough():
    recogniser = Recogniser(detect, facts())
    recogniser.latencies = {1: 5.0, 2: 9.0}
    assert [recogniser.size_within(limit) for limit in (5, 8.9, 9, 1e6)] == [1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"the fastest size takes 5\.0 ms"):
        recogniser.size_within(4.9)
    assert Recogniser(detect, facts()).size_within(1e6) == 2


def test_a_latency_is_that_of_the_windows_that_are_transcribed():
    lengths = []
    recogniser = Recogniser(lambda *a, **k: lengths.append(len(a[0])) or detect(*a, **k), facts())
    recogniser.transcribe(np.ones(10 * RATE, np.float32), sample_rate=RATE)
    windows, lengths[:] = lengths[:], []
    recogniser.latency(1)
    assert len(windows) > 1 and lengths == 8 * windows  # one run to warm up, seven that count


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory with the checkpoint of a supernet and one cut size. Not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = random_supernet([5, 2, 7, 0, 1, 3, 6, 4])
    checkpoint.save(folder / "checkpoint.pt", model, tokenizer)
    checkpoint.save(folder / "size-3.pt", cut(model, 3), tokenizer)
    return folder


@pytest.fixture
def noise(tmp_path) -> Path:
    path = tmp_path / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.3, 0.3, 3 * RATE), RATE)
    return path


def test_loads_a_run_a_checkpoint_and_a_cut_size(run, noise):
    whole, cut_size = dynsize.load(run), dynsize.load(str(run / "size-3.pt"))
    assert whole.sizes == (3, 5, 8) and cut_size.sizes == (3,)
    texts = [whole.transcribe(noise, size=size).text for size in (3, 5, 8)]
    assert texts[0] == cut_size.transcribe(noise).text and len(set(texts)) == 3
    assert dynsize.load(run / "checkpoint.pt").transcribe(str(noise)).text == texts[2]


@pytest.mark.parametrize("longest, window", [(0.3, 2.0), (7.0, 7.0), (90.0, 30.0)])
def test_windows_are_as_long_as_the_longest_utterance_within_bounds(tmp_path, longest, window):
    checkpoint.save(tmp_path / "checkpoint.pt", *random_supernet(), longest_seconds=longest)
    assert facts_of(checkpoint.load(tmp_path)).window_seconds == window


def test_the_command_writes_text_of_a_size(run, noise, tmp_path):
    expected = dynsize.load(run).transcribe(noise, size=5)
    says = ("dynsize", noise, "--model", run)
    done = done_well(*says, "--size", 5)
    assert (done.stdout, done.stderr) == (f"{expected.text}\n", "")
    folder = tmp_path / "new" / "texts"
    written_to = (*says, "--size", 5, "--format", "json", "--output", folder)
    done = done_well(*written_to)
    assert not done.stdout + done.stderr
    written = json.loads((folder / "noise.json").read_text())
    assert written["text"] == expected.text and written["seconds"] == 3.0
    assert [Word(*word.values()) for word in written["words"]] == expected.words
    line = refused(*written_to, cwd=folder)
    assert "noise.json: exists already; --overwrite replaces it" in line
    done_well(*written_to, "--overwrite")
    assert "size 8 takes" in done_well(*says, "--max-latency-ms", 1e6).stderr


@pytest.mark.parametrize(
    "arguments, why",
    [
        (("a.wav", "--model", "no-run"), "no-run: can't be read"),
        (("a.wav",), "--model"),
        (("a.wav", "--model", "RUN", "--size", "4"), "size 4: the sizes are 3, 5, 8"),
        (("a.wav", "--model", "RUN", "--max-latency-ms", "0"), "the fastest size takes"),
        (("a.wav", "--model", "RUN", "--channel", "0"), "the first channel is 1"),
        (("a.wav", "--model", "RUN", "--max-latency-ms", "9", "--beam", "4"), "name --size"),
        (("a.wav", "b.wav", "--model", "RUN", "--format", "srt"), "srt of several files needs"),
        (("a.wav", "x/a.flac", "--model", "RUN", "--output", "."), "would be a.txt too"),
    ],
)
def test_the_command_refuses_in_one_line(run, tmp_path, arguments, why):
    arguments = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert why in refused("dynsize", *arguments, cwd=tmp_path)


def test_the_command_goes_on_after_a_file_that_cannot_be_read(run, noise, tmp_path):
    (tmp_path / "talk.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(99))
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-1, 1, 30_000), RATE)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    names = [tmp_path / name for name in ("missing.wav", "talk.m4a", "cut.flac")]
    done = in_process.run("dynsize", *names, noise, "--model", run)
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    for line, name in zip(done.stderr.splitlines(), names, strict=True):
        assert line.startswith(f"dynsize: {name}: ")
    assert f"ffmpeg -i {names[1]} {tmp_path / 'talk.flac'} converts it" in done.stderr


def test_standard_input_without_audio_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("text\n" * 99)
    _, terminal = os.openpty()
    no_audio, no_input = "not audio that can be read: [^<]*$", "is closed, or a terminal"
    with open("/dev/null") as empty, open(tmp_path / "text") as text, open(terminal) as keys:
        for stdin, why in {empty: no_audio, text: no_audio, keys: no_input, None: no_input}.items():
            monkeypatch.setattr(sys, "stdin", stdin)
            with pytest.raises(ValueError, match=f"^standard input: {why}"):
                list(file_blocks("-", RATE, None, None))


def test_the_command_is_a_module_too_and_reads_a_wav_of_unknown_length(run, noise):
    data = noise.read_bytes()
    place = data.index(b"data") + 4
    data = data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :]  # as ffmpeg writes to a pipe
    done = subprocess.run(
        [sys.executable, "-m", "dynsize", "-", "--model", str(run)],
        input=data, capture_output=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == dynsize.load(run).transcribe(noise).text + "\n"


SAID = [Word("ONE", 0.5, 0.9), Word("TWO", 0.9, 1.25), Word("THREE", 3661.0, 3661.5)]
TALK = Transcript(SAID, 3662.0)


def test_formats():
    written = {name: write(TALK, "x/my talk.wav") for name, write in command.FORMATS.items()}
    assert written["txt"] == "ONE TWO THREE\n"
    assert written["srt"] == (
        "1\n00:00:00,500 --> 00:00:01,250\nONE TWO\n\n"
        "2\n01:01:01,000 --> 01:01:01,500\nTHREE\n"
    )  # fmt: skip
    assert written["vtt"] == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.250\nONE TWO\n\n01:01:01.000 --> 01:01:01.500\nTHREE\n"
    )
    assert written["ctm"].splitlines() == [
        "my_talk 1 0.500 0.400 ONE", "my_talk 1 0.900 0.350 TWO", "my_talk 1 3661.000 0.500 THREE",
    ]  # fmt: skip
    assert json.loads(written["json"])["words"][1] == dict(word="TWO", start=0.9, end=1.25)


ODD = Transcript([Word("A&B<C", 0.0, 1.0), Word("É日", 1.0, 2.0)], 2.0)


def test_signs_that_a_format_has_itself_are_escaped():
    assert "A&amp;B&lt;C É日" in command.vtt(ODD, "a.wav") and "A&B<C É" in command.srt(ODD, "a")
    assert command.ctm(ODD, "\x1b[1mx.wav").startswith("\\x1b[1mx 1 0.000")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("name", command.FORMATS)
def test_a_stream_that_cannot_hold_the_text_gets_escapes(monkeypatch, encoding, name):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    command.put(command.FORMATS[name](ODD, "caf\udce9.wav"), None)
    text = sys.stdout.buffer.getvalue().decode(encoding)
    assert "\\u65e5" in text and ("É" in text) == (encoding == "latin-1")
    if name == "json":
        row = json.loads(text)
        assert row["text"] == "A&B<C É日" and row["file"] == "caf\udce9.wav"


def test_the_command_keeps_what_is_there(run, noise, tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9.wav")
    (tmp_path / name).write_bytes(noise.read_bytes())
    flags = ("--model", run, "--output", tmp_path)
    as_json = ("dynsize", tmp_path / name, *flags, "--format", "json")
    done_well(*as_json)
    written = tmp_path / os.fsdecode(b"caf\xe9.json")
    assert json.loads(written.read_text())["file"].endswith(name)
    (tmp_path / "talk.txt").write_bytes(noise.read_bytes())
    line = refused("dynsize", tmp_path / "talk.txt", *flags, "--overwrite", cwd=tmp_path)
    assert "talk.txt: is an audio file itself" in line
    (tmp_path / "noise.txt").symlink_to(tmp_path / "nowhere")
    assert "noise.txt: exists already" in refused("dynsize", noise, *flags, cwd=tmp_path)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert ".json: No space left" in refused(*as_json, "--overwrite", cwd=tmp_path)


def test_captions_are_short():
    words = [Word("word", i / 2, i / 2 + 0.4) for i in range(50)]
    captions = command.captions(Transcript(words, 30.0))
    assert " ".join(caption.text for caption in captions) == " ".join(50 * ["word"])
    assert max(len(caption.text) for caption in captions) <= 60
    assert [caption.start for caption in captions] == [words[i].start for i in range(0, 50, 12)]
    assert [caption.end for caption in captions] == [words[i].end for i in (11, 23, 35, 47, 49)]


def test_captions_of_a_script_without_blanks_are_short():
    text = 20 * "ขึ้นรถ坐公交车。"
    words = [Word("a", 0.0, 1.0), Word(text, 1.0, 41.0), Word("b", 41.0, 42.0)]
    captions = command.captions(Transcript(words, 42.0))
    assert "".join(caption.text for caption in captions) == f"a {text} b"
    assert max(caption.end - caption.start for caption in captions) <= 8
    assert not any(unicodedata.category(c.text[0])[0] == "M" for c in captions)  # marks are kept


def test_the_snippet_of_the_readme_runs(noise, tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"^```python\n(import dynsize\n.*?)^```", readme, re.M | re.S)
    assert found, "README.md has no Python that begins with `import dynsize`"
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    model, tokenizer = random_supernet(blocks=5, sizes=(7, 13, 20))  # as the preset demo
    checkpoint.save(tmp_path / "runs" / "demo" / "checkpoint.pt", model, tokenizer)
    soundfile.write(tmp_path / "talk.flac", *soundfile.read(noise))
    monkeypatch.chdir(tmp_path)
    assert len(found[1].splitlines()) <= 25
    exec(compile(found[1], "README.md", "exec"), {})
    assert re.search(r"\d\.\d", capsys.readouterr().out)  # a time
