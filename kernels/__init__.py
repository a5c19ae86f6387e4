"""The ops that training spends its memory traffic on, each in plain torch (`reference.py`) and as a Triton kernel.

Which runs is decided here, once for each kind of device, and logged: Triton where the tensors lie on a GPU, torch
elsewhere. The environment variable `DYNSIZE_KERNELS` (`auto`, `torch`, `triton`) forces one. triton is imported where
it is used and nowhere else.

    gated_residual               a layer's end: x + scale · gate · dropout(branch)
    gated_residual_layer_norm    the same, and the next layer's LayerNorm of it
    linear_gated_residual        the same with the layer's last projection before it
    ctc_loss                     CTC of a whole batch
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from kernels import reference

log = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def triton_runs(device: str) -> bool:
    """`decide`, asked once for each kind of device; torch.compile takes the answer as it is."""
    return decide(device)


@functools.cache
def decide(device: str) -> bool:
    """Whether tensors on this kind of device (`cpu`, `cuda`) go to Triton; logged when first asked. Raises ValueError
    where `DYNSIZE_KERNELS` is no mode, or asks for Triton where it can't run."""
    mode = os.environ.get("DYNSIZE_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton"):
        raise ValueError(f"DYNSIZE_KERNELS={mode}: must be auto, torch or triton")
    obstacle = None
    if importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    elif device != "cuda" and not (device == "cpu" and interpreted()):
        obstacle = f"there is no Triton for tensors on '{device}', unless TRITON_INTERPRET=1 interprets it on the CPU"
    if mode == "triton" and obstacle:
        raise ValueError(f"DYNSIZE_KERNELS=triton: {obstacle}")
    chosen = mode == "triton" or (mode == "auto" and device == "cuda" and not obstacle)
    reason = f" ({obstacle})" if obstacle else ""
    log.info("kernels on %s: %s, DYNSIZE_KERNELS=%s%s", device, "triton" if chosen else "torch", mode, reason)
    return chosen


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: TRITON_INTERPRET=1 when triton was imported."""
    import triton

    return triton.knobs.runtime.interpret


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """x + scale · gate · dropout(branch), in the dtype of `x`.

    `x`, `branch`: (R, T, D) of any float dtypes, R a multiple of B. `gate`: () for all rows or (R,) for each, in
    device memory; None for 1. `seed`: (B,) int64 on the device, one for each utterance, needed where `dropout_p` is not
    0: row r drops what row r mod B drops, so that all sizes of an utterance drop the same. Where the gate is 0, the
    result is bitwise `x` and the branch is not read: NaN there reaches neither the result nor any gradient but the
    gate's own, which is right there too. Differentiable once. Raises ValueError for shapes, dtypes or devices that
    don't fit.
    """
    seed = seed if dropout_p else None
    check_residual(x, branch.shape, gate, dropout_p, seed, branch=branch)
    if not triton_runs(x.device.type):
        return reference.gated_residual(x, branch, gate, scale, dropout_p, seed)
    from kernels.residual import gated_residual as op

    return op(x, branch, gate, scale, dropout_p, seed)


def gated_residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, weight: Tensor, bias: Tensor, eps: float = 1e-5,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x + scale · gate · dropout(branch), and LayerNorm(y) · weight + bias, both in the dtype of `x`.

    `weight`, `bias`: (D,). The rest as in `gated_residual`. Statistics in float32.
    """
    seed = seed if dropout_p else None
    check_residual(x, branch.shape, gate, dropout_p, seed, branch=branch, weight=weight, bias=bias)
    expect("weight", weight, x.shape[-1:])
    expect("bias", bias, x.shape[-1:])
    if not triton_runs(x.device.type):
        return reference.gated_residual_layer_norm(x, branch, gate, scale, weight, bias, eps, dropout_p, seed)
    from kernels.residual_layer_norm import gated_residual_layer_norm as op

    return op(x, branch, gate, scale, weight, bias, eps, dropout_p, seed)


