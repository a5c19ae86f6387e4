"""Files that can be made again, kept between runs; one that is not whole is made again."""

import os
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

from dynsize import files


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


def read(path: Path) -> bytes:
    """Return what `write` wrote; nothing where the file is missing, damaged or unreadable."""
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""
    checksum, data = content[:4], content[4:]
    return data if checksum == zlib.crc32(data).to_bytes(4, "big") else b""


def write(path: Path, data: bytes) -> None:
    """Write a file that other processes see wholly or not at all. Warns where that fails.

    It is not forced to the disk: its checksum tells where a crash left less than all of it.
    """
    temporary = files.unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(zlib.crc32(data).to_bytes(4, "big") + data)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        warnings.warn(f"{path}: can't be written, so it is not kept: {error}", stacklevel=2)


def clean(folder: Path) -> None:
    """Delete the unfinished files that `files.clean` deletes, in a cache and its folders."""
    with suppress(OSError):
        files.clean(folder)
        for path in folder.iterdir():
            if path.is_dir():
                files.clean(path)
