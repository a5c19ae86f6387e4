"""y = x + scale · gate · dropout(b), b = h @ weightᵀ + bias: a layer's last projection, with the residual for epilogue.

With g the gradient of y, m what dropout keeps, f = scale / (1 − p), and c = f · m · g (the gradient of b but for the
gate), backward is

    x: g        h: gate · (c @ weight)        weight: Σ gate · cᵀ h        bias: Σ gate · c
    gate: Σ_k h · (c @ weight) + Σ_d c · bias

so b never visits memory, and the gate's gradient takes no product of its own. Replaces torch's linear layer, dropout,
product with the gate, and sum. A tile of frames whose gates are all 0 does no product, forward or backward; only a gate
that needs a gradient has c @ weight computed for all of them. Frames whose gate is 0 are not loaded into a product, so
NaN does not spread from them. Sums over programs are made by torch, in the same order each time.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynsize.kernels.residual import dropout, launch, of_row, scalars

# frames and columns of a tile of the result, warps, steps along the sum whose loads are under way
Tiles = namedtuple("Tiles", "frames columns warps stages")
SINGLE, HALF, WIDE_HALF = (
    Tiles(64, 32, 8, 3),
    Tiles(64, 64, 4, 3),
    Tiles(128, 64, 8, 4),
)  # three stages there: spills
DEPTH = 32  # of a step; 64 halves the occupancy
SPLITS = 4  # programs that share the sum over the rows for one tile of the weight's gradient


def tiles(width: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a width D and a dtype of the factors."""
    return SINGLE if dtype == torch.float32 else WIDE_HALF if width >= 256 else HALF


