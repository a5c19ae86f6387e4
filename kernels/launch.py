"""The launch of a kernel on the device of its tensors."""

import torch
from torch import Tensor
from triton.runtime import JITFunction


def launch(kernel: JITFunction, programs: int, *arguments, warps: int) -> None:
    """Launch `programs` programs of `warps` warps each, or nothing for 0 programs.

    The first argument is a tensor. Inputs are made contiguous; outputs must be.
    """
    if programs == 0:
        return
    dense = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    with torch.cuda.device_of(dense[0]):
        kernel[(programs,)](*dense, num_warps=warps)
