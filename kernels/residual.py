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


def frames_of(width: int, elements: int = 2048) -> tuple[int, int]:
    """The tile for a width D: its frames and its columns, a power of two. Raises ValueError for too wide a D."""
    if width > WIDEST:
        raise ValueError(f"width {width}: the kernels hold a frame in registers, {WIDEST} columns at most")
    columns = max(16, triton.next_power_of_2(width))
    return min(max(1, elements // columns), 32), columns


@triton.jit
def kept(seed, frame, first, WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr):
    """What dropout keeps of COLUMNS columns from `first`, a multiple of 4, in the frames `frame`, (FRAMES,) int64:
    (FRAMES, COLUMNS) bool, as `reference.kept` defines it."""
    word = first // 4 + tl.arange(0, COLUMNS // 4)
    z = (frame[:, None] * ((WIDTH + 3) // 4) + word[None, :]) * WEYL + seed
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    z = z ^ (z >> 31)
    bits = z[:, :, None] >> (16 * tl.arange(0, 4))[None, None, :]
    return tl.reshape(bits, (FRAMES, COLUMNS)).to(tl.int16) >= THRESHOLD


@triton.jit
def gate_of(gate_ptr, index):
    """The gate at `index`, int64 of any shape, as float32; 1 where there are no gates. A scalar is made (1, 1)."""
    index = index + tl.zeros((1, 1), tl.int64)
    gate = tl.full(index.shape, 1.0, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + index).to(tl.float32)
    return gate


@triton.jit
def forward_kernel(
    x_ptr,  # (R, T, D)
    branch_ptr,  # (R, T, D)
    gate_ptr,  # (R,) with `gate_stride`, which is 0 where one gate serves all; None: gates of 1
    seed_ptr,  # () int64, or None without dropout
    y_ptr,  # (R, T, D), out
    gate_stride,
    frames,  # T
    factor,  # scale / (1 - p)
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(frames, FRAMES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    time = tl.program_id(0) % blocks * FRAMES + tl.arange(0, FRAMES)
    column = tl.arange(0, COLUMNS)
    frame = row * frames + time
    at = frame[:, None] * WIDTH + column[None, :]
    inside = (time < frames)[:, None] & (column < WIDTH)[None, :]
    gate = gate_of(gate_ptr, row * gate_stride)
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    branch = tl.load(branch_ptr + at, mask=inside & (gate != 0), other=0.0).to(tl.float32)
    if seed_ptr is not None:
        keep = kept(tl.load(seed_ptr), frame, 0, WIDTH, THRESHOLD, FRAMES, COLUMNS)
        branch = tl.where(keep, branch, 0.0)
    y = tl.where(gate != 0, x + factor * gate * branch, x)  # not x + 0, which is no -0
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr,  # (R, T, D), of y
    branch_ptr,  # (R, T, D), or None where the gate needs no gradient
    gate_ptr,  # as in the forward pass
    seed_ptr,  # as in the forward pass
    branch_grad_ptr,  # (R, T, D), out
    gate_grad_ptr,  # (R, ⌈T / FRAMES⌉) float32, out: the gate's gradient, a part from each program; or None
    gate_stride,
    frames,
    factor,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(frames, FRAMES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    time = tl.program_id(0) % blocks * FRAMES + tl.arange(0, FRAMES)
    column = tl.arange(0, COLUMNS)
    frame = row * frames + time
    at = frame[:, None] * WIDTH + column[None, :]
    inside = (time < frames)[:, None] & (column < WIDTH)[None, :]
    gate = gate_of(gate_ptr, row * gate_stride)
    needed = inside
    if gate_grad_ptr is None:
        needed = inside & (gate != 0)
    grad = factor * tl.load(grad_ptr + at, mask=needed, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        keep = kept(tl.load(seed_ptr), frame, 0, WIDTH, THRESHOLD, FRAMES, COLUMNS)
        grad = tl.where(keep, grad, 0.0)
    tl.store(branch_grad_ptr + at, tl.where(gate != 0, gate * grad, 0.0), mask=inside)
    if gate_grad_ptr is not None:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            branch = tl.where(keep, branch, 0.0)
        tl.store(gate_grad_ptr + tl.program_id(0).to(tl.int64), tl.sum(grad * branch))


def stride_of(gate: Tensor | None) -> int:
    """From one row's gate to the next, in numbers: 0 where one gate serves all rows."""
    return gate.stride(0) if gate is not None and gate.dim() else 0


def check_dtypes(*tensors: Tensor) -> None:
    if any(tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors):
        raise ValueError(f"Triton computes float32, bfloat16 and float16, not {[tensor.dtype for tensor in tensors]}")


@torch.library.custom_op("dynsize::gated_residual", mutates_args=())
def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Launches the forward kernel. Arguments as in `kernels.gated_residual`."""
    check_dtypes(x, branch)
    x, branch, seed = x.contiguous(), branch.contiguous(), seed if dropout_p else None
    (rows, frames, width), y = x.shape, torch.empty_like(x)
    tile = frames_of(width)
    if y.numel():
        with torch.cuda.device_of(x):
            forward_kernel[(rows * triton.cdiv(frames, tile[0]),)](
                *(x, branch, gate, seed, y, stride_of(gate), frames, scale / (1 - dropout_p)),
                *(reference.threshold(dropout_p), width, *tile),
                num_warps=4,
            )
    return y


@torch.library.custom_op("dynsize::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    grad: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel. `branch`: given where the gate needs a gradient. `dtype`: the branch's. Returns
    the gradients of branch and gate, the latter of no elements where it needs none."""
    grad, branch, seed = grad.contiguous(), None if branch is None else branch.contiguous(), seed if dropout_p else None
    (rows, frames, width), branch_grad = grad.shape, torch.empty_like(grad, dtype=dtype)
    tile = frames_of(width)
    blocks = triton.cdiv(frames, tile[0])
    parts = None if branch is None else grad.new_zeros(rows, blocks, dtype=torch.float32)
    if grad.numel():
        with torch.cuda.device_of(grad):
            backward_kernel[(rows * blocks,)](
                *(grad, branch, gate, seed, branch_grad, parts, stride_of(gate), frames, scale / (1 - dropout_p)),
                *(reference.threshold(dropout_p), width, *tile),
                num_warps=4,
            )
    return branch_grad, gate_gradient(parts, gate, grad)


def gate_gradient(parts: Tensor | None, gate: Tensor | None, like: Tensor) -> Tensor:
    """The gate's gradient from its (R, …) parts, or no elements where it needs none."""
    if parts is None or gate is None:
        return like.new_empty(0)
    return parts.sum().to(gate.dtype) if gate.dim() == 0 else parts.sum(1).to(gate.dtype)


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
