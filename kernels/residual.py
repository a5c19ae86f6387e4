"""y = x + scale · gate · dropout(branch), the end of a layer, and, if wanted, n = LayerNorm(y) · weight + bias, the
beginning of the next one: in one pass over memory.

With m what dropout keeps, f = scale / (1 − p), μ and σ² the mean and variance of a frame of y as it is rounded to its
dtype, r = 1 / √(σ² + ε), z = (y − μ) · r:  y = x + f · gate · m · branch,  n = z · weight + bias.  Backward, with g_y
and g_n the gradients of y and n, w = g_n · weight, and means over the frame:

    g = g_y + r · (w − mean(w) − z · mean(w · z))       of y, through both outputs; g_y where there is no n
    x: g        branch: gate · f · m · g        gate: Σ f · m · g · branch        weight: Σ g_n · z        bias: Σ g_n

Replaces torch's chain of dropout, product with the gate, sum, and LayerNorm, and the mask that it keeps: here the mask
comes from the seed each time. A program walks over CHUNK frames of one row of the batch, so its gate is one number;
where that is 0, no lane of the branch is loaded. It adds up its share of the gradients of weight, bias and gate in
registers and stores it once; torch sums the shares, in the same order each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

WEYL, FIRST, SECOND = (tl.constexpr(number) for number in (reference.WEYL, reference.FIRST, reference.SECOND))
WIDEST = 8192  # columns that a program can hold
CHUNK = 64  # frames of a program: the weights and the shares, once a program, are then a 40th of the traffic
WARPS, FORWARD, BACKWARD = 8, 4096, 2048  # the tiles' elements: backward, twice as many take over 128 registers


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
def place_of(program, frames, CHUNK: tl.constexpr):
    """The row (int64) of `program`, and the first and the end of its frames."""
    chunks = tl.cdiv(frames, CHUNK)
    first = program % chunks * CHUNK
    return (program // chunks).to(tl.int64), first, tl.minimum(first + CHUNK, frames)


@triton.jit
def forward_kernel(
    x_ptr,  # (R, T, D)
    branch_ptr,  # (R, T, D)
    gate_ptr,  # (R,), or () with a stride of 0, or None: gates of 1
    seed_ptr,  # (B,) int64, for row r that of r mod B; None: no dropout
    weight_ptr, bias_ptr,  # (D,), or None: no n
    y_ptr, normed_ptr,  # (R, T, D), out
    mean_ptr, rstd_ptr,  # (R, T) float32, out: μ and r
    eps, gate_stride, utterances, frames, factor,  # ε, …, B, T, f
    P: tl.constexpr,  # the lowest draw that dropout keeps
    WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,  # D, the tile
):  # fmt: skip
    row, first, end = place_of(tl.program_id(0), frames, CHUNK)
    column = tl.arange(0, COLUMNS)
    gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    for start in range(first, end, FRAMES):
        time = start + tl.arange(0, FRAMES)
        frame = row * frames + time
        at = frame[:, None] * WIDTH + column[None, :]
        inside = (time < end)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + at, mask=inside & (gate != 0), other=0.0).to(tl.float32)
        if seed_ptr is not None:
            seed = of_row(seed_ptr, row % utterances, 0)
            branch = tl.where(kept(seed, time, 0, P, WIDTH, FRAMES, COLUMNS), branch, 0.0)
        y = tl.where(gate != 0, x + factor * gate * branch, x)  # not x + 0, which is no -0
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, y, mask=inside)
        if weight_ptr is not None:
            y = y.to(tl.float32)
            mean = tl.sum(y, 1) / WIDTH
            centred = tl.where(inside, y - mean[:, None], 0.0)
            rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
            tl.store(mean_ptr + frame, mean, mask=time < end)
            tl.store(rstd_ptr + frame, rstd, mask=time < end)
            tl.store(normed_ptr + at, centred * rstd[:, None] * weight[None, :] + bias[None, :], mask=inside)


@triton.jit
def backward_kernel(
    y_grad_ptr,  # (R, T, D)
    normed_grad_ptr, y_ptr,  # (R, T, D), or None
    mean_ptr, rstd_ptr,  # (R, T) float32, or None
    weight_ptr,  # (D,), or None: no n
    branch_ptr,  # (R, T, D), or None where the gate needs no gradient
    gate_ptr, seed_ptr,  # as in the forward pass
    x_grad_ptr,  # (R, T, D), out; None without n: it is y's
    branch_grad_ptr,  # (R, T, D), out
    shares_ptr,  # (programs, 2, D) float32, out: the gradients of weight and bias, a share from each program; or None
    gate_grad_ptr,  # (R, chunks of T) float32, out: the gate's, a share from each program; or None
    gate_stride, utterances, frames, factor,
    P: tl.constexpr, WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, first, end = place_of(tl.program_id(0), frames, CHUNK)
    column = tl.arange(0, COLUMNS)
    gate = of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32)
    gate_grad = tl.zeros((FRAMES,), tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        weight_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
        bias_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
    for start in range(first, end, FRAMES):
        time = start + tl.arange(0, FRAMES)
        frame = row * frames + time
        at = frame[:, None] * WIDTH + column[None, :]
        inside = (time < end)[:, None] & (column < WIDTH)[None, :]
        needed = inside
        if weight_ptr is None and gate_grad_ptr is None:
            needed = inside & (gate != 0)
        grad = tl.load(y_grad_ptr + at, mask=needed, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            normed_grad = tl.load(normed_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + frame, mask=time < end, other=0.0)
            rstd = tl.load(rstd_ptr + frame, mask=time < end, other=0.0)[:, None]
            z = tl.where(inside, y - mean[:, None], 0.0) * rstd
            weight_grad += normed_grad * z
            bias_grad += normed_grad
            w = normed_grad * weight[None, :]
            along_z = tl.sum(w * z, 1)[:, None] / WIDTH
            grad += rstd * (w - tl.sum(w, 1)[:, None] / WIDTH - z * along_z)
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
    if weight_ptr is not None:
        share = shares_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
        tl.store(share, tl.sum(weight_grad, 0), mask=column < WIDTH)
        tl.store(share + WIDTH, tl.sum(bias_grad, 0), mask=column < WIDTH)
    if gate_grad_ptr is not None:
        tl.store(gate_grad_ptr + tl.program_id(0), tl.sum(gate_grad))


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


def tile_of(width: int, elements: int) -> tuple[int, int]:
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
    """Launches the forward kernel without n. Arguments as in `kernels.gated_residual`; `seed` None without dropout."""
    (rows, frames, width), y = x.shape, torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = (x, branch, gate, seed, None, None, y, None, None, None, 0.0)
    arguments += (*scalars(gate, scale, dropout_p, seed, frames), width, *tile_of(width, FORWARD), CHUNK)
    launch(forward_kernel, rows * triton.cdiv(frames, CHUNK), *arguments, num_warps=WARPS)
    return y


@torch.library.custom_op("dynsize::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    grad: Tensor, branch: Tensor | None, gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward kernel without n. `branch`: given where the gate needs a gradient. `dtype`: the branch's.
    Returns the gradients of branch and gate, the latter of no elements where it needs none."""
    (rows, frames, width), chunks = grad.shape, triton.cdiv(grad.shape[1], CHUNK)
    branch_grad = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    shares = None if branch is None else grad.new_empty(rows, chunks, dtype=torch.float32)
    arguments = (grad, None, None, None, None, None, branch, gate, seed, None, branch_grad, None, shares)
    arguments += (*scalars(gate, scale, dropout_p, seed, frames), width, *tile_of(width, BACKWARD), CHUNK)
    launch(backward_kernel, rows * chunks, *arguments, num_warps=WARPS)
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
