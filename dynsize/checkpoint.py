"""One file with all that is needed to decode or to go on training, the same for supernets and cut subnets.

It is the zip file that `torch.save` writes, with a checksum of all its bytes as the zip file's comment.
"""

import dataclasses
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from dynsize.config import from_dict
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer

FORMAT = "dynsize checkpoint 3"
NAME = "checkpoint.pt"  # of the supernet in a run directory; the ones before are checkpoint-1.pt, checkpoint-2.pt, ...
CHECKSUM = 64  # characters: SHA-256 in hexadecimal digits


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `training` is the trainer's state; None where no training can go on: in a cut subnet, in the
    best network on dev, in the average of several."""

    path: Path
    model: Supernet
    tokenizer: Tokenizer
    training: dict | None


def save(
    path: Path, model: Supernet, tokenizer: Tokenizer, training: dict | None = None, keep: int = 1
) -> None:
    """Writes a checkpoint, and keeps so many, this one among them: `path` as `path`-1, that one as `path`-2, ...

    After an interruption at any time, the newest of these files is the old one or the new one, and whole. Raises
    OSError, with the path, where there is no room.
    """
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "weights": model.state_dict(),
        "size": model.size,
        "tokenizer": tokenizer.model,
        "training": training,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()[:-2] + CHECKSUM.to_bytes(
        2, "little"
    )  # a zip file ends with its comment's length
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(body + sha256(body).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{error.strerror}; what was saved before is untouched", str(path)
        ) from error
    names = [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(1, keep))]
    for age in range(keep - 1, 0, -1):
        if names[age - 1].exists():
            names[age - 1].replace(names[age])
    unfinished.replace(path)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint file onto the CPU; of a run directory the newest that is whole, with a warning for newer ones.
    Runs no code from the file.

    Raises ValueError where there is none, or it is damaged, or something else.
    """
    found = next(whole(path), None) if path.is_dir() else read(path)
    if found is None:
        raise ValueError(f"{path}: no checkpoint in it, or none that is whole")
    return found


def whole(run: Path) -> Iterator[Checkpoint]:
    """The checkpoints of a run directory that are whole, newest first; warns of the others."""
    for path in history(run):
        try:
            yield read(path)
        except ValueError as error:
            warnings.warn(f"{error}; the one before it is used", stacklevel=3)


def history(run: Path) -> list[Path]:
    """The checkpoints of a run directory, newest first."""
    older = sorted(run.glob(f"{Path(NAME).stem}-[0-9].pt"))
    return [run / NAME, *older] if (run / NAME).exists() else older


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint file; `load` without the choice."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    data = path.read_bytes()
    if sha256(data[:-CHECKSUM]).hexdigest().encode() != data[-CHECKSUM:]:
        raise ValueError(
            f"{path}: damaged, or not a checkpoint that dynsize wrote: its checksum is wrong"
        )
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        tokenizer = Tokenizer(content["tokenizer"])
        ranking = content["weights"]["_extra_state"]
        config = from_dict(content["config"])
        model = Supernet(config, tokenizer.labels, ranking, content["size"])
        model.load_state_dict(content["weights"])
        return Checkpoint(path, model.eval(), tokenizer, content["training"])
    except Exception as error:  # torch raises a dozen kinds, according to what is wrong
        raise ValueError(f"{path}: not a checkpoint: {str(error).partition(chr(10))[0]}") from error
