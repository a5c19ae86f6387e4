"""y = x + scale · gate · dropout(branch): the end of every layer, in one pass over memory.

Backward, with g the gradient of y, m what dropout keeps, f = scale / (1 − p):

    x: g        branch: gate · f · m · g        gate: Σ f · m · g · branch

Replaces torch's chain of dropout, product with the gate, and sum, which moves the branch through memory five times and
keeps a mask. Here the mask comes from the seed each time. A program sees a few frames of one row of the batch, so its
gate is one number; where that is 0, no lane of the branch or of g is loaded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

WEYL, FIRST, SECOND = (tl.constexpr(number) for number in (reference.WEYL, reference.FIRST, reference.SECOND))
WIDEST = 8192  # columns that a program can hold


@triton.jit
def of_row(pointer, index, NEUTRAL: tl.constexpr):
    """The numbers at `index`, int64 of any shape, a scalar as (1, 1); NEUTRAL everywhere where there is no pointer."""
    index = index + tl.zeros((1, 1), tl.int64)
    if pointer is not None:
        return tl.load(pointer + index)
    else:
        return tl.full(index.shape, NEUTRAL, tl.float32)


@triton.jit
def kept(seed, time, first, P: tl.constexpr, WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr):
    """What dropout with probability P keeps of COLUMNS columns from `first`, a multiple of 4, in the frames `time`,
    (FRAMES,): (FRAMES, COLUMNS) bool, as `reference.kept` defines it. `seed`: (1, 1) or (FRAMES, 1) int64."""
    word = first // 4 + tl.arange(0, COLUMNS // 4)
    z = (time.to(tl.int64)[:, None] * ((WIDTH + 3) // 4) + word[None, :]) * WEYL + seed
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    z = z ^ (z >> 31)
    bits = z[:, :, None] >> (16 * tl.arange(0, 4))[None, None, :]
    return tl.reshape(bits, (FRAMES, COLUMNS)).to(tl.int16) >= P


@triton.jit
def tile_of(program, frames, WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of `program`: its row (int64), its frames in the row, the tile's offsets and which lie inside."""
    blocks = tl.cdiv(frames, FRAMES)
    row = (program // blocks).to(tl.int64)
    time = program % blocks * FRAMES + tl.arange(0, FRAMES)
    column = tl.arange(0, COLUMNS)
    at = (row * frames + time)[:, None] * WIDTH + column[None, :]
    return row, time, at, (time < frames)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def forward_kernel(
    x_ptr,  # (R, T, D)
    branch_ptr,  # (R, T, D)
    gate_ptr,  # (R,), or () with a stride of 0, or None: gates of 1
    seed_ptr,  # (B,) int64, for row r that of r mod B; None: no dropout
    y_ptr,  # (R, T, D), out
    gate_stride, utterances, frames, factor,  # B, T, scale / (1 − p)
    P: tl.constexpr,  # the lowest draw that dropout keeps
    WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr,  # D, and the tile
):  # fmt: skip
    row, time, at, inside = tile_of(tl.program_id(0), frames, WIDTH, FRAMES, COLUMNS)
    gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    branch = tl.load(branch_ptr + at, mask=inside & (gate != 0), other=0.0).to(tl.float32)
    if seed_ptr is not None:
        seed = of_row(seed_ptr, row % utterances, 0)
        branch = tl.where(kept(seed, time, 0, P, WIDTH, FRAMES, COLUMNS), branch, 0.0)
    y = tl.where(gate != 0, x + factor * gate * branch, x)  # not x + 0, which is no -0
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr,  # (R, T, D), of y
    branch_ptr,  # (R, T, D), or None where the gate needs no gradient
    gate_ptr, seed_ptr,  # as in the forward pass
    branch_grad_ptr,  # (R, T, D), out
    gate_grad_ptr,  # (R, ⌈T / FRAMES⌉) float32, out: the gate's gradient, a share from each program; or None
    gate_stride, utterances, frames, factor,
    P: tl.constexpr, WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, time, at, inside = tile_of(tl.program_id(0), frames, WIDTH, FRAMES, COLUMNS)
    gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
    needed = inside
    if gate_grad_ptr is None:
        needed = inside & (gate != 0)
    grad = factor * tl.load(grad_ptr + at, mask=needed, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        keep = kept(of_row(seed_ptr, row % utterances, 0), time, 0, P, WIDTH, FRAMES, COLUMNS)
        grad = tl.where(keep, grad, 0.0)
    tl.store(branch_grad_ptr + at, tl.where(gate != 0, gate * grad, 0.0), mask=inside)
    if gate_grad_ptr is not None:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            branch = tl.where(keep, branch, 0.0)
        tl.store(gate_grad_ptr + tl.program_id(0), tl.sum(grad * branch))


def launch(kernel: triton.runtime.JITFunction, programs: int, *arguments, **options) -> None:
    """Launches so many programs, perhaps none, on the tensors' device, inputs made contiguous. Raises ValueError for
    float64."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise ValueError("Triton's kernels compute in float32: float64 needs DYNSIZE_KERNELS=torch")
    if programs:
        contiguous = (argument.contiguous() if isinstance(argument, Tensor) else argument for argument in arguments)
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs,)](*contiguous, **options)


def frames_of(width: int, elements: int) -> tuple[int, int]:
    """A tile of about so many elements for a width D: its frames and its columns, both powers of two. Raises
    ValueError for too wide a D."""
    if width > WIDEST:
        raise ValueError(f"width {width}: the kernels hold whole frames in registers, {WIDEST} columns at most")
    columns = max(16, triton.next_power_of_2(width))
    return min(max(1, elements // columns), 32), columns


def scalars(gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None, frames: int) -> tuple:
    """What every kernel takes from the ops' arguments: gate's stride, B, T, f and P."""
    stride = 0 if gate is None else gate.dim()
    utterances = 1 if seed is None else len(seed)
    return stride, utterances, frames, scale / (1 - dropout_p), reference.threshold(dropout_p)


def gate_gradient(shares: Tensor | None, gate: Tensor | None, like: Tensor) -> Tensor:
    """The gate's gradient from (R, …) shares; no elements where it needs none."""
    if shares is None:
        return like.new_empty(0)
    return (shares.sum(1) if gate.dim() else shares.sum()).to(gate.dtype)


@torch.library.custom_op("dynsize::gated_residual", mutates_args=())
def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Launches the forward kernel. Arguments as in `kernels.gated_residual`; `seed` None without dropout."""
    (rows, frames, width), y = x.shape, torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = frames_of(width, 2048)
    arguments = (x, branch, gate, seed, y, *scalars(gate, scale, dropout_p, seed, frames), width, *tile)
    launch(forward_kernel, rows * triton.cdiv(frames, tile[0]), *arguments, num_warps=4)
    return y


@torch.library.custom_op("dynsize::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    grad: Tensor, branch: Tensor | None, gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward kernel. `branch`: given where the gate needs a gradient. `dtype`: the branch's. Returns
    the gradients of branch and gate, the latter of no elements where it needs none."""
    (rows, frames, width), tile = grad.shape, frames_of(grad.shape[-1], 2048)
    branch_grad = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    blocks = triton.cdiv(frames, tile[0])
    shares = None if branch is None else grad.new_empty(rows, blocks, dtype=torch.float32)
    arguments = (grad, branch, gate, seed, branch_grad, shares, *scalars(gate, scale, dropout_p, seed, frames))
    launch(backward_kernel, rows * blocks, *arguments, width, *tile, num_warps=4)
    return branch_grad, gate_gradient(shares, gate, grad)


@gated_residual.register_fake
def _(x, branch, gate, scale, dropout_p, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@gated_residual_backward.register_fake
def _(grad, branch, gate, scale, dropout_p, seed, dtype):
    branch_grad = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    return branch_grad, grad.new_empty(0) if branch is None else torch.empty_like(gate)


def save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    _, branch, gate, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, seed)
    ctx.dtype = branch.dtype


def backward(ctx, grad: Tensor) -> tuple:
    branch, gate, seed = ctx.saved_tensors
    branch_grad, gate_grad = gated_residual_backward(grad, branch, gate, ctx.scale, ctx.dropout_p, seed, ctx.dtype)
    return grad, branch_grad, None if branch is None else gate_grad, None, None, None


gated_residual.register_autograd(backward, setup_context=save_for_backward)
