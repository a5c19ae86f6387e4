"""CTC (Graves et al. 2006): the loss with its analytic gradient, and greedy decoding. Label 0 is the blank."""

import torch
from torch import Tensor

BLANK = 0


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Negative log-likelihood of each utterance's labels, summed over all alignments.

    `log_probs`: (N, T, V) of any float dtype; computed in float32, or in float64 if they are. `lengths`: (N,) frames,
    1 to T. `labels`: (N, U), padded with anything. `label_lengths`: (N,), 0 to U. Returns (N,); infinite, with a
    gradient of 0, where the labels and the blanks between repeated ones don't fit into the frames.
    """
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


def greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """The best label of each frame, repeats joined, blanks removed. `log_probs`: (N, T, V). Returns N lists."""
    best = log_probs.argmax(-1).cpu()
    paths = (
        torch.unique_consecutive(path[:length]).tolist() for path, length in zip(best, lengths.tolist(), strict=True)
    )
    return [[label for label in path if label != BLANK] for path in paths]
