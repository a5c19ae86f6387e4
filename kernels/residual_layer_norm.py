"""y = x + scale · gate · dropout(branch) and n = LayerNorm(y) · weight + bias: the end of a layer and the beginning of
the next one, in one pass over memory.

With μ and σ² the mean and variance of a frame of y, as it is rounded to its dtype, r = 1 / √(σ² + ε) and
z = (y − μ) · r: n = z · weight + bias. Backward, with g_y and g_n the gradients of y and n, w = g_n · weight, and means
over the frame:

    g = g_y + r · (w − mean(w) − z · mean(w · z))       of y, through both outputs
    x: g        branch, gate: as in `residual.py`       weight: Σ g_n · z       bias: Σ g_n

Replaces torch's chain of dropout, product with the gate, sum, and LayerNorm. A program walks over CHUNK frames of one
row of the batch. It adds up its frames' share of the gradients of weight, bias and gate in registers and stores it
once; torch sums the programs' shares, in the same order each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.residual import frames_of, gate_gradient, kept, launch, of_row, scalars

CHUNK = 64  # frames of a program: the shares and the weights, once a program, are then a 40th of the traffic
WARPS, FORWARD, BACKWARD = 8, 4096, 2048  # the tiles' elements: backward, twice as many take over 128 registers


@triton.jit
def forward_kernel(
    x_ptr,  # (R, T, D)
    branch_ptr,  # (R, T, D)
    gate_ptr,  # (R,), or () with a stride of 0, or None: gates of 1
    seed_ptr,  # (B,) int64, for row r that of r mod B; None: no dropout
    weight_ptr, bias_ptr,  # (D,)
    y_ptr, normed_ptr,  # (R, T, D), out
    mean_ptr, rstd_ptr,  # (R, T) float32, out: μ and r
    eps, gate_stride, utterances, frames, factor,  # ε, …, B, T, scale / (1 − p)
    P: tl.constexpr,  # the lowest draw that dropout keeps
    WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr,  # D, and the tile
    CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(frames, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * CHUNK
    column = tl.arange(0, COLUMNS)
    gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    for start in range(first, min(first + CHUNK, frames), FRAMES):
        time = start + tl.arange(0, FRAMES)
        frame = row * frames + time
        at = frame[:, None] * WIDTH + column[None, :]
        inside = (time < frames)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + at, mask=inside & (gate != 0), other=0.0).to(tl.float32)
        if seed_ptr is not None:
            seed = of_row(seed_ptr, row % utterances, 0)
            branch = tl.where(kept(seed, time, 0, P, WIDTH, FRAMES, COLUMNS), branch, 0.0)
        y = tl.where(gate != 0, x + factor * gate * branch, x).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, y, mask=inside)
        y = y.to(tl.float32)
        mean = tl.sum(y, 1) / WIDTH
        centred = tl.where(inside, y - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
        tl.store(mean_ptr + frame, mean, mask=time < frames)
        tl.store(rstd_ptr + frame, rstd, mask=time < frames)
        tl.store(normed_ptr + at, centred * rstd[:, None] * weight[None, :] + bias[None, :], mask=inside)


@triton.jit
def backward_kernel(
    y_grad_ptr, normed_grad_ptr, y_ptr,  # (R, T, D)
    mean_ptr, rstd_ptr,  # (R, T) float32
    weight_ptr,  # (D,)
    branch_ptr,  # (R, T, D), or None where the gate needs no gradient
    gate_ptr, seed_ptr,  # as in the forward pass
    x_grad_ptr, branch_grad_ptr,  # (R, T, D), out
    shares_ptr,  # (programs, 2, D) float32, out: the gradients of weight and bias, a share from each program
    gate_grad_ptr,  # (R, chunks of T) float32, out: the gate's, a share from each program; or None
    gate_stride, utterances, frames, factor,
    P: tl.constexpr, WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(frames, CHUNK)
    row = program // chunks
    first = tl.program_id(0) % chunks * CHUNK
    column = tl.arange(0, COLUMNS)
    gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
    bias_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
    gate_grad = tl.zeros((FRAMES,), tl.float32)
    for start in range(first, min(first + CHUNK, frames), FRAMES):
        time = start + tl.arange(0, FRAMES)
        frame = row * frames + time
        at = frame[:, None] * WIDTH + column[None, :]
        inside = (time < frames)[:, None] & (column < WIDTH)[None, :]
        normed_grad = tl.load(normed_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + frame, mask=time < frames, other=0.0)
        rstd = tl.load(rstd_ptr + frame, mask=time < frames, other=0.0)[:, None]
        z = tl.where(inside, y - mean[:, None], 0.0) * rstd
        weight_grad += normed_grad * z
        bias_grad += normed_grad
        w = normed_grad * weight[None, :]
        along_z = tl.sum(w * z, 1)[:, None] / WIDTH
        grad = rstd * (w - tl.sum(w, 1)[:, None] / WIDTH - z * along_z)
        grad += tl.load(y_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_grad_ptr + at, grad, mask=inside)
        grad *= factor
        if seed_ptr is not None:
            keep = kept(of_row(seed_ptr, row % utterances, 0), time, 0, P, WIDTH, FRAMES, COLUMNS)
            grad = tl.where(keep, grad, 0.0)
        tl.store(branch_grad_ptr + at, tl.where(gate != 0, gate * grad, 0.0), mask=inside)
        if gate_grad_ptr is not None:
            branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                branch = tl.where(keep, branch, 0.0)
            gate_grad += tl.sum(grad * branch, 1)
    share = shares_ptr + program * 2 * WIDTH + column
    tl.store(share, tl.sum(weight_grad, 0), mask=column < WIDTH)
    tl.store(share + WIDTH, tl.sum(bias_grad, 0), mask=column < WIDTH)
    if gate_grad_ptr is not None:
        tl.store(gate_grad_ptr + program, tl.sum(gate_grad))


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
    arguments += (*scalars(gate, scale, dropout_p, seed, frames), width, *frames_of(width, FORWARD), CHUNK)
    launch(forward_kernel, rows * triton.cdiv(frames, CHUNK), *arguments, num_warps=WARPS)
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
    arguments += (*scalars(gate, scale, dropout_p, seed, frames), width, *frames_of(width, BACKWARD), CHUNK)
    launch(backward_kernel, programs, *arguments, num_warps=WARPS)
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
