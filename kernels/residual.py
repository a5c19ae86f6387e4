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

A program computes CHUNK frames of one row, so its gate is one number. Where that is 0, nothing of
the branch is loaded. A program adds up its shares of the gradients of weight, bias and gate in
registers and stores them once; torch sums the shares, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynsize.kernels import reference

WEYL = tl.constexpr(reference.WEYL)
FIRST = tl.constexpr(reference.FIRST % 2**64)
SECOND = tl.constexpr(reference.SECOND % 2**64)
NONE_DROPPED = tl.constexpr(reference.threshold(0.0))
WIDEST = 8192  # columns: a program holds whole frames in registers
CHUNK = 64  # frames of a program, so that weights and shares are but a 40th of its traffic
FORWARD, BACKWARD = 2048, 1024  # elements of a tile; twice as many halve the occupancy
WARPS = 8
NUMBERS = ["branch_rows", "rows", "frames", "utterances"]  # one machine code for all their values


@triton.jit
def load(pointer, mask):
    """Return what lies at `pointer` as float32, 0 where not `mask`."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def place(frames, CHUNK: tl.constexpr):
    """Return the program's row, (1, 1) int64, its first frame, and the end of its frames."""
    chunks = tl.cdiv(frames, CHUNK)
    row = tl.full((1, 1), tl.program_id(0) // chunks, tl.int64)
    first = tl.program_id(0) % chunks * CHUNK
    return row, first, tl.minimum(first + CHUNK, frames)


@triton.jit
def gate_of(gate_ptr, row, branch_rows):
    """Return the gate of `row`, (1, 1): 0 past the branch; without gates 1 in the branch."""
    if gate_ptr is None:
        gate = (row < branch_rows).to(tl.float32)
    else:
        gate = load(gate_ptr + row, row < branch_rows)
    return gate


@triton.jit
def dropout(values, seed_ptr, row, utterances, frame, P: tl.constexpr, WIDTH: tl.constexpr):
    """Return `values`, (FRAMES, COLUMNS), with 0 for what `reference.kept` drops.

    `frame`: (FRAMES, 1), their numbers. `P`: the lowest draw that is kept.
    """
    if P != NONE_DROPPED:
        seed = tl.load(seed_ptr + row % utterances)
        word = tl.arange(0, values.shape[1] // 4)[None, :]
        number = frame.to(tl.int64) * ((WIDTH + 3) // 4) + word
        z = number * WEYL + seed
        z = z.to(tl.uint64, bitcast=True)  # so that shifts to the right bring zeros
        z = (z ^ (z >> 30)) * FIRST
        z = (z ^ (z >> 27)) * SECOND
        z = z ^ (z >> 31)
        shift = 16 * tl.arange(0, 4)[None, None, :]
        draws = tl.reshape(z[:, :, None] >> shift, values.shape)
        values = tl.where(draws.to(tl.int16) >= P, values, 0.0)
    return values


@triton.jit
def frame_mean(values, WIDTH: tl.constexpr):
    """Return the mean of each frame, (FRAMES, 1), of `values` that are 0 outside of it."""
    return tl.sum(values, 1, keep_dims=True) / WIDTH


@triton.jit
def normalised(y, inside, eps, WIDTH: tl.constexpr):
    """Return z and r of the frames `y`, which are 0 where not `inside`."""
    centred = tl.where(inside, y - frame_mean(y, WIDTH), 0.0)
    r = 1 / tl.sqrt(frame_mean(centred * centred, WIDTH) + eps)
    return centred * r, r


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    x_ptr,  # (R, T, D) float32
    branch_ptr,  # (R', T, D)
    gate_ptr,  # (R',), or None: gates of 1
    seed_ptr,  # (B,) int64: row r has that of r mod B; None: no dropout
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (R, T, D) float32, out
    normed_ptr,  # (rows, T, D), out
    branch_rows,  # R'
    rows,  # that are normalised
    frames,  # T
    utterances,  # B
    factor,  # f
    eps,  # ε
    P: tl.constexpr,  # the lowest draw that dropout keeps
    WIDTH: tl.constexpr,  # D
    FRAMES: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile
    CHUNK: tl.constexpr,  # frames of a program
):
    row, first, end = place(frames, CHUNK)
    gate = gate_of(gate_ptr, row, branch_rows)
    column = tl.arange(0, COLUMNS)[None, :]
    weight = load(weight_ptr + column, column < WIDTH)
    bias = load(bias_ptr + column, column < WIDTH)
    for start in range(first, end, FRAMES):
        frame = start + tl.arange(0, FRAMES)[:, None]
        at = (row * frames + frame) * WIDTH + column
        inside = (frame < end) & (column < WIDTH)
        x = load(x_ptr + at, inside)
        branch = load(branch_ptr + at, inside & (gate != 0))
        branch = dropout(branch, seed_ptr, row, utterances, frame, P, WIDTH)
        y = tl.where(gate != 0, x + factor * gate * branch, x)  # x + 0 would turn −0 into 0
        tl.store(y_ptr + at, y, mask=inside)
        z, _ = normalised(y, inside, eps, WIDTH)
        normed = z * weight + bias
        tl.store(normed_ptr + at, normed, mask=inside & (row < rows))


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    y_grad_ptr,  # (R, T, D) float32, or None where y is not used
    normed_grad_ptr,  # (rows, T, D)
    y_ptr,  # (R, T, D) float32
    weight_ptr,  # (D,)
    branch_ptr,  # (R', T, D), or None where the gate needs no gradient
    gate_ptr,  # (R',), or None: gates of 1
    seed_ptr,  # (B,) int64, or None
    x_grad_ptr,  # (R, T, D) float32, out
    branch_grad_ptr,  # (R', T, D), out
    shares_ptr,  # (rows · chunks of T, 2, D) float32, out: of the gradients of weight and bias
    gate_grad_ptr,  # (R', chunks of T) float32, out: shares of the gate's gradient; or None
    branch_rows,  # R'
    rows,  # that are normalised
    frames,  # T
    utterances,  # B
    factor,  # f
    eps,  # ε
    P: tl.constexpr,  # the lowest draw that dropout keeps
    WIDTH: tl.constexpr,  # D
    FRAMES: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile
    CHUNK: tl.constexpr,  # frames of a program
):
    row, first, end = place(frames, CHUNK)
    gate = gate_of(gate_ptr, row, branch_rows)
    column = tl.arange(0, COLUMNS)[None, :]
    weight = load(weight_ptr + column, column < WIDTH)
    weight_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
    bias_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
    gate_grad = tl.zeros((FRAMES, 1), tl.float32)
    for start in range(first, end, FRAMES):
        frame = start + tl.arange(0, FRAMES)[:, None]
        at = (row * frames + frame) * WIDTH + column
        inside = (frame < end) & (column < WIDTH)
        in_normed = inside & (row < rows)
        in_branch = inside & (row < branch_rows)
        normed_grad = load(normed_grad_ptr + at, in_normed)
        y = load(y_ptr + at, in_normed)
        z, r = normalised(y, in_normed, eps, WIDTH)
        weight_grad += normed_grad * z
        bias_grad += normed_grad
        w = normed_grad * weight
        along_z = z * frame_mean(w * z, WIDTH)
        grad = r * (w - frame_mean(w, WIDTH) - along_z)
        if y_grad_ptr is not None:
            grad += load(y_grad_ptr + at, inside)
        tl.store(x_grad_ptr + at, grad, mask=inside)
        grad = dropout(grad, seed_ptr, row, utterances, frame, P, WIDTH)
        branch_grad = tl.where(gate != 0, factor * gate * grad, 0.0)
        tl.store(branch_grad_ptr + at, branch_grad, mask=in_branch)
        if gate_grad_ptr is not None:
            branch = load(branch_ptr + at, in_branch)
            gate_grad += tl.sum(grad * branch, 1, keep_dims=True)
    program = tl.full((1, 1), tl.program_id(0), tl.int64)
    share = shares_ptr + program * 2 * WIDTH + column
    stored = (column < WIDTH) & (row < rows)
    weight_grad = tl.sum(weight_grad, 0, keep_dims=True)
    bias_grad = tl.sum(bias_grad, 0, keep_dims=True)
    tl.store(share, weight_grad, mask=stored)
    tl.store(share + WIDTH, bias_grad, mask=stored)
    if gate_grad_ptr is not None:
        share = gate_grad_ptr + program
        total = factor * tl.sum(gate_grad, 0, keep_dims=True)
        tl.store(share, total, mask=row < branch_rows)


def launch(kernel: triton.runtime.JITFunction, programs: int, *arguments, warps: int) -> None:
    """Launch `programs` programs, or nothing for 0, on the tensors' device.

    Inputs are made contiguous; outputs must be.
    """
    dense = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    tensor = next(a for a in dense if isinstance(a, Tensor))
    if programs:
        with torch.cuda.device_of(tensor):
            kernel[(programs,)](*dense, num_warps=warps)


def tile(width: int, elements: int) -> tuple[int, int, int, int]:
    """Return WIDTH, FRAMES, COLUMNS and CHUNK for tiles of about `elements` elements.

    Raises ValueError where the width D is above WIDEST.
    """
    if width > WIDEST:
        raise ValueError(f"width {width}: at most {WIDEST}, or DYNSIZE_KERNELS=torch")
    columns = max(16, triton.next_power_of_2(width))
    frames = min(max(1, elements // columns), 32)
    return width, frames, columns, CHUNK


def launch_forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rows: int,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. Return y and the normalised rows.

    Arguments as in `kernels.gated_residual_layer_norm`; `seed` is None without dropout.
    """
    _, frames, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = x.new_empty(rows, frames, width, dtype=dtype)
    utterances = 1 if seed is None else len(seed)
    factor = scale / (1 - dropout_p)
    launch(
        forward_kernel,
        len(x) * triton.cdiv(frames, CHUNK),
        *(x, branch, gate, seed, weight, bias, y, normed),
        *(len(branch), rows, frames, utterances, factor, eps),
        reference.threshold(dropout_p),
        *tile(width, FORWARD),
        warps=WARPS,
    )
    return y, normed


def launch_backward(
    y_grad: Tensor | None,
    normed_grad: Tensor,
    y: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    branch_grad: Tensor,
    scale: float,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the backward kernel, which fills `branch_grad`, (R', T, D).

    Return the gradients of x; of the gate, (R',), or None where `branch` is None; and of weight
    and bias, (2, D); all float32.
    """
    _, frames, width = y.shape
    chunks = triton.cdiv(frames, CHUNK)
    branch_rows, rows = len(branch_grad), len(normed_grad)
    x_grad = torch.empty_like(y)
    shares = y.new_empty(rows * chunks, 2, width)
    gate_grad = None if branch is None else y.new_empty(branch_rows, chunks)
    utterances = 1 if seed is None else len(seed)
    factor = scale / (1 - dropout_p)
    launch(
        backward_kernel,
        len(y) * chunks,
        *(y_grad, normed_grad, y, weight, branch, gate, seed),
        *(x_grad, branch_grad, shares, gate_grad),
        *(branch_rows, rows, frames, utterances, factor, eps),
        reference.threshold(dropout_p),
        *tile(width, BACKWARD),
        warps=WARPS,
    )
    if gate_grad is not None:
        gate_grad = gate_grad.sum(1)
    return x_grad, gate_grad, shares.sum(0)


class GatedResidualLayerNorm(torch.autograd.Function):
    """`kernels.gated_residual_layer_norm`, with all arguments given."""

    @staticmethod
    def forward(ctx, x, branch, gate, scale, dropout_p, seed, *others) -> tuple[Tensor, Tensor]:
        seed = seed if dropout_p else None
        y, normed = launch_forward(x, branch, gate, scale, dropout_p, seed, *others)
        weight, *_, eps = others
        of_gate = branch if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(y, weight, of_gate, gate, seed)
        ctx.set_materialize_grads(False)
        ctx.numbers = scale, dropout_p, eps
        ctx.branch_shape, ctx.branch_dtype = branch.shape, branch.dtype
        return y, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor | None, normed_grad: Tensor | None) -> tuple:
        y, weight, branch, gate, seed = ctx.saved_tensors
        normed_grad = y[:0] if normed_grad is None else normed_grad
        branch_grad = y.new_empty(ctx.branch_shape, dtype=ctx.branch_dtype)
        x_grad, gate_grad, of_norm = launch_backward(
            y_grad, normed_grad, y, weight, branch, gate, seed, branch_grad, *ctx.numbers
        )
        before_norm = (x_grad, branch_grad, gate_grad, None, None, None)
        return *before_norm, of_norm[0], of_norm[1], None, None, None
