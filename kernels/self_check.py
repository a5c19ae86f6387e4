"""The comparison of each kernel with torch before its first use on a device.

The truth is computed in float64 on small tensors: for the residual by its definition, for CTC by
torch's `ctc_loss`, for the relaxed top-k by the paper's formula. Outputs and gradients are
compared.
"""

import functools
import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dynsize.kernels import reference

# The largest error that counts as right, relative to the largest number of its tensor. One rounding
# to float16 is 5e-4 and to bfloat16 2e-3; in float32, CTC's sums of logarithms are off by 7e-5.
TOLERANCE = dict(
    gated_residual_layer_norm={torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3},
    ctc_loss={torch.float32: 3e-4},
    relaxed_top_k={torch.float32: 1e-4},
)
LABELS = (10, 200)  # of CTC's utterances


def compare(op: str, device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, str]:
    """Return the op's largest error, and why it can't be used, or nothing. Waits for the device.

    `size`: D for the residual, L for the relaxed top-k.
    """
    if dtype not in TOLERANCE[op]:
        return math.inf, f"it has no self-check in {dtype}"
    tolerance = TOLERANCE[op][dtype]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, enabled=False):
                error = error_of(op, device, dtype, size)
    except Exception as failure:  # compilers raise errors of many kinds
        lines = str(failure).strip().splitlines() or [""]
        return math.inf, f"{type(failure).__name__}: {lines[-1]}"
    if error <= tolerance:  # false for NaN
        return error, ""
    return error, f"its error is {error:.1e}, above {tolerance:.0e}"


def error_of(op: str, device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the largest error of an op; arguments as of `compare`."""
    if op == "gated_residual_layer_norm":
        return residual_error(device, dtype, width=size)
    if op == "ctc_loss":
        return ctc_error(device)
    return top_k_error(device, layers=size)


def residual_error(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return the largest error of `gated_residual_layer_norm` with a branch of `dtype` and width D.

    One case has gates, dropout, a long branch and few normalised rows; the other is the opposite.
    """
    importlib.import_module("dynsize.kernels.residual")

    normal = normal_on(device)
    x = normal(6, 17, width)
    branch = normal(4, 17, width).to(dtype)
    gate = normal(4)
    with torch.no_grad():
        gate[1] = 0
    weight = normal(width)
    bias = normal(width)
    seed = torch.tensor([5, -3], device=device)
    gated = [x, branch, gate, 0.5, 0.25, seed, weight, bias, 2, dtype, 1e-5]
    plain = [x, branch[:2], None, 0.5, 0.0, None, weight, bias, 6, dtype, 1e-5]

    def ours(*arguments) -> tuple[Tensor, Tensor]:
        return torch.ops.dynsize.gated_residual_layer_norm(*arguments)[:2]

    truth = reference.gated_residual_layer_norm
    return max(largest_error(ours, truth, gated), largest_error(ours, truth, plain))


def ctc_error(device: torch.device) -> float:
    """Return the largest error of `ctc_loss` in float32, with 10 and with 200 labels.

    Of 200 labels, several warps share the states of a frame; few labels have one warp. One
    utterance has all the labels, and one frame more than they fit into; the others are short.
    """
    importlib.import_module("dynsize.kernels.ctc")

    def ours(logits, lengths, labels, label_lengths) -> tuple[Tensor]:
        log_probs = logits.log_softmax(-1)
        loss, _ = torch.ops.dynsize.ctc_loss(log_probs, lengths, labels, label_lengths, True)
        return (loss,)

    def truth(logits, lengths, labels, label_lengths) -> tuple[Tensor]:
        by_frame = logits.log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none")
        return (loss,)

    errors = []
    for most in LABELS:
        frames = most + 2
        logits = normal_on(device)(3, frames, 7)
        lengths = torch.tensor([frames, 12, 9], device=device)
        number = torch.arange(3 * most, device=device)
        labels = number.view(3, most) % 6 + 1  # none twice in a row
        labels[0, 1] = labels[0, 0]
        label_lengths = torch.tensor([most, 5, 0], device=device)
        error = largest_error(ours, truth, [logits, lengths, labels, label_lengths])
        errors.append(error)
    return max(errors)


def top_k_error(device: torch.device, layers: int) -> float:
    """Return the largest error of `relaxed_top_k` for L scores in float32 and k = L / 2."""
    importlib.import_module("dynsize.kernels.top_k")

    def ours(scores) -> tuple[Tensor]:
        relaxed, _ = torch.ops.dynsize.relaxed_top_k(scores, layers // 2)
        return (relaxed,)

    def truth(scores) -> tuple[Tensor]:
        a = scores
        relaxed = torch.zeros_like(scores)
        for _ in range(layers // 2):
            p = a.softmax(0)
            relaxed = relaxed + p
            a = a + torch.log1p(-p)
        return (relaxed,)

    scores = normal_on(device)(layers)
    return largest_error(ours, truth, [scores])


def normal_on(device: torch.device) -> Callable:
    """Return a function that draws normal numbers of a shape, always the same, with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    return functools.partial(torch.randn, generator=generator, device=device, requires_grad=True)


def largest_error(ours: Callable, truth: Callable, arguments: list) -> float:
    """Return the largest error of outputs and gradients, relative to the largest number of each.

    `truth` computes in float64. Returns NaN where a result is NaN.
    """
    results = differentiated(ours, arguments)
    doubled = [in_float64(argument) for argument in arguments]
    right = differentiated(truth, doubled)
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
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    outputs = function(*arguments)
    cotangents = []
    for output in outputs:
        number = torch.arange(output.numel(), device=output.device)
        cotangent = (number % 5 - 1).to(output.dtype)
        cotangents.append(cotangent.view_as(output))
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return [*outputs, *gradients]
