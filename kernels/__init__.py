"""Two fused ops, which Triton computes on a GPU and plain torch elsewhere.

`gated_residual_layer_norm` ends one layer and begins the next: `reference.py` has its definition in
torch, `residual.py` its kernels. `ctc_loss` is the loss: `dynsize/ctc.py` has its definition in
torch, and calls the op here where `triton_runs`; `kernels/ctc.py` has its kernel. What is drawn at
random for an utterance, dropout and skipped layers, is there as well.

The environment variable `DYNSIZE_KERNELS` chooses: `torch`, `triton`, or `auto`, which is Triton on
a GPU. Before its first use on a device, each op is compared with torch (`self_check.py`); an op
that does not compile or is wrong there is left to torch. triton is imported only where it is used.
No kernel has run on a GPU yet: they are tested in Triton's interpreter and compiled for GPUs.
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
INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def decide(device: str) -> bool:
    """Return whether tensors on this kind of device (`cpu`, `cuda`) go to Triton.

    Raises ValueError where `DYNSIZE_KERNELS` is no mode, or asks for Triton where it can't run.
    """
    mode = os.environ.get("DYNSIZE_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton"):
        raise ValueError(f"DYNSIZE_KERNELS={mode}: must be auto, torch or triton")
    if mode == "torch" or (mode == "auto" and device != "cuda"):
        return False
    obstacle = ""
    if importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    elif device != "cuda" and not (device == "cpu" and interpreted()):
        obstacle = f"Triton runs on 'cuda', and with TRITON_INTERPRET=1 on 'cpu', not on '{device}'"
    if obstacle and mode == "triton":
        raise ValueError(f"DYNSIZE_KERNELS=triton: {obstacle}")
    if obstacle:
        log.warning("torch computes what Triton could: %s", obstacle)
    return not obstacle


def interpreted() -> bool:
    """Return whether Triton interprets its kernels, which works on a CPU."""
    triton = importlib.import_module("triton")
    return triton.knobs.runtime.interpret


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
    computed_in = dict(gated_residual_layer_norm=dtype, ctc_loss=torch.float32)
    largest = 0.0
    failed = []
    for op in computed_in:
        error = self_check.error_of(op, device, computed_in[op])
        if error is None:
            failed.append(f", torch for {op}")
        else:
            largest = max(largest, error)
    if len(failed) == len(computed_in):
        return "torch"
    rounded = f"{largest:.0e}".replace("e-0", "e-")
    return f"triton (checked: {rounded})" + "".join(failed)


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

    `x`: (R, T, D) float32 or float64, the stack; y has its shape and dtype. `branch`: (R', T, D)
    of a dtype in FLOATS, R' ≤ R; y is bitwise `x` in the rows from R' on. `gate`: (R',), or None
    for 1. `seed`: (B,) int64, one for each utterance, needed where `dropout_p` is not 0; B divides
    R and R', and row r uses seed r mod B, so that all sizes of an utterance drop the same.
    `weight`, `bias`: (D,). `rows`: how many rows are normalised, by default all. `dtype`: that of
    the normalised rows, by default that of `x`.

    Where the gate is 0, y is bitwise `x`, and NaN in the branch reaches no result and no gradient
    but the gate's. The gate's gradient is computed there too, so a gate of 0 can learn.
    Differentiable once. Nothing waits for the device. Raises ValueError for shapes, dtypes or
    devices that don't fit.
    """
    check_residual(x, branch, gate, dropout_p, seed, weight, bias, rows)
    rows = len(x) if rows is None else rows
    dtype = dtype or x.dtype
    op = reference.gated_residual_layer_norm
    computed_in = branch.dtype if x.dtype == torch.float32 else x.dtype
    if triton_runs("gated_residual_layer_norm", x.device, computed_in):
        from dynsize.kernels.residual import GatedResidualLayerNorm

        op = GatedResidualLayerNorm.apply
    return op(x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps)


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Return the losses of `dynsize.ctc.ctc_loss`, computed by Triton in float32.

    Raises ValueError for shapes, dtypes or devices that don't fit.
    """
    expect_frames("log_probs", log_probs, FLOATS)
    n = len(log_probs)
    expect("lengths", lengths, (n,), INTEGERS, log_probs)
    expect("labels", labels, (n, labels.shape[-1]), INTEGERS, log_probs)
    expect("label_lengths", label_lengths, (n,), INTEGERS, log_probs)
    if log_probs.shape[1] == 0:
        raise ValueError(f"log_probs {described(log_probs)} must have frames")
    from dynsize.kernels.ctc import CtcLoss

    return CtcLoss.apply(log_probs, lengths, labels, label_lengths)


def check_residual(x, branch, gate, dropout_p, seed, weight, bias, rows) -> None:
    """Raise ValueError where an argument of `gated_residual_layer_norm` doesn't fit."""
    expect_frames("x", x, (torch.float32, torch.float64))
    count, frames, width = x.shape
    prefix = len(branch)  # R'
    expect("branch", branch, (prefix, frames, width), FLOATS, x)
    if prefix > count:
        raise ValueError(f"branch {described(branch)} must have at most {count} rows, those of x")
    if gate is not None:
        expect("gate", gate, (prefix,), FLOATS, x)
    expect("weight", weight, (width,), FLOATS, x)
    expect("bias", bias, (width,), FLOATS, x)
    if rows is not None and not 0 <= rows <= count:
        raise ValueError(f"rows {rows} must be at least 0 and at most {count}, the rows of x")
    if not 0 <= dropout_p < 1 or (dropout_p > 0 and seed is None):
        raise ValueError(f"dropout_p {dropout_p} must be 0, or below 1 with a seed")
    if seed is not None:
        utterances = len(seed)  # B
        expect("seed", seed, (utterances,), (torch.int64,), x)
        if utterances == 0 or count % utterances or prefix % utterances:
            rows_of_both = f"the {count} rows of x and the {prefix} of the branch"
            raise ValueError(f"seed: {utterances} seeds must divide {rows_of_both}")


def expect_frames(name: str, tensor: Tensor, dtypes: tuple) -> None:
    """Raise ValueError unless the tensor has three dimensions and one of `dtypes`."""
    if tensor.dim() != 3 or tensor.dtype not in dtypes:
        raise ValueError(f"{name} {described(tensor)} must have 3 dimensions and one of {dtypes}")


def expect(name: str, tensor: Tensor, shape: tuple, dtypes: tuple, like: Tensor) -> None:
    """Raise ValueError unless the tensor has this shape, one of `dtypes`, and `like`'s device."""
    fits = tensor.shape == shape and tensor.dtype in dtypes
    if not fits or tensor.device != like.device:
        expected = f"{shape} on {like.device}, one of {dtypes}"
        raise ValueError(f"{name} {described(tensor)} must be {expected}")


def described(tensor: Tensor) -> str:
    """Return shape, dtype and device, for messages."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
