"""Audio files: how long they are, which is kept between runs, and their samples."""

import io
import json
import os
import stat
from collections.abc import Iterable
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from dynsize import files

# The endings of audio files. Of files that differ in their endings alone the first one is read.
ENDINGS = (
    ".flac .wav .sph .mp3 .ogg .opus .oga .aiff .aif .aifc .nist .au .snd .caf .w64 .rf64 .wavex "
    ".mp2 .mp1 .voc .avr .paf .pvf .sds .ircam .iff .8svx .svx"
).split()
# What soundfile does not read, but ffmpeg converts
FOREIGN = ".m4a .mp4 .aac .webm .wma .amr .3gp .mka .wv .ape".split()
TOLERANCE = 0.5  # seconds that an MP3 may be shorter than its header says; they become silence
MOST_SAMPLES = 2**40  # libsndfile gives more for a file of unknown length
THREADS = 8  # that read headers: most of the time they wait for a disk
FAILURES = (soundfile.SoundFileError, OSError, TypeError)  # TypeError: a file without header

# MPEG's tables, for MPEG-1 and for MPEG-2 and 2.5: kbit/s by the index of the bit rate, Hz by the
# index of the sample rate.
KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


class CorruptAudio(ValueError):
    """An audio file that can't be read, or not wholly."""


class Header(NamedTuple):
    """What is known of an audio file without decoding it."""

    size: int  # in bytes
    time: int  # of its last change, in ns
    samples: int  # of each channel
    rate: int  # in Hz
    channels: int


def headers(
    paths: Iterable[str], corpus: Path
) -> tuple[dict[str, Header], dict[str, OSError | CorruptAudio]]:
    """Return the header of each file, and for files that can't be read the reason.

    What was read for this corpus in an earlier run is kept in the user's cache; only files of
    another size or time are opened again. What was read is also kept after an interruption.
    """
    name = sha256(os.fsencode(corpus)).hexdigest()[:16]
    file = files.user_cache() / f"durations-2-{name}"
    kept = read_kept(file)
    found: dict[str, Header] = {}
    faults: dict[str, OSError | CorruptAudio] = {}
    paths = list(dict.fromkeys(paths))
    try:
        with ThreadPool(THREADS) as pool:
            known = [(path, kept.get(path)) for path in paths]
            read = pool.imap(header_of, known, 200)
            bar = tqdm(
                read, "headers", len(paths), unit=" files", delay=2, leave=False, disable=None
            )
            for path, result in zip(paths, bar, strict=True):
                if isinstance(result, Header):
                    found[path] = result
                else:
                    faults[path] = result
    finally:
        if any(kept.get(path) != header for path, header in found.items()):
            write_kept(file, kept | found)
    return found, faults


def read_kept(file: Path) -> dict[str, Header]:
    """Return the headers that `write_kept` wrote, by path; none where the file is damaged."""
    paths, *columns = json.loads(files.kept(file) or "[[]]")
    return {path: Header(*row) for path, *row in zip(paths, *columns, strict=True)}


def write_kept(file: Path, headers: dict[str, Header]) -> None:
    paths = sorted(headers)
    columns = zip(*(headers[path] for path in paths), strict=True)
    files.keep(file, json.dumps([paths, *columns]).encode())  # long lists are read fastest


def header_of(known: tuple[str, Header | None]) -> Header | OSError | CorruptAudio:
    """Return a file's header, the one given if it still holds, or why the file can't be read."""
    path, header = known
    try:
        status = os.stat(path)
        if header and (header.size, header.time) == (status.st_size, status.st_mtime_ns):
            return header
        if not stat.S_ISREG(status.st_mode):
            return CorruptAudio(f"{path}: not a file")  # opening a pipe would wait
        with opened(path) as file:
            samples, rate, channels = file.frames, file.samplerate, file.channels
        if samples > MOST_SAMPLES:
            what = f"its header tells no length; ffmpeg -i {path} NEW.flac writes one that does"
            return CorruptAudio(f"{path}: {what}")
        return Header(status.st_size, status.st_mtime_ns, samples, rate, channels)
    except FileNotFoundError as error:
        return error
    except OSError as error:
        return CorruptAudio(f"{path}: {error.strerror}")
    except (soundfile.SoundFileError, TypeError) as error:
        return CorruptAudio(f"{path}: {advice(path) or error}")


def advice(path: str) -> str:
    """Return what converts a file that soundfile does not read; '' where nothing is known."""
    stem, ending = os.path.splitext(path)
    if ending.lower() in FOREIGN:
        return f"{ending} is not read; ffmpeg -i {path} {stem}.flac converts it"
    with open(path, "rb") as file:
        first_bytes = file.read(1024)
    if first_bytes.startswith(b"NIST_1A") and b"embedded-" in first_bytes:
        return f"compressed SPHERE is not read; sph2pipe -f rif {path} {stem}.wav converts it"
    return ""


