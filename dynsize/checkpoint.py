"""One file with all that decoding or more training needs, for supernets and for cut subnets.

It is the zip file that `torch.save` writes, with a checksum of all its bytes as the zip file's
comment.
"""

import dataclasses
import io
import math
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from dynsize import files
from dynsize.config import from_dict
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer

FORMAT = "dynsize checkpoint 3"
NAME = "checkpoint.pt"  # the newest of a run; the ones before are checkpoint-1.pt, checkpoint-2.pt
CHECKSUM = 64  # characters: SHA-256 in hexadecimal digits


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    path: Path
    model: Supernet
    tokenizer: Tokenizer
    training: dict | None  # the trainer's state; None for a cut subnet and for the best network
    longest_seconds: float  # of training's longest utterance


def save(
    path: Path,
    model: Supernet,
    tokenizer: Tokenizer,
    training: dict | None = None,
    keep: int = 1,
    longest_seconds: float = 15.0,
) -> None:
    """Write a checkpoint, and keep the ones before it, `keep` files in all.

    `path` becomes PATH-1, which becomes PATH-2, and so on. After an interruption at any time the
    newest of these files is the old one or the new one, and whole.

    Raises OSError, with the path, where the disk is full, and FloatingPointError for a weight that
    is not finite. Then nothing was changed.
    """
    content = content_of(model, tokenizer, training, longest_seconds)
    check_finite(path, content)
    with files.whole(path) as unfinished:
        unfinished.write_bytes(with_checksum(content))
        names = [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(1, keep))]
        for age in range(keep - 1, 0, -1):
            if names[age - 1].exists():
                names[age - 1].replace(names[age])


def content_of(
    model: Supernet, tokenizer: Tokenizer, training: dict | None, longest_seconds: float
) -> dict:
    """Return what a checkpoint's file holds."""
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "weights": model.state_dict(),
        "size": model.size,
        "tokenizer": tokenizer.model,
        "training": training,
        "longest_seconds": longest_seconds,
    }


def file_bytes(loaded: Checkpoint) -> int:
    """Return the bytes that a checkpoint's file would have without the training's state."""
    content = content_of(loaded.model, loaded.tokenizer, None, loaded.longest_seconds)
    return len(with_checksum(content))


def check_finite(path: Path, content: dict) -> None:
    """Raise FloatingPointError where a number of a checkpoint's weights or state is not finite."""
    if name := not_finite(content):
        raise FloatingPointError(
            f"{path}: not written, as {name} is not finite; what was saved before is "
            "untouched. Try a lower peak learning rate"
        )


def not_finite(content: dict) -> str:
    """Return the name of a tensor that is not finite, '' where all are."""
    for name, tensor in tensors(content):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return ""


def tensors(content: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of all tensors in nested dictionaries."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from tensors(value, f"{prefix}{name}.")


def with_checksum(content: dict) -> bytes:
    """Return the bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    without_length = buffer.getvalue()[:-2]  # a zip file ends with the length of its comment
    body = without_length + CHECKSUM.to_bytes(2, "little")
    return body + sha256(body).hexdigest().encode()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file onto the CPU, or the newest one of a run directory that is whole.

    Warns of newer ones that are not. Runs no code from the file. Raises ValueError where there is
    no checkpoint, or where it is damaged or something else.
    """
    found = next(whole(path), None) if path.is_dir() else read(path)
    if found is None:
        raise ValueError(f"{path}: no checkpoint in it, or none that is whole")
    return found


def whole(run: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints of a run directory that are whole, newest first; warn of the others."""
    for path in history(run):
        try:
            yield read(path)
        except ValueError as error:
            # Located here, the same warning is shown once, whatever reads the run again.
            warnings.warn(f"{error}; the one before it is used", stacklevel=1)


def history(run: Path) -> list[Path]:
    """Return the checkpoints of a run directory, newest first."""
    older = sorted(run.glob(f"{Path(NAME).stem}-[0-9].pt"))
    return [run / NAME, *older] if (run / NAME).exists() else older


def read(path: Path) -> Checkpoint:
    """Read one checkpoint file. Raises ValueError where it is missing, damaged or unreadable."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no such checkpoint: not a file")  # opening a pipe would wait
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error
    if sha256(data[:-CHECKSUM]).hexdigest().encode() != data[-CHECKSUM:]:
        raise ValueError(
            f"{path}: damaged, or not a checkpoint that dynsize wrote: its checksum is wrong"
        )
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return from_content(path, content)
    except pickle.UnpicklingError as error:  # torch's text advises to run the code in the file
        raise ValueError(
            f"{path}: not a checkpoint: it holds more than tensors and plain values"
        ) from error
    except Exception as error:  # torch raises a dozen kinds, according to what is wrong
        raise ValueError(f"{path}: not a checkpoint: {str(error).partition(chr(10))[0]}") from error


def from_content(path: Path, content: dict) -> Checkpoint:
    """Return the checkpoint that a file holds. Raises ValueError for another format."""
    if content["format"] != FORMAT:
        raise ValueError(
            f"its format is {content['format']!r}, not {FORMAT!r}; train it again, or use the "
            "version of dynsize that wrote it"
        )
    tokenizer = Tokenizer(content["tokenizer"])
    config = from_dict(content["config"])
    ranking = content["weights"]["_extra_state"]
    model = Supernet(config, tokenizer.labels, ranking, content["size"])
    model.load_state_dict(content["weights"])
    longest = float(content["longest_seconds"])
    if name := not_finite(content):
        raise ValueError(f"{name} is not finite; the network can't be used")
    if not 0 < longest < math.inf:
        raise ValueError(f"its longest_seconds is {longest}, not a time above 0")
    return Checkpoint(path, model.eval(), tokenizer, content["training"], longest)