def linear_gated_residual(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, scale: float, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x + scale · gate · dropout(h @ weightᵀ + bias), in the dtype of `x`.

    `h`: (R, T, K). `weight`: (D, K), of the dtype of `h`, except under autocast, which sees to both. `bias`: (D,). The
    rest as in `gated_residual`.
    """
    seed = seed if dropout_p else None
    check_residual(x, (*h.shape[:-1], len(weight)), gate, dropout_p, seed, h=h, weight=weight, bias=bias)
    expect("weight", weight, (x.shape[-1], h.shape[-1]))
    expect("bias", bias, x.shape[-1:])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        h, weight = h.to(dtype), weight.to(dtype)
    if h.dtype != weight.dtype:
        raise ValueError(f"h {described(h)} and weight {described(weight)} must have one dtype")
    if not triton_runs(x.device.type):
        return reference.linear_gated_residual(x, h, weight, bias, gate, scale, dropout_p, seed)
    from kernels.linear_residual import linear_gated_residual as op

    return op(x, h, weight, bias, gate, scale, dropout_p, seed)


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """CTC (Graves et al. 2006): negative log-likelihood of each utterance's labels, summed over all alignments.

    `log_probs`: (N, T, V) of any float dtype; computed in float32, or in float64 if they are. `lengths`: (N,) frames,
    1 to T. `labels`: (N, U), padded with anything; label 0 is the blank. `label_lengths`: (N,), 0 to U. Returns (N,);
    infinite, with a gradient of 0, where the labels and the blanks between repeated ones don't fit into the frames.
    Raises ValueError for shapes, dtypes or devices that don't fit.
    """
    n = log_probs.shape[:1]
    if log_probs.dim() != 3 or labels.dim() != 2 or not log_probs.is_floating_point():
        raise ValueError(f"log_probs {described(log_probs)} must be (N, T, V), labels {described(labels)} (N, U)")
    expect("lengths", lengths, n)
    expect("labels", labels, (*n, labels.shape[1]))
    expect("label_lengths", label_lengths, n)
    for name, tensor in dict(lengths=lengths, labels=labels, label_lengths=label_lengths).items():
        if tensor.device != log_probs.device or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} {described(tensor)} must be integers on the device of {described(log_probs)}")
    if not triton_runs(log_probs.device.type):
        return reference.ctc_loss(log_probs, lengths, labels, label_lengths)
    from kernels.ctc import ctc_loss as op

    return op(log_probs, lengths, labels, label_lengths)


def check_residual(
    x: Tensor, shape: tuple, gate: Tensor | None, dropout_p: float, seed: Tensor | None, **others: Tensor
) -> None:
    """Raises ValueError where `x` is not (R, T, D) or not of the branch's `shape`, or the others don't fit to it."""
    if x.dim() != 3 or x.shape != shape:
        names = ", ".join(f"{name} {described(tensor)}" for name, tensor in others.items())
        raise ValueError(f"x {described(x)} must be (R, T, D), and the branch of the same shape; here are {names}")
    if gate is not None and gate.shape not in ((), x.shape[:1]):
        raise ValueError(f"gate {described(gate)} must be () or (R,) for x {described(x)}")
    if not 0 <= dropout_p < 1 or (dropout_p > 0 and seed is None):
        raise ValueError(f"dropout_p {dropout_p} must be 0, or below 1 with a seed")
    if seed is not None and (seed.dim() != 1 or len(seed) == 0 or len(x) % len(seed) or seed.dtype != torch.int64):
        raise ValueError(f"seed {described(seed)} must be (B,) int64, and B divide the rows of x {described(x)}")
    if seed is not None and seed.device != x.device:
        raise ValueError(f"seed {described(seed)} must be on the device of x {described(x)}")
    for name, tensor in (others | ({} if gate is None else dict(gate=gate)) | dict(x=x)).items():
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(f"{name} {described(tensor)} must be of a float dtype, on the device of x {described(x)}")


def expect(name: str, tensor: Tensor, shape: tuple) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} {described(tensor)} must have the shape {tuple(shape)}")


def described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
