"""The processes of one training, as torchrun starts them; without torchrun there is one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def join() -> None:
    """Joins the other processes where torchrun started this one: over NCCL, a GPU for each, or over gloo."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0. The first one writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def wrapped(model: nn.Module) -> nn.Module:
    """The same model; where there are several processes, one whose gradients become the mean over all of them."""
    return DistributedDataParallel(model) if count() > 1 else model


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if count() > 1:
        dist.all_reduce(tensor := tensor.clone())
    return tensor


@contextmanager
def first_alone() -> Iterator[None]:
    """What is inside, the first process does before the others: it writes what they then read."""
    if rank():
        dist.barrier()
    yield
    if count() > 1 and not rank():
        dist.barrier()
