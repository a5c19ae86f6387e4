"""Manifests in JSON: those of NeMo, wenet and speechbrain, and lhotse's cuts."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynsize.lists import Entry, lines, placed, seconds, without_ending
from dynsize.text import shown

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


def manifest(file: Path, _: object) -> Iterator[Entry]:
    """Read a manifest of NeMo, wenet, speechbrain, or lhotse (cuts).

    An utterance without an id has the name of its file, with the line's number where others have
    the same name.
    """
    entries: list[Entry] = []
    for where, id, row in rows(file):
        try:
            of_lhotse = isinstance(row, dict) and ("supervisions" in row or "recording" in row)
            reader = lhotse_cut if of_lhotse else manifest_row
            entries += reader(file, where, id, row)
        except (LookupError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, LookupError) else str(error)
            raise ValueError(f"{where}: {what} in {shown(json.dumps(row))}; {FORMS}") from error
    names = Counter(without_ending(entry.path) for entry in entries if not entry.id)
    for entry in entries:
        id = entry.id
        if not id:
            name = without_ending(entry.path)
            number = entry.where.rpartition(":")[2]
            id = name if names[name] == 1 else f"{name}-{number}"
        yield entry._replace(id=id)


def manifest_row(file: Path, where: str, id: str, row: dict) -> Iterator[Entry]:
    """Yield the one utterance of a row of NeMo's, wenet's or speechbrain's."""
    given = {
        name: next((row[key] for key in keys if row.get(key) is not None), None)
        for name, keys in FIELDS.items()
    }
    path, text = given["path"], given["text"]
    if not isinstance(path, str) or not isinstance(text, str | None):
        raise TypeError("a path or a text that is no string, or no path")
    path = path.replace("{data_root}", os.path.dirname(file))  # speechbrain's
    start, length = seconds(row.get("offset") or 0, where), row.get("duration")
    yield Entry(
        where,
        encodable(given["id"] or id),
        placed(file, encodable(path), where),
        None if text is None else encodable(text),
        encodable(given["speaker"] or ""),
        start,
        None if length is None else start + seconds(length, where),
        row.get("channel"),
    )


def lhotse_cut(file: Path, where: str, id: str, row: dict) -> Iterator[Entry]:
    """Yield the utterances of one of lhotse's cuts, one for each supervision in it."""
    changes = [change.get("name") for change in row["recording"].get("transforms") or []]
    if row.get("type", "MonoCut") not in ("MonoCut", "MultiCut") or set(changes) - {"Resample"}:
        raise ValueError(f"{where}: only cuts of one recording as it was recorded are read")
    begin, length = seconds(row["start"], where), seconds(row["duration"], where)
    supervisions = row["supervisions"] or [dict(start=0, duration=length, text=None)]
    for part in supervisions:
        first = part["start"]  # below 0 where a supervision begins before its cut
        last = first + seconds(part["duration"], where)
        channel = part.get("channel", row.get("channel", 0))
        sources = [s for s in row["recording"]["sources"] if channel in s["channels"]]
        if not sources or sources[0]["type"] != "file":
            raise ValueError(f"{where}: no audio file for the channel {channel!r}; {FORMS}")
        yield Entry(
            where,
            encodable(row["id"] if len(supervisions) == 1 else part["id"]),
            placed(file, encodable(sources[0]["source"]), where),
            None if part.get("text") is None else encodable(part["text"]),
            encodable(part.get("speaker") or ""),
            seconds(begin + max(first, 0.0), where),
            seconds(begin + min(last, length), where),
            sources[0]["channels"].index(channel),
        )


def rows(file: Path) -> Iterator[tuple[str, str, object]]:
    """Yield FILE:LINE, id and value of each utterance of a JSON file.

    The file holds a value in each line, one array of values, or one dictionary of dictionaries, by
    id. In the other two forms the id is ''.
    """
    listed = lines(file)
    where, first = next(listed, ("", "[]"))
    try:
        value = parsed(first, where)
        lined = isinstance(value, dict) and not all(isinstance(v, dict) for v in value.values())
    except ValueError:
        lined = first.strip() not in ("[", "{") and first[-1] in "]}"
    if lined:
        yield where, "", parsed(first, where)
        for where, line in listed:
            yield where, "", parsed(line, where)
    else:
        places, texts = zip((where, first), *listed, strict=True)
        for line, id, value in members("\n".join(texts), places):
            yield places[line], id, value


def parsed(line: str, where: str) -> object:
    """Return the value of a line of JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}; {FORMS}") from error


def members(text: str, places: Sequence[str]) -> Iterator[tuple[int, str, object]]:
    """Yield line (from 0), key and value of each member of a JSON array or dictionary.

    `places`: FILE:LINE of each line of the text. Keys of an array are ''.
    """
    try:
        if not isinstance(json.loads(text), dict | list):
            raise ValueError(f"{places[0]}: neither an array nor a dictionary; {FORMS}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{places[error.lineno - 1]}: not JSON: {error.msg}; {FORMS}") from error
    except RecursionError as error:
        raise ValueError(f"{places[0]}: JSON of too many levels; {FORMS}") from error
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*")
    text = text.strip()
    line, counted, key = 0, 0, ""
    place = between.match(text, 1).end()
    while text[place] not in "]}":
        line, counted = line + text.count("\n", counted, place), place
        if text[0] == "{":
            key, place = decode(text, place)
            place = between.match(text, place).end()
        value, place = decode(text, place)
        yield line, key, value
        place = between.match(text, place).end()


def encodable(value: object) -> str:
    """Return a string or number as text. Raises TypeError for others, and half characters."""
    if not isinstance(value, str | int):
        raise TypeError(f"{value!r} is no string")
    try:
        return str(value).encode().decode()
    except UnicodeEncodeError as error:
        raise TypeError(str(error)) from error
