"""Dynamic encoder size: one Conformer-CTC supernet, and subnets that share its weights."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynsize.recogniser import Recogniser

__version__ = "0.1.0"


def load(path: str | Path) -> "Recogniser":
    """Return the recogniser of a run directory, of one checkpoint, or of an ONNX file.

    Raises ValueError where `path` is none of these.
    """
    from dynsize import recogniser  # here, so that `import dynsize` does not import torch

    return recogniser.load(path)
