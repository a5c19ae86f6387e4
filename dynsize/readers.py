"""The readers of the five kinds of corpora, and of what lists hold: lines, paths, times, JSON.

Each reader yields an `Entry` for each utterance that the lists of one split name. A new kind is one
more reader, its line in `LAYOUTS` at the end, and its name in `config.CORPUS_KINDS`.
"""

import gzip
import json
import math
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dynsize.audio import ENDINGS, FOREIGN
from dynsize.text import quoted
from dynsize.wer import Reference

LISTED = 12  # names of files that a message lists, at most
LONGEST_LINE = 2**28  # bytes; an array of a million utterances may be one line
PREFERRED = {ending: place for place, ending in enumerate([*ENDINGS, *FOREIGN])}

# The names that toolkits give to the fields of an utterance in their manifests.
FIELDS = {
    "id": ("id", "key", "utt_id"),  # key, wav, txt: wenet
    "path": ("audio_filepath", "wav", "audio"),  # audio_filepath: NeMo
    "text": ("text", "txt", "words", "wrd", "transcript"),  # words, wrd, spk_id: speechbrain
    "speaker": ("speaker", "spk_id", "spk"),
}
FORMS = (
    "expected is a line of JSON for each utterance, an array of them, or a dictionary by id; each "
    "with audio_filepath (or wav), text and, where needed, offset and duration in seconds, "
    "channel, speaker, id; or lhotse's cuts"
)
# Words in the name of a field or of a column that may choose a part of a recording.
PARTS = {"start", "stop", "end", "begin", "offset", "onset", "segments"}
SPANS = "offset and duration in seconds, start and end in seconds, or start and stop in samples"

# The lines of an STM, and the notation of its transcripts.
STM_LINE = re.compile(r"\s*(\S+)\s+([12AaBb])\s+(\S+)\s+(\S+)\s+(\S+)\s*(.*)")
SECOND_CHANNEL = "2Bb"
MARK = re.compile(r"<[^<>\s]*>|%[\w-]+|@")  # <sil>, %hesitation; @: nothing
OPTIONAL = re.compile(r"\(([^\s(){}<>\[\]]+)\)")  # (uh)
PRONUNCIATION = re.compile(r"([^\s(){}<>\[\]]+)\(\d+\)")  # word(2)
CLITIC = re.compile(r"(?<=\w)\s+('(?:s|re|ve|ll|d|m|t))(?!\S)")  # it 's
LABEL = re.compile(r"^<(?!unk>|na>|sil>)[^<>\s]*>(?!\S)", re.IGNORECASE)  # <o,f0,male>


class Entry(NamedTuple):
    """What a corpus says of one utterance, in the place `where` of a list."""

    where: str  # FILE:LINE, or FILE: utterance NUMBER
    id: str
    path: str
    text: str
    speaker: str = ""
    start: float = 0.0  # in seconds, as `end`; both in samples if `in_samples`
    end: float | None = None  # None: the end of the file
    channel: int | None = None  # from 0; None: none is chosen
    reference: Reference = ()  # of an STM's transcript; see `parse_stm`
    in_samples: bool = False


@dataclass
class Notes:
    """What was left out of a corpus, and changed in its texts."""

    # reason → id → what exactly, with the file
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)  # what → how often

    def leave_out(self, reason: str, name: str, what: str) -> None:
        self.left_out.setdefault(reason, {})[name] = what

    def first_left_out(self) -> str:
        """Return what exactly was left out first; '' where nothing was."""
        for names in self.left_out.values():
            return next(iter(names.values()))
        return ""


# The readers. Each takes what its kind is recognised by, and the notes.


def librispeech(split: Path, notes: Notes) -> Iterator[Entry]:
    """Read SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID WORDS`, and ID.flac beside."""
    for folder, names in walk(split):
        lists = [f"{folder}/{name}" for name in names if name.endswith(".trans.txt")]
        audio = audio_files(folder, names) if lists else {}
        for where, line in lines(*lists):
            name, *text = line.split(maxsplit=1)
            path = audio_of(name, audio, folder, where)
            yield Entry(where, name, path, "".join(text), name.partition("-")[0])


