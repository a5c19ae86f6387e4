"""y = x + scale · gate · dropout(branch), the end of a layer, and, if wanted, n = LayerNorm(y) · weight + bias, the
beginning of the next one: in one pass over memory.

With m what dropout keeps, f = scale / (1 − p), μ and σ² the mean and variance of a frame of y as it is rounded to its
dtype, r = 1 / √(σ² + ε), z = (y − μ) · r:  y = x + f · gate · m · branch,  n = z · weight + bias.  Backward, with g_y
and g_n the gradients of y and n, w = g_n · weight, and means over the frame:

    g = g_y + r · (w − mean(w) − z · mean(w · z))       of y, through both outputs; g_y where there is no n
    x: g        branch: gate · f · m · g        gate: Σ f · m · g · branch        weight: Σ g_n · z        bias: Σ g_n

Replaces torch's chain of dropout, product with the gate, sum, and LayerNorm, and what it keeps: here the mask comes
from the seed each time, and μ and r from y, which the backward pass has to read anyway. A program walks over CHUNK
frames of one row of the batch, so its gate is one number; where that is 0, no lane of the branch is loaded. It adds up
its share of the gradients of weight, bias and gate in registers and stores it once; torch sums the shares, always in
one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynsize.kernels import reference

WEYL, FIRST, SECOND = (
    tl.constexpr(n) for n in (reference.WEYL, reference.FIRST % 2**64, reference.SECOND % 2**64)
)
NONE_DROPPED = tl.constexpr(reference.threshold(0.0))
WIDEST = 8192  # columns that a program can hold
CHUNK = 64  # frames of a program: the weights and the shares, once a program, are then a 40th of the traffic
WARPS, FORWARD, BACKWARD = 8, 4096, 2048  # the tiles' elements; backward, more halve the occupancy


@triton.jit
def of_row(pointer, index, NEUTRAL: tl.constexpr):
    """The numbers at `index`, int64 of any shape, a scalar as (1, 1); NEUTRAL everywhere where there is no pointer."""
    index = index + tl.zeros((1, 1), tl.int64)
    return (
        tl.full(index.shape, NEUTRAL, tl.float32) if pointer is None else tl.load(pointer + index)
    )


@triton.jit
def dropout(values, seed, time, first, P: tl.constexpr, WIDTH: tl.constexpr):
    """`values`, (FRAMES, COLUMNS) from the column `first` on, a multiple of 4, with 0 for what `reference.kept` drops.
    `seed`: (1, 1) or (FRAMES, 1) int64. `time`: (FRAMES,). `P`: the lowest draw that is kept."""
    if P == NONE_DROPPED:
        return values
    word = first // 4 + tl.arange(0, values.shape[1] // 4)
    z = (time.to(tl.int64)[:, None] * ((WIDTH + 3) // 4) + word[None, :]) * WEYL + seed
    z = z.to(tl.uint64, bitcast=True)  # whose shifts to the right bring zeros
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    z = z ^ (z >> 31)
    bits = z[:, :, None] >> (16 * tl.arange(0, 4))[None, None, :]
    return tl.where(tl.reshape(bits, values.shape).to(tl.int16) >= P, values, 0.0)


@triton.jit
def place_of(program, frames, CHUNK: tl.constexpr):
    """The row (int64) of `program`, and the first and the end of its frames."""
    chunks = tl.cdiv(frames, CHUNK)
    first = program % chunks * CHUNK
    return (program // chunks).to(tl.int64), first, tl.minimum(first + CHUNK, frames)


@triton.jit
def normalised(y, inside, eps, WIDTH: tl.constexpr):
    """z and r of the frames `y`, float32, where `inside`."""
    centred = tl.where(inside, y - tl.sum(tl.where(inside, y, 0.0), 1)[:, None] / WIDTH, 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / WIDTH + eps)
    return centred * r, r


@triton.jit
def forward_kernel(
    x_ptr,  # (R, T, D)
    branch_ptr,  # (R, T, D)
    gate_ptr,  # (R,), or () with a stride of 0, or None: gates of 1
    seed_ptr,  # (B,) int64, for row r that of r mod B; None: no dropout
    weight_ptr, bias_ptr,  # (D,), or None: no n
    y_ptr, normed_ptr,  # (R, T, D), out
    eps, gate_stride, utterances, frames, factor,  # ε, …, B, T, f
    P: tl.constexpr,  # the lowest draw that dropout keeps
    WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,  # D, the tile
):  # fmt: skip
    row, first, end = place_of(tl.program_id(0), frames, CHUNK)
    column = tl.arange(0, COLUMNS)
    gate, seed = (
        of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32),
        of_row(seed_ptr, row % utterances, 0),
    )
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    for start in range(first, end, FRAMES):
        time = start + tl.arange(0, FRAMES)
        at = (row * frames + time)[:, None] * WIDTH + column[None, :]
        inside = (time < end)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + at, mask=inside & (gate != 0), other=0.0).to(tl.float32)
        branch = dropout(branch, seed, time, 0, P, WIDTH)
        y = tl.where(gate != 0, x + factor * gate * branch, x)  # not x + 0, which is no -0
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, y, mask=inside)
        if weight_ptr is not None:
            z, _ = normalised(y.to(tl.float32), inside, eps, WIDTH)
            tl.store(normed_ptr + at, z * weight[None, :] + bias[None, :], mask=inside)


@triton.jit
def backward_kernel(
    y_grad_ptr,  # (R, T, D)
    normed_grad_ptr, y_ptr,  # (R, T, D), or None
    weight_ptr,  # (D,), or None: no n
    branch_ptr,  # (R, T, D), or None where the gate needs no gradient
    gate_ptr, seed_ptr,  # as in the forward pass
    x_grad_ptr,  # (R, T, D), out; None without n: it is y's
    branch_grad_ptr,  # (R, T, D), out
    shares_ptr,  # (programs, 2, D) float32, out: the gradients of weight and bias, a share from each program; or None
    gate_grad_ptr,  # (R, chunks of T) float32, out: the gate's, a share from each program; or None
    eps, gate_stride, utterances, frames, factor,
    P: tl.constexpr, WIDTH: tl.constexpr, FRAMES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, first, end = place_of(tl.program_id(0), frames, CHUNK)
    column = tl.arange(0, COLUMNS)
    gate, seed = (
        of_row(gate_ptr, row * gate_stride, 1.0).to(tl.float32),
        of_row(seed_ptr, row % utterances, 0),
    )
    gate_grad = tl.zeros((FRAMES,), tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        weight_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
        bias_grad = tl.zeros((FRAMES, COLUMNS), tl.float32)
    for start in range(first, end, FRAMES):
        time = start + tl.arange(0, FRAMES)
        at = (row * frames + time)[:, None] * WIDTH + column[None, :]
        inside = (time < end)[:, None] & (column < WIDTH)[None, :]
        needed = inside
        if weight_ptr is None and gate_grad_ptr is None:
            needed = inside & (gate != 0)
        grad = tl.load(y_grad_ptr + at, mask=needed, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            normed_grad = tl.load(normed_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            z, r = normalised(y, inside, eps, WIDTH)
            weight_grad += normed_grad * z
            bias_grad += normed_grad
            w = normed_grad * weight[None, :]
            along_z = tl.sum(w * z, 1)[:, None] / WIDTH
            grad += r * (w - tl.sum(w, 1)[:, None] / WIDTH - z * along_z)
            tl.store(x_grad_ptr + at, grad, mask=inside)
        grad = dropout(grad, seed, time, 0, P, WIDTH)
        tl.store(branch_grad_ptr + at, tl.where(gate != 0, factor * gate * grad, 0.0), mask=inside)
        if gate_grad_ptr is not None:
            branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gate_grad += tl.sum(grad * dropout(branch, seed, time, 0, P, WIDTH), 1)
    if weight_ptr is not None:
        share = shares_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
        tl.store(share, tl.sum(weight_grad, 0), mask=column < WIDTH)
        tl.store(share + WIDTH, tl.sum(bias_grad, 0), mask=column < WIDTH)
    if gate_grad_ptr is not None:
        tl.store(gate_grad_ptr + tl.program_id(0), factor * tl.sum(gate_grad))


def launch(kernel: triton.runtime.JITFunction, programs: int, *arguments, **options) -> None:
    """Launches so many programs, perhaps none, on the tensors' device, inputs made contiguous. Raises ValueError for
    float64."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise ValueError("Triton's kernels compute in float32: float64 needs DYNSIZE_KERNELS=torch")
    if programs:
        contiguous = (
            argument.contiguous() if isinstance(argument, Tensor) else argument
            for argument in arguments
        )
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs,)](*contiguous, **options)


