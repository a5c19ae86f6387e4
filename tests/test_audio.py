"""Audio files: formats, whole and cut, of unknown length, from a pipe; what is refused, and how."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import soundfile
from conftest import RATE, read, tiny

from dynsize.audio import ENDINGS, FORMATS, CorruptAudio, Header, header_of, opened, read_samples
from dynsize.batching import features_of
from dynsize.corpora import Corpus, read_audio


def loud_then_quiet(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """Noise whose first tenth is loud: an encoder of variable rate spends its bits there."""
    noise = np.random.default_rng(0).standard_normal(round(seconds * rate))
    noise[: len(noise) // 10] *= 0.2
    noise[len(noise) // 10 :] *= 1e-2
    return np.stack(channels * [noise], 1)


def decoded(source, name: str = "") -> np.ndarray:
    """Return (samples, channels) of a file, read block by block."""
    with opened(source, name) as file:
        return np.concatenate(list(file.blocks()))


def listed(root: Path, *rows: dict, **changes) -> Corpus:
    """Read a manifest with these rows."""
    (root / "train.jsonl").write_text("\n".join(json.dumps({"text": "A"} | row) for row in rows))
    return read(root, **changes)


def left_out(root: Path, *rows: dict) -> str:
    """Return why the utterances of a manifest, all of them, are left out."""
    with pytest.raises(ValueError, match="no utterances are left") as error:
        listed(root, *rows)
    return str(error.value)


@contextmanager
def piped(data: bytes) -> Iterator[IO[bytes]]:
    """Give the end of a pipe from which these bytes come."""
    source, sink = os.pipe()
    with open(source, "rb", buffering=0) as pipe, open(sink, "wb") as file:
        writer = threading.Thread(target=lambda: (file.write(data), file.close()))
        writer.start()
        yield pipe
    writer.join()


KINDS = [(f, s) for f in soundfile.available_formats() for s in soundfile.available_subtypes(f)]


@pytest.mark.parametrize(("kind", "coding"), KINDS)
def test_what_can_be_decoded_is_read_and_what_is_missing_is_told(tmp_path, kind, coding):
    """Each format that libsndfile knows: whole, cut at three places, and through a pipe."""
    audio, path = loud_then_quiet(4.0), tmp_path / "a"
    try:
        soundfile.write(path, audio, RATE, coding, format=kind)
    except soundfile.LibsndfileError:
        pytest.skip(f"libsndfile does not write {coding} in {kind}")
    data = path.read_bytes()
    if kind not in FORMATS:
        with pytest.raises(CorruptAudio, match=r"a: .*(is not read; ffmpeg|not recognised)"):
            decoded(path)
        return
    whole = decoded(path)
    assert len(audio) <= len(whole) < len(audio) + 400  # some are filled up to a whole block
    header = header_of(str(path))
    assert (header.samples, header.lost) == (len(whole), "")
    span = (RATE, RATE + 500)  # also where the format can't seek
    part = read_samples(str(path), span, RATE, 0)
    np.testing.assert_allclose(part, whole[slice(*span), 0], atol=1e-3)
    with piped(data) as pipe:
        np.testing.assert_array_equal(decoded(pipe, "pipe"), whole)
    for share in (0.9, 0.5, 0.05):
        path.write_bytes(data[: round(share * len(data))])
        with pytest.raises(CorruptAudio, match=r"a: [^\n]*(truncated|no samples|can be read)"):
            decoded(path)
        header = header_of(str(path))
        if isinstance(header, Header) and not header.lost:  # FLAC and MP3 show it when read
            with pytest.raises(CorruptAudio, match=r"a: "):
                read_samples(str(path), (0, header.samples), RATE, 0)


NOTHING, MOST = bytes(4), b"\xff" * 4


@pytest.mark.parametrize(
    ("ending", "mark", "changes", "is_read"),
    [
        ("wav", b"data", [(4, MOST)], True),  # as ffmpeg and others write it into a pipe
        ("wav", b"data", [(4, b"\x00\xf0\xff\x7f")], True),
        ("wav", b"data", [(4, NOTHING)], False),  # the recorder crashed
        ("wav", b"RIFF", [(4, NOTHING)], True),
        ("wav", b"RIFF", [(4, b"\xff\xff\x00\x00")], True),
        ("aiff", b"SSND", [(4, MOST)], True),
        ("aiff", b"SSND", [(4, NOTHING)], True),
        ("au", b".snd", [(8, MOST)], True),
        ("au", b".snd", [(8, NOTHING)], False),
        ("caf", b"data", [(4, MOST + MOST)], False),
        ("flac", b"fLaC", [(21, b"\xf0"), (22, NOTHING)], True),
        ("flac", b"fLaC", [(21, b"\xff"), (22, MOST)], True),  # 2**36 samples
    ],
)
def test_headers_without_the_length_are_not_believed(tmp_path, ending, mark, changes, is_read):
    audio, path = loud_then_quiet(1.0), tmp_path / f"a.{ending}"
    soundfile.write(path, audio, RATE)
    data = bytearray(path.read_bytes())
    start = data.index(mark)
    for place, new in changes:
        data[start + place : start + place + len(new)] = new
    path.write_bytes(data)
    if is_read:
        [utterance] = listed(tmp_path, dict(audio_filepath=path.name)).utterances
        assert utterance.samples == len(decoded(path)) == len(audio)
        np.testing.assert_allclose(read_audio(utterance, RATE), audio[:, 0], atol=1e-4)
    else:
        assert path.name in left_out(tmp_path, dict(audio_filepath=path.name))
        with pytest.raises(CorruptAudio, match=rf"a\.{ending}: (no samples; ffmpeg|not audio)"):
            decoded(path)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 2)])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x02\0" + bytes(256)])
def test_an_mp3_without_its_length_is_read_to_its_end(tmp_path, mode, rate, channels, tag):
    audio, path = loud_then_quiet(4.0, rate, channels), tmp_path / "a.mp3"
    soundfile.write(path, audio, rate, bitrate_mode=mode, compression_level=0.5)
    data = path.read_bytes()
    assert b"Xing" in data[:60] or b"Info" in data[:60]
    second = data.index(data[:2], 100)  # the first frame tells the length
    path.write_bytes(tag + data[second:] + b"TAG" + bytes(125))
    rows = [dict(audio_filepath="a.mp3", channel=channels - 1)]
    rows.append(rows[0] | dict(offset=2.0, duration=0.5))
    whole, part = listed(tmp_path, *rows).utterances
    # the encoder begins with up to two frames of silence, and fills up the last one
    assert len(audio) <= whole.span[1] <= len(audio) + 4 * 1152
    samples = read_audio(whole, rate).numpy()
    assert np.abs(samples[-2400:-1200]).mean() > 1e-4  # there is sound at the end
    expected = samples[2 * rate : 5 * rate // 2]
    np.testing.assert_allclose(read_audio(part, rate), expected, atol=1e-5)


def test_segments_of_a_cut_recording_are_read_but_not_the_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", loud_then_quiet(2.0), RATE)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(data[: len(data) // 2])
    row = dict(audio_filepath="a.wav")
    parts = [row | dict(id=name, duration=s) for name, s in (("in", 0.9), ("over", 1.1))]
    corpus = listed(tmp_path, *parts, row)
    assert [utterance.id for utterance in corpus.utterances] == ["in"]
    [lost] = corpus.left_out.values()
    assert sorted(lost) == ["a", "over"]
    assert all("truncated: 15978 of 32000 bytes of audio" in what for what in lost.values())


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_is_found_in_any_case_and_layout(tmp_path, ending):
    """Beside each file, one of an ending that comes later: the first in ENDINGS counts."""
    formats = {".sph": "NIST", ".aif": "AIFF", ".aifc": "AIFF", ".snd": "AU", ".oga": "OGG"}
    kind = formats.get(ending, "OGG" if ending == ".opus" else ending[1:].upper())
    names = [f"train/1/2/1-2-0000{ending}", f"stm/sph/talk{ending.upper()}"]
    names.append(f"clips/one{ending.title()}")
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(parents=True)
        path.with_suffix(".m4a").touch()
        with open(path, "wb") as file:
            soundfile.write(file, loud_then_quiet(0.5), RATE, format=kind)
    (tmp_path / "train/1/2/1-2.trans.txt").write_text("1-2-0000 A\n")
    (tmp_path / "stm/stm").mkdir()
    (tmp_path / "stm/stm/x.stm").write_text("talk 1 anna 0 0.5 A\n")
    (tmp_path / "tsv.tsv").write_text("path\tsentence\none.mp3\tA\n")
    utterances = read(tmp_path, "train", "stm", "tsv").utterances
    assert [Path(u.path).relative_to(tmp_path).as_posix() for u in utterances] == names
    assert all(len(read_audio(u, RATE)) == u.samples for u in utterances)


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
    ],
)
def test_what_can_not_be_read_is_named_with_what_converts_it(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    told = left_out(tmp_path, dict(audio_filepath=name))
    assert all(word in told for word in words), told
    with pytest.raises(CorruptAudio, match=words[0]):
        decoded(tmp_path / name)


@pytest.mark.parametrize("level", [1e30, np.inf, np.nan])
def test_samples_beyond_all_sense_are_corrupt_audio(tmp_path, level):
    soundfile.write(tmp_path / "loud.wav", np.full(RATE, level), RATE, subtype="FLOAT")
    [utterance] = listed(tmp_path, dict(audio_filepath="loud.wav")).utterances
    with pytest.raises(CorruptAudio, match=r"loud\.wav: a sample of (1e\+30|inf|nan), where"):
        read_audio(utterance, RATE)


def test_samples_of_sixteen_bits_as_floats_are_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(RATE, 32767.0), RATE, subtype="FLOAT")
    [utterance] = listed(tmp_path, dict(audio_filepath="a.wav")).utterances
    assert features_of(utterance, tiny(), 1.0).isfinite().all()