def precision() -> str:
    """Of float32 products: exact, or tensor cores' 10 bits where `torch.set_float32_matmul_precision` allows them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def place(across, rows, frames, gate_ptr, gate_stride, seed_ptr, utterances, FRAMES: tl.constexpr):
    """The frames, of all R T, of a program's tile, where `across` tiles lie side by side: their numbers (int64) and
    which exist, (FRAMES, 1) both; the gates and seeds of their rows, (FRAMES, 1), gates 0 where there is no frame;
    their times in their rows, (FRAMES,)."""
    frame = (tl.program_id(0) // across).to(tl.int64) * FRAMES + tl.arange(0, FRAMES)
    exists = (frame < rows.to(tl.int64) * frames)[:, None]
    row = tl.minimum(frame // frames, rows - 1)[:, None]
    gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
    return (
        frame[:, None],
        exists,
        tl.where(exists, gate, 0.0),
        of_row(seed_ptr, row % utterances, 0),
        frame % frames,
    )


@triton.jit
def forward_kernel(
    x_ptr,  # (R, T, D)
    h_ptr,  # (R, T, K)
    weight_ptr,  # (D, K)
    bias_ptr,  # (D,)
    gate_ptr,  # (R,), or () with a stride of 0, or None: gates of 1
    seed_ptr,  # (B,) int64, for row r that of r mod B; None: no dropout
    y_ptr,  # (R, T, D), out
    rows, gate_stride, utterances, frames, factor,  # R, …, B, T, scale / (1 − p)
    P: tl.constexpr,  # the lowest draw that dropout keeps
    WIDTH: tl.constexpr, INNER: tl.constexpr,  # D, K
    FRAMES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(WIDTH, COLUMNS)
    first = tl.program_id(0) % across * COLUMNS
    column, k = (first + tl.arange(0, COLUMNS))[None, :], tl.arange(0, DEPTH)
    frame, exists, gate, seed, time = place(
        across, rows, frames, gate_ptr, gate_stride, seed_ptr, utterances, FRAMES
    )
    product = tl.zeros((FRAMES, COLUMNS), tl.float32)
    if tl.max(tl.abs(gate)) > 0:
        for start in range(0, INNER, DEPTH):
            deep = start + k
            h_mask, weight_mask = (
                (gate != 0) & (deep < INNER)[None, :],
                (column < WIDTH) & (deep < INNER)[:, None],
            )
            h = tl.load(h_ptr + frame * INNER + deep[None, :], mask=h_mask, other=0.0)
            weight = tl.load(
                weight_ptr + column * INNER + deep[:, None], mask=weight_mask, other=0.0
            )
            product = tl.dot(h, weight, product, input_precision=PRECISION)
    branch = product + tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    branch = dropout(branch, seed, time, first, P, WIDTH)
    inside = exists & (column < WIDTH)
    x = tl.load(x_ptr + frame * WIDTH + column, mask=inside).to(tl.float32)
    y = tl.where(gate != 0, x + factor * gate * branch, x)
    tl.store(y_ptr + frame * WIDTH + column, y, mask=inside)


@triton.jit
def hidden_grad_kernel(
    grad_ptr,  # (R, T, D), of y
    h_ptr,  # (R, T, K), read where the gate needs a gradient
    weight_ptr, bias_ptr, gate_ptr, seed_ptr,  # as in the forward pass
    h_grad_ptr,  # (R, T, K), out
    gate_grad_ptr,  # (⌈K / COLUMNS⌉, R T) float32, out: each frame's share of its gate's gradient; or None
    rows, gate_stride, utterances, frames, factor,
    P: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    FRAMES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(INNER, COLUMNS)
    part = tl.program_id(0) % across
    k, d = (part * COLUMNS + tl.arange(0, COLUMNS))[None, :], tl.arange(0, DEPTH)
    frame, exists, gate, seed, time = place(
        across, rows, frames, gate_ptr, gate_stride, seed_ptr, utterances, FRAMES
    )
    needed = gate != 0
    if gate_grad_ptr is not None:
        needed = exists
    product = tl.zeros((FRAMES, COLUMNS), tl.float32)
    gate_grad = tl.zeros((FRAMES,), tl.float32)
    if tl.max(needed.to(tl.int32)) > 0:
        for start in range(0, WIDTH, DEPTH):
            deep = start + d
            grad_mask, weight_mask = (
                needed & (deep < WIDTH)[None, :],
                (deep < WIDTH)[:, None] & (k < INNER),
            )
            grad = tl.load(grad_ptr + frame * WIDTH + deep[None, :], mask=grad_mask, other=0.0)
            c = dropout(factor * grad.to(tl.float32), seed, time, start, P, WIDTH)
            weight = tl.load(weight_ptr + deep[:, None] * INNER + k, mask=weight_mask, other=0.0)
            product = tl.dot(c.to(weight.dtype), weight, product, input_precision=PRECISION)
            if gate_grad_ptr is not None:  # bias's share, in one program of those across
                bias = tl.load(
                    bias_ptr + deep, mask=(deep < WIDTH) & (part + 0 * d == 0), other=0.0
                ).to(tl.float32)
                gate_grad += tl.sum(c * bias[None, :], 1)
    inside = exists & (k < INNER)
    tl.store(h_grad_ptr + frame * INNER + k, tl.where(gate != 0, gate * product, 0.0), mask=inside)
    if gate_grad_ptr is not None:
        h = tl.load(h_ptr + frame * INNER + k, mask=inside, other=0.0).to(tl.float32)
        share = (gate_grad + tl.sum(product * h, 1))[:, None]
        tl.store(gate_grad_ptr + part.to(tl.int64) * rows * frames + frame, share, mask=exists)


@triton.jit
def weight_grad_kernel(
    grad_ptr,  # (R, T, D), of y
    h_ptr,  # (R, T, K)
    gate_ptr, seed_ptr,  # as in the forward pass
    weight_grad_ptr,  # (SPLITS, D, K) float32, out: the shares of the rows that each split sums over
    bias_grad_ptr,  # (SPLITS, D) float32, out
    rows, gate_stride, utterances, frames, factor,
    P: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    across, down = tl.cdiv(INNER, COLUMNS), tl.cdiv(WIDTH, COLUMNS)
    part, first = tl.program_id(0) % across, tl.program_id(0) // across % down * COLUMNS
    split = tl.program_id(0) // (across * down)
    k, d = part * COLUMNS + tl.arange(0, COLUMNS), first + tl.arange(0, COLUMNS)
    product = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    bias_grad = tl.zeros((COLUMNS,), tl.float32)
    for number in range(split, rows, SPLITS):
        row = tl.cast(number, tl.int64)
        gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
        if tl.max(tl.abs(gate)) > 0:
            seed = of_row(seed_ptr, row % utterances, 0)
            for start in range(0, frames, DEPTH):
                time = start + tl.arange(0, DEPTH)
                frame, exists = (row * frames + time)[:, None], (time < frames)[:, None]
                grad = tl.load(
                    grad_ptr + frame * WIDTH + d[None, :],
                    mask=exists & (d < WIDTH)[None, :],
                    other=0.0,
                )
                c = dropout(factor * gate * grad.to(tl.float32), seed, time, first, P, WIDTH)
                h = tl.load(
                    h_ptr + frame * INNER + k[None, :],
                    mask=exists & (k < INNER)[None, :],
                    other=0.0,
                )
                product = tl.dot(tl.trans(c.to(h.dtype)), h, product, input_precision=PRECISION)
                bias_grad += tl.sum(c, 0)
    at, inside = split.to(tl.int64) * WIDTH + d, (d < WIDTH)[:, None] & (k < INNER)[None, :]
    tl.store(weight_grad_ptr + at[:, None] * INNER + k[None, :], product, mask=inside)
    tl.store(bias_grad_ptr + at, bias_grad, mask=(d < WIDTH) & (part + 0 * d == 0))


@torch.library.custom_op("dynsize::linear_gated_residual", mutates_args=())
def linear_gated_residual(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, scale: float, dropout_p: float,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launches the forward kernel. Arguments as in `kernels.linear_gated_residual`; `seed` None without dropout."""
    (rows, frames, width), tile, seed = (
        x.shape,
        tiles(x.shape[-1], h.dtype),
        seed if dropout_p else None,
    )
    y, across = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        triton.cdiv(width, tile.columns),
    )
    launch(
        forward_kernel, triton.cdiv(rows * frames, tile.frames) * across, x, h, weight, bias, gate, seed, y,
        rows, *scalars(gate, scale, dropout_p, seed, frames), width, h.shape[-1],
        tile.frames, tile.columns, DEPTH, precision(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@torch.library.custom_op("dynsize::linear_gated_residual_backward", mutates_args=())
def linear_gated_residual_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, scale: float, dropout_p: float,
    seed: Tensor | None, for_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches both backward kernels. Returns the gradients of h, weight, bias and gate; the gate's of no elements
    unless `for_gate`."""
    h_grad, *_, gate_grad = fake_backward(
        grad, h, weight, bias, gate, scale, dropout_p, seed, for_gate
    )
    (rows, frames, width), inner, seed = grad.shape, h.shape[-1], seed if dropout_p else None
    tile = tiles(width, h.dtype)
    across, down = triton.cdiv(inner, tile.columns), triton.cdiv(width, tile.columns)
    of_gate = grad.new_empty(across, rows, frames, dtype=torch.float32) if for_gate else None
    of_weight, of_bias = (
        grad.new_empty(SPLITS, *t.shape, dtype=torch.float32) for t in (weight, bias)
    )
    common = (rows, *scalars(gate, scale, dropout_p, seed, frames), width, inner)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    arguments = (
        grad,
        h,
        weight,
        bias,
        gate,
        seed,
        h_grad,
        of_gate,
        *common,
        tile.frames,
        tile.columns,
        DEPTH,
    )
    launch(
        hidden_grad_kernel,
        triton.cdiv(rows * frames, tile.frames) * across,
        *arguments,
        precision(),
        **options,
    )
    arguments = (
        grad,
        h,
        gate,
        seed,
        of_weight,
        of_bias,
        *common,
        tile.columns,
        DEPTH,
        precision(),
        SPLITS,
    )
    launch(weight_grad_kernel, SPLITS * down * across, *arguments, **options)
    if for_gate:
        gate_grad = of_gate.sum((0, 2)).sum_to_size(gate.shape).to(gate.dtype)
    return h_grad, of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(bias.dtype), gate_grad


@linear_gated_residual.register_fake
def _(x, h, weight, bias, gate, scale, dropout_p, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@linear_gated_residual_backward.register_fake
def fake_backward(grad, h, weight, bias, gate, scale, dropout_p, seed, for_gate):
    like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, weight, bias))
    return *like, torch.empty_like(gate) if for_gate else grad.new_empty(0)


def save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    _, *tensors, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def backward(ctx, grad: Tensor) -> tuple:
    *tensors, seed = ctx.saved_tensors
    for_gate = ctx.needs_input_grad[4]
    *gradients, gate_grad = linear_gated_residual_backward(
        grad, *tensors, ctx.scale, ctx.dropout_p, seed, for_gate
    )
    return grad, *gradients, gate_grad if for_gate else None, None, None, None


linear_gated_residual.register_autograd(backward, setup_context=save_for_backward)
