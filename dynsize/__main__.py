"""The command `dynsize`: text, with times, from audio files. `python -m dynsize` is the same."""

import argparse
import codecs
import html
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

import dynsize
from dynsize import files
from dynsize.processes import use_threads
from dynsize.readers import in_list
from dynsize.recogniser import Recogniser, Transcript, Word
from dynsize.report import columns
from dynsize.terminal import (
    Parser,
    add_decoding_flags,
    beam_of,
    check_decoding,
    lm_settings,
    one_line,
    reported,
)
from dynsize.text import printable

DESCRIPTION = "Turns audio files into text with a trained network, at a size that can be chosen."
EXAMPLES = """  dynsize talk.flac --model runs/demo
  dynsize calls/*.wav --model runs/demo --size 7 --format srt --output captions
  arecord -f S16_LE -r 16000 -d 5 | dynsize - --model runs/demo"""
CAPTION_PAUSE = 1.0  # seconds without a word, after which a new caption begins
CAPTION_COLUMNS = 60  # at most, in one caption
# 25 letters, which can be twice as wide, each with the marks and signs after it.
CAPTION_PART = re.compile(r"\W*(?:\w\W*){1,25}|\W+")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("dynsize", DESCRIPTION, EXAMPLES, "FILE ... --model PATH ")
    add = parser.add_argument
    add("audio", nargs="+", metavar="FILE", help="what soundfile reads; -: from standard input")
    add("--model", required=True, metavar="PATH", help="a run of train.py, or one network's file")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=int, help="in layers (the largest)")
    size.add_argument(
        "--max-latency-ms",
        type=float,
        help="the largest size as fast as this for 10 s of audio, in windows as it transcribes",
    )
    add(
        "--format",
        choices=FORMATS,
        default="txt",
        help="json and ctm have the times of words, srt and vtt of captions (txt)",
    )
    add("--output", type=Path, metavar="DIR", help="write DIR/NAME.FORMAT for each file")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--channel", type=int, help="of the audio; 1 is the first (the mean of all channels)")
    add_decoding_flags(parser)
    parsed = parser.parse_args(arguments)
    check_decoding(parser, parsed)
    if parsed.max_latency_ms is not None and (beam_of(parsed) > 1 or parsed.lm):
        parser.error("--max-latency-ms is without --beam and --lm, which take longer: name --size")
    if parsed.channel is not None and parsed.channel < 1:
        parser.error(f"--channel {parsed.channel}: the first channel is 1")
    if parsed.format in ("srt", "vtt") and len(parsed.audio) > 1 and not parsed.output:
        parser.error(f"{parsed.format} of several files needs --output: one file for each")
    return parsed


def captions(transcript: Transcript) -> list[Word]:
    """Return the words joined to captions of at most 60 columns, without pauses of 1 s."""
    joined: list[Word] = []
    for word in transcript.words:
        first, *others = parts(word)
        if joined:
            last = joined[-1]
            text = f"{last.text} {first.text}"
            if columns(text) <= CAPTION_COLUMNS and first.start < last.end + CAPTION_PAUSE:
                joined.pop()
                first = Word(text, last.start, first.end)
        joined += [first, *others]
    return joined


def parts(word: Word) -> list[Word]:
    """Return a word, in parts where it is longer than a caption.

    Scripts without spaces have such words. The parts share the time of the word equally, which is
    an estimate.
    """
    if columns(word.text) <= CAPTION_COLUMNS:
        return [word]
    texts = CAPTION_PART.findall(word.text)
    seconds = (word.end - word.start) / len(texts)
    starts = [word.start + number * seconds for number in range(len(texts))]
    return [Word(text, start, start + seconds) for text, start in zip(texts, starts, strict=True)]


def span(caption: Word, point: str) -> str:
    """Return the times of a caption, as 00:00:00.500 --> 01:02:03.456; the point is SRT's comma."""
    return f"{clock(caption.start, point)} --> {clock(caption.end, point)}"


def clock(seconds: float, point: str) -> str:
    """Return a time as 01:02:03.456."""
    total = round(1000 * seconds)
    minutes, milliseconds = divmod(total, 60_000)
    second, milliseconds = divmod(milliseconds, 1000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}{point}{milliseconds:03}"


def txt(transcript: Transcript, name: str) -> str:
    return transcript.text + "\n"


def json_line(transcript: Transcript, name: str) -> str:
    words = [dict(word=w.text, start=w.start, end=w.end) for w in transcript.words]
    row = dict(file=name, seconds=transcript.seconds, text=transcript.text, words=words)
    return json.dumps(row, ensure_ascii=False) + "\n"