def stm(folder: Path, notes: Notes) -> Iterator[Entry]:
    """Read stm/*.stm and sph/NAME.sph, as of TED-LIUM 2 and Switchboard.

    A line is `NAME CHANNEL SPEAKER START END [<LABEL>] WORDS`.
    """
    sph = folder.parent / "sph"
    audio = audio_files(*next(walk(sph)))
    for where, line in lines(*sorted(folder.glob("*.stm"))):
        if line.startswith(";;"):
            continue
        fields = STM_LINE.fullmatch(line)
        if not fields:
            form = "NAME CHANNEL SPEAKER START END [<LABEL>] WORDS, channel 1, 2, A or B"
            raise ValueError(f"{where}: not {form}: {quoted(line)}")
        name, channel, speaker, start, end, raw = fields.groups()
        id = in_list(os.path.basename(where))
        if "ignore_time_segment_in_scoring" in raw.lower():
            notes.leave_out("ignore_time_segment_in_scoring", id, where)
            continue
        words = LABEL.sub("", raw)
        try:
            reference = parse_stm(words, notes.changes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; in {quoted(raw)}") from error
        if words.strip() and not reference:
            notes.leave_out("no words but marks", id, f"{where}: {quoted(words)}")
            continue
        path = audio_of(name, audio, sph, where)
        first_reading = [word for alternatives in reference for word in alternatives[0]]
        text = " ".join(first_reading)
        number = int(channel in SECOND_CHANNEL)
        begins, ends = seconds(start, where), seconds(end, where)
        yield Entry(where, id, path, text, speaker, begins, ends, number, reference)


def common_voice(tsv: Path, notes: Notes) -> Iterator[Entry]:
    """Read SPLIT.tsv, whose first line names columns, among them `path` and `sentence`."""
    clips = tsv.parent / "clips"
    audio = audio_files(*next(walk(clips)))
    listed = lines(tsv)
    where, header = next(listed, (f"{tsv}:1", ""))
    columns = header.split("\t")
    if not {"path", "sentence"} <= set(columns):
        raise ValueError(f"{where}: no columns path and sentence: {quoted(header)}")
    if parts := part_names(columns):
        raise ValueError(f"{where}: {', '.join(parts)}: only whole clips are read")
    for where, line in listed:
        values = line.split("\t")
        if len(values) != len(columns):
            raise ValueError(f"{where}: not {len(columns)} columns, tabs between: {quoted(line)}")
        row = dict(zip(columns, values, strict=True))
        name = without_ending(row["path"])
        path = audio_of(name, audio, clips, where)
        yield Entry(where, name, path, row["sentence"], row.get("client_id", ""))


def kaldi(scp: Path, notes: Notes) -> Iterator[Entry]:
    """Read wav.scp, `RECORDING PATH`, and `text`, `UTTERANCE WORDS`, beside it.

    Optional: segments, `UTTERANCE RECORDING START END`, where the end -1 is the recording's, and
    utt2spk, `UTTERANCE SPEAKER`.
    """
    if not scp.with_name("text").exists():
        raise ValueError(f"{scp}:1: no file `text` beside it, of lines UTTERANCE WORDS")
    recordings = keyed_lines(scp)
    texts = keyed_lines(scp.with_name("text"))
    speakers = keyed_lines(scp.with_name("utt2spk"))
    segments = keyed_lines(scp.with_name("segments"))
    if not segments:
        segments = {name: (where, f"{name} 0 -1") for name, (where, _) in recordings.items()}
    for name, (where, text) in texts.items():
        where, segment = segments.get(name, (where, ""))
        parts = segment.split()
        if len(parts) != 3 or parts[0] not in recordings:
            form = f"{name} has no recording of {scp}, or not RECORDING START END"
            raise ValueError(f"{where}: {form}: {quoted(segment)}")
        recording, start, end = parts
        line, path = recordings[recording]
        if path.endswith("|"):
            advice = "write the audio file's path in its place; most kinds of audio are read"
            raise ValueError(f"{line}: {quoted(path)} is a command, which is not run: {advice}")
        path = placed(scp, path, line)
        begins = seconds(start, where)
        ends = None if end in ("-1", "-1.0") else seconds(end, where)
        _, speaker = speakers.get(name, ("", ""))
        yield Entry(where, name, path, text, speaker, begins, ends)
    for name in segments.keys() - texts:
        where, _ = segments[name]
        notes.leave_out("no transcript", name, where)


def manifest(file: Path, notes: Notes) -> Iterator[Entry]:
    """Read a manifest of NeMo, wenet, speechbrain, or lhotse (cuts).

    An utterance without an id has the name of its file, with its number in the manifest where
    others have the same name.
    """
    entries: list[Entry] = []
    for where, id, row in rows(file):
        try:
            if "supervisions" in row or "recording" in row:
                entries += lhotse_cut(file, where, row, notes)
            else:
                entries.append(manifest_row(file, where, id, row))
        except (LookupError, TypeError, AttributeError, UnicodeEncodeError) as error:
            what = f"no {error}" if isinstance(error, LookupError) else str(error)
            raise ValueError(f"{where}: {what} in {quoted(json.dumps(row))}; {FORMS}") from error
    names = [in_list(without_ending(entry.path)) for entry in entries]
    counts = Counter(name for name, entry in zip(names, entries, strict=True) if not entry.id)
    for number, (name, entry) in enumerate(zip(names, entries, strict=True), 1):
        alone = name if counts[name] == 1 else f"{name}-{number}"
        yield entry._replace(id=entry.id or alone)


def manifest_row(file: Path, where: str, id: str, row: dict) -> Entry:
    """Return the utterance of a row of NeMo's, wenet's or speechbrain's."""
    path = value_of(row, "path")
    if not isinstance(path, str):
        raise TypeError("a path that is no string, or no path")
    path = path.replace("{data_root}", os.path.dirname(file))  # speechbrain's
    path = placed(file, encodable(path), where)
    id = encodable(value_of(row, "id", id))
    text = text_in(value_of(row, "text"), where)
    speaker = encodable(value_of(row, "speaker", ""))
    start, end, in_samples = part_of(row, where)
    channel = row.get("channel")
    return Entry(where, id, path, text, speaker, start, end, channel, in_samples=in_samples)


def value_of(row: dict, field: str, missing: object = None) -> object:
    """Return the value of a field, whatever a toolkit calls it, or `missing`."""
    for name in FIELDS[field]:
        if row.get(name) is not None:
            return row[name]
    return missing


def part_of(row: dict, where: str) -> tuple[float, float | None, bool]:
    """Return start and end of the part of a file that a row means, and whether they are samples.

    Those of NeMo are `offset` and `duration`, of wenet `start` and `end`, of speechbrain `start`
    and `stop`. Raises ValueError for fields of other names that may say which part is meant.
    """
    given = part_names(name for name, value in row.items() if value is not None)
    if given not in ([], ["offset"], ["end", "start"], ["start", "stop"]):
        told = f"{', '.join(given)} may choose a part of the audio"
        raise ValueError(f"{where}: {told}; what is read: {SPANS}")
    start = seconds(row.get("start") or row.get("offset") or 0, where)
    if "end" in given:
        return start, seconds(row["end"], where), False
    if "stop" in given:
        return start, seconds(row["stop"], where), True
    length = row.get("duration")
    end = None if length is None else start + seconds(length, where)
    return start, end, False


def part_names(names: Iterable[str]) -> list[str]:
    """Return, sorted, the names of fields that may choose a part of a recording."""
    return sorted(name for name in names if PARTS & set(name.lower().split("_")))


def lhotse_cut(file: Path, where: str, row: dict, notes: Notes) -> Iterator[Entry]:
    """Yield the utterances of one of lhotse's cuts, one for each supervision in it."""
    recording, supervisions = row["recording"], row["supervisions"]
    transforms = recording.get("transforms") or []
    changes = {change.get("name") for change in transforms}
    if row.get("type", "MonoCut") not in ("MonoCut", "MultiCut") or changes - {"Resample"}:
        raise ValueError(f"{where}: only cuts of one recording as it was recorded are read")
    begin = seconds(row["start"], where)
    length = seconds(row["duration"], where)
    if not supervisions:
        notes.leave_out("no transcript", encodable(row["id"]), where)
    for part in supervisions:
        first = part["start"]  # below 0 where a supervision begins before its cut
        last = first + seconds(part["duration"], where)
        channel = part.get("channel", row.get("channel", 0))
        sources = [s for s in recording["sources"] if channel in s["channels"]]
        if not sources or sources[0]["type"] != "file":
            raise ValueError(f"{where}: no audio file for the channel {channel!r}; {FORMS}")
        path = placed(file, encodable(sources[0]["source"]), where)
        id = encodable(row["id"] if len(supervisions) == 1 else part["id"])
        text = text_in(part.get("text"), where)
        speaker = encodable(part.get("speaker") or "")
        start = seconds(begin + max(first, 0.0), where)
        end = seconds(begin + min(last, length), where)
        channel = sources[0]["channels"].index(channel)
        yield Entry(where, id, path, text, speaker, start, end, channel)


def text_in(value: object, where: str) -> str:
    """Return the text of an utterance. Raises ValueError where there is none."""
    if value is None:
        names = ", ".join(FIELDS["text"])
        raise ValueError(f"{where}: the utterance has no text, in a field {names}")
    return encodable(value)


def encodable(value: object) -> str:
    """Return a string or number as text.

    Raises TypeError for others, and UnicodeEncodeError for half characters.
    """
    if not isinstance(value, str | int):
        raise TypeError(f"{value!r} is no string")
    return str(value).encode().decode()


def rows(file: Path) -> Iterator[tuple[str, str, object]]:
    """Yield place, id and value of each utterance of a JSON file.

    The file holds a value in each line, one array of values, or one dictionary of dictionaries, by
    id. In the other two forms the id is ''.
    """
    listed = [*lines(file)]
    value = parsed(listed) if listed else []
    if isinstance(value, list):
        for number, row in enumerate(value, 1):
            yield f"{file}: utterance {number}", "", row
    elif isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        for id, row in value.items():
            yield f"{file}: utterance {quoted(id)}", id, row
    else:
        for line in listed:
            where, _ = line
            yield where, "", parsed([line])


def parsed(listed: Sequence[tuple[str, str]]) -> object:
    """Return the JSON value that lines hold together; None where each of several has its own."""
    text = "\n".join(line for _, line in listed)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and len(listed) > 1:
            return None
        where, what = listed[error.lineno - 1][0], error.msg
    except (ValueError, RecursionError) as error:  # of too many digits, or levels
        where, what = listed[0][0], str(error)
    raise ValueError(f"{where}: not JSON: {what}; {FORMS}")


# The notation of STM files.


def parse_stm(raw: str, changes: Counter[str]) -> Reference:
    """Return the reference that an STM's transcript stands for; the text is its first reading.

    The notation is sclite's: `{ a / b c / @ }` are alternatives (@ is nothing), `(uh)` is a word
    that may be missing; each sign but the parentheses is a separate word. Marks such as `<sil>`,
    `{NOISE}` and `%hesitation` are taken out and counted in `changes`, and `word(2)`, a
    pronunciation, is `word`. Raises ValueError for what is not understood.
    """
    text, joined = CLITIC.subn(r"\1", raw)
    changes["× words joined, as it 's → it's"] += joined
    reference: list[list[list[str]]] = []
    for braces, inside, token in re.findall(r"(\{([^{}]*)\})|([{}]|[^\s{}]+)", text):
        if not braces:
            for word in stm_words(token, changes):
                plain = word.strip("()")
                may_be_missing = plain != word
                reference.append([[plain], []] if may_be_missing else [[plain]])
        elif "/" in inside:
            changes["× alternatives, of which the first is trained on"] += 1
            parts = [stm_words(part, changes) for part in inside.split("/")]
            reference.append([[word.strip("()") for word in words] for words in parts])
        elif len(inside.split()) > 1:
            raise ValueError(f"{braces} has no alternatives, a / between them")
        else:
            changes[f"× {{{inside.strip()}}} taken out"] += 1
    return reference


def stm_words(text: str, changes: Counter[str]) -> list[str]:
    """Return the words of a part of an STM's text, without its marks."""
    words = []
    for token in text.split():
        optional = OPTIONAL.fullmatch(token)
        mark = optional[1] if optional else token
        if MARK.fullmatch(mark):
            changes[f"× {mark} taken out"] += mark != "@"
            continue
        pronounced = PRONUNCIATION.fullmatch(token)
        word = pronounced[1] if pronounced else token
        if word == "/" or (not optional and re.search(r"[(){}<>\[\]]", word)):
            raise ValueError(f"{quoted(token)} is not understood")
        words.append(word)
    return words


# What lists hold: lines, paths, times.


def lines(*paths: Path | str) -> Iterator[tuple[str, str]]:
    """Yield FILE:NUMBER and text of each line of UTF-8 files that is not blank. Unpacks .gz."""
    for path in map(os.fspath, paths):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}:1: not a regular file, which a list must be")
        open_list = gzip.open if path.endswith(".gz") else open
        number = 0
        try:
            with open_list(path, "rb") as file:
                read = partial(file.readline, LONGEST_LINE)
                for number, line in enumerate(iter(read, b""), 1):
                    if len(line) == LONGEST_LINE:
                        raise ValueError(f"{path}:{number}: longer than {LONGEST_LINE:,} bytes")
                    text = line.decode().removeprefix("\ufeff").rstrip("\r\n")
                    if text and not text.isspace():
                        yield f"{path}:{number}", text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text: {error}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged gzip data: {error}") from error


