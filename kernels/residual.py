"""The end of one layer and the beginning of the next, in one pass over memory each way.

    y = x + f · gate · m · branch                  f = scale / (1 − p), m: what dropout keeps
    z = (y − μ) · r                                μ, σ²: mean and variance of a frame of y
    normed = z · weight + bias                     r = 1 / √(σ² + ε)

The branch has the first R' of the R rows; after them the gate counts as 0. Only the first `rows`
rows are normalised. Backward, with w = normed_grad · weight, 0 in rows that are not normalised,
and with means over a frame:

    g = y_grad + r · (w − mean(w) − z · mean(w · z))               the gradient of x
    branch: f · gate · m · g        gate: Σ f · m · g · branch
    weight: Σ normed_grad · z       bias: Σ normed_grad

This replaces torch's chain of dropout, product with the gate, sum and LayerNorm, and what that
chain keeps for the backward pass: here m comes from the seed again, and μ and r from y.

A program computes PROGRAM frames of one row, a tile of a few frames at a time, in registers. All
its frames have one gate; where that is 0, nothing of the branch is loaded. The program adds up its
shares of the gradients of weight, bias and gate in registers and stores them once; torch sums the
shares, always in the same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynsize.kernels import reference

WEYL = tl.constexpr(reference.WEYL)
FIRST = tl.constexpr(reference.FIRST % 2**64)
SECOND = tl.constexpr(reference.SECOND % 2**64)
WIDEST = 8192  # columns: a program holds whole frames in registers
PROGRAM = 64  # frames of a program, so that weights and shares are but a 40th of its traffic
FORWARD = 2048  # elements of a tile; twice as many halve the occupancy
BACKWARD = 1024
WARPS = 8


class Numbers(NamedTuple):
    """What both kernels get after the tensors, in this order."""

    branch_rows: int  # R'
    rows: int  # that are normalised
    frames: int  # T
    utterances: int  # B
    factor: float  # f
    eps: float  # ε
    lowest: int  # of the draws that dropout keeps; it is compiled into the kernels


@triton.jit
def load(pointer, mask):
    """Return what lies at `pointer` as float32, 0 where not `mask`."""
    values = tl.load(pointer, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def place(frames, CHUNK: tl.constexpr):
    """Return the program's row, (1, 1) int64, its first frame, and the end of its frames."""
    program = tl.program_id(0)
    chunks = tl.cdiv(frames, CHUNK)  # of a row
    row = tl.full((1, 1), program // chunks, tl.int64)
    first = program % chunks * CHUNK
    end = tl.minimum(first + CHUNK, frames)
    return row, first, end


@triton.jit
def gate_of(gate_ptr, row, branch_rows):
    """Return the gate of `row`, (1, 1): 0 past the branch; without gates 1 in the branch."""
    in_branch = row < branch_rows
    gate = in_branch.to(tl.float32)
    if gate_ptr is not None:
        gate = load(gate_ptr + row, in_branch)
    return gate


@triton.jit
def dropout(values, seed_ptr, row, utterances, frame, LOWEST: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile's `values` with 0 for what `reference.kept` drops.

    `frame`: (TILE, 1), their numbers. LOWEST: the lowest draw that is kept.
    """
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + row % utterances)
        words = (WIDTH + 3) // 4  # of a frame
        word = tl.arange(0, values.shape[1] // 4)
        number = frame.to(tl.int64) * words + word[None, :]
        z = number * WEYL + seed
        z = z.to(tl.uint64, bitcast=True)  # so that shifts to the right bring zeros
        z = (z ^ (z >> 30)) * FIRST
        z = (z ^ (z >> 27)) * SECOND
        z = z ^ (z >> 31)
        shift = 16 * tl.arange(0, 4)
        drawn = z[:, :, None] >> shift[None, None, :]
        drawn = tl.reshape(drawn, values.shape).to(tl.int16)
        values = tl.where(drawn >= LOWEST, values, 0.0)
    return values


@triton.jit
def frame_mean(values, width):
    """Return the mean of each frame, (TILE, 1). `values` are 0 past the frame's `width`."""
    return tl.sum(values, 1, keep_dims=True) / width


@triton.jit
def normalised(y, inside, eps, width):
    """Return z and r of the frames `y`, which are 0 where not `inside`."""
    centred = y - frame_mean(y, width)
    centred = tl.where(inside, centred, 0.0)
    variance = frame_mean(centred * centred, width)
    r = 1 / tl.sqrt(variance + eps)
    return centred * r, r


@triton.jit(do_not_specialize=Numbers._fields)  # one machine code for all their values
def forward_kernel(
    x_ptr,  # (R, T, D) float32
    branch_ptr,  # (R', T, D)
    gate_ptr,  # (R',), or None: gates of 1
    seed_ptr,  # (B,) int64: row r has that of r mod B; None: no dropout
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (R, T, D) float32, out
    normed_ptr,  # (rows, T, D), out
    branch_rows,  # this and the following: see Numbers
    rows,
    frames,
    utterances,
    factor,
    eps,
    LOWEST: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    COLUMNS: tl.constexpr,  # at least D, a power of 2
    TILE: tl.constexpr,  # frames of a tile, a power of 2
    CHUNK: tl.constexpr,  # frames of a program
):
    row, first, end = place(frames, CHUNK)
    gate = gate_of(gate_ptr, row, branch_rows)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    weight = load(weight_ptr + column, in_width)
    bias = load(bias_ptr + column, in_width)
    for start in range(first, end, TILE):
        frame = start + tl.arange(0, TILE)[:, None]
        inside = (frame < end) & in_width
        at = (row * frames + frame) * WIDTH + column
        x = load(x_ptr + at, inside)
        branch = load(branch_ptr + at, inside & (gate != 0))
        branch = dropout(branch, seed_ptr, row, utterances, frame, LOWEST, WIDTH)
        y = x + factor * gate * branch
        y = tl.where(gate != 0, y, x)  # x + 0 would turn −0 into 0
        tl.store(y_ptr + at, y, mask=inside)
        z, _ = normalised(y, inside, eps, WIDTH)
        normed = z * weight + bias
        tl.store(normed_ptr + at, normed, mask=inside & (row < rows))


@triton.jit(do_not_specialize=Numbers._fields)
def backward_kernel(
    y_ptr,  # (R, T, D) float32
    y_grad_ptr,  # (R, T, D) float32, or None where y is not used
    normed_grad_ptr,  # (rows, T, D)
    branch_ptr,  # (R', T, D), or None where the gate needs no gradient
    gate_ptr,  # (R',), or None: gates of 1
    seed_ptr,  # (B,) int64, or None
    weight_ptr,  # (D,)
    x_grad_ptr,  # (R, T, D) float32, out
    branch_grad_ptr,  # (R', T, D), out
    gate_grad_ptr,  # (R', chunks of T) float32, out: shares of the gate's gradient; or None
    shares_ptr,  # (rows · chunks of T, 2, D) float32, out: of the gradients of weight and bias
    branch_rows,  # this and the following: see Numbers
    rows,
    frames,
    utterances,
    factor,
    eps,
    LOWEST: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    COLUMNS: tl.constexpr,  # at least D, a power of 2
    TILE: tl.constexpr,  # frames of a tile, a power of 2
    CHUNK: tl.constexpr,  # frames of a program
):
    row, first, end = place(frames, CHUNK)
    gate = gate_of(gate_ptr, row, branch_rows)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    weight = load(weight_ptr + column, in_width)
    weight_grad = tl.zeros((TILE, COLUMNS), tl.float32)
    bias_grad = tl.zeros((TILE, COLUMNS), tl.float32)
    gate_grad = tl.zeros((TILE, 1), tl.float32)
    for start in range(first, end, TILE):
        frame = start + tl.arange(0, TILE)[:, None]
        inside = (frame < end) & in_width
        in_normed = inside & (row < rows)
        in_branch = inside & (row < branch_rows)
        at = (row * frames + frame) * WIDTH + column
        normed_grad = load(normed_grad_ptr + at, in_normed)
        y = load(y_ptr + at, in_normed)
        z, r = normalised(y, in_normed, eps, WIDTH)
        weight_grad += normed_grad * z
        bias_grad += normed_grad
        w = normed_grad * weight
        mean = frame_mean(w, WIDTH)
        along_z = z * frame_mean(w * z, WIDTH)
        grad = r * (w - mean - along_z)
        if y_grad_ptr is not None:
            grad += load(y_grad_ptr + at, inside)
        tl.store(x_grad_ptr + at, grad, mask=inside)
        grad = dropout(grad, seed_ptr, row, utterances, frame, LOWEST, WIDTH)
        branch_grad = factor * gate * grad
        branch_grad = tl.where(gate != 0, branch_grad, 0.0)
        tl.store(branch_grad_ptr + at, branch_grad, mask=in_branch)
        if gate_grad_ptr is not None:
            branch = load(branch_ptr + at, in_branch)
            gate_grad += tl.sum(grad * branch, 1, keep_dims=True)
    program = tl.full((1, 1), tl.program_id(0), tl.int64)
    weight_grad = tl.sum(weight_grad, 0, keep_dims=True)
    bias_grad = tl.sum(bias_grad, 0, keep_dims=True)
    share = shares_ptr + program * 2 * WIDTH + column
    stored = in_width & (row < rows)
    tl.store(share, weight_grad, mask=stored)
    tl.store(share + WIDTH, bias_grad, mask=stored)
    if gate_grad_ptr is not None:
        share = factor * tl.sum(gate_grad, 0, keep_dims=True)
        tl.store(gate_grad_ptr + program, share, mask=row < branch_rows)


def tile_of(width: int, elements: int) -> tuple[int, int, int, int]:
    """Return WIDTH, COLUMNS, TILE and CHUNK: a tile has about `elements` elements.

    Raises ValueError where D is above WIDEST.
    """
    if width > WIDEST:
        raise ValueError(f"width {width}: at most {WIDEST}, or DYNSIZE_KERNELS=torch")
    columns = max(16, triton.next_power_of_2(width))
    frames = max(1, elements // columns)
    return width, columns, min(frames, 32), PROGRAM


def dense(tensors: tuple) -> list:
    """Return the tensors, contiguous; what is None stays None."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def launch_forward(x, branch, gate, seed, weight, bias, numbers: Numbers, dtype) -> tuple:
    """Launch `forward_kernel`, which says the tensors' shapes and dtypes.

    Return y, and the normalised rows in `dtype`.
    """
    _, frames, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = x.new_empty(numbers.rows, frames, width, dtype=dtype)
    tensors = (x, branch, gate, seed, weight, bias)
    tile = tile_of(width, FORWARD)
    grid = (len(x) * triton.cdiv(frames, PROGRAM),)
    with torch.cuda.device_of(x):
        forward_kernel[grid](*dense(tensors), y, normed, *numbers, *tile, num_warps=WARPS)
    return y, normed


def launch_backward(
    y, y_grad, normed_grad, branch, gate, seed, weight, branch_grad, numbers: Numbers
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch `backward_kernel`, which says the tensors' shapes and dtypes. It fills `branch_grad`.

    Return the gradients of x; of the gate, (R',), or None where `branch` is None; and of weight
    and bias, (2, D); all float32.
    """
    _, frames, width = y.shape
    chunks = triton.cdiv(frames, PROGRAM)
    x_grad = torch.empty_like(y)
    gate_grad = None
    if branch is not None:
        gate_grad = y.new_empty(numbers.branch_rows, chunks)
    shares = y.new_empty(numbers.rows * chunks, 2, width)
    inputs = (y, y_grad, normed_grad, branch, gate, seed, weight)
    outputs = (x_grad, branch_grad, gate_grad, shares)
    tile = tile_of(width, BACKWARD)
    grid = (len(y) * chunks,)
    with torch.cuda.device_of(y):
        backward_kernel[grid](*dense(inputs), *outputs, *numbers, *tile, num_warps=WARPS)
    if gate_grad is not None:
        gate_grad = gate_grad.sum(1)
    return x_grad, gate_grad, shares.sum(0)


class GatedResidualLayerNorm(torch.autograd.Function):
    """`kernels.gated_residual_layer_norm`, with all arguments given."""

    @staticmethod
    def forward(ctx, x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps):
        seed = seed if dropout_p else None
        ctx.numbers = Numbers(
            branch_rows=len(branch),
            rows=rows,
            frames=x.shape[1],
            utterances=1 if seed is None else len(seed),
            factor=scale / (1 - dropout_p),
            eps=eps,
            lowest=reference.lowest_kept(dropout_p),
        )
        y, normed = launch_forward(x, branch, gate, seed, weight, bias, ctx.numbers, dtype)
        learned = ctx.needs_input_grad[2]
        ctx.save_for_backward(y, branch if learned else None, gate, seed, weight)
        ctx.set_materialize_grads(False)
        ctx.branch_shape = branch.shape
        ctx.branch_dtype = branch.dtype
        return y, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor | None, normed_grad: Tensor | None) -> tuple:
        y, *saved = ctx.saved_tensors
        numbers = ctx.numbers
        if normed_grad is None:  # as if no row were normalised
            normed_grad = y[:0]
            numbers = numbers._replace(rows=0)
        branch_grad = y.new_empty(ctx.branch_shape, dtype=ctx.branch_dtype)
        x_grad, gate_grad, (weight_grad, bias_grad) = launch_backward(
            y, y_grad, normed_grad, *saved, branch_grad, numbers
        )
        of_layer = (x_grad, branch_grad, gate_grad, None, None, None)
        return *of_layer, weight_grad, bias_grad, None, None, None