def read_samples(path: str, span: tuple[int, int], rate: int, channel: int) -> np.ndarray:
    """Return (samples,) float32 of one channel, from sample `span[0]` to before `span[1]`.

    `rate`: in Hz, of the file as it was listed. Raises CorruptAudio where the file is damaged,
    shorter than its header says, or has changed since.
    """
    first, last = span
    try:
        with opened(path) as file:
            file.seek(min(first, file.frames))
            audio = file.read(last - first, dtype="float32", always_2d=True)
            missing = last - first - len(audio)
            changed = file.samplerate != rate or file.channels <= channel
            most = TOLERANCE * rate if file.format == "MP3" else 0
    except FAILURES as error:
        what = "damaged audio" if os.path.exists(path) else "is gone"
        raise CorruptAudio(f"{path}: {what}: {error}") from error
    if changed or missing > most:
        found = f"{len(audio)} of {last - first} samples can be read"
        raise CorruptAudio(f"{path}: {found}: truncated, or changed since it was listed")
    samples = np.pad(audio[:, channel], (0, missing))
    if not np.isfinite(samples).all():
        raise CorruptAudio(f"{path}: samples that are not finite")
    return samples


def opened(path: str) -> soundfile.SoundFile:
    """Return an open audio file."""
    if path.lower().endswith(".mp3"):
        with open(path, "rb") as file:
            data = mp3_with_length(file)
        if data:
            return soundfile.SoundFile(io.BytesIO(data))
    return soundfile.SoundFile(os.fsencode(path))  # soundfile can't encode every path that exists


def mp3_with_length(file: IO[bytes]) -> bytes:
    """Return an MP3 after a frame that tells its length; nothing where none is needed.

    libsndfile estimates the length of an MP3 whose first frame does not tell it, and reads no
    further: a file that starts loud is cut. The file is left at its beginning.
    """
    first_bytes = file.read(10)
    tag = 0
    if first_bytes.startswith(b"ID3"):
        tag = 10 + syncsafe(first_bytes[6:])
    file.seek(tag)
    first_frame = file.read(200)
    told = any(name in first_frame for name in (b"Xing", b"Info", b"VBRI"))
    data = b""
    if frame_bytes(first_frame) and not told:
        data = first_frame + file.read()
        data = length_frame(data) + data
    file.seek(0)
    return data


def syncsafe(digits: bytes) -> int:
    """Return the number that four bytes of seven bits each write, as in ID3 tags."""
    a, b, c, d = digits.ljust(4, b"\0")[:4]
    return (a << 21) + (b << 14) + (c << 7) + d


def frame_bytes(data: bytes, start: int = 0) -> int:
    """Return the length of the MPEG layer III frame at `start`, in bytes; 0 where none begins."""
    header = int.from_bytes(data[start : start + 4], "big")
    sync = header >> 21
    version = header >> 19 & 3
    layer = header >> 17 & 3
    bits = header >> 12 & 15
    rate = header >> 10 & 3
    padding = header >> 9 & 1
    if sync != 0x7FF or layer != 1 or version == 1:
        return 0
    if bits in (0, 15) or rate == 3:
        return 0
    hz = RATES[version][rate]
    if version == 3:
        return 144_000 * KBITS_1[bits] // hz + padding
    return 72_000 * KBITS_2[bits] // hz + padding


def length_frame(data: bytes) -> bytes:
    """Return a frame, like the first of an MP3's, that tells the number of frames in `data`.

    It is what encoders write for this (Xing's "Info"): empty side information, the word, a flag
    and the number of frames.
    """
    frames = 0
    start = 0
    while start >= 0:
        length = frame_bytes(data, start)
        if length:
            frames += 1
            start += length
        else:
            start = data.find(b"\xff", start + 1)
    version = data[1] >> 3 & 3
    mono = data[3] >> 6 == 3
    side = 17  # bytes
    if version == 3 and not mono:
        side = 32
    if version != 3 and mono:
        side = 9
    no_checksum = data[1] | 1
    bit_rate = data[2] & 0x0C | 0x90  # 128 or 80 kbit/s
    header = bytes([data[0], no_checksum, bit_rate, data[3]])
    flag = (1).to_bytes(4, "big")
    number = frames.to_bytes(4, "big")
    frame = header + bytes(side) + b"Info" + flag + number
    return frame.ljust(frame_bytes(header), b"\0")
