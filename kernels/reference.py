"""Each op in plain torch: its definition, what runs where Triton does not, and what the kernels are tested against.

Letters: R rows of the batch (all sizes stacked), T frames, D model width, K width of a layer's last projection,
N utterances, V labels with the blank, U target labels, S = 2 U + 1 states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLANK = 0
# SplitMix64 (Steele, Lea, Flood 2014), the multipliers as signed numbers
WEYL, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """x + scale · gate · dropout(branch). See `kernels.gated_residual`."""
    if dropout_p:
        branch = torch.where(kept(branch.shape, dropout_p, seed), branch, 0.0)
        scale = scale / (1 - dropout_p)
    if gate is None:
        return torch.add(x, branch, alpha=scale).to(x.dtype)
    return Gated.apply(x, branch, gate, scale)


class Gated(torch.autograd.Function):
    """x + scale · gate · branch, where a gate of 0 keeps out whatever the branch holds, NaN too, and all the same gets
    its own gradient: the automatic one would be 0 · branch."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, gate: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate)
        ctx.scale, ctx.dtype = scale, branch.dtype
        gate = gate.reshape(-1, 1, 1)
        return torch.where(gate != 0, x + (scale * gate).to(branch.dtype) * branch, x).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        branch, gate = ctx.saved_tensors
        factor = gate.reshape(-1, 1, 1)
        for_branch = torch.where(factor != 0, grad * (ctx.scale * factor).to(grad.dtype), 0.0).to(ctx.dtype)
        if branch is None:
            return grad, for_branch, None, None
        for_gate = ctx.scale * (grad * branch).sum((1, 2), dtype=torch.promote_types(gate.dtype, torch.float32))
        return grad, for_branch, for_gate.sum_to_size(gate.shape).to(gate.dtype), None


def kept(shape: torch.Size, dropout_p: float, seed: Tensor) -> Tensor:
    """What dropout keeps of a tensor of `shape`, (R, T, D) bool: a function of the seed, the frame and the column.

    Column d of frame f has the (d mod 4)-th 16 bits of SplitMix64's word number f · ⌈D/4⌉ + d // 4, and is dropped
    where they are among the lowest 65536 · p. On a CPU this takes a seventh of the time of torch's Bernoulli draws.
    """
    frames, words = shape[:-1], -(-shape[-1] // 4)
    z = torch.arange(frames.numel() * words, device=seed.device) * WEYL + seed
    z = (z ^ (z >> 30)) * FIRST  # the shifts are arithmetic: torch has no others
    z = (z ^ (z >> 27)) * SECOND
    bits = (z ^ (z >> 31)).view(torch.int16)
    return bits.view(*frames, 4 * words)[..., : shape[-1]] >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """The lowest of the 65536 draws, −32768 to 32767, that is kept."""
    return min(round(65536 * dropout_p), 65535) - 32768


def gated_residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: float,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x + scale · gate · dropout(branch), and LayerNorm(y). See `kernels.gated_residual_layer_norm`."""
    y = gated_residual(x, branch, gate, scale, dropout_p, seed)
    wide = torch.promote_types(y.dtype, torch.float32)
    normed = F.layer_norm(y.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y, normed.to(y.dtype)


def linear_gated_residual(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + scale · gate · dropout(h @ weightᵀ + bias). See `kernels.linear_gated_residual`."""
    return gated_residual(x, F.linear(h, weight, bias), gate, scale, dropout_p, seed)


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """−log Σ over alignments, of each utterance. See `kernels.ctc_loss`."""
    return CtcLoss.apply(log_probs, lengths, labels, label_lengths)


class CtcLoss(torch.autograd.Function):
    """−log Σ over alignments; the gradient is minus the posterior probability of each label in each frame.

    The states are the labels with blanks around them, s = 0 … 2U. With e(t, s) the log-probability of the state's
    label in frame t, α(t, s) = e(t, s) + log Σ exp α(t−1, s'), with s' = s, s−1 and, where state s is a label other
    than that of s−2, s−2. β is the same recursion on the utterance and its labels reversed, so one loop over the
    frames, on a batch of 2 N, gives both.
    """

    @staticmethod
    def forward(ctx, log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        frames, states = log_probs.shape[1], 2 * labels.shape[1] + 1
        last = 2 * label_lengths  # (N,) the last state
        time, state = torch.arange(frames, device=labels.device), torch.arange(states, device=labels.device)
        extended = labels.new_full((len(labels), states), BLANK)
        extended[:, 1::2] = labels
        extended = extended.masked_fill(state > last[:, None], BLANK)  # the padding may hold anything
        emitted = log_probs.to(dtype).gather(2, extended[:, None].expand(-1, frames, -1))  # (N, T, S)
        emitted = emitted.masked_fill(state > last[:, None, None], -torch.inf)
        to_reversed = (lengths[:, None] - 1 - time).clamp(min=0)  # (N, T): frame t ↔ frame length − 1 − t
        state_reversed = (last[:, None] - state).clamp(min=0)  # (N, S)
        index = to_reversed[:, :, None].expand(-1, -1, states), state_reversed[:, None].expand(-1, frames, -1)
        backwards = emitted.gather(1, index[0]).gather(2, index[1])
        backwards = backwards.masked_fill(state > last[:, None, None], -torch.inf)
        both_labels = torch.cat([extended, extended.gather(1, state_reversed)])
        alpha, beta = forward_variables(torch.cat([emitted, backwards]), both_labels).chunk(2)  # (N, T, S)
        at_end = alpha.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, states))[:, 0]  # (N, S)
        final = (state == last[:, None]) | (state == last[:, None] - 1)
        log_likelihood = at_end.masked_fill(~final, -torch.inf).logsumexp(1)
        beta = beta.gather(1, index[0]).gather(2, index[1])
        # α and β both contain e(t, s), so that one of them must go
        posterior = (alpha + beta - emitted.clamp(min=-1e30) - log_likelihood[:, None, None]).exp()
        valid = (time < lengths[:, None])[..., None] & (state <= last[:, None, None])
        valid &= log_likelihood.isfinite()[:, None, None]
        ctx.save_for_backward(posterior.masked_fill(~valid, 0), extended)
        ctx.vocabulary, ctx.dtype = log_probs.shape[2], log_probs.dtype
        return -log_likelihood

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        posterior, extended = ctx.saved_tensors
        occupied = posterior.new_zeros(*posterior.shape[:2], ctx.vocabulary)
        occupied.scatter_add_(2, extended[:, None].expand_as(posterior), posterior)  # (N, T, V)
        return (-grad[:, None, None] * occupied).to(ctx.dtype), None, None, None


def forward_variables(emitted: Tensor, labels: Tensor) -> Tensor:
    """α of every frame and state. `emitted`: (N, T, S) log-probabilities; `labels`: (N, S). Returns (N, T, S)."""
    skip = torch.zeros_like(labels, dtype=torch.bool)
    skip[:, 2:] = (labels[:, 2:] != BLANK) & (labels[:, 2:] != labels[:, :-2])
    skip_penalty = torch.zeros_like(emitted[:, 0]).masked_fill(~skip, -torch.inf)[:, 2:]
    alpha = torch.full_like(emitted, -torch.inf)
    alpha[:, 0, :2] = emitted[:, 0, :2]
    for t in range(1, emitted.shape[1]):
        before = alpha[:, t - 1]
        sources = before.new_full((3, *before.shape), -torch.inf)
        sources[0], sources[1, :, 1:], sources[2, :, 2:] = before, before[:, :-1], before[:, :-2] + skip_penalty
        alpha[:, t] = sources.logsumexp(0) + emitted[:, t]
    return alpha
