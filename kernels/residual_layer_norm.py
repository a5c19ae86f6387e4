"""The end of a layer and the LayerNorm of the next one in one pass: launcher and autograd; `residual.py` has the maths
and the kernels."""

import torch
import triton
from torch import Tensor

from kernels import residual
from kernels.residual import CHUNK, WARPS, gate_gradient, launch, scalars, tile_of


@torch.library.custom_op("dynsize::gated_residual_layer_norm", mutates_args=())
def with_statistics(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, weight: Tensor, bias: Tensor, eps: float,
    dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel. Returns y, n, and the (R, T) float32 means and reciprocal deviations."""
    rows, frames, width = x.shape
    y, normed = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    mean, rstd = (x.new_empty(rows, frames, dtype=torch.float32) for _ in range(2))
    arguments = (x, branch, gate, seed, weight, bias, y, normed, mean, rstd, eps)
    arguments += (*scalars(gate, scale, dropout_p, seed, frames), width, *tile_of(width, residual.FORWARD), CHUNK)
    launch(residual.forward_kernel, rows * triton.cdiv(frames, CHUNK), *arguments, num_warps=WARPS)
    return y, normed, mean, rstd


@torch.library.custom_op("dynsize::gated_residual_layer_norm_backward", mutates_args=())
def gated_residual_layer_norm_backward(
    y_grad: Tensor, normed_grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, branch: Tensor | None,
    gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward kernel. `branch`: given where the gate needs a gradient. `dtype`: the branch's. Returns
    the gradients of x, branch, gate (of no elements where it needs none), weight and bias (both float32)."""
    rows, frames, width = y.shape
    programs = rows * triton.cdiv(frames, CHUNK)
    x_grad, branch_grad = torch.empty_like(y), torch.empty_like(y, dtype=dtype)
    shares = y.new_empty(programs, 2, width, dtype=torch.float32)
    for_gate = None if branch is None else y.new_empty(rows, programs // max(rows, 1), dtype=torch.float32)
    arguments = (y_grad, normed_grad, y, mean, rstd, weight, branch, gate, seed, x_grad, branch_grad, shares, for_gate)
    arguments += (*scalars(gate, scale, dropout_p, seed, frames), width, *tile_of(width, residual.BACKWARD), CHUNK)
    launch(residual.backward_kernel, programs, *arguments, num_warps=WARPS)
    return x_grad, branch_grad, gate_gradient(for_gate, gate, y), shares[:, 0].sum(0), shares[:, 1].sum(0)


@with_statistics.register_fake
def _(x, branch, gate, scale, weight, bias, eps, dropout_p, seed):
    y, normed = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return y, normed, mean, rstd


@gated_residual_layer_norm_backward.register_fake
def _(y_grad, normed_grad, y, mean, rstd, weight, branch, gate, scale, dropout_p, seed, dtype):
    gate_grad = y.new_empty(0) if branch is None else torch.empty_like(gate)
    weight_grad, bias_grad = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(y), torch.empty_like(y, dtype=dtype), gate_grad, weight_grad, bias_grad


def save_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    _, branch, gate, ctx.scale, weight, bias, _, ctx.dropout_p, seed = inputs
    y, _, mean, rstd = output
    ctx.save_for_backward(y, mean, rstd, weight, branch if ctx.needs_input_grad[2] else None, gate, seed)
    ctx.dtypes = branch.dtype, weight.dtype, bias.dtype
    ctx.mark_non_differentiable(mean, rstd)


def backward(ctx, y_grad: Tensor, normed_grad: Tensor, *_) -> tuple:
    *saved, gate, seed = ctx.saved_tensors
    dtype, of_weight, of_bias = ctx.dtypes
    x_grad, branch_grad, gate_grad, weight_grad, bias_grad = gated_residual_layer_norm_backward(
        y_grad, normed_grad, *saved, gate, ctx.scale, ctx.dropout_p, seed, dtype
    )
    gate_grad = gate_grad if ctx.needs_input_grad[2] else None
    return x_grad, branch_grad, gate_grad, None, weight_grad.to(of_weight), bias_grad.to(of_bias), None, None, None


with_statistics.register_autograd(backward, setup_context=save_for_backward)


def gated_residual_layer_norm(*arguments) -> tuple[Tensor, Tensor]:
    """y and n. Arguments as in `kernels.gated_residual_layer_norm`."""
    y, normed, _, _ = with_statistics(*arguments)
    return y, normed
