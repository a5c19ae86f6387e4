"""The ops that training spends its memory traffic on, each in plain torch (`reference.py`) and as a Triton kernel.

Which runs is decided here, once for each kind of device, and logged: Triton where the tensors lie on a GPU, torch
elsewhere. The environment variable `DYNSIZE_KERNELS` (`auto`, `torch`, `triton`) forces one. triton is imported where
it is used and nowhere else.
"""

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from dynsize.kernels import reference
from dynsize.kernels.reference import layer_gates as layer_gates
from dynsize.kernels.reference import layer_seed as layer_seed

log = logging.getLogger(__name__)


@functools.cache
def decide(device: str) -> bool:
    """Whether tensors on this kind of device (`cpu`, `cuda`) go to Triton. Raises ValueError where `DYNSIZE_KERNELS` is
    no mode, or asks for Triton where it can't run."""
    mode = os.environ.get("DYNSIZE_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton"):
        raise ValueError(f"DYNSIZE_KERNELS={mode}: must be auto, torch or triton")
    obstacle = ""
    if importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    elif device != "cuda" and not (
        device == "cpu" and importlib.import_module("triton").knobs.runtime.interpret
    ):
        obstacle = f"there is no Triton for tensors on '{device}', unless TRITON_INTERPRET=1 interprets it on the CPU"
    if mode == "triton" and obstacle:
        raise ValueError(f"DYNSIZE_KERNELS=triton: {obstacle}")
    chosen = mode == "triton" or (mode == "auto" and device == "cuda" and not obstacle)
    level = logging.WARNING if mode == "auto" and device == "cuda" and obstacle else logging.INFO
    reason = f" ({obstacle})" if obstacle else ""
    log.log(
        level,
        "kernels on %s: %s, DYNSIZE_KERNELS=%s%s",
        device,
        "triton" if chosen else "torch",
        mode,
        reason,
    )
    return chosen


@torch.compiler.assume_constant_result
def triton_runs(device: str) -> bool:
    """`decide`, whose answer torch.compile takes as it is."""
    return decide(device)


