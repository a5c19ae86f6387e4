"""Files that appear whole or not at all, those that are kept between runs, and their leftovers."""

import json
import os
import shutil
import socket
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HOST = socket.gethostname()


@contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield another name; the file or directory that is written there then becomes `path`.

    After an interruption at any time `path` is the old one or the new one; `sync`: after a power
    failure too, except of a directory. The other name is PATH.HOST.PID.unfinished, so that two
    processes can write the same path. Raises OSError, with `path`, where it can't be written. The
    old one stays then.
    """
    unfinished = path.with_name(f"{path.name}.{HOST}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        if sync and unfinished.is_file():
            force(unfinished)
        unfinished.replace(path)
        if sync:
            with suppress(OSError):  # some network file systems refuse it for directories
                force(path.parent)
    except OSError as error:
        if error.filename not in (None, str(unfinished)):
            raise
        what = f"{error.strerror}; what was saved before is untouched"
        raise OSError(error.errno, what, str(path)) from error
    finally:
        delete(unfinished)


def force(path: Path) -> None:
    """Wait until a file's content, or the names of a directory's files, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes, sync: bool = True) -> None:
    """Write a file whole or not at all, as `whole` does."""
    with whole(path, sync) as unfinished:
        unfinished.write_bytes(data)


def is_newer(path: Path, source: Path) -> bool:
    """Return whether a file is there, and was written after the one that it was made from."""
    return path.exists() and path.stat().st_mtime_ns >= source.stat().st_mtime_ns


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, see `write`."""
    write(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write what JSON can hold, see `write`. Raises ValueError for a number that is not finite."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def delete(path: Path) -> None:
    """Delete a file or a directory with all that is in it, if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def clean(folder: Path) -> None:
    """Delete what processes that are gone left unfinished in a folder and in its folders.

    What belongs to other machines stays.
    """
    for path in [*folder.glob("*.unfinished"), *folder.glob("*/*.unfinished")]:
        name, _, pid = path.name.removesuffix(".unfinished").rpartition(".")
        if name.endswith(f".{HOST}") and pid.isdigit() and not runs(int(pid)):
            delete(path)


def runs(pid: int) -> bool:
    """Return whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)  # sends nothing
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


# Files that can be made again.


def user_cache() -> Path:
    """Return the directory of what is kept for this user.

    Raises ValueError where neither XDG_CACHE_HOME nor a home directory is known.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "dynsize"
    try:
        return Path.home() / ".cache" / "dynsize"
    except RuntimeError as error:
        raise ValueError(f"{error} Set HOME, or XDG_CACHE_HOME to a directory") from error


def keep(folder: Path, name: str, data: bytes) -> None:
    """Write a file for `kept`. Warns once for each folder where that fails.

    It is not forced to the disk: its checksum tells where a crash left less than all of it.
    """
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, checksum(path, data) + data, sync=False)
    except OSError as error:
        way = "; XDG_CACHE_HOME names another place" if folder == user_cache() else ""
        what = f"{folder}: nothing is kept there for later runs: {error.strerror}{way}"
        warnings.warn(what, stacklevel=2)


def kept(path: Path) -> bytes:
    """Return what `keep` wrote; nothing where the file is missing, damaged or unreadable.

    A file that was written under another name counts as damaged.
    """
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""
    data = content[4:]
    return data if content[:4] == checksum(path, data) else b""


def checksum(path: Path, data: bytes) -> bytes:
    """Return the CRC-32 of a kept file's name and content."""
    return zlib.crc32(path.name.encode(errors="surrogateescape") + data).to_bytes(4, "big")