def keyed_lines(path: Path) -> dict[str, tuple[str, str]]:
    """Return KEY → FILE:NUMBER, VALUE of a file's lines `KEY VALUE`; {} where it is missing."""
    found: dict[str, tuple[str, str]] = {}
    for where, line in lines(path) if path.exists() else ():
        key, *value = line.split(maxsplit=1)
        if key in found:
            raise ValueError(f"{where}: {key} is there twice, first in {found[key][0]}")
        found[key] = (where, "".join(value))
    return found


def seconds(value: object, where: str) -> float:
    """Return a time that is given as a number or its digits."""
    try:
        if 0 <= (time := float(value)) < math.inf:
            return time
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: {quoted(str(value))} is not a time")


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a directory and the names in it, then the same of each directory below it.

    Links are followed. Each directory is visited once. Raises ValueError where one can't be listed.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: can't be listed: {error.strerror}") from error

    visited = set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        true_path = os.path.realpath(path)
        if true_path in visited:
            folders.clear()
        else:
            visited.add(true_path)
            yield path, sorted(folders + names)


def audio_files(folder: Path | str, names: Iterable[str]) -> dict[str, str]:
    """Return the paths of audio files by their names without ending.

    Of several endings the first in `ENDINGS` counts. No name in a list can lead out of a folder.
    """
    known = [name for name in names if ending_of(name) in PREFERRED]
    # The first ending comes last, and stays.
    known.sort(key=lambda name: PREFERRED[ending_of(name)], reverse=True)
    return {without_ending(name): f"{folder}/{name}" for name in known}


