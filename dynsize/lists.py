"""The lists of a corpus: their lines, and the paths, times and names in them."""

import gzip
import math
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dynsize.audio import ENDINGS, FOREIGN
from dynsize.text import shown

LISTED = 12  # names of files that a message lists, at most


class Entry(NamedTuple):
    """What a corpus says of one utterance, in the line `where`, FILE:NUMBER."""

    where: str
    id: str
    path: str
    text: str | None  # None: the corpus does not say
    speaker: str = ""
    start: float = 0.0  # in seconds, as `end`
    end: float | None = None  # None: the end of the file
    channel: int | None = None  # from 0; None: none is chosen
    reference: str = ""


def lines(*paths: Path | str) -> Iterator[tuple[str, str]]:
    """Yield FILE:NUMBER and text of each line of UTF-8 files that is not blank. Unpacks .gz."""
    for path in map(os.fspath, paths):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}:1: not a regular file, which a list must be")
        number = 0
        try:
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    text = line.decode().removeprefix("\ufeff").rstrip("\r\n")
                    if text and not text.isspace():
                        yield f"{path}:{number}", text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text: {error}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged gzip data: {error}") from error


def table(path: Path) -> dict[str, tuple[str, str]]:
    """Return KEY → FILE:NUMBER, VALUE of a file's lines `KEY VALUE`; {} where it is missing."""
    found: dict[str, tuple[str, str]] = {}
    for where, line in lines(path) if path.exists() else ():
        key, *value = line.split(maxsplit=1)
        if key in found:
            raise ValueError(f"{where}: {key} is there twice, first in {found[key][0]}")
        found[key] = (where, "".join(value))
    return found


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a directory and the names in it, then the same of each directory below it.

    Links are followed. Each directory is visited once. Raises ValueError where one can't be listed.
    """
    pending, visited = [os.fspath(folder)], set()
    while pending:
        path = pending.pop()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=attrgetter("name"))
        except OSError as error:
            raise ValueError(f"{path}: can't be listed: {error.strerror}") from error
        yield path, [entry.name for entry in entries]
        pending += [entry.path for entry in reversed(entries) if entry.is_dir()]


def names_in(folder: Path) -> list[str]:
    """Return the names in a directory that a corpus must have."""
    try:
        return os.listdir(folder)
    except OSError as error:
        raise ValueError(f"{folder}: can't be listed: {error.strerror}") from error


def audio_files(folder: Path | str, names: Sequence[str]) -> dict[str, str]:
    """Return the paths of audio files by their names without ending.

    Of several endings the first in `ENDINGS` counts. No name in a list can lead out of a folder.
    """
    found: dict[str, tuple[int, str]] = {}
    for name in sorted(names):
        stem, ending = os.path.splitext(name)
        place = PLACES.get(ending.lower())
        if place is not None:
            found[stem] = min((place, f"{folder}/{name}"), found.get(stem, (place + 1, "")))
    return {stem: path for stem, (_, path) in found.items()}


PLACES = {ending: place for place, ending in enumerate((*ENDINGS, *FOREIGN))}


def without_ending(path: str) -> str:
    """Return the name of an audio file without its ending."""
    stem, ending = os.path.splitext(os.path.basename(path))
    return stem if ending.lower() in PLACES else stem + ending


def placed(file: Path, name: str, where: str) -> str:
    """Return the path of an audio file that a list names.

    A relative path is looked for in the list's directory, then in the working directory.
    """
    bases = (os.path.dirname(file), os.getcwd())
    if "\0" in name:
        raise ValueError(f"{where}: {shown(name)} is no path")
    if os.path.isabs(name):
        return name
    for base in bases:
        path = os.path.normpath(os.path.join(base, name))
        if not path.startswith(os.path.join(base, "")):
            advice = "write an absolute path if it is meant"
            raise ValueError(f"{where}: {shown(name)} is not inside {base}; {advice}")
        if os.path.exists(path):
            return path
    looked = " and ".join(dict.fromkeys(bases))
    raise ValueError(f"{where}: no audio: {shown(name)} doesn't exist, looked for in {looked}")


def missing(where: str, id: str, folder: Path | str) -> str:
    """Raise ValueError where a directory has no audio file with the name of an utterance."""
    raise no_audio(where, id, f"{folder}/{id}{{{','.join(ENDINGS[:8])},…}}")


def no_audio(where: str, id: str, path: str) -> ValueError:
    """Return the error for an utterance whose file does not exist."""
    there = contents(os.path.dirname(path))
    return ValueError(f"{where}: no audio for the utterance {id}: {path} doesn't exist; {there}")


def contents(folder: Path | str) -> str:
    """Return, for a message, what a directory holds."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"in {folder}: {', '.join(names[:LISTED]) or 'nothing'}{more}"


def seconds(value: object, where: str) -> float:
    """Return a time that is given as a number or its digits."""
    try:
        if 0 <= (time := float(value)) < math.inf:
            return time
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: {shown(str(value))} is not a time in seconds")
