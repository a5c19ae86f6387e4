"""The comparison of each kernel with torch before its first use on a device.

The truth is the op's definition in torch (for CTC torch's `ctc_loss`), in float64 on small tensors.
Outputs and gradients are compared.
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
    checks = dict(gated_residual_layer_norm=residual_error, ctc_loss=ctc_error)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, enabled=False):
                error = checks[op](device, dtype)
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

    normal = normal_on(device)
    x = normal(6, 70, 48)
    branch = normal(4, 70, 48).to(dtype)
    gate = normal(4)
    with torch.no_grad():
        gate[1] = 0
    weight = normal(48)
    bias = normal(48)
    seed = torch.tensor([5, -3], device=device)
    gated = [x, branch, gate, 0.5, 0.25, seed, weight, bias, 2, dtype, 1e-5]
    plain = [x, branch[:2], None, 0.5, 0.0, None, weight, bias, 6, dtype, 1e-5]
    ours = GatedResidualLayerNorm.apply
    truth = reference.gated_residual_layer_norm
    return max(largest_error(ours, truth, arguments) for arguments in (gated, plain))


def ctc_error(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest error of `ctc_loss` for logits of `dtype`."""
    from dynsize.kernels.ctc import CtcLoss

    def ours(logits, *others) -> tuple[Tensor]:
        loss = CtcLoss.apply(logits.log_softmax(-1), *others)
        return (loss,)

    def truth(logits, lengths, labels, label_lengths) -> tuple[Tensor]:
        by_frame = logits.log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none")
        return (loss,)

    logits = normal_on(device)(3, 20, 7).to(dtype)
    lengths = torch.tensor([20, 17, 9], device=device)
    labels = torch.tensor([[1, 1, 2, 3, 2], [3, 3, 3, 0, 0], [0, 0, 0, 0, 0]], device=device)
    label_lengths = torch.tensor([5, 3, 0], device=device)
    return largest_error(ours, truth, [logits, lengths, labels, label_lengths])


def normal_on(device: torch.device) -> Callable:
    """Return a function that draws normal numbers of a shape, always the same, with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    return functools.partial(torch.randn, generator=generator, device=device, requires_grad=True)


def largest_error(ours: Callable, truth: Callable, arguments: list) -> float:
    """Return the largest error of outputs and gradients, relative to the largest number of each.

    `truth` computes in float64. Returns NaN where a result is NaN.
    """
    results = differentiated(ours, arguments)
    right = differentiated(truth, [in_float64(argument) for argument in arguments])
    errors = []
    for result, exact in zip(results, right, strict=True):
        error = (result - exact).abs().max()
        errors.append(error / exact.abs().max())
    return torch.stack(errors).max().item()


def in_float64(argument: object) -> object:
    """Return a tensor of floats, or a dtype, as float64, and any other argument as it is."""
    if isinstance(argument, torch.dtype):
        return torch.float64
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument


def differentiated(function: Callable, arguments: list) -> list[Tensor]:
    """Return the outputs of `function`, and the gradients of the arguments that require them."""
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    outputs = function(*arguments)
    cotangents = []
    for output in outputs:
        number = torch.arange(output.numel(), device=output.device)
        cotangent = (number % 5 - 1).to(output.dtype)
        cotangents.append(cotangent.view_as(output))
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return [*outputs, *gradients]