def ending_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def without_ending(path: str) -> str:
    """Return the name of an audio file without its ending."""
    name = os.path.basename(path)
    return os.path.splitext(name)[0] if ending_of(name) in PREFERRED else name


def placed(file: Path, name: str, where: str) -> str:
    """Return the path of an audio file that a list names.

    A relative path is looked for in the list's directory, then in the working directory.
    """
    folders = (os.path.dirname(file), os.getcwd())
    for folder in folders:
        path = os.path.join(folder, on_disk(name))  # an absolute path stays as it is
        if os.path.exists(path):
            return path
    looked = " and ".join(dict.fromkeys(folders))
    what = f"{quoted(name)} doesn't exist; a relative path is looked for in {looked}"
    raise ValueError(f"{where}: no audio: {what}")


def audio_of(name: str, audio: dict[str, str], folder: Path | str, where: str) -> str:
    """Return the path of an utterance's audio in a directory."""
    if on_disk(name) in audio:
        return audio[on_disk(name)]
    path = f"{folder}/{name}{{{','.join(ENDINGS[:8])},…}}"
    there = contents(folder)
    raise ValueError(f"{where}: no audio for the utterance {name}: {path} doesn't exist; {there}")


def on_disk(name: str) -> str:
    """Return a name in a list, in UTF-8, as Python spells it for a file in this locale."""
    return os.fsdecode(name.encode(errors="surrogateescape"))


def in_list(name: str) -> str:
    """Return the name of a file as a list in UTF-8 spells it, in every locale, if it is UTF-8."""
    try:
        return os.fsencode(name).decode()
    except UnicodeError:
        return name


def contents(folder: Path | str) -> str:
    """Return, for a message, what a directory holds."""
    names = sorted(os.listdir(folder))
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"in {folder}: {', '.join(names[:LISTED]) or 'nothing'}{more}"


LAYOUTS = (  # one of `CORPUS_KINDS`, what it is recognised by, reader; the first that is there
    ("stm", "{}/stm", stm),
    ("kaldi", "{}/wav.scp", kaldi),
    ("common-voice", "{}.tsv", common_voice),
    ("manifest", "{}.jsonl", manifest),
    ("manifest", "{}.jsonl.gz", manifest),
    ("manifest", "{}.json", manifest),
    ("manifest", "{}.json.gz", manifest),
    ("librispeech", "{}", librispeech),
)
