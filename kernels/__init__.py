"""Three fused ops, which Triton computes on a GPU and plain torch elsewhere.

| op | its kernels | its definition in torch |
| --- | --- | --- |
| `gated_residual_layer_norm`: a layer's end, the next LayerNorm | `residual.py` | `reference.py` |
| `ctc_loss` with its gradient | `ctc.py` | `dynsize/ctc.py` |
| `relaxed_top_k` of Simple-Top-k | `top_k.py` | `dynsize/simple_top_k.py` |

A module with kernels registers its op with torch under the op's name, so `torch.compile` takes it
as one node. An op is called where `triton_runs` says so. The environment variable
`DYNSIZE_KERNELS` decides that:

    torch     torch computes everything
    triton    Triton computes everything but float64; where it can't, there is an error
    auto      Triton on a GPU, torch elsewhere, and where an op fails its self-check (the default)

The self-check compares an op with torch before its first use on a device, at the width that is
used (`self_check.py`). train.py makes it for a whole training before it begins, by `describe`;
later its results are looked up. triton is imported only where it is used.
No kernel has run on a GPU yet: they are tested in Triton's interpreter and compiled for GPUs.
"""

import importlib
import importlib.util
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

from dynsize.kernels import reference, self_check
from dynsize.kernels.reference import layer_gates as layer_gates
from dynsize.kernels.reference import layer_seed as layer_seed

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What computes an op: Triton, with the error of its self-check, or else torch."""

    triton: bool
    error: float = 0.0  # the largest one, relative to the largest number of the same tensor
    reason: str = ""  # why not Triton, where one would expect it


# What was chosen: (op, kind of device, dtype, size) → Choice
CHOSEN: dict[tuple[str, str, torch.dtype, int], Choice] = {}


def triton_runs(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> bool:
    """Return whether Triton computes `op` on `device` in `dtype`. float64 is left to torch.

    `size`: the width D of the residual, the L of the top-k. Raises ValueError where
    `DYNSIZE_KERNELS` is no mode, or asks for Triton where it can't compute the op.
    """
    if dtype == torch.float64:
        return False
    key = (op, device.type, dtype, size)
    if key not in CHOSEN:
        CHOSEN[key] = choose(op, device, dtype, size)
    return CHOSEN[key].triton


def choose(op: str, device: torch.device, dtype: torch.dtype, size: int) -> Choice:
    """Return what computes `op`, as `triton_runs` describes it. Waits for the device."""
    mode = os.environ.get("DYNSIZE_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton"):
        raise ValueError(f"DYNSIZE_KERNELS={mode}: must be auto, torch or triton")
    if mode == "torch" or (mode == "auto" and device.type != "cuda"):
        return Choice(triton=False)
    error = 0.0
    reason = obstacle(device.type)
    if not reason:
        error, reason = self_check.compare(op, device, dtype, size)
    if reason and mode == "triton":
        raise ValueError(f"DYNSIZE_KERNELS=triton: {op} on {device.type} in {dtype}: {reason}")
    if reason:
        log.warning("torch, not Triton, computes %s: %s", op, reason)
    return Choice(not reason, error, reason)


def obstacle(device: str) -> str:
    """Return why Triton can't run on this kind of device, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = importlib.import_module("triton").knobs.runtime.interpret
    if device == "cuda" or (device == "cpu" and interpreted):
        return ""
    return f"Triton runs on 'cuda', and with TRITON_INTERPRET=1 on 'cpu', not on '{device}'"


def describe(device: torch.device, dtype: torch.dtype, width: int, layers: int) -> str:
    """Choose what computes the ops of a training on `device`, and return it for people.

    `dtype`: of the residual's branches. `width`, `layers`: the network's D and L.

    `torch`, or `Triton (largest error 3e-3)`, or with each op that torch computes on a GPU and why:
    `Triton (largest error 3e-3), but torch for ctc_loss, because …`.
    """
    sizes = dict(gated_residual_layer_norm=width, ctc_loss=0, relaxed_top_k=layers)
    chosen = {}
    for op, size in sizes.items():
        computed_in = dtype if op == "gated_residual_layer_norm" else torch.float32
        triton_runs(op, device, computed_in, size)
        chosen[op] = CHOSEN[op, device.type, computed_in, size]
    errors = [choice.error for choice in chosen.values() if choice.triton]
    reasons = {op: choice.reason for op, choice in chosen.items() if choice.reason}
    if not errors:
        first = next(iter(reasons.values()), "")
        return f"torch, because {first}" if first else "torch"
    rounded = f"{max(errors):.0e}".replace("e-0", "e-")
    parts = [f"Triton (largest error {rounded})"]
    parts += [f"but torch for {op}, because {reason}" for op, reason in reasons.items()]
    return ", ".join(parts)


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
    of any float dtype, R' ≤ R; y is bitwise `x` in the rows from R' on. `gate`: (R',), or None
    for 1. `seed`: (B,) int64, one for each utterance, needed where `dropout_p` is not 0; B divides
    R and R', and row r uses seed r mod B, so that all sizes of an utterance drop the same.
    `weight`, `bias`: (D,). `rows`: how many rows are normalised, by default all. `dtype`: that of
    the normalised rows, by default that of `x`.

    Where the gate is 0, y is bitwise `x`, and NaN in the branch reaches no result and no gradient
    but the gate's. The gate's gradient is computed there too, so a gate of 0 can learn.
    Differentiable once. Nothing waits for the device.
    """
    rows = len(x) if rows is None else rows
    dtype = dtype or x.dtype
    assert branch.shape[1:] == x.shape[1:] and len(branch) <= len(x)
    assert gate is None or gate.shape == branch.shape[:1]
    assert 0 <= rows <= len(x)
    if dropout_p:
        utterances = len(seed)  # B
        assert len(x) % utterances == 0 and len(branch) % utterances == 0
    op = reference.gated_residual_layer_norm
    computed_in = branch.dtype if x.dtype == torch.float32 else x.dtype
    if triton_runs("gated_residual_layer_norm", x.device, computed_in, x.shape[-1]):
        op = torch.ops.dynsize.gated_residual_layer_norm
    return op(x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps)[:2]
