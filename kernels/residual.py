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
chain keeps for the backward pass: here m comes from the seed again. Kept are y, μ and r.

A program computes some frames of one row, one after the other. Up to D 512 it is a single warp, so
the sums over a frame need no barrier. All its frames have one gate. Where that is 0, the forward
pass loads nothing of the branch; the backward pass loads it where gates learn. x is copied to y in
every row. The program adds up its shares of the gradients of weight, bias and gate in registers and
stores them once; torch sums the shares, always in the same order.

Importing this module registers the op `torch.ops.dynsize.gated_residual_layer_norm`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynsize.kernels import reference

WEYL = tl.constexpr(reference.WEYL)
FIRST = tl.constexpr(reference.FIRST % 2**64)
SECOND = tl.constexpr(reference.SECOND % 2**64)
WIDEST = 8192  # columns: a program holds whole frames in registers
OF_WARP = 512  # columns of a warp; twice as many spill registers in the backward pass
NUMBERS = ["branch_rows", "rows", "frames", "utterances", "chunk", "factor", "lowest"]


@triton.jit
def load(pointer, mask):
    """Return what lies at `pointer` as float32, 0 where not `mask`."""
    values = tl.load(pointer, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def place(frames, chunk):
    """Return the program's row, (1, 1) int64, its first frame, and the end of its frames."""
    program = tl.program_id(0)
    chunks = tl.cdiv(frames, chunk)  # of a row
    row = tl.full((1, 1), program // chunks, tl.int64)
    first = program % chunks * chunk
    end = tl.minimum(first + chunk, frames)
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
def dropout(values, seed_ptr, utterance, frame, lowest, WIDTH: tl.constexpr):
    """Return a tile's `values`, (TILE, COLUMNS), with 0 for what `reference.dropout_mask` drops.

    `frame`: (TILE, 1), their numbers.
    """
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + utterance)
        words = (WIDTH + 3) // 4  # of a frame
        word = tl.arange(0, values.shape[1] // 4)[None, :]
        number = frame.to(tl.int64) * words + word
        z = number * WEYL + seed
        z = z.to(tl.uint64, bitcast=True)  # so that shifts to the right bring zeros
        z = (z ^ (z >> 30)) * FIRST
        z = (z ^ (z >> 27)) * SECOND
        z = z ^ (z >> 31)
        shift = 16 * tl.arange(0, 4)
        drawn = z[:, :, None] >> shift[None, None, :]
        drawn = tl.reshape(drawn, values.shape).to(tl.int16)
        values = tl.where(drawn >= lowest, values, 0.0)
    return values


@triton.jit(do_not_specialize=[*NUMBERS, "eps"])  # one machine code for all their values
def forward_kernel(
    x_ptr,  # (R, T, D) float32
    branch_ptr,  # (R', T, D)
    gate_ptr,  # (R',), or None: gates of 1
    seed_ptr,  # (B,) int64: row r has that of r mod B; None: no dropout
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (R, T, D) float32, out
    normed_ptr,  # (rows, T, D), out
    statistics_ptr,  # (rows, T, 2) float32, out: μ and r
    branch_rows,  # R'
    rows,  # that are normalised
    frames,  # T
    utterances,  # B
    chunk,  # frames of a program
    factor,  # f
    eps,  # ε
    lowest,  # of the draws that dropout keeps
    WIDTH: tl.constexpr,  # D
    COLUMNS: tl.constexpr,  # at least D, a power of 2
    TILE: tl.constexpr,  # frames at a time: 1 on a GPU
):
    row, first, end = place(frames, chunk)
    gate = gate_of(gate_ptr, row, branch_rows)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    weight = load(weight_ptr + column, in_width)
    bias = load(bias_ptr + column, in_width)
    for start in range(first, end, TILE):
        frame = start + tl.arange(0, TILE)[:, None]
        inside = (frame < end) & in_width
        number = row * frames + frame  # of all R · T
        at = number * WIDTH + column
        x = load(x_ptr + at, inside)
        branch = load(branch_ptr + at, inside & (gate != 0))
        branch = dropout(branch, seed_ptr, row % utterances, frame, lowest, WIDTH)
        y = x + factor * gate * branch
        y = tl.where(gate != 0, y, x)  # x + 0 would turn −0 into 0
        tl.store(y_ptr + at, y, mask=inside)
        mean = tl.sum(y, 1, keep_dims=True) / WIDTH
        centred = tl.where(inside, y - mean, 0.0)
        variance = tl.sum(centred * centred, 1, keep_dims=True) / WIDTH
        r = 1 / tl.sqrt(variance + eps)
        normed = centred * r * weight + bias
        tl.store(normed_ptr + at, normed, mask=inside & (row < rows))
        kept = (frame < end) & (row < rows)
        tl.store(statistics_ptr + 2 * number, mean, mask=kept)
        tl.store(statistics_ptr + 2 * number + 1, r, mask=kept)


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    y_grad_ptr,  # (R, T, D) float32, or None where y is not used
    normed_grad_ptr,  # (rows, T, D)
    y_ptr,  # (R, T, D) float32
    statistics_ptr,  # (rows, T, 2) float32: μ and r
    branch_ptr,  # (R', T, D), or None where the gate needs no gradient
    gate_ptr,  # (R',), or None: gates of 1
    seed_ptr,  # (B,) int64, or None
    weight_ptr,  # (D,)
    x_grad_ptr,  # (R, T, D) float32, out
    branch_grad_ptr,  # (R', T, D), out
    gate_grad_ptr,  # (R', chunks of T) float32, out: shares of the gate's gradient; or None
    shares_ptr,  # (rows · chunks of T, 2, D) float32, out: of the gradients of weight and bias
    branch_rows,  # this and the following: as in the forward pass
    rows,
    frames,
    utterances,
    chunk,
    factor,
    lowest,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    row, first, end = place(frames, chunk)
    gate = gate_of(gate_ptr, row, branch_rows)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    weight = load(weight_ptr + column, in_width)
    weight_grad = tl.zeros((TILE, COLUMNS), tl.float32)
    bias_grad = tl.zeros((TILE, COLUMNS), tl.float32)
    gate_grad = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(first, end, TILE):
        frame = start + tl.arange(0, TILE)[:, None]
        inside = (frame < end) & in_width
        in_normed = inside & (row < rows)
        in_branch = inside & (row < branch_rows)
        number = row * frames + frame
        at = number * WIDTH + column
        normed_grad = load(normed_grad_ptr + at, in_normed)
        kept = (frame < end) & (row < rows)
        mean = load(statistics_ptr + 2 * number, kept)
        r = load(statistics_ptr + 2 * number + 1, kept)
        z = (load(y_ptr + at, in_normed) - mean) * r
        weight_grad += normed_grad * z
        bias_grad += normed_grad
        w = normed_grad * weight  # 0 outside of the frame, where z is not
        mean_w = tl.sum(w, 1, keep_dims=True) / WIDTH
        mean_wz = tl.sum(w * z, 1, keep_dims=True) / WIDTH
        grad = r * (w - mean_w - z * mean_wz)
        if y_grad_ptr is not None:
            grad += load(y_grad_ptr + at, inside)
        tl.store(x_grad_ptr + at, grad, mask=inside)
        grad = dropout(grad, seed_ptr, row % utterances, frame, lowest, WIDTH)
        branch_grad = tl.where(gate != 0, factor * gate * grad, 0.0)
        tl.store(branch_grad_ptr + at, branch_grad, mask=in_branch)
        if gate_grad_ptr is not None:
            gate_grad += grad * load(branch_ptr + at, in_branch)
    program = tl.full((1, 1), tl.program_id(0), tl.int64)
    share = shares_ptr + program * 2 * WIDTH + column
    stored = in_width & (row < rows)
    tl.store(share, tl.sum(weight_grad, 0, keep_dims=True), mask=stored)
    tl.store(share + WIDTH, tl.sum(bias_grad, 0, keep_dims=True), mask=stored)
    if gate_grad_ptr is not None:
        of_tile = tl.sum(gate_grad, 0, keep_dims=True)
        share = factor * tl.sum(of_tile, 1, keep_dims=True)
        tl.store(gate_grad_ptr + program, share, mask=row < branch_rows)


# Each program of the backward pass stores its shares of two gradients, which are as much as half of
# what it moves for one frame: with 8 frames a 16th. One of the forward pass stores nothing more.
FEWEST = dict(forward=1, backward=8)
MOST = 64  # frames of a program
INTERPRETED = 16  # frames at a time, because each step takes it milliseconds
PROGRAMS = 16  # of a multiprocessor: as many warps as its registers hold


def frames_of_program(rows: int, frames: int, multiprocessors: int, fewest: int) -> int:
    """Return how many frames a program computes, from `fewest` to MOST.

    Rows of T frames give every multiprocessor PROGRAMS programs where they can, and the programs
    of a row differ in one frame at most, but for the last.
    """
    wanted = rows * frames // (multiprocessors * PROGRAMS)
    wanted = min(max(wanted, fewest), MOST)
    programs = max(1, triton.cdiv(frames, wanted))  # of a row
    return max(1, triton.cdiv(frames, programs))


def tile_of(device: torch.device) -> int:
    """Return how many frames a program computes at a time: a warp one, the interpreter several."""
    return INTERPRETED if device.type == "cpu" else 1


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """Return the number of the GPU's multiprocessors, and 1 for the interpreter."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def shape_of(width: int) -> tuple[int, int]:
    """Return COLUMNS and the number of warps for frames of this width D.

    Raises ValueError where D is above WIDEST.
    """
    if width > WIDEST:
        raise ValueError(f"width {width}: at most {WIDEST}, or DYNSIZE_KERNELS=torch")
    columns = max(16, triton.next_power_of_2(width))
    return columns, max(1, columns // OF_WARP)


def dense(*tensors: Tensor | None) -> list:
    """Return the tensors, contiguous; what is None stays None."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


torch.library.define(
    "dynsize::gated_residual_layer_norm",
    "(Tensor x, Tensor branch, Tensor? gate, float scale, float dropout_p, Tensor? seed, "
    "Tensor weight, Tensor bias, int rows, ScalarType dtype, float eps) "
    "-> (Tensor y, Tensor normed, Tensor statistics)",
)
torch.library.define(
    "dynsize::gated_residual_layer_norm_backward",
    "(Tensor? y_grad, Tensor normed_grad, Tensor y, Tensor statistics, Tensor? branch, "
    "Tensor? gate, Tensor? seed, Tensor weight, float scale, float dropout_p, int branch_rows, "
    "ScalarType branch_dtype) "
    "-> (Tensor x_grad, Tensor branch_grad, Tensor gate_grad, Tensor norm_grad)",
)


def outputs(x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps) -> tuple:
    """Return memory for y, the normalised rows, and μ and r of their frames, (rows, T, 2)."""
    _, frames, width = x.shape
    y = x.new_empty(x.shape)
    normed = x.new_empty(rows, frames, width, dtype=dtype)
    statistics = x.new_empty(rows, frames, 2)
    return y, normed, statistics


@torch.library.impl("dynsize::gated_residual_layer_norm", ("cpu", "cuda"))
def launch_forward(
    x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps
) -> tuple:
    """Return y, the normalised rows, and their statistics: `forward_kernel` has their shapes.

    `reference.gated_residual_layer_norm` describes the arguments.
    """
    results = outputs(x, branch, gate, scale, dropout_p, seed, weight, bias, rows, dtype, eps)
    count, frames, width = x.shape
    columns, warps = shape_of(width)
    chunk = frames_of_program(count, frames, multiprocessors_of(x.device), FEWEST["forward"])
    programs = count * triton.cdiv(frames, chunk)
    with torch.cuda.device_of(x):
        forward_kernel[(programs,)](
            *dense(x, branch, gate, seed if dropout_p else None, weight, bias),
            *results,
            branch_rows=len(branch),
            rows=rows,
            frames=frames,
            utterances=len(seed) if dropout_p else 1,
            chunk=chunk,
            factor=scale / (1 - dropout_p),
            eps=eps,
            lowest=reference.lowest_kept(dropout_p),
            WIDTH=width,
            COLUMNS=columns,
            TILE=tile_of(x.device),
            num_warps=warps,
        )
    return results


def gradients(
    y_grad, normed_grad, y, statistics, branch, gate, seed, weight, scale, dropout_p, branch_rows,
    branch_dtype,
) -> tuple:  # fmt: skip
    """Return memory for the gradients of x, of the branch, of the gate, and of weight and bias."""
    _, frames, width = y.shape
    x_grad = y.new_empty(y.shape)
    branch_grad = y.new_empty(branch_rows, frames, width, dtype=branch_dtype)
    gate_grad = y.new_empty(0 if branch is None else branch_rows)
    norm_grad = y.new_empty(2, width)
    return x_grad, branch_grad, gate_grad, norm_grad


@torch.library.impl("dynsize::gated_residual_layer_norm_backward", ("cpu", "cuda"))
def launch_backward(
    y_grad, normed_grad, y, statistics, branch, gate, seed, weight, scale, dropout_p, branch_rows,
    branch_dtype,
) -> tuple:  # fmt: skip
    """Return the gradients of x, (R, T, D); of the branch, (R', T, D) in its dtype; of the gate,
    (R',), empty where `branch` is None; and of weight and bias, (2, D).

    `backward_kernel` describes the tensors.
    """
    count, frames, width = y.shape
    rows = len(normed_grad)
    columns, warps = shape_of(width)
    chunk = frames_of_program(count, frames, multiprocessors_of(y.device), FEWEST["backward"])
    chunks = triton.cdiv(frames, chunk)  # of a row
    x_grad = y.new_empty(y.shape)
    branch_grad = y.new_empty(branch_rows, frames, width, dtype=branch_dtype)
    gate_shares = None if branch is None else y.new_empty(branch_rows, chunks)
    shares = y.new_empty(rows * chunks, 2, width)
    results = (x_grad, branch_grad, gate_shares, shares)
    with torch.cuda.device_of(y):
        backward_kernel[(count * chunks,)](
            *dense(y_grad, normed_grad, y, statistics, branch, gate, seed, weight),
            *results,
            branch_rows=branch_rows,
            rows=rows,
            frames=frames,
            utterances=1 if seed is None else len(seed),
            chunk=chunk,
            factor=scale / (1 - dropout_p),
            lowest=reference.lowest_kept(dropout_p),
            WIDTH=width,
            COLUMNS=columns,
            TILE=tile_of(y.device),
            num_warps=warps,
        )
    gate_grad = y.new_empty(0) if branch is None else gate_shares.sum(1)
    return x_grad, branch_grad, gate_grad, shares.sum(0)


def save(ctx, inputs: tuple, output: tuple) -> None:
    """Keep what the backward pass needs of the op's inputs and outputs."""
    _, branch, gate, scale, dropout_p, seed, weight, *_ = inputs
    y, _, statistics = output
    learned = branch if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(y, statistics, learned, gate, seed if dropout_p else None, weight)
    ctx.numbers = (scale, dropout_p, len(branch), branch.dtype)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)


def backward(ctx, y_grad: Tensor | None, normed_grad: Tensor | None, _) -> tuple:
    """Return the gradients of the op's inputs."""
    y, *saved = ctx.saved_tensors
    if normed_grad is None:  # as if no row were normalised
        normed_grad = y[:0]
    op = torch.ops.dynsize.gated_residual_layer_norm_backward
    x_grad, branch_grad, gate_grad, norm_grad = op(y_grad, normed_grad, y, *saved, *ctx.numbers)
    if not ctx.needs_input_grad[2]:
        gate_grad = None
    weight_grad, bias_grad = norm_grad
    of_layer = (x_grad, branch_grad, gate_grad, None, None, None)
    return *of_layer, weight_grad, bias_grad, None, None, None


torch.library.register_fake("dynsize::gated_residual_layer_norm", outputs)
torch.library.register_fake("dynsize::gated_residual_layer_norm_backward", gradients)
torch.library.register_autograd("dynsize::gated_residual_layer_norm", backward, setup_context=save)
