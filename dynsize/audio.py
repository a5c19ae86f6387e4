"""Audio files: how long they are, which is kept between runs, and their samples."""

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from dynsize import files

# The endings of audio files. Of files that differ only in their endings the first one is read.
ENDINGS = (
    ".flac .wav .sph .mp3 .ogg .opus .oga .aiff .aif .aifc .nist .au .snd .caf .w64 .rf64"
).split()
FOREIGN = ".m4a .mp4 .aac .webm .wma .amr".split()  # ffmpeg converts them
# Of all that libsndfile reads, the formats where a file that was cut shows it.
FORMATS = "WAV WAVEX RF64 W64 AIFF AU CAF FLAC OGG MP3 NIST".split()
# What libsndfile logs where a header promises more bytes of audio than there are.
PROMISED = re.compile(r"(?m)^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)")
ENDLESS = 2**31 - 2**16  # bytes that a header promises, or more, where its writer knew no length
MOST_SAMPLES = 5000  # for one byte of a file: silence in the largest blocks of a FLAC
BLOCK = 2**16  # numbers that are decoded at once
MOST_PIPED = 2**32  # bytes of audio from a pipe: what a WAV file can hold
LOUDEST = 1e15  # of a sample; full scale is 1. The energies of louder ones are not finite
MP3_FRAME = 1152  # samples that an MP3 may lack: not all encoders count its first frame
THREADS = 8  # that read headers: most of the time they wait for a disk


class CorruptAudio(ValueError):
    """An audio file that can't be read, or not wholly."""


class Header(NamedTuple):
    """What is known of an audio file before its samples are needed."""

    size: int  # in bytes
    time: int  # of its last change, in ns
    samples: int  # of each channel
    rate: int  # in Hz
    channels: int
    lost: str  # how the file was cut off, or ''


def headers(paths: Iterable[str], corpus: Path) -> dict[str, Header | CorruptAudio]:
    """Return the header of each file, or the reason why it can't be read.

    What was read for this corpus in an earlier run is kept in the user's cache; only files of
    another size or time are opened again. What was read is also kept after an interruption.
    """
    name = sha256(os.fsencode(corpus)).hexdigest()[:16]
    file = files.user_cache() / f"headers-1-{name}"
    stored = json.loads(files.kept(file) or "{}")
    kept = {path: Header(*values) for path, values in stored.items()}
    read: dict[str, Header | CorruptAudio] = {}
    paths = list(dict.fromkeys(paths))
    try:
        pool = ThreadPool(THREADS)
    except AttributeError as error:  # what Python raises where it could start some threads only
        raise MemoryError(str(error.__context__)) from error
    try:
        with pool:
            results = pool.imap(lambda path: header_of(path, kept.get(path)), paths, 200)
            options = dict(unit=" files", delay=2, leave=False, disable=None)
            bar = tqdm(results, "headers", len(paths), **options)
            read.update(zip(paths, bar, strict=True))
    finally:
        found = {path: header for path, header in read.items() if isinstance(header, Header)}
        if any(kept.get(path) != header for path, header in found.items()):
            files.keep(file.parent, file.name, json.dumps(kept | found).encode())
    return read


def header_of(path: str, header: Header | None = None) -> Header | CorruptAudio:
    """Return a file's header, the one given if it still holds, or why the file can't be read.

    A file whose header tells no length, or one that its bytes can't hold, is decoded once.
    """
    try:
        status = os.stat(path)
        stamp = (status.st_size, status.st_mtime_ns)
        if header and (header.size, header.time) == stamp:
            return header
        if not stat.S_ISREG(status.st_mode):
            return CorruptAudio(f"{path}: not a file")  # opening a pipe would wait
        with opened(path) as file:
            samples = file.promised or sum(map(len, file.blocks()))
            return Header(*stamp, samples, file.samplerate, file.channels, file.lost())
    except (OSError, ValueError) as error:
        return CorruptAudio(f"{path}: {getattr(error, 'strerror', None) or error}")


