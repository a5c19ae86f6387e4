"""Files that can be made again, kept between runs: written atomically, and read only where they are whole."""

import os
import tempfile
import warnings
import zlib
from pathlib import Path


def user_cache() -> Path:
    """The directory of what is kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynsize"


def read(path: Path) -> bytes:
    """What `write` wrote; empty where nothing is there, or something damaged."""
    content = path.read_bytes() if path.is_file() else b""
    return content[4:] if content[:4] == zlib.crc32(content[4:]).to_bytes(4, "big") else b""


def write(path: Path, data: bytes) -> None:
    """Writes a file that other processes see wholly or not at all. Warns where that can't be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent
        ) as folder:  # on the same disk, and gone in any case
            Path(folder, path.name).write_bytes(zlib.crc32(data).to_bytes(4, "big") + data)
            Path(folder, path.name).replace(path)
    except OSError as error:
        warnings.warn(f"{path}: can't be written, so it is not kept: {error}", stacklevel=2)
