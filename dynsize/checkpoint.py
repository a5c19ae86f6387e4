"""One file with all that decoding or more training needs, for supernets and for cut subnets.

It is the zip file that `torch.save` writes, whose checksums are compared before it is loaded.
"""

import dataclasses
import io
import math
import pickle
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path

import torch

from dynsize import files
from dynsize.config import from_dict
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer

FORMAT = "dynsize checkpoint 3"
NAME = "checkpoint.pt"  # the newest of a run; the ones before are checkpoint-1.pt, checkpoint-2.pt


@dataclasses.dataclass(frozen=True)
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

    Raises OSError, with the path, where the disk is full. Then no network is lost.
    """
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "weights": model.state_dict(),
        "size": model.size,
        "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
        "training": training,
        "longest_seconds": longest_seconds,
    }
    buffer = io.BytesIO()  # torch.save tells no OSError of a full disk
    torch.save(content, buffer)
    with files.whole(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())
        files.force(unfinished)  # where this fails, the older files keep their names
        names = [path, *(path.with_stem(f"{path.stem}-{age}") for age in range(1, keep))]
        for newer, older in reversed([*pairwise(names)]):
            if newer.exists():
                newer.replace(older)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file onto the CPU, or the newest one of a run directory that is whole.

    Warns of newer ones that are not. Runs no code from the file. Raises ValueError where there is
    no checkpoint, or where it is damaged or something else.
    """
    if not path.is_dir():
        return read(path)
    for file in history(path):
        try:
            return read(file)
        except ValueError as error:
            # Located here, the same warning is shown once, whatever reads the run again.
            warnings.warn(f"{error}; the one before it is used", stacklevel=1)
    raise ValueError(f"{path}: no checkpoint in it, or none that is whole")


def history(run: Path) -> list[Path]:
    """Return the checkpoints of a run directory, newest first."""
    older = sorted(run.glob(f"{Path(NAME).stem}-[0-9].pt"))
    return [run / NAME, *older] if (run / NAME).exists() else older


def read(path: Path) -> Checkpoint:
    """Read one checkpoint file. Raises ValueError where it is missing, damaged or unreadable."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: can't be read: not a file")  # opening a pipe would wait
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                raise ValueError("compressed, as torch.save never does")
            if name := file.testzip():
                raise ValueError(f"the checksum of {name} is wrong")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return from_content(path, content)
    except pickle.UnpicklingError as error:  # torch's text advises to run the code in the file
        raise ValueError(
            f"{path}: not a checkpoint: it holds more than tensors and plain values"
        ) from error
    except Exception as error:  # zipfile and torch raise a dozen kinds, according to what is wrong
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: damaged, or not a checkpoint: {reason}") from error


def from_content(path: Path, content: dict) -> Checkpoint:
    """Return the checkpoint that a file holds. Raises ValueError for another format."""
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}; train it again")
    tokenizer = Tokenizer(bytes(content["tokenizer"].tolist()))
    config = from_dict(content["config"])
    ranking = content["weights"]["_extra_state"]
    model = Supernet(config, tokenizer.labels, ranking, content["size"])
    model.load_state_dict(content["weights"])
    longest = float(content["longest_seconds"])
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not finite; the network can't be used")
    if not 0 < longest < math.inf:
        raise ValueError(f"its longest_seconds is {longest}, not a time above 0")
    return Checkpoint(path, model.eval(), tokenizer, content["training"], longest)
