"""One file with all that is needed to decode or to go on training, the same for supernets and cut subnets."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dynsize.config import from_dict
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer

FORMAT = "dynsize checkpoint 1"
NAME = "checkpoint.pt"  # of the supernet in a run directory


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `training` is the trainer's state, None for a cut subnet."""

    path: Path
    model: Supernet
    tokenizer: Tokenizer
    training: dict | None


def save(path: Path, model: Supernet, tokenizer: Tokenizer, training: dict | None = None) -> None:
    """Writes a checkpoint: after an interruption at any time, `path` is the old file or the new one, and whole."""
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "weights": model.state_dict(),
        "ranking": model.ranking,
        "size": model.size,
        "tokenizer": tokenizer.model,
        "training": training,
    }
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint file, or the supernet's in a run directory, onto the CPU. Runs no code from the file.

    Raises ValueError where there is none, or it is damaged, or something else.
    """
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, according to what is wrong
        raise ValueError(f"{path}: damaged, or not a checkpoint: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: a PyTorch file, but not one that dynsize wrote ({FORMAT!r})")
    try:
        tokenizer = Tokenizer(content["tokenizer"])
        model = Supernet(from_dict(content["config"]), tokenizer.labels, content["ranking"], content["size"])
        model.load_state_dict(content["weights"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: damaged checkpoint: {error}") from error
    return Checkpoint(path, model.eval(), tokenizer, content["training"])
