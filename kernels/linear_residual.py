"""y = x + scale · gate · dropout(b), b = h @ weightᵀ + bias: the projection that ends a layer, the residual its epilogue.

With g the gradient of y, m what dropout keeps, f = scale / (1 − p), and c = f · m · g (the gradient of b but for the
gate), backward is

    x: g    h: gate · (c @ weight)    weight: Σ gate · cᵀ h    bias: Σ gate · c    gate: Σ_k h · (c @ weight) + Σ_d c · bias

so b never visits memory, and the gate's gradient takes no product of its own. Replaces torch's linear layer, dropout,
product with the gate, and sum. A tile of frames whose gates are all 0 does no product, forward or backward; only a gate
that needs a gradient has c @ weight computed for all of them. Frames whose gate is 0 are not loaded into a product, so
NaN does not spread from them. Sums over programs are made by torch, in the same order each time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.residual import check_dtypes, gate_gradient, gate_of, kept, stride_of


class Tiles(NamedTuple):
    frames: int  # of a tile of the result
    columns: int  # of a tile of the result
    depth: int  # of one step along the sum
    warps: int
    stages: int  # steps whose loads are in flight


SINGLE, HALF, WIDE_HALF = Tiles(64, 32, 32, 4, 3), Tiles(64, 64, 32, 4, 3), Tiles(128, 64, 64, 8, 3)
SPLITS = 4  # programs that share the sum over the rows for one tile of the weight's gradient


def tiles(width: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a width D and a dtype of the factors."""
    if dtype == torch.float32:
        return SINGLE
    return WIDE_HALF if width >= 256 else HALF


