"""Each op in plain torch: its definition, what runs where Triton does not, and what the kernels are tested against.

Letters: R rows of the batch (the utterances of all sizes, stacked), B utterances, T frames, D model width, K width of
what a layer's last projection reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynsize.ctc import BLANK as BLANK
from dynsize.ctc import ctc_loss as ctc_loss

# SplitMix64 (Steele, Lea, Flood 2014), its three constants as signed numbers
WEYL, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + scale · gate · dropout(branch). See `kernels.gated_residual`."""
    if gate is None and not dropout_p:
        return torch.add(x, branch, alpha=scale).to(x.dtype)
    scale, keep = scale / (1 - dropout_p), torch.ones((), dtype=branch.dtype, device=branch.device)
    if dropout_p:
        keep = kept(seed, *branch.shape[1:], dropout_p).to(branch.dtype)
        x, branch = (
            x.unflatten(0, (-1, len(seed))),
            branch.unflatten(0, (-1, len(seed))),
        )  # (R / B, B, T, D)
    if gate is None:
        y = torch.addcmul(x, branch, keep, value=scale).to(x.dtype)
    else:
        y = Gated.apply(x, branch, gate, scale, keep)
    return y.flatten(0, -3)


class Gated(torch.autograd.Function):
    """x + scale · gate · keep · branch, where a gate of 0 keeps out whatever the branch holds, NaN too, and still gets
    its own gradient: automatic differentiation gives up one for the other."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, gate: Tensor, scale: float, keep: Tensor) -> Tensor:
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, keep)
        ctx.scale, ctx.dtype = scale, branch.dtype
        rows = by_row(gate, x)
        y = torch.addcmul(x, branch, rows.to(branch.dtype) * keep, value=scale)
        return torch.where(rows != 0, y, x).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        branch, gate, keep = ctx.saved_tensors
        rows = by_row(gate, grad)
        branch_grad = torch.where(
            rows != 0, grad * (ctx.scale * rows).to(grad.dtype) * keep, 0.0
        ).to(ctx.dtype)
        if branch is None:
            return grad, branch_grad, None, None, None
        products = (grad * keep * branch).sum(
            (-2, -1), dtype=torch.promote_types(gate.dtype, torch.float32)
        )
        gate_grad = ctx.scale * products.flatten()  # (R,)
        return grad, branch_grad, gate_grad.sum_to_size(gate.shape).to(gate.dtype), None, None


def by_row(gate: Tensor, x: Tensor) -> Tensor:
    """() or (R,) gates as a factor of `x`, (R, T, D) or (R / B, B, T, D)."""
    return gate.expand(x.shape[:-2].numel()).view(*x.shape[:-2], 1, 1)


def gated_residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Returns y = x + scale · gate · dropout(branch) and LayerNorm(y[:rows]) in `dtype`.

    See `kernels.gated_residual_layer_norm`.
    """
    keep = kept(seed, *x.shape[1:], dropout_p) if dropout_p else None  # (B, T, D)
    scale = scale / (1 - dropout_p)
    if gate is None and keep is None and len(branch) == len(x):
        y = torch.add(x, branch, alpha=scale).to(x.dtype)
    else:
        y = GatedResidual.apply(x, branch, gate, scale, keep)
    normed = F.layer_norm(y[:rows], weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return y, normed.to(dtype or x.dtype)


class GatedResidual(torch.autograd.Function):
    """y = x + scale · gate · keep · branch, where `branch` has the first R' of the R rows.

    A gate of 0 keeps out what the branch holds, NaN too, and still gets its gradient; automatic
    differentiation of the formula can't do both. `gate`: (R',) or None. `keep`: (B, T, D) or None.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, keep: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, keep)
        ctx.scale, ctx.dtype, ctx.branch_rows = scale, branch.dtype, len(branch)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y[len(branch) :] = x[len(branch) :]
        if gate is None and keep is None:
            torch.add(x[: len(branch)], branch, alpha=scale, out=y[: len(branch)])
            return y
        opened, factor = factors(gate, keep, x.dtype)
        before = by_utterance(x[: len(branch)], factor)
        after = by_utterance(y[: len(branch)], factor)
        torch.addcmul(before, by_utterance(branch, factor), factor, value=scale, out=after)
        if opened is not None:
            torch.where(opened, after, before, out=after)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        branch, gate, keep = ctx.saved_tensors
        grad = y_grad[: ctx.branch_rows]
        if gate is None and keep is None:
            return y_grad, (ctx.scale * grad).to(ctx.dtype), None, None, None
        opened, factor = factors(gate, keep, grad.dtype)
        grad = by_utterance(grad, factor)  # (R' / B, B, T, D)
        branch_grad = grad * (ctx.scale * factor)
        if opened is not None:
            branch_grad = torch.where(opened, branch_grad, 0.0)
        branch_grad = branch_grad.to(ctx.dtype).flatten(0, 1)
        gate_grad = None
        if branch is not None:
            products = grad * by_utterance(branch, factor)
            if keep is not None:
                products *= keep
            gate_grad = (ctx.scale * products.sum((2, 3)).flatten()).to(gate.dtype)  # (R',)
        return y_grad, branch_grad, gate_grad, None, None


def factors(
    gate: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Returns where the gate is not 0 (None without gates), and gate · keep.

    Both broadcast to (R' / B, B, T, D), where B is R' without dropout.
    """
    if gate is None:
        return None, keep[None].to(dtype)
    gate = gate.to(dtype).view(-1, len(gate) if keep is None else len(keep), 1, 1)
    return gate != 0, gate if keep is None else gate * keep


def by_utterance(tensor: Tensor, factor: Tensor) -> Tensor:
    """Returns `tensor`, (R', T, D), as (R' / B, B, T, D) for the B utterances of `factor`."""
    return tensor.unflatten(0, (-1, factor.shape[1]))


def kept(seed: Tensor, frames: int, width: int, dropout_p: float) -> Tensor:
    """What dropout keeps of the frames of each seed, (B,) int64: (B, T, D) bool.

    Column d of frame t has the (d mod 4)-th 16 bits of SplitMix64's word number t · ⌈D/4⌉ + d // 4, and is dropped
    where they are among the lowest 65536 · p. On a CPU this takes a seventh of the time of torch's Bernoulli draws.
    """
    words = -(-width // 4)
    z = torch.arange(frames * words, device=seed.device) * WEYL + seed[:, None]
    z = (z ^ shifted(z, 30)) * FIRST
    z = (z ^ shifted(z, 27)) * SECOND
    bits = (z ^ shifted(z, 31)).view(torch.int16).view(len(seed), frames, 4 * words)
    return bits[..., :width] >= threshold(dropout_p)


def layer_seed(seed: Tensor, layer: int) -> Tensor:
    """Returns the seeds, (B,), from which layer number `layer` draws its dropout: `seed` + layer."""
    return seed + layer


def layer_gates(seed: Tensor, layers: int, dropped: float) -> Tensor:
    """Returns (L, B) float32: 0 where an utterance skips a layer, with probability `dropped`, else 1.

    Drawn from `seed` − 1, which no layer's dropout uses (see `layer_seed`).
    """
    return kept(seed - 1, 1, layers, dropped)[:, 0].T.float()


def shifted(z: Tensor, places: int) -> Tensor:
    """int64 to the right, zeros shifted in: torch's own shift repeats the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def threshold(dropout_p: float) -> int:
    """The lowest of the 65536 draws, −32768 to 32767, that is kept."""
    return min(round(65536 * dropout_p), 65535) - 32768


def linear_gated_residual(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, scale: float, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x + scale · gate · dropout(h @ weightᵀ + bias). See `kernels.linear_gated_residual`."""
    return gated_residual(x, F.linear(h, weight, bias), gate, scale, dropout_p, seed)
