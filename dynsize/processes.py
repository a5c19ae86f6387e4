"""The processes of one training, one or several, and the device on which each computes."""

import atexit
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dynsize import kernels
from dynsize.config import Config
from dynsize.supernet import Supernet, precision

# torch.distributed.nn.functional is imported above, before there is a process group. Imported
# later, as torch does, its default arguments hold the group, and gloo's threads can abort the
# process when it ends.

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl.h
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # settings of glibc's malloc.h
FAILED = 2  # exit code of a process that can't go on


def join() -> None:
    """Join the other processes of one training where there are some, until this one ends.

    Tensors on GPUs are exchanged over NCCL, all others over gloo.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # which torchrun sets
        return
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)
    if sys.platform == "linux":  # where torchrun is killed, its processes save and end
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def use_gpu(device: str) -> None:
    """Give each of several processes on a machine a GPU for itself, unless `device` is the CPU.

    Raises ValueError where there are fewer GPUs than processes.
    """
    if count() == 1 or not torch.cuda.is_available() or device.partition(":")[0] == "cpu":
        return
    gpu = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if gpu >= gpus:
        raise ValueError(f"torchrun --nproc-per-node: must be at most {gpus}, the GPUs here")
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


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes.

    Raises ConnectionError where another process ended; for a tensor on a GPU, NCCL's own error.
    """
    if count() == 1:
        return tensor
    tensor = tensor.clone()
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        if tensor.is_cuda:
            raise
        raise ConnectionError("another process ended, or did not answer") from error
    return tensor


def start_alike(model: Supernet) -> None:
    """Give all processes the first one's weights and ranking, whatever each of them read."""
    if count() == 1:
        return
    for weight in model.parameters():
        dist.broadcast(weight.data, 0)
    ranking = torch.tensor(model.ranking)
    dist.broadcast(ranking, 0)
    model.ranking = ranking.tolist()


def sum_gradients(model: nn.Module) -> None:
    """Replace the gradients of a model by their sums over all processes, if there are several.

    A process that could read nothing has no gradient, and adds zeros. A weight that no network of
    the update uses has no gradient in any process, and keeps none.

    All are exchanged as one tensor after the backward pass. That is plainer than
    DistributedDataParallel, which exchanges some while others are computed.
    """
    if count() == 1:
        return
    weights = list(model.parameters())
    has_gradient = torch.tensor([weight.grad is not None for weight in weights]).int()  # on the CPU
    for weight, holders in zip(weights, total(has_gradient).tolist(), strict=True):
        if weight.grad is None and holders:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    vector_to_parameters(total(parameters_to_vector(gradients)), gradients)


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process do what is inside before the others, which read what it wrote.

    Where it fails in the first process, the others end with exit code 2 and no message.
    """
    failed = torch.tensor(float(is_first()))
    if is_first():
        try:
            yield
            failed.zero_()
        finally:
            total(failed)
    else:
        if total(failed):
            raise SystemExit(FAILED)
        yield


def in_first(error: Exception) -> BaseException:
    """Return what to raise for an error that all processes have: only the first one reports it."""
    return error if is_first() else SystemExit(FAILED)


@dataclass
class Requests:
    """What a training is asked for by signals: see `terminal.signals`."""

    save: bool = False  # after the next update
    stop: int = 0  # a signal's number: save after the next update that is read, and end


# What computes here.


def device_of(config: Config) -> torch.device:
    """Return the configured device. Raises ValueError where this machine lacks it."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: {error}") from error


def use_threads(number: int) -> None:
    """Let torch compute with `number` threads on the CPU; 0 leaves the number to torch."""
    most = os.cpu_count() or 1
    if not 0 <= number <= most:
        raise ValueError(f"--threads {number}: must be 0 to {most}, the processors here")
    if number:
        torch.set_num_threads(number)


def keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that it frees, where the C library is glibc.

    By default glibc returns that of large tensors to the system, and the next ones get theirs page
    by page. Without this an update took 1.04 to 1.07 times as long on two cores of an AMD EPYC.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)  # large tensors come from the heap too, which stays
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)  # bytes: the most that is kept


def hardware(config: Config, device: torch.device) -> str:
    """Return what computes, for people: device, precision, threads, kernels."""
    with precision(config, device):
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
    parts = [f"{device.type} {processor(device)}", str(dtype).removeprefix("torch.")]
    if device.type == "cpu":
        number = torch.get_num_threads()
        parts.append(f"{number} thread{'s' if number > 1 else ''}")
    parts.append(f"kernels: {kernels.describe(device, dtype, config.width, config.layers)}")
    return ", ".join(parts)


def processor(device: torch.device) -> str:
    """Return the name that the device's maker gave it, as far as it is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
