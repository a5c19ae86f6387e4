"""The gated residual with its LayerNorm in plain torch, and what is drawn for an utterance.

This is the op's definition. It runs where Triton does not, and the kernel is checked against it.
Letters: R rows (the utterances of all sizes, stacked), R' ≤ R rows of the branch, B utterances, T
frames, D model width, L layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# SplitMix64 (Steele, Lea, Flood 2014): its three constants as signed numbers
WEYL = -0x61C8864680B583EB
FIRST = -0x40A7B892E31B1A47
SECOND = -0x6B2FB644ECCEEE15


def gated_residual_layer_norm(
    x: Tensor,  # (R, T, D)
    branch: Tensor,  # (R', T, D)
    gate: Tensor | None,  # (R',)
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # (B,)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return y, (R, T, D), and LayerNorm of its first `rows` rows, in `dtype`.

    `kernels.gated_residual_layer_norm` describes the arguments.
    """
    keep = None
    if dropout_p:
        keep = kept(seed, x.shape[1], x.shape[2], dropout_p)
    scale = scale / (1 - dropout_p)
    if gate is None and keep is None and len(branch) == len(x):
        y = torch.add(x, branch, alpha=scale).to(x.dtype)
    else:
        y = GatedResidual.apply(x, branch, gate, scale, keep)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    normed = F.layer_norm(y[:rows], weight.shape, weight, bias, eps)
    return y, normed.to(dtype or x.dtype)


class GatedResidual(torch.autograd.Function):
    """y = x + scale · gate · keep · branch; the rows after the branch are those of `x`.

    A gate of 0 keeps out what the branch holds, NaN too, and still gets its gradient; automatic
    differentiation of the formula can't do both. `gate`: (R',) or None. `keep`: (B, T, D) or None.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, keep: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, keep)
        ctx.scale = scale
        ctx.branch_rows = len(branch)
        ctx.branch_dtype = branch.dtype
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y[len(branch) :] = x[len(branch) :]
        before = by_size(x[: len(branch)], keep)
        after = by_size(y[: len(branch)], keep)
        opened, factor = factors(x, gate, keep)
        torch.addcmul(before, by_size(branch, keep), factor, value=scale, out=after)
        if gate is not None:
            torch.where(opened, after, before, out=after)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, keep = ctx.saved_tensors
        opened, factor = factors(y_grad, gate, keep)
        grad = by_size(y_grad[: ctx.branch_rows], keep)
        branch_grad = grad * (ctx.scale * factor)
        if gate is not None:
            branch_grad = torch.where(opened, branch_grad, 0.0)
        gate_grad = None
        if branch is not None:
            products = grad * by_size(branch, keep)
            if keep is not None:
                products *= keep
            gate_grad = ctx.scale * products.sum((2, 3)).flatten()  # (R',)
        branch_grad = branch_grad.flatten(0, 1).to(ctx.branch_dtype)
        return y_grad, branch_grad, gate_grad, None, None


def by_size(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Return `tensor`, (R', …), as (sizes, B, …); without dropout all rows count as one size."""
    sizes = 1 if keep is None else len(tensor) // len(keep)
    return tensor.unflatten(0, (sizes, -1))


def factors(x: Tensor, gate: Tensor | None, keep: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return where the gate is not 0 (None without gates), and gate · keep in the dtype of `x`.

    Both broadcast to (sizes, B, T, D).
    """
    opened, factor = None, x.new_ones(())
    if gate is not None:
        factor = by_size(gate, keep)[:, :, None, None].to(x.dtype)
        opened = factor != 0
    if keep is not None:
        factor = factor * keep
    return opened, factor


def layer_seed(seed: Tensor, layer: int) -> Tensor:
    """Return the seeds, (B,), from which layer number `layer` draws its dropout: seed + layer."""
    return seed + layer


def layer_gates(seed: Tensor, layers: int, dropped: float) -> Tensor:
    """Return (L, B) float32: 0 where an utterance skips a layer, with probability `dropped`, or 1.

    `seed`: (B,) int64. Drawn from seed − 1, which no layer's dropout uses (see `layer_seed`).
    """
    stays = kept(seed - 1, 1, layers, dropped)  # (B, 1, L)
    return stays[:, 0].T.float()


def kept(seed: Tensor, frames: int, width: int, dropout_p: float) -> Tensor:
    """Return what dropout keeps of the frames of each seed, (B,) int64, as (B, T, D) bool.

    Column d of frame t has the (d mod 4)-th 16 bits of SplitMix64's word number t · ⌈D/4⌉ + d // 4,
    and is dropped where they are among the lowest 65536 · p. On a CPU this takes a seventh of the
    time of torch's Bernoulli draws.
    """
    words = -(-width // 4)  # of a frame
    number = torch.arange(frames * words, device=seed.device)
    z = number * WEYL + seed[:, None]
    z = (z ^ shifted(z, 30)) * FIRST
    z = (z ^ shifted(z, 27)) * SECOND
    z = z ^ shifted(z, 31)
    draws = z.view(torch.int16).view(len(seed), frames, 4 * words)
    return draws[..., :width] >= threshold(dropout_p)


def shifted(z: Tensor, places: int) -> Tensor:
    """Return int64 `z` shifted to the right; zeros come in, where torch repeats the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def threshold(dropout_p: float) -> int:
    """Return the lowest of the 65536 draws, −32768 to 32767, that is kept."""
    return min(round(65536 * dropout_p), 65535) - 32768
