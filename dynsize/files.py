"""Files that appear whole or not at all, and what interrupted processes left of them."""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

HOST = socket.gethostname()


def unfinished(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is whole.

    It is PATH.HOST.PID.unfinished: two processes that write the same path have two names.
    """
    return path.with_name(f"{path.name}.{HOST}.{os.getpid()}.unfinished")


def write(path: Path, data: bytes) -> None:
    """Write a file; after an interruption at any time it has its old content or its new one.

    Raises OSError, with `path`, where it can't be written. The old content is then untouched.
    """
    put(prepare(path, data), path)


def prepare(path: Path, data: bytes) -> Path:
    """Write the data of `path` to its unfinished file, safely on the disk. Returns that file."""
    temporary = unfinished(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        what = f"{error.strerror}; what was saved before is untouched"
        raise OSError(error.errno, what, str(path)) from error
    return temporary


def put(temporary: Path, path: Path) -> None:
    """Give a finished file its name, and see that the name is on the disk too."""
    temporary.replace(path)
    with suppress(OSError):  # some network file systems refuse it for directories
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def clean(folder: Path) -> None:
    """Delete a folder's unfinished files, but for those of other machines and running processes."""
    for path in folder.glob("*.unfinished"):
        name, _, pid = path.name.removesuffix(".unfinished").rpartition(".")
        if not name.endswith(f".{HOST}") or not pid.isdigit() or runs(int(pid)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def runs(pid: int) -> bool:
    """Return whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
