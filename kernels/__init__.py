"""Two fused ops, which Triton computes on a GPU and plain torch elsewhere.

`gated_residual_layer_norm` ends one layer and begins the next: `reference.py` has its definition in
torch, `residual.py` its kernel. `ctc_loss` is the loss: `dynsize/ctc.py` has its definition in
torch and calls this one where `triton_runs`; `kernels/ctc.py` has its kernel. Neither kernel has
run on a GPU yet: they are tested in Triton's interpreter and compiled for GPUs.

The environment variable `DYNSIZE_KERNELS` (`auto`, `torch`, `triton`) forces one or the other.
Before its first use on a device, each kernel is compared with torch (`self_check.py`); an op whose
kernel does not compile or is wrong is left to torch. triton is imported only where it is used.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from dynsize.kernels import reference, self_check
from dynsize.kernels.reference import layer_gates as layer_gates
from dynsize.kernels.reference import layer_seed as layer_seed

log = logging.getLogger(__name__)
INTEGERS = (torch.int32, torch.int64)  # that the kernels read


@functools.cache
def decide(device: str) -> bool:
    """Return whether tensors on this kind of device (`cpu`, `cuda`) go to Triton.

    Raises ValueError where `DYNSIZE_KERNELS` is no mode, or asks for Triton where it can't run.
    """
    mode = os.environ.get("DYNSIZE_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton"):
        raise ValueError(f"DYNSIZE_KERNELS={mode}: must be auto, torch or triton")
    obstacle = ""
    if importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    elif device != "cuda" and not (device == "cpu" and interpreted()):
        obstacle = f"Triton runs on 'cuda', and with TRITON_INTERPRET=1 on 'cpu', not on '{device}'"
    if mode == "triton" and obstacle:
        raise ValueError(f"DYNSIZE_KERNELS=triton: {obstacle}")
    if mode == "auto" and device == "cuda" and obstacle:
        log.warning("torch computes what Triton could: %s", obstacle)
    return mode == "triton" or (mode == "auto" and device == "cuda" and not obstacle)


def interpreted() -> bool:
    """Return whether Triton interprets its kernels, which works on a CPU."""
    return importlib.import_module("triton").knobs.runtime.interpret


def triton_runs(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton computes `op` on `device` in `dtype`. float64 is left to torch."""
    if dtype == torch.float64 or not decide(device.type):
        return False
    return self_check.error_of(op, device, dtype) is not None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Return what computes the ops on `device` in a run of `dtype`.

    `torch`, or `triton (checked: 3e-3)` with the largest error of the self-check, relative to the
    largest number of the same tensor. An op that failed is named: `…, torch for ctc_loss`.
    """
    if not decide(device.type):
        return "torch"
    errors = {}
    for op, computed_in in dict(gated_residual_layer_norm=dtype, ctc_loss=torch.float32).items():
        errors[op] = self_check.error_of(op, device, computed_in)
    right = [error for error in errors.values() if error is not None]
    if not right:
        return "torch"
    checked = f"triton (checked: {max(right):.0e})".replace("e-0", "e-")
    return checked + "".join(f", torch for {op}" for op in errors if errors[op] is None)


def gated_residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return y = x + scale · gate · dropout(branch), and LayerNorm(y[:rows]) · weight + bias.

    `x`: (R, T, D) float32 or float64, the stream; y has its shape and dtype. `branch`: (R', T, D)
    of any float dtype, R' ≤ R; y is bitwise `x` in the rows from R' on. `gate`: (R',), or None for
    1. `seed`: (B,) int64, one for each utterance, needed where `dropout_p` is not 0; B divides R
    and R', and row r uses seed r mod B, so that all sizes of an utterance drop the same.
    `weight`, `bias`: (D,). `rows`: how many rows are normalised, by default all. `dtype`: that of
    the normalised rows, by default that of `x`.

    Where the gate is 0, y is bitwise `x`, and NaN in the branch reaches neither the results nor
    any gradient but the gate's, which is computed there too, so a gate of 0 can learn.
    Differentiable once. Nothing waits for the device. Raises ValueError for shapes, dtypes or
    devices that don't fit.
    """
    check_residual(x, branch, gate, dropout_p, seed, weight, bias, rows)
    rows = len(x) if rows is None else rows
    dtype = dtype or x.dtype
    arguments = (x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps)
    computed_in = branch.dtype if x.dtype == torch.float32 else x.dtype
    if not triton_runs("gated_residual_layer_norm", x.device, computed_in):
        return reference.gated_residual_layer_norm(*arguments)
    from dynsize.kernels.residual import GatedResidualLayerNorm

    return GatedResidualLayerNorm.apply(*arguments)


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Return the losses of `dynsize.ctc.ctc_loss`, computed by Triton in float32.

    Raises ValueError for shapes, dtypes or devices that don't fit.
    """
    n = len(log_probs)
    fits = log_probs.dim() == 3 and log_probs.shape[1] > 0 and log_probs.is_floating_point()
    expect("log_probs", log_probs, log_probs.shape, log_probs, fits)
    for name, tensor in dict(lengths=lengths, label_lengths=label_lengths).items():
        expect(name, tensor, (n,), log_probs, tensor.dtype in INTEGERS)
    expect("labels", labels, (n, labels.shape[-1]), log_probs, labels.dtype in INTEGERS)
    from dynsize.kernels.ctc import CtcLoss

    return CtcLoss.apply(log_probs, lengths, labels, label_lengths)


def check_residual(x, branch, gate, dropout_p, seed, weight, bias, rows) -> None:
    """Raise ValueError where an argument of `gated_residual_layer_norm` doesn't fit."""
    fits = x.dim() == 3 and x.dtype in (torch.float32, torch.float64)
    expect("x", x, x.shape, x, fits)
    prefix = len(branch)  # R'
    fits = branch.is_floating_point() and prefix <= len(x)
    expect("branch", branch, (prefix, *x.shape[1:]), x, fits)
    if gate is not None:
        expect("gate", gate, (prefix,), x, gate.is_floating_point())
    for name, tensor in dict(weight=weight, bias=bias).items():
        expect(name, tensor, x.shape[2:], x, tensor.is_floating_point())
    if not 0 <= dropout_p < 1 or (dropout_p > 0 and seed is None):
        raise ValueError(f"dropout_p {dropout_p} must be 0, or below 1 with a seed")
    if seed is not None:
        utterances = len(seed)  # B
        divides = utterances > 0 and len(x) % utterances == 0 and prefix % utterances == 0
        expect("seed", seed, (utterances,), x, divides and seed.dtype == torch.int64)
    if rows is not None and not 0 <= rows <= len(x):
        raise ValueError(f"rows {rows} must be at least 0 and at most {len(x)}, the rows of x")


def expect(name: str, tensor: Tensor, shape: tuple, like: Tensor, fits: bool) -> None:
    """Raise ValueError for another shape, another device than that of `like`, or if not `fits`."""
    if tensor.shape != shape or tensor.device != like.device or not fits:
        expected = f"{tuple(shape)} expected, beside {described(like)}"
        raise ValueError(f"{name} {described(tensor)} doesn't fit: {expected}")


def described(tensor: Tensor) -> str:
    """Return shape, dtype and device, for messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