def read_samples(path: str, span: tuple[int, int], rate: int, channel: int) -> np.ndarray:
    """Return (samples,) float32 of one channel, from sample `span[0]` to before `span[1]`.

    `rate`: in Hz, of the file as it was listed. Raises CorruptAudio where the file is damaged,
    shorter than it was listed, or has changed since.
    """
    first, last = span
    wanted = last - first
    parts = [np.zeros(0, np.float32)]
    try:
        with opened(path) as file:
            changed = file.samplerate != rate or file.channels <= channel
            file.skip(first)
            while wanted and not changed and len(block := file.block(wanted)):
                parts.append(block[:, channel])
                wanted -= len(block)
            too_few = wanted > file.may_lack
    except OSError as error:
        raise CorruptAudio(f"{path}: is gone: {error.strerror}") from error
    if changed or too_few:
        found = f"{last - first - wanted} of {last - first} samples can be read"
        raise CorruptAudio(f"{path}: {found}: truncated, or changed since it was listed")
    return np.pad(np.concatenate(parts), (0, wanted))


@contextmanager
def opened(source: str | Path | IO[bytes], name: str = "") -> Iterator["AudioFile"]:
    """Open an audio file, which `name` names in messages. What comes from a pipe is copied first.

    Raises CorruptAudio for what is not audio that is read, and where damaged audio is met while the
    file is open; OSError for a file that can't be opened.
    """
    name = name or os.fspath(source)
    raw = source
    if isinstance(source, str | Path):
        raw = open(source, "rb", buffering=0)  # noqa: SIM115 (it is closed below)
    with raw if raw.seekable() else copy_of(raw, name) as raw:
        try:
            file = AudioFile(raw.fileno(), raw, name)
            if file.format == "MP3" and not mp3_tells_length(raw):
                file.close()
                file = AudioFile(Endless(raw), raw, name)
            with file:
                if file.format not in FORMATS:
                    what = f"audio in the format {file.format} is not read"
                    raise CorruptAudio(f"{name}: {what}; ffmpeg -i {name} NEW.flac may convert it")
                yield file
        except soundfile.LibsndfileError as error:
            what = advice(raw, name) or f"not audio that can be read: {error.error_string}"
            raise CorruptAudio(f"{name}: {what}") from error


def copy_of(pipe: IO[bytes], name: str) -> IO[bytes]:
    """Return a temporary file with all that comes from a pipe: in it soundfile can seek."""
    copy = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it is deleted when it is closed)
    with pipe:
        while copy.tell() <= MOST_PIPED and (data := pipe.read(2**20)):
            copy.write(data)
    if copy.tell() > MOST_PIPED:
        raise CorruptAudio(f"{name}: more than {MOST_PIPED / 1e9:.1f} GB; name a file instead")
    copy.seek(0)
    return copy


def advice(raw: IO[bytes], name: str) -> str:
    """Return what converts a file that soundfile does not read; '' where nothing is known."""
    stem, ending = os.path.splitext(name)
    if ending.lower() in FOREIGN:
        return f"{ending} is not read; ffmpeg -i {name} {stem}.flac converts it"
    first_bytes = os.pread(raw.fileno(), 1024, 0)
    if first_bytes.startswith(b"NIST_1A") and b"embedded-" in first_bytes:
        return f"compressed SPHERE is not read; sph2pipe -f rif {name} {stem}.wav converts it"
    return ""


def mp3_tells_length(raw: IO[bytes]) -> bool:
    """Return whether the first frame of an MP3 tells its length; an ID3 tag may come before it."""
    tag = os.pread(raw.fileno(), 10, 0)
    start = 0
    if tag.startswith(b"ID3"):
        a, b, c, d = tag[6:].ljust(4, b"\0")  # seven bits each
        start = 10 + (a << 21) + (b << 14) + (c << 7) + d
    first_frame = os.pread(raw.fileno(), 64, start)
    return any(mark in first_frame for mark in (b"Xing", b"Info", b"VBRI"))


