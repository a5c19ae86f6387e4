"""The gated residual with its LayerNorm in plain torch, and all that is drawn for an utterance.

`gated_residual_layer_norm` is the op's definition. It runs where Triton does not, and the kernel is
checked against it.

An utterance has one seed in each epoch, an int64. Two things are drawn, by one convention:

    seed + l    dropout of layer l = 0, 1, …, L − 1                                  `layer_seed`
    seed − 1    the layers that the utterance skips: stochastic depth, LayerDrop     `layer_gates`

So dropout is the same for all sizes of an utterance, and all draws are the same in every batch, on
every device, and after resuming.

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


def layer_seed(seed: Tensor, layer: int) -> Tensor:
    """Return the seeds, (B,), from which layer number `layer` draws its dropout: seed + layer."""
    return seed + layer


def layer_gates(seed: Tensor, layers: int, dropped: float) -> Tensor:
    """Return gates, (L, B) float32: 0 where an utterance skips a layer, and 1 elsewhere.

    Each utterance skips each layer with probability `dropped`, drawn from seed − 1, which no
    layer's dropout uses. Stochastic depth and LayerDrop are such gates. `seed`: (B,) int64.
    """
    stays = kept(seed - 1, 1, layers, dropped)  # (B, 1, L)
    return stays[:, 0].T.float()


def kept(seed: Tensor, frames: int, width: int, dropout_p: float) -> Tensor:
    """Return what dropout keeps in the frames of each seed, (B,) int64, as (B, T, D) bool.

    Each of SplitMix64's words of 64 bits gives four draws of 16 bits. The draw of column d in
    frame t is number d mod 4 of word t · ⌈D/4⌉ + d // 4. It is dropped where it is among the
    lowest 65536 · p. On a CPU this takes a seventh of the time of torch's Bernoulli draws.
    """
    words = -(-width // 4)  # of a frame
    number = torch.arange(frames * words, device=seed.device)
    z = number * WEYL + seed[:, None]
    z = (z ^ shifted(z, 30)) * FIRST
    z = (z ^ shifted(z, 27)) * SECOND
    z = z ^ shifted(z, 31)
    draws = z.view(torch.int16)
    draws = draws.view(len(seed), frames, 4 * words)
    return draws[..., :width] >= lowest_kept(dropout_p)


def shifted(z: Tensor, places: int) -> Tensor:
    """Return int64 `z` shifted to the right; zeros come in, where torch repeats the sign."""
    low_bits = (1 << (64 - places)) - 1
    return (z >> places) & low_bits


def lowest_kept(dropout_p: float) -> int:
    """Return the lowest of the 65536 draws, −32768 to 32767, that is kept."""
    dropped = min(round(65536 * dropout_p), 65535)
    return dropped - 32768
