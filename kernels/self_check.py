"""The comparison of each kernel with torch before its first use on a device.

The truth is the op's definition in torch (for CTC torch's `ctc_loss`) in float64, for outputs and
gradients, on small tensors.
"""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dynsize.kernels import reference

log = logging.getLogger(__name__)
# The largest error that counts as right, relative to the largest number of its tensor. One rounding
# to float16 is 5e-4 and to bfloat16 2e-3; in float32, CTC's sums of logarithms are off by 1e-5.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 2e-3,
    torch.bfloat16: 8e-3,
}


@functools.cache
def error_of(op: str, device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the op's largest error, or None, logged, where it fails or the error is too large.

    Computed once in a process for each op, device and dtype. Waits for the device.
    """
    check = dict(gated_residual_layer_norm=residual_error, ctc_loss=ctc_error)[op]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, enabled=False):
                error = check(device, dtype)
    except Exception as failure:  # compilers raise errors of many kinds
        reason = f"{type(failure).__name__}: {failure}"
    else:
        if error <= TOLERANCE[dtype]:
            return error
        reason = f"its error is {error:.1e}, above {TOLERANCE[dtype]:.0e}"
    log.warning("torch, not Triton, computes %s on %s in %s: %s", op, device, dtype, reason)
    return None


def residual_error(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest error of `gated_residual_layer_norm` with a branch of `dtype`.

    One case has gates, dropout, a long branch and few normalised rows; the other is the opposite.
    """
    from dynsize.kernels.residual import GatedResidualLayerNorm

    seed = torch.tensor([5, -3], device=device)
    gates = torch.tensor([1.0, 0.0, 0.3, -1.7], device=device)
    errors = []
    for gate, dropout_p, branch_rows, rows in ((gates, 0.25, 4, 2), (None, 0.0, 2, 6)):
        tensors = drawn(device, (6, 70, 48), (branch_rows, 70, 48), (48,), (48,))
        tensors[1] = tensors[1].to(dtype)
        leaves = tensors if gate is None else [*tensors, gate]

        def call(op, dtype, x, branch, weight, bias, gate=None, p=dropout_p, rows=rows):
            return op(x, branch, gate, 0.5, p, seed, weight, bias, rows, dtype, 1e-5)

        ours = functools.partial(call, GatedResidualLayerNorm.apply, dtype)
        truth = functools.partial(call, reference.gated_residual_layer_norm, torch.float64)
        errors.append(largest_error(ours, truth, leaves))
    return max(errors)


def ctc_error(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest error of `ctc_loss` for logits of `dtype`."""
    from dynsize.kernels.ctc import CtcLoss

    labels = torch.tensor([[1, 1, 2, 3, 2], [3, 3, 3, 0, 0], [0] * 5], device=device)
    lengths = torch.tensor([20, 17, 9], device=device)
    label_lengths = torch.tensor([5, 3, 0], device=device)

    def ours(logits: Tensor) -> tuple[Tensor]:
        return (CtcLoss.apply(logits.log_softmax(-1), lengths, labels, label_lengths),)

    def truth(logits: Tensor) -> tuple[Tensor]:
        by_frame = logits.log_softmax(-1).transpose(0, 1)
        return (F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none"),)

    (logits,) = drawn(device, (3, 20, 7))
    return largest_error(ours, truth, [logits.to(dtype)])


def drawn(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return normal random numbers, float32, which are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def largest_error(ours: Callable, truth: Callable, leaves: list[Tensor]) -> float:
    """Return the largest error of outputs and gradients, relative to the largest number of each.

    `truth` gets the `leaves` in float64. Returns NaN where a result is NaN.
    """
    results = differentiated(ours, leaves)
    right = differentiated(truth, [leaf.double() for leaf in leaves])
    errors = []
    for result, exact in zip(results, right, strict=True):
        error = (result - exact).abs().max()
        errors.append(error / exact.abs().max())
    return torch.stack(errors).max().item()


def differentiated(function: Callable, leaves: list[Tensor]) -> list[Tensor]:
    """Return the outputs of `function` and the gradients of its inputs."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    cotangents = []
    for output in outputs:
        number = torch.arange(output.numel(), device=output.device)
        cotangents.append((number % 5 - 1).to(output.dtype).view_as(output))
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]