class Endless:
    """An MP3 that claims to have `END` bytes.

    libsndfile estimates the length of an MP3 that does not tell it from its bytes, and reads no
    further: a file that starts loud would be cut. From this one it reads to the true end.
    """

    END = 2**40

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.END)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, count: int) -> bytes:
        if self.place > self.END // 2:  # where libsndfile looks for a tag, no tag
            data = bytes(count)
        else:
            data = os.pread(self.raw.fileno(), count, self.place)
        self.place += len(data)
        return data


class AudioFile(soundfile.SoundFile):
    """An audio file that is decoded forward, as far as it goes.

    The header says how many samples there should be, but memory is only taken for those that are
    there.
    """

    def __init__(self, file: int | Endless, raw: IO[bytes], name: str) -> None:
        """`raw`: the same file, of which some bytes are read. `name`: for messages."""
        super().__init__(file, closefd=False)
        self.raw = raw
        self.path = name
        self.bytes = os.fstat(raw.fileno()).st_size
        self.may_lack = MP3_FRAME if self.format == "MP3" else 0  # samples

    def seekable(self) -> bool:
        """Return False: else soundfile reads what the header promises, and seeks at each block."""
        return False

    @property
    def promised(self) -> int | None:
        """Samples by the header; None where it tells no number that the file can hold."""
        return self.frames if self.frames <= MOST_SAMPLES * self.bytes else None

    def skip(self, samples: int) -> None:
        """Go to a sample from the beginning, by decoding where the format can't seek."""
        if samples:
            try:
                self.seek(samples)
            except soundfile.LibsndfileError:
                while samples and (decoded := len(self.block(samples))):
                    samples -= decoded

    def block(self, most: int = BLOCK) -> np.ndarray:
        """Return the next samples, at most `most`, (samples, channels) float32; none at the end."""
        samples = min(most, max(1, BLOCK // self.channels))
        block = self.read(samples, dtype="float32", always_2d=True)
        loudest = np.abs(block).max(initial=0)
        if not loudest <= LOUDEST:  # nor for what is no number
            raise CorruptAudio(f"{self.path}: a sample of {loudest:g}, where full scale is 1")
        return block

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all blocks; raise CorruptAudio after them where samples are missing."""
        samples = 0
        while len(block := self.block()):
            samples += len(block)
            yield block
        promised = self.promised or 0
        lost = self.lost()
        if samples < promised - self.may_lack:
            lost = f"truncated: {samples} of {promised} samples can be read"
        if samples == 0:
            stem = os.path.splitext(self.path)[0]
            lost = f"no samples; ffmpeg -i {self.path} {stem}.flac may recover some"
        if lost:
            raise CorruptAudio(f"{self.path}: {lost}")

    def lost(self) -> str:
        """Return how the file was cut off; '' where neither header nor last bytes show that."""
        if self.format in ("FLAC", "MP3"):
            return ""  # it shows when they are decoded
        if found := PROMISED.search(self.extra_info):
            promised, there = map(int, found.groups())
            if there < promised < ENDLESS:
                return f"truncated: {there} of {promised} bytes of audio are there"
        if self.format == "NIST":
            told = re.search(rb"sample_count -i (\d+)", os.pread(self.raw.fileno(), 1024, 0))
            if told and int(told[1]) > self.frames:
                return f"truncated: {self.frames} of {int(told[1])} samples are there"
        if self.format == "OGG" and not self.has_last_page():
            return "truncated: it ends before its last page"
        return ""

    def has_last_page(self) -> bool:
        """Return whether an Ogg file ends with a whole page that says it is the last."""
        most = 65307  # bytes of a page
        end = os.pread(self.raw.fileno(), most, max(0, self.bytes - most))
        page = end[end.rfind(b"OggS") :]
        if len(page) < 27:
            return False
        lengths = page[27 : 27 + page[26]]
        return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(lengths)