def srt(transcript: Transcript, name: str) -> str:
    blocks = []
    for number, caption in enumerate(captions(transcript), start=1):
        blocks.append(f"{number}\n{span(caption, ',')}\n{caption.text}\n")
    return "\n".join(blocks)


def vtt(transcript: Transcript, name: str) -> str:
    blocks = ["WEBVTT\n"]
    for caption in captions(transcript):
        text = html.escape(caption.text, quote=False)  # & and < are WebVTT's own
        blocks.append(f"{span(caption, '.')}\n{text}\n")
    return "\n".join(blocks)


def ctm(transcript: Transcript, name: str) -> str:
    """Return NIST's format: recording, channel, start, duration, word."""
    recording = printable("_".join(stem(name).split()))  # the fields are separated by spaces
    return "".join(
        f"{recording} 1 {word.start:.3f} {word.end - word.start:.3f} {word.text}\n"
        for word in transcript.words
    )


def stem(name: str) -> str:
    return "stdin" if name == "-" else Path(name).stem


FORMATS: dict[str, Callable[[Transcript, str], str]] = {
    "txt": txt, "json": json_line, "srt": srt, "vtt": vtt, "ctm": ctm,
}  # fmt: skip


def text_files(options: argparse.Namespace) -> list[Path | None]:
    """Return the file to write for each audio file; None: standard output.

    Raises ValueError where one is there already, is an audio file, or would be written twice.
    """
    if not options.output:
        return [None] * len(options.audio)
    inputs = {os.path.realpath(name) for name in options.audio}
    texts = [options.output / f"{stem(name)}.{options.format}" for name in options.audio]
    for i, file in enumerate(texts):
        if file in texts[:i]:
            raise ValueError(f"{options.audio[i]}: another file's text would be {file} too")
        if os.path.realpath(file) in inputs:
            raise ValueError(f"{file}: is an audio file itself; --output names another folder")
        if os.path.lexists(file) and not options.overwrite:
            raise ValueError(f"{file}: exists already; --overwrite replaces it")
        if file.is_dir():
            raise ValueError(f"{file}: is a directory")
    options.output.mkdir(parents=True, exist_ok=True)
    return texts


def run(options: argparse.Namespace) -> int:
    """Transcribe file after file. Returns the exit code: 2 where some file could not be read."""
    written = text_files(options)
    recogniser = dynsize.load(options.model)
    asked: dict[str, Any] = dict(size=chosen_size(recogniser, options), beam=beam_of(options))
    if options.channel:
        asked["channel"] = options.channel - 1
    words = None
    if options.lm:
        words = recogniser.language_model(options.lm, **lm_settings(options))
        asked["language_model"] = words
    bar_options = dict(unit=" s", unit_scale=True, delay=2, leave=False, disable=None)
    code, texts = 0, []
    for name, file in zip(options.audio, written, strict=True):
        try:
            with tqdm(desc=printable(name), **bar_options) as bar:
                transcript = recogniser.transcribe(name, progress=bar.update, **asked)
        except ValueError as error:
            print(one_line(f"dynsize: {error}"), file=sys.stderr)
            code = 2
            continue
        texts.append(transcript.text)
        put(FORMATS[options.format](transcript, in_list(name)), file)
    if words:
        print(one_line(f"dynsize: {words.missing(texts)}"), file=sys.stderr)
    return code


def chosen_size(recogniser: Recogniser, options: argparse.Namespace) -> int:
    """Return the size that is asked for, or the largest one that is fast enough."""
    if options.max_latency_ms is None:
        size = recogniser.sizes[-1] if options.size is None else options.size
        recogniser.check_size(size)
        return size
    size = recogniser.size_within(options.max_latency_ms)
    taken = recogniser.latencies[size]
    print(f"dynsize: size {size} takes {taken:.1f} ms for 10 s of audio", file=sys.stderr)
    return size


def put(text: str, file: Path | None) -> None:
    """Write a text to a file, or to standard output.

    Characters that the stream or UTF-8 lacks are written as JSON does, so that JSON stays JSON.
    """
    if file is None:
        encoding = sys.stdout.encoding
        print(text.encode(encoding, "json").decode(encoding), end="", flush=True)
    else:
        files.write(file, text.encode("utf-8", "json"))


def json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Return the escapes of what can't be encoded, as `codecs.register_error` asks for it."""
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json", json_escapes)


def main() -> None:
    with reported("dynsize", "stopped; files that were written are whole"):
        options = parse(sys.argv[1:])
        use_threads(options.threads)
        sys.exit(run(options))


if __name__ == "__main__":
    main()
