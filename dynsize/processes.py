"""The processes of one training: one alone, or several that torchrun or `start` has started."""

import atexit
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FAILED = 2  # exit code of a process that can't go on


def started() -> bool:
    """Return whether torchrun or `start` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(number: int) -> NoReturn:
    """Run this program in a number of processes on this machine, and end as they end.

    It does what torchrun does, with two differences. Only what the processes print is printed,
    where torchrun adds a traceback and a report to an error. The exit code is that of the process
    that failed, where torchrun's is 1. Raises ChildProcessError where a process was killed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # of what torchrun logs: the processes say what is of use
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it saves where it is sent to a training process
    try:
        run.main(["--standalone", f"--nproc-per-node={number}", "--", *sys.argv])
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        place, failure = max(error.failures.items(), key=lambda item: item[1].exitcode)
        if failure.exitcode < 0:
            raise ChildProcessError(
                f"process {place} of {number} was ended by {failure.signal_name()}"
            ) from error
        sys.exit(failure.exitcode)
    sys.exit(0)


def join() -> None:
    """Join the other processes of one training where there are some, until this one ends.

    Tensors on GPUs are exchanged over NCCL, all others over gloo.
    """
    if not started():
        return
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    atexit.register(leave)


def leave() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def use_gpu(device: str) -> None:
    """Give each of several processes on a machine a GPU for itself, unless `device` is the CPU.

    Raises ValueError where there are fewer GPUs than processes.
    """
    if count() == 1 or not torch.cuda.is_available() or device.partition(":")[0] == "cpu":
        return
    gpu = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if gpu >= gpus:
        raise ValueError(
            f"--processes (torchrun: --nproc-per-node): must be at most {gpus}, the GPUs here"
        )
    torch.cuda.set_device(gpu)


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this is the first process: the one that writes and prints."""
    return number() == 0


def wrapped(model: nn.Module) -> nn.Module:
    """Return the model, wrapped so that the gradients of several processes become their mean."""
    return DistributedDataParallel(model) if count() > 1 else model


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if count() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process do what is inside before the others, which read what it wrote.

    Where it fails in the first process, the others end with exit code 2 and no message.
    """
    if not is_first():
        wait_for_first()
        yield
        return
    failed = torch.ones(())
    try:
        yield
        failed.zero_()
    finally:
        total(failed)


def wait_for_first() -> None:
    """Wait until the first process has done its part; end this process where that failed."""
    if total(torch.zeros(())):
        raise SystemExit(FAILED)


def in_first(error: Exception) -> BaseException:
    """Return what to raise for an error that all processes have: only the first one reports it."""
    return error if is_first() else SystemExit(FAILED)