def precision() -> str:
    """Of float32 products, as torch's: exact, or tensor cores' 10 bits where `torch.set_float32_matmul_precision`
    allows them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def forward_kernel(
    x_ptr,  # (R, T, D)
    h_ptr,  # (R, T, K)
    weight_ptr,  # (D, K)
    bias_ptr,  # (D,)
    gate_ptr,  # (R,) with `gate_stride`, which is 0 where one gate serves all; None: gates of 1
    seed_ptr,  # () int64, or None without dropout
    y_ptr,  # (R, T, D), out
    gate_stride,
    rows,  # R
    frames,  # T
    factor,  # scale / (1 - p)
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    INNER: tl.constexpr,  # K
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across = tl.cdiv(WIDTH, COLUMNS)
    first = tl.program_id(0) % across * COLUMNS
    frame = (tl.program_id(0) // across).to(tl.int64) * FRAMES + tl.arange(0, FRAMES)
    last = rows.to(tl.int64) * frames - 1
    column, k = first + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    gate = gate_of(gate_ptr, (tl.minimum(frame, last) // frames * gate_stride)[:, None])
    gate = tl.where(frame[:, None] <= last, gate, 0.0)
    product = tl.zeros((FRAMES, COLUMNS), tl.float32)
    if tl.max(tl.abs(gate)) > 0:
        for start in range(0, INNER, DEPTH):
            deep = start + k < INNER
            h = tl.load(
                h_ptr + frame[:, None] * INNER + (start + k)[None, :], mask=(gate != 0) & deep[None, :], other=0.0
            )
            weight = tl.load(
                weight_ptr + column[None, :] * INNER + (start + k)[:, None],
                mask=(column < WIDTH)[None, :] & deep[:, None],
                other=0.0,
            )
            product = tl.dot(h, weight, product, input_precision=PRECISION)
    branch = product + tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        branch = tl.where(kept(tl.load(seed_ptr), frame, first, WIDTH, THRESHOLD, FRAMES, COLUMNS), branch, 0.0)
    at = frame[:, None] * WIDTH + column[None, :]
    inside = (frame <= last)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    tl.store(y_ptr + at, tl.where(gate != 0, x + factor * gate * branch, x), mask=inside)


@triton.jit
def hidden_grad_kernel(
    grad_ptr,  # (R, T, D), of y
    h_ptr,  # (R, T, K), read where the gate needs a gradient
    weight_ptr,  # (D, K)
    bias_ptr,  # (D,)
    gate_ptr,  # as in the forward pass
    seed_ptr,  # as in the forward pass
    h_grad_ptr,  # (R, T, K), out
    gate_grad_ptr,  # (⌈K / COLUMNS⌉, R T) float32, out: each frame's share of its gate's gradient; or None
    gate_stride,
    rows,  # R
    frames,  # T
    factor,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across = tl.cdiv(INNER, COLUMNS)
    part = tl.program_id(0) % across
    frame = (tl.program_id(0) // across).to(tl.int64) * FRAMES + tl.arange(0, FRAMES)
    last = rows.to(tl.int64) * frames - 1
    k, d = part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    gate = gate_of(gate_ptr, (tl.minimum(frame, last) // frames * gate_stride)[:, None])
    gate = tl.where(frame[:, None] <= last, gate, 0.0)
    needed = gate != 0
    if gate_grad_ptr is not None:
        needed = frame[:, None] <= last
    product = tl.zeros((FRAMES, COLUMNS), tl.float32)
    gate_grad = tl.zeros((FRAMES,), tl.float32)
    if tl.max(needed.to(tl.int32)) > 0:
        for start in range(0, WIDTH, DEPTH):
            deep = start + d < WIDTH
            grad = tl.load(
                grad_ptr + frame[:, None] * WIDTH + (start + d)[None, :], mask=needed & deep[None, :], other=0.0
            )
            c = factor * grad.to(tl.float32)
            if seed_ptr is not None:
                c = tl.where(kept(tl.load(seed_ptr), frame, start, WIDTH, THRESHOLD, FRAMES, DEPTH), c, 0.0)
            weight = tl.load(
                weight_ptr + (start + d)[:, None] * INNER + k[None, :],
                mask=deep[:, None] & (k < INNER)[None, :],
                other=0.0,
            )
            product = tl.dot(c.to(weight.dtype), weight, product, input_precision=PRECISION)
            if gate_grad_ptr is not None:
                bias = tl.load(bias_ptr + start + d, mask=deep & (part + 0 * d == 0), other=0.0).to(tl.float32)
                gate_grad += tl.sum(c * bias[None, :], 1)
    at = frame[:, None] * INNER + k[None, :]
    inside = (frame <= last)[:, None] & (k < INNER)[None, :]
    tl.store(h_grad_ptr + at, tl.where(gate != 0, gate * product, 0.0), mask=inside)
    if gate_grad_ptr is not None:
        gate_grad += tl.sum(product * tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(gate_grad_ptr + part.to(tl.int64) * (last + 1) + frame, gate_grad, mask=frame <= last)


@triton.jit
def weight_grad_kernel(
    grad_ptr,  # (R, T, D), of y
    h_ptr,  # (R, T, K)
    gate_ptr,  # as in the forward pass
    seed_ptr,  # as in the forward pass
    weight_grad_ptr,  # (SPLITS, D, K) float32, out: the shares of the rows that each split sums over
    bias_grad_ptr,  # (SPLITS, D) float32, out
    gate_stride,
    rows,  # R
    frames,  # T
    factor,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across = tl.cdiv(INNER, COLUMNS)
    part = tl.program_id(0) % across
    down = tl.program_id(0) // across % tl.cdiv(WIDTH, COLUMNS)
    split = tl.program_id(0) // (across * tl.cdiv(WIDTH, COLUMNS))
    k, d = part * COLUMNS + tl.arange(0, COLUMNS), down * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    bias_grad = tl.zeros((COLUMNS,), tl.float32)
    for row in range(split, rows, SPLITS):
        row_start = tl.cast(row, tl.int64) * frames
        gate = gate_of(gate_ptr, tl.cast(row, tl.int64) * gate_stride)
        if tl.max(tl.abs(gate)) > 0:
            for start in range(0, frames, DEPTH):
                time = start + tl.arange(0, DEPTH)
                frame = row_start + time
                grad = tl.load(
                    grad_ptr + frame[:, None] * WIDTH + d[None, :],
                    mask=(time < frames)[:, None] & (d < WIDTH)[None, :],
                    other=0.0,
                )
                c = factor * gate * grad.to(tl.float32)
                if seed_ptr is not None:
                    keep = kept(tl.load(seed_ptr), frame, down * COLUMNS, WIDTH, THRESHOLD, DEPTH, COLUMNS)
                    c = tl.where(keep, c, 0.0)
                h = tl.load(
                    h_ptr + frame[:, None] * INNER + k[None, :],
                    mask=(time < frames)[:, None] & (k < INNER)[None, :],
                    other=0.0,
                )
                product = tl.dot(tl.trans(c.to(h.dtype)), h, product, input_precision=PRECISION)
                bias_grad += tl.sum(c, 0)
    at = split.to(tl.int64) * WIDTH + d
    tl.store(
        weight_grad_ptr + at[:, None] * INNER + k[None, :], product, mask=(d < WIDTH)[:, None] & (k < INNER)[None, :]
    )
    tl.store(bias_grad_ptr + at, bias_grad, mask=(d < WIDTH) & (part + 0 * d == 0))


@torch.library.custom_op("dynsize::linear_gated_residual", mutates_args=())
def linear_gated_residual(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Launches the forward kernel. Arguments as in `kernels.linear_gated_residual`."""
    check_dtypes(x, h, weight, bias)
    x, h, weight, bias = x.contiguous(), h.contiguous(), weight.contiguous(), bias.contiguous()
    (rows, frames, width), inner, y = x.shape, h.shape[-1], torch.empty_like(x)
    tile, seed = tiles(width, h.dtype), seed if dropout_p else None
    if y.numel():
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(rows * frames, tile.frames) * triton.cdiv(width, tile.columns),)](
                *(x, h, weight, bias, gate, seed, y, stride_of(gate), rows, frames, scale / (1 - dropout_p)),
                *(reference.threshold(dropout_p), width, inner, tile.frames, tile.columns, tile.depth, precision()),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    return y


@torch.library.custom_op("dynsize::linear_gated_residual_backward", mutates_args=())
def linear_gated_residual_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    for_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches both backward kernels. Returns the gradients of h, weight and bias (both float32) and gate; the gate's
    of no elements unless `for_gate`."""
    grad, h, weight, bias = grad.contiguous(), h.contiguous(), weight.contiguous(), bias.contiguous()
    (rows, frames, width), inner = grad.shape, h.shape[-1]
    tile, seed = tiles(width, h.dtype), seed if dropout_p else None
    across, total, single = triton.cdiv(inner, tile.columns), rows * frames, dict(dtype=torch.float32)
    h_grad, parts = torch.empty_like(h), grad.new_zeros(across, total, **single) if for_gate else None
    weight_grad, bias_grad = grad.new_zeros(SPLITS, width, inner, **single), grad.new_zeros(SPLITS, width, **single)
    common = (stride_of(gate), rows, frames, scale / (1 - dropout_p), reference.threshold(dropout_p), width, inner)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    if grad.numel():
        with torch.cuda.device_of(grad):
            hidden_grad_kernel[(triton.cdiv(total, tile.frames) * across,)](
                *(grad, h, weight, bias, gate, seed, h_grad, parts, *common),
                *(tile.frames, tile.columns, tile.depth, precision()),
                **options,
            )
            weight_grad_kernel[(SPLITS * triton.cdiv(width, tile.columns) * across,)](
                *(grad, h, gate, seed, weight_grad, bias_grad, *common),
                *(tile.columns, tile.depth, SPLITS, precision()),
                **options,
            )
    gate_grad = gate_gradient(parts.sum(0).view(rows, frames) if for_gate else None, gate, grad)
    return h_grad, weight_grad.sum(0), bias_grad.sum(0), gate_grad


@linear_gated_residual.register_fake
def _(x, h, weight, bias, gate, scale, dropout_p, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@linear_gated_residual_backward.register_fake
def _(grad, h, weight, bias, gate, scale, dropout_p, seed, for_gate):
    h_grad = torch.empty_like(h, memory_format=torch.contiguous_format)
    weight_grad = weight.new_empty(weight.shape, dtype=torch.float32)
    return h_grad, weight_grad, weight_grad.new_empty(bias.shape), torch.empty_like(gate) if for_gate else grad.new_empty(0)


def save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    _, h, weight, bias, gate, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(h, weight, bias, gate, seed)


def backward(ctx, grad: Tensor) -> tuple:
    h, weight, bias, gate, seed = ctx.saved_tensors
    for_gate = ctx.needs_input_grad[4]
    h_grad, weight_grad, bias_grad, gate_grad = linear_gated_residual_backward(
        grad, h, weight, bias, gate, ctx.scale, ctx.dropout_p, seed, for_gate
    )
    weight_grad, bias_grad = weight_grad.to(weight.dtype), bias_grad.to(bias.dtype)
    return grad, h_grad, weight_grad, bias_grad, gate_grad if for_gate else None, None, None, None


linear_gated_residual.register_autograd(backward, setup_context=save_for_backward)