def implementation(x: Tensor) -> ModuleType:
    """What computes every op where `x` lies."""
    if not triton_runs(x.device.type):
        return reference
    from dynsize.kernels import fused

    return fused


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + scale · gate · dropout(branch), in the dtype of `x`.

    `x`, `branch`: (R, T, D) of any float dtypes, R a multiple of B. `gate`: () for all rows or (R,) for each, in
    device memory; None for 1. `seed`: (B,) int64 on the device, one for each utterance, needed where `dropout_p` is not
    0: row r drops what row r mod B drops, so that all sizes of an utterance drop the same. Where the gate is 0, the
    result is bitwise `x` and the branch is not read: NaN there reaches neither the result nor any gradient but the
    gate's own, which is right there too. Differentiable once. Raises ValueError for shapes, dtypes or devices that
    don't fit.
    """
    check_residual(x, gate, dropout_p, seed, branch=(branch, x.shape))
    return implementation(x).gated_residual(x, branch, gate, scale, dropout_p, seed)


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
    """Returns y = x + scale · gate · dropout(branch), and LayerNorm(y[:rows]) · weight + bias.

    `x`: (R, T, D) float32 or float64, the stream; y has its shape and dtype. `branch`: (R', T, D)
    of any float dtype, R' ≤ R; y is bitwise `x` in the rows from R' on. `gate`: (R',), or None for
    1. `seed`: (B,) int64, one for each utterance, needed where `dropout_p` is not 0; B divides R
    and R', and row r drops what row r mod B drops, so that all sizes of an utterance drop the same.
    `weight`, `bias`: (D,). `rows`: how many rows are normalised, by default all. `dtype`: that of
    the normalised rows, by default that of `x`.

    Where the gate is 0, y is bitwise `x`, and NaN in the branch reaches neither the results nor
    any gradient but the gate's, which is right there too. Differentiable once. Nothing waits for
    the device. Raises ValueError for shapes, dtypes or devices that don't fit.
    """
    check(x, branch, gate, dropout_p, seed, weight, bias, rows)
    return reference.gated_residual_layer_norm(
        x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps
    )


def check(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rows: int | None,
) -> None:
    """Raises ValueError where an argument of `gated_residual_layer_norm` doesn't fit to `x`."""
    expect("x", x, x.shape, x, x.dim() == 3 and x.dtype in (torch.float32, torch.float64))
    prefix = len(branch) if branch.dim() else 0  # R'
    fits = branch.is_floating_point() and prefix <= len(x)
    expect("branch", branch, (prefix, *x.shape[1:]), x, fits)
    if gate is not None:
        expect("gate", gate, (prefix,), x, gate.is_floating_point())
    for name, tensor in dict(weight=weight, bias=bias).items():
        expect(name, tensor, x.shape[2:], x, tensor.is_floating_point())
    if not 0 <= dropout_p < 1 or (dropout_p > 0 and seed is None):
        raise ValueError(f"dropout_p {dropout_p} must be 0, or below 1 with a seed")
    if seed is not None:
        utterances = len(seed) if seed.dim() else 0  # B
        divides = utterances > 0 and len(x) % utterances == 0 and prefix % utterances == 0
        expect("seed", seed, (utterances,), x, divides and seed.dtype == torch.int64)
    if rows is not None and not 0 <= rows <= len(x):
        raise ValueError(f"rows {rows} must be at least 0 and at most {len(x)}, the rows of x")


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Returns what computes the ops for tensors on `device`: `torch` or `triton`."""
    return "triton" if triton_runs(device.type) else "torch"


def linear_gated_residual(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, scale: float, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x + scale · gate · dropout(h @ weightᵀ + bias), in the dtype of `x`.

    `h`: (R, T, K). `weight`: (D, K), of the dtype of `h`, except under autocast, which sees to both. `bias`: (D,). The
    rest as in `gated_residual`, but that torch lets NaN in `h` through to the weight's gradient.
    """
    d, k = x.shape[-1:], h.shape[-1:]
    check_residual(
        x, gate, dropout_p, seed, h=(h, x.shape[:-1] + k), weight=(weight, d + k), bias=(bias, d)
    )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        h, weight = h.to(dtype), weight.to(dtype)
    if h.dtype != weight.dtype:
        raise ValueError(f"h {described(h)} and weight {described(weight)} must have one dtype")
    return implementation(x).linear_gated_residual(x, h, weight, bias, gate, scale, dropout_p, seed)


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """CTC: see `dynsize.ctc.ctc_loss`, whose arguments and result these are; on a GPU always computed in float32.

    Raises ValueError for shapes, dtypes or devices that don't fit.
    """
    if (
        log_probs.dim() != 3
        or labels.dim() != 2
        or not log_probs.is_floating_point()
        or not log_probs.shape[1]
    ):
        raise ValueError(
            f"log_probs {described(log_probs)} must be (N, T, V), labels {described(labels)} (N, U)"
        )
    n = log_probs.shape[:1]
    tensors = dict(
        lengths=(lengths, n),
        labels=(labels, (*n, labels.shape[1])),
        label_lengths=(label_lengths, n),
    )
    for name, (tensor, shape) in tensors.items():
        expect(name, tensor, shape, log_probs, tensor.dtype in (torch.int32, torch.int64))
    return implementation(log_probs).ctc_loss(log_probs, lengths, labels, label_lengths)


def check_residual(
    x: Tensor,
    gate: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    **others: tuple[Tensor, tuple],
) -> None:
    """Raises ValueError where `x` is not (R, T, D), or where something else, given with the shape that it must have,
    doesn't fit to it."""
    for name, (tensor, shape) in (dict(x=(x, x.shape)) | others).items():
        expect(name, tensor, shape, x, x.dim() == 3 and tensor.is_floating_point())
    if gate is not None:
        expect("gate", gate, x.shape[:1] if gate.dim() else (), x, gate.is_floating_point())
    if not 0 <= dropout_p < 1 or (dropout_p > 0 and seed is None):
        raise ValueError(f"dropout_p {dropout_p} must be 0, or below 1 with a seed")
    if seed is not None:
        divides = seed.dim() == 1 and len(seed) > 0 and len(x) % len(seed) == 0
        expect("seed", seed, seed.shape, x, divides and seed.dtype == torch.int64)


def expect(name: str, tensor: Tensor, shape: tuple, like: Tensor, holds: bool) -> None:
    """Raises ValueError for another shape, another device than that of `like`, or where something else doesn't hold."""
    if tensor.shape != shape or tensor.device != like.device or not holds:
        raise ValueError(
            f"{name} {described(tensor)} does not fit to {described(like)}: {tuple(shape)} expected"
        )


def described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
