"""The gated residual with its LayerNorm, in plain torch.

This is the op's definition. It runs where Triton does not, and the kernel is checked against it.
Letters: R rows (the utterances of all sizes, stacked), R' ≤ R rows of the branch, B utterances, T
frames, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynsize.kernels.draws import kept


def gated_residual_layer_norm(
    x: Tensor,  # (R, T, D)
    branch: Tensor,  # (R', T, D)
    gate: Tensor | None,  # (R',)
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # (B,)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    rows: int,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return y, (R, T, D), and LayerNorm of its first `rows` rows, in `dtype`.

    `kernels.gated_residual_layer_norm` describes the arguments.
    """
    keep = None
    if dropout_p:
        _, frames, width = x.shape
        keep = kept(seed, frames, width, dropout_p)
    scale = scale / (1 - dropout_p)
    everywhere = gate is None and len(branch) == len(x)
    if everywhere and keep is None:
        y = torch.add(x, branch, alpha=scale).to(x.dtype)
    else:
        y = GatedResidual.apply(x, branch, gate, scale, keep)
    weight = weight.to(x.dtype)
    bias = bias.to(x.dtype)
    normed = F.layer_norm(y[:rows], weight.shape, weight, bias, eps)
    return y, normed.to(dtype)


class GatedResidual(torch.autograd.Function):
    """y = x + scale · gate · keep · branch; the rows after the branch are those of `x`.

    `x`: (R, T, D). `branch`: (R', T, D). `gate`: (R',), or None for 1. `keep`: (B, T, D) bool, or
    None to keep all.

    A gate of 0 keeps out all that the branch holds, NaN too, and still gets its gradient.
    Automatic differentiation of the formula can't do both.
    """

    @staticmethod
    def forward(ctx, x, branch, gate, scale, keep) -> Tensor:
        rows = len(branch)
        learned = ctx.needs_input_grad[2]
        ctx.save_for_backward(branch if learned else None, gate, keep)
        ctx.scale = scale
        ctx.branch_rows = rows
        ctx.branch_dtype = branch.dtype
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y[rows:] = x[rows:]
        before = by_size(x[:rows], keep)
        after = by_size(y[:rows], keep)
        gates = gates_by_size(gate, keep, x)
        factor = gates if keep is None else gates * keep
        torch.addcmul(before, by_size(branch, keep), factor, value=scale, out=after)
        if gate is not None:
            torch.where(gates != 0, after, before, out=after)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, keep = ctx.saved_tensors
        grad = by_size(y_grad[: ctx.branch_rows], keep)
        if keep is not None:
            grad = grad * keep
        gates = gates_by_size(gate, keep, y_grad)
        branch_grad = grad * (ctx.scale * gates)
        if gate is not None:
            branch_grad = torch.where(gates != 0, branch_grad, 0.0)
        branch_grad = branch_grad.flatten(0, 1).to(ctx.branch_dtype)
        gate_grad = None
        if branch is not None:
            products = grad * by_size(branch, keep)
            sums = products.sum((2, 3))  # (sizes, B)
            gate_grad = ctx.scale * sums.flatten()
        return y_grad, branch_grad, gate_grad, None, None


def by_size(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Return `tensor`, (R', …), as (sizes, B, …); without dropout all rows count as one size."""
    sizes = 1 if keep is None else len(tensor) // len(keep)
    return tensor.unflatten(0, (sizes, -1))


def gates_by_size(gate: Tensor | None, keep: Tensor | None, like: Tensor) -> Tensor:
    """Return the gates in the dtype of `like`, (sizes, B, 1, 1), or one gate of 1 for all rows."""
    if gate is None:
        return like.new_ones(())
    gates = by_size(gate, keep)
    return gates[:, :, None, None].to(like.dtype)
