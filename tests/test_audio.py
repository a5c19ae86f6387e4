"""Audio files of every ending; MP3 files that don't tell their length; files that are refused."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RATE, tiny
from hypothesis import given
from hypothesis import strategies as st

from dynsize.audio import ENDINGS, CorruptAudio, Header, frame_bytes, header_of, read_samples
from dynsize.batching import features_of
from dynsize.corpora import UNREADABLE, Corpus, read_audio, read_corpus


def loud_then_quiet(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Noise whose first tenth is loud: an encoder of variable rate spends its bits there."""
    noise = np.random.default_rng(0).standard_normal(round(seconds * rate))
    noise[: len(noise) // 10] *= 0.2
    noise[len(noise) // 10 :] *= 1e-3
    return np.stack(channels * [noise], 1)


def write_mp3(
    path: Path, mode: str, seconds: float = 4.0, rate: int = 16000, channels: int = 1
) -> int:
    """Write an MP3, take away its first frame, which tells its length; return its samples."""
    audio = loud_then_quiet(seconds, rate, channels)
    soundfile.write(path, audio, rate, bitrate_mode=mode, compression_level=0.5)
    data = path.read_bytes()
    assert b"Xing" in data[:60] or b"Info" in data[:60]
    path.write_bytes(data[frame_bytes(data) :])
    return len(audio)


def listed(root: Path, *rows: dict, **changes) -> Corpus:
    """Read a manifest with these rows."""
    (root / "train.jsonl").write_text("\n".join(json.dumps({"text": "A"} | row) for row in rows))
    return read_corpus(tiny(corpus=str(root), **changes), ["train"])


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (44100, 1), (48000, 2)])
def test_an_mp3_that_does_not_tell_its_length_is_read_to_its_end(tmp_path, mode, rate, channels):
    samples = write_mp3(tmp_path / "a.mp3", mode, rate=rate, channels=channels)
    estimated = soundfile.info(tmp_path / "a.mp3").frames
    if mode == "VARIABLE":
        assert estimated < 0.7 * samples  # what libsndfile reads of it
    [utterance] = listed(tmp_path, dict(audio_filepath="a.mp3", channel=channels - 1)).utterances
    # the encoder begins with up to two frames of silence, and fills up the last one
    assert samples <= utterance.span[1] <= samples + 4 * 1152
    audio = read_audio(utterance, rate).numpy()
    assert len(audio) == utterance.span[1]
    loud = np.abs(audio).reshape(-1)[: len(audio) // 10].mean()
    assert np.abs(audio[len(audio) // 2 :]).mean() < 0.05 * loud
    assert np.abs(audio[-2400:-1200]).mean() > 1e-4  # there is sound at the end


def test_an_mp3_after_an_id3_tag_and_with_noise_between_frames_is_read(tmp_path):
    samples = write_mp3(tmp_path / "a.mp3", "VARIABLE")
    data = (tmp_path / "a.mp3").read_bytes()
    tag = b"ID3\x04\x00\x00\x00\x00\x02\x00" + bytes(256)
    (tmp_path / "a.mp3").write_bytes(tag + data + b"TAG" + bytes(125))
    [utterance] = listed(tmp_path, dict(audio_filepath="a.mp3")).utterances
    assert samples <= utterance.span[1] <= samples + 4 * 1152
    assert len(read_audio(utterance, RATE)) == utterance.samples


def test_spans_of_an_mp3_without_a_length_are_those_of_the_whole(tmp_path):
    write_mp3(tmp_path / "a.mp3", "VARIABLE")
    whole, part = listed(
        tmp_path,
        dict(audio_filepath="a.mp3"),
        dict(audio_filepath="a.mp3", offset=1.0, duration=0.5),
    ).utterances
    expected = read_audio(whole, 16000)[16000:24000]
    np.testing.assert_allclose(read_audio(part, 16000), expected, atol=1e-5)


@pytest.mark.parametrize(("kept", "is_read"), [(0.97, True), (0.6, False)])
def test_an_mp3_shorter_than_its_header_says_is_read_within_half_a_second(tmp_path, kept, is_read):
    audio = loud_then_quiet(4.0, 16000)
    soundfile.write(tmp_path / "a.mp3", audio, 16000, bitrate_mode="CONSTANT")
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(data[: round(kept * len(data))])
    [utterance] = listed(tmp_path, dict(audio_filepath="a.mp3")).utterances
    if is_read:
        assert len(read_audio(utterance, 16000)) == len(audio)
    else:
        with pytest.raises(CorruptAudio, match=r"a\.mp3: \d+ of 64000 samples can be read"):
            read_audio(utterance, 16000)


FORMATS = {
    "flac": {}, "wav": {}, "ogg": {}, "mp3": {}, "caf": {}, "aiff": {}, "aif": dict(format="AIFF"),
    "au": {}, "snd": dict(format="AU"), "w64": {}, "rf64": {}, "voc": {}, "opus": dict(
    format="OGG", subtype="OPUS"), "sph": dict(format="NIST"), "nist": dict(format="NIST"),
    "oga": dict(format="OGG"), "aifc": dict(format="AIFF"),
}  # fmt: skip


@pytest.mark.parametrize("ending", sorted(FORMATS))
def test_every_ending_is_found_in_any_case_and_layout(tmp_path, ending):
    audio = loud_then_quiet(0.5, RATE)
    names = [f"train/1/2/1-2-0000.{ending}", f"stm/sph/talk.{ending.upper()}"]
    names.append(f"clips/one.{ending.title()}")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        with open(path, "wb") as file:
            how = {"format": ending.upper(), "subtype": None} | FORMATS[ending]
            soundfile.write(file, audio, RATE, **how)
    (tmp_path / "train/1/2/1-2.trans.txt").write_text("1-2-0000 A\n")
    (tmp_path / "stm/stm").mkdir()
    (tmp_path / "stm/stm/x.stm").write_text("talk 1 anna 0 0.5 A\n")
    (tmp_path / "tsv.tsv").write_text("path\tsentence\none.mp3\tA\n")
    utterances = read_corpus(tiny(corpus=str(tmp_path)), ["train", "stm", "tsv"]).utterances
    assert [Path(u.path).relative_to(tmp_path).as_posix() for u in utterances] == names
    assert all(len(read_audio(u, RATE)) == u.samples for u in utterances)


def test_of_several_endings_the_first_that_is_read_counts(tmp_path):
    folder = tmp_path / "train/1"
    folder.mkdir(parents=True)
    for name in ("1-2.wav", "1-2.FLAC", "1-2.ogg"):
        with open(folder / name, "wb") as file:
            soundfile.write(file, loud_then_quiet(0.5, RATE), RATE, format=name[4:].upper())
    (folder / "1-2.m4a").touch()
    (folder / "1.trans.txt").write_text("1-2 A\n")
    assert ENDINGS[:3] == [".flac", ".wav", ".sph"]
    assert (
        read_corpus(tiny(corpus=str(tmp_path)), ["train"]).utterances[0].path.endswith("1-2.FLAC")
    )


def shorten_sphere() -> bytes:
    """The start of a SPHERE file that NIST's tools compressed with shorten."""
    fields = ["NIST_1A", "   1024", "channel_count -i 1", "sample_rate -i 16000"]
    fields += ["sample_n_bytes -i 2", "sample_byte_format -s2 01", "sample_count -i 8000"]
    fields += ["sample_coding -s26 pcm,embedded-shorten-v2.00", "end_head", ""]
    return "\n".join(fields).encode().ljust(1024) + b"ajkg\x02" + bytes(4000)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.sph", shorten_sphere(), ["compressed SPHERE", "sph2pipe -f rif", "a.wav"]),
        ("a.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(500), ["ffmpeg -i", "a.m4a", "a.flac"]),
        ("a.M4A", b"", ["ffmpeg -i", "a.M4A"]),
        ("a.wav", b"no audio", ["a.wav", "Format not recognised"]),
        ("a.mp3", b"no audio", ["a.mp3"]),
        ("a.mp3", b"\xff\xfb", ["a.mp3"]),
        ("a.mp3", b"ID3", ["a.mp3"]),
        ("a.flac", None, ["tells no length", "ffmpeg"]),
    ],
)
def test_what_can_not_be_read_is_named_with_what_converts_it(tmp_path, name, data, words):
    if data is None:  # as encoders write it that can't go back in their output
        soundfile.write(tmp_path / name, loud_then_quiet(0.5, RATE), RATE)
        data = bytearray((tmp_path / name).read_bytes())
        data[21] &= 0xF0
        data[22:26] = bytes(4)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="no utterances are left") as error:
        listed(tmp_path, dict(audio_filepath=name))
    assert all(word in str(error.value) for word in words), error.value


def test_features_that_are_not_finite_are_corrupt_audio(tmp_path):
    for name, level in (("loud", 1e30), ("infinite", np.inf), ("good", 0.1)):
        audio = np.full(RATE, level) * np.random.default_rng(0).choice([-1, 1], RATE)
        soundfile.write(tmp_path / f"{name}.wav", audio, RATE, subtype="FLOAT")
    rows = [dict(audio_filepath=f"{name}.wav") for name in ("loud", "infinite", "good")]
    corpus = listed(tmp_path, *rows)
    good, infinite, loud = corpus.utterances
    assert features_of(good, tiny(), 1.0).isfinite().all() and not corpus.left_out.get(UNREADABLE)
    with pytest.raises(CorruptAudio, match=r"loud\.wav: samples so large"):
        features_of(loud, tiny(), 1.0)
    with pytest.raises(CorruptAudio, match=r"infinite\.wav: samples that are not finite"):
        features_of(infinite, tiny(), 1.0)


@given(st.binary(max_size=99), st.lists(st.binary(max_size=5), max_size=9), st.integers(2, 400))
def test_any_bytes_are_an_mp3_or_are_refused(tmp_path_factory, start, parts, length):
    frame = b"\xff\xfb\x90\xc4".ljust(length, b"\0")
    path = tmp_path_factory.mktemp("bytes") / "a.mp3"
    path.write_bytes(start + frame.join([b"", *parts, b""]))
    header = header_of((str(path), None))
    if isinstance(header, Header):
        with suppress(CorruptAudio):
            read_samples(str(path), (0, header.samples), header.rate, 0)
    else:
        assert "a.mp3" in str(header)