def tile_of(width: int, elements: int) -> tuple[int, int]:
    """A tile of about so many elements for a width D: its frames and its columns, both powers of two. Raises
    ValueError for too wide a D."""
    if width > WIDEST:
        raise ValueError(
            f"width {width}: the kernels hold whole frames in registers, {WIDEST} columns at most"
        )
    columns = max(16, triton.next_power_of_2(width))
    return min(max(1, elements // columns), 32), columns


def scalars(
    gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None, frames: int
) -> tuple:
    """What every kernel takes from the ops' arguments: gate's stride, B, T, f and P."""
    stride = 0 if gate is None else gate.dim()
    utterances = 1 if seed is None else len(seed)
    return stride, utterances, frames, scale / (1 - dropout_p), reference.threshold(dropout_p)


@torch.library.custom_op("dynsize::gated_residual", mutates_args=())
def gated_residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel for `kernels.gated_residual_layer_norm`. With `weight` None, n has no elements."""
    y, normed = fake_forward(x, branch, gate, scale, dropout_p, seed, weight, bias, eps)
    (rows, frames, width), seed = x.shape, seed if dropout_p else None
    arguments = (x, branch, gate, seed, weight, bias, y, None if weight is None else normed, eps)
    arguments += (
        *scalars(gate, scale, dropout_p, seed, frames),
        width,
        *tile_of(width, FORWARD),
        CHUNK,
    )
    launch(forward_kernel, rows * triton.cdiv(frames, CHUNK), *arguments, num_warps=WARPS)
    return y, normed


@torch.library.custom_op("dynsize::gated_residual_backward", mutates_args=())
def launch_backward(
    y_grad: Tensor, normed_grad: Tensor | None, y: Tensor | None, weight: Tensor | None, branch: Tensor | None,
    gate: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of branch, of its `dtype`, x, gate, and (2, D) those of weight and bias in float32. With `weight`
    None, there is no n, and x's has no elements; with `branch` None, the gate's has none."""
    outputs = fake_backward(
        y_grad, normed_grad, y, weight, branch, gate, seed, scale, dropout_p, eps, dtype
    )
    branch_grad, x_grad, gate_grad, _ = outputs
    (rows, frames, width), seed = y_grad.shape, seed if dropout_p else None
    chunks, normed = triton.cdiv(frames, CHUNK), weight is not None
    shares = y_grad.new_empty(rows * chunks if normed else 0, 2, width, dtype=torch.float32)
    of_gate = None if branch is None else y_grad.new_empty(rows, chunks, dtype=torch.float32)
    arguments = (
        y_grad,
        normed_grad,
        y,
        weight,
        branch,
        gate,
        seed,
        x_grad if normed else None,
        branch_grad,
    )
    arguments += (
        shares if normed else None,
        of_gate,
        eps,
        *scalars(gate, scale, dropout_p, seed, frames),
    )
    arguments += (width, *tile_of(width, BACKWARD), CHUNK)
    launch(backward_kernel, rows * chunks, *arguments, num_warps=WARPS)
    if branch is not None:
        gate_grad = of_gate.sum(1).sum_to_size(gate.shape).to(gate.dtype)
    return branch_grad, x_grad, gate_grad, shares.sum(0)


@gated_residual_layer_norm.register_fake
def fake_forward(x, branch, gate, scale, dropout_p, seed, weight, bias, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, y.new_empty(0 if weight is None else y.shape)


@launch_backward.register_fake
def fake_backward(y_grad, normed_grad, y, weight, branch, gate, seed, scale, dropout_p, eps, dtype):
    branch_grad = torch.empty_like(y_grad, dtype=dtype, memory_format=torch.contiguous_format)
    x_grad = y_grad.new_empty(0 if weight is None else y_grad.shape)
    gate_grad = y_grad.new_empty(0) if branch is None else torch.empty_like(gate)
    return (
        branch_grad,
        x_grad,
        gate_grad,
        y_grad.new_empty(2, y_grad.shape[-1], dtype=torch.float32),
    )


def save_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    _, branch, gate, *ctx.numbers, seed, weight, bias, eps = inputs
    y = None if weight is None else output[0]
    ctx.save_for_backward(y, weight, branch if ctx.needs_input_grad[2] else None, gate, seed)
    ctx.numbers += [eps, branch.dtype]
    ctx.of_bias = None if bias is None else bias.dtype


def backward(ctx, y_grad: Tensor, normed_grad: Tensor) -> tuple:
    _, weight, branch, *_ = ctx.saved_tensors
    normed_grad = None if weight is None else normed_grad
    branch_grad, x_grad, gate_grad, of_weights = launch_backward(
        y_grad, normed_grad, *ctx.saved_tensors, *ctx.numbers
    )
    gate_grad = None if branch is None else gate_grad
    if weight is None:
        return y_grad, branch_grad, gate_grad, *[None] * 6
    weight_grad, bias_grad = of_weights[0].to(weight.dtype), of_weights[1].to(ctx.of_bias)
    return x_grad, branch_grad, gate_grad, None, None, None, weight_grad, bias_grad, None


gated_residual_layer_norm.register_autograd(backward, setup_context=save_for_backward)


def gated_residual(*arguments) -> Tensor:
    """`kernels.gated_residual`."""
    return gated_residual_layer_norm(*arguments, None, None, 0.0)[0]
