"""What plain torch computes where Triton does not, and all that is drawn for an utterance.

`gated_residual_layer_norm` is the op's definition, against which the kernel is checked.
`torchs_ctc_loss` computes CTC on a GPU where the kernel doesn't run.

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

BLANK = 0  # CTC's label

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
        keep = dropout_mask(seed, frames, width, dropout_p)
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
        factor = scaled(keep, scale, x)
        if gate is not None:
            gates = gates_by_size(gate, keep, x)
            factor = factor * gates
        torch.addcmul(before, by_size(branch, keep), factor, out=after)
        if gate is not None:
            torch.where(gates != 0, after, before, out=after)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, keep = ctx.saved_tensors
        grad = by_size(y_grad[: ctx.branch_rows], keep)
        branch_grad = grad * scaled(keep, ctx.scale, y_grad)  # gate · branch_grad in the end
        gate_grad = None
        if branch is not None:
            products = branch_grad * by_size(branch, keep)
            gate_grad = products.sum((2, 3)).flatten()
        if gate is not None:
            branch_grad *= gates_by_size(gate, keep, y_grad)
        branch_grad = branch_grad.flatten(0, 1).to(ctx.branch_dtype)
        return y_grad, branch_grad, gate_grad, None, None


def by_size(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Return `tensor`, (R', …), as (sizes, B, …); without dropout all rows count as one size."""
    sizes = 1 if keep is None else len(tensor) // len(keep)
    return tensor.unflatten(0, (sizes, -1))


def gates_by_size(gate: Tensor, keep: Tensor | None, like: Tensor) -> Tensor:
    """Return the gates in the dtype of `like`, (sizes, B, 1, 1)."""
    gates = by_size(gate, keep)
    return gates[:, :, None, None].to(like.dtype)


def scaled(keep: Tensor | None, scale: float, like: Tensor) -> Tensor:
    """Return scale · keep in the dtype of `like`, (B, T, D), or (), the scale, without dropout."""
    if keep is None:
        return like.new_full((), scale)
    return keep.to(like.dtype).mul_(scale)


@torch.library.custom_op("dynsize::torchs_ctc_loss", mutates_args=())
def torchs_ctc_loss(
    log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the losses, as `ctc_loss`, and their gradients, (N, T, V), by torch's own op.

    It has few launches, but waits for a GPU. `F.ctc_loss` would break the graph of `torch.compile`,
    and gives an infinite loss a gradient of NaN; here it is 0.
    """
    by_frame = log_probs.transpose(0, 1)  # (T, N, V)
    by_frame = by_frame.to(torch.promote_types(log_probs.dtype, torch.float32))
    others = (labels, lengths, label_lengths)
    loss, alpha = torch.ops.aten._ctc_loss.Tensor(by_frame, *others, BLANK, True)
    ones = torch.ones_like(loss)
    grad = torch.ops.aten._ctc_loss_backward.Tensor(
        ones, by_frame, *others, loss, alpha, BLANK, True
    )
    return loss, grad.transpose(0, 1).contiguous()


@torchs_ctc_loss.register_fake
def losses_and_gradients(
    log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes and dtypes that `torchs_ctc_loss` returns."""
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    loss = log_probs.new_empty(len(log_probs), dtype=dtype)
    return loss, log_probs.new_empty(log_probs.shape, dtype=dtype)


def keep_gradient(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the gradient of `torchs_ctc_loss` for the backward pass."""
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def scaled_gradient(ctx, loss_grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    """Return the gradient of the log-probabilities, (N, T, V)."""
    (grad,) = ctx.saved_tensors
    log_probs_grad = loss_grad[:, None, None] * grad
    return log_probs_grad.to(ctx.dtype), None, None, None


torchs_ctc_loss.register_autograd(scaled_gradient, setup_context=keep_gradient)


def layer_seed(seed: Tensor, layer: int) -> Tensor:
    """Return the seeds, (B,), from which layer number `layer` draws its dropout: seed + layer."""
    return seed + layer


def layer_gates(seed: Tensor, layers: int, dropped: float) -> Tensor:
    """Return gates, (L, B) float32: 0 where an utterance skips a layer, and 1 elsewhere.

    Each utterance skips each layer with probability `dropped`, drawn from seed − 1, which no
    layer's dropout uses. Stochastic depth and LayerDrop are such gates. `seed`: (B,) int64.
    """
    stays = dropout_mask(seed - 1, 1, layers, dropped)  # (B, 1, L)
    return stays[:, 0].T.float()


def dropout_mask(seed: Tensor, frames: int, width: int, dropout_p: float) -> Tensor:
    """Return what dropout keeps in the frames of each seed, (B,) int64, as (B, T, D) bool.

    Each of SplitMix64's words of 64 bits gives four draws of 16 bits. The draw of column d in
    frame t is number d mod 4 of word t · ⌈D/4⌉ + d // 4. It is dropped where it is among the
    lowest 65536 · p. On a CPU this takes a seventh of the time of torch's Bernoulli draws.
    """
    words = -(-width // 4)  # of a frame
    number = torch.arange(frames * words, device=seed.device)
    z = number * WEYL + seed[:, None]
    for places, factor in ((30, FIRST), (27, SECOND)):
        z ^= shifted(z, places)
        z *= factor
    z ^= shifted(z, 31)
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
