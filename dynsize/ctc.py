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
    def forward(
        ctx, log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> Tensor:
        dtype, frames = torch.promote_types(log_probs.dtype, torch.float32), log_probs.shape[1]
        last, state = (
            2 * label_lengths[:, None],
            torch.arange(2 * labels.shape[1] + 1, device=labels.device),
        )
        outside = (state > last)[:, None]  # (N, 1, S)
        extended = with_blanks(labels).masked_fill(
            outside[:, 0], BLANK
        )  # the padding may hold anything
        emitted = log_probs.to(dtype).gather(
            2, extended[:, None].expand(-1, frames, -1)
        )  # (N, T, S)
        emitted = emitted.masked_fill(outside, -torch.inf)
        backwards = flipped(flipped(emitted, lengths - 1, 1), last[:, 0], 2).masked_fill(
            outside, -torch.inf
        )
        both_labels = torch.cat([extended, flipped(extended, last[:, 0], 1)])
        alpha, beta = forward_variables(torch.cat([emitted, backwards]), both_labels).chunk(
            2
        )  # (N, T, S) each
        beta = flipped(flipped(beta, lengths - 1, 1), last[:, 0], 2)
        at_end = alpha[torch.arange(len(alpha), device=alpha.device), lengths - 1]  # (N, S)
        final = (state == last) | (state == last - 1)
        log_likelihood = at_end.masked_fill(~final, -torch.inf).logsumexp(1)  # (N,)
        # α and β both contain e(t, s), so that one of them must go
        posterior = (alpha + beta - emitted.clamp(min=-1e30) - log_likelihood[:, None, None]).exp()
        after = (
            torch.arange(frames, device=labels.device)[:, None] >= lengths[:, None, None]
        )  # (N, T, 1)
        nowhere = after | outside | ~log_likelihood.isfinite()[:, None, None]
        ctx.save_for_backward(posterior.masked_fill(nowhere, 0), extended)
        ctx.vocabulary, ctx.dtype = log_probs.shape[2], log_probs.dtype
        return -log_likelihood

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        posterior, extended = ctx.saved_tensors
        occupied = posterior.new_zeros(*posterior.shape[:2], ctx.vocabulary)
        occupied.scatter_add_(2, extended[:, None].expand_as(posterior), posterior)  # (N, T, V)
        return (-grad[:, None, None] * occupied).to(ctx.dtype), None, None, None


def with_blanks(labels: Tensor) -> Tensor:
    """(N, U) labels → (N, S), with a blank before, between and behind them."""
    extended = labels.new_full((len(labels), 2 * labels.shape[1] + 1), BLANK)
    extended[:, 1::2] = labels
    return extended


def flipped(x: Tensor, last: Tensor, dim: int) -> Tensor:
    """`x` with the entries 0 to `last`, (N,), of a dimension in reverse order; behind them is no matter what."""
    place = torch.arange(x.shape[dim], device=x.device)
    index = (last[:, None] - place).clamp(min=0)  # (N, size of the dimension)
    return x.gather(
        dim,
        index.view(len(x), *(x.shape[d] if d == dim else 1 for d in range(1, x.dim()))).expand_as(
            x
        ),
    )


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
        sources[0], sources[1, :, 1:], sources[2, :, 2:] = (
            before,
            before[:, :-1],
            before[:, :-2] + skip_penalty,
        )
        alpha[:, t] = sources.logsumexp(0) + emitted[:, t]
    return alpha


def greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """The best label of each frame, repeats joined, blanks removed. `log_probs`: (N, T, V). Returns N lists."""
    best = log_probs.argmax(-1).cpu()
    paths = (
        torch.unique_consecutive(path[:length]).tolist()
        for path, length in zip(best, lengths.tolist(), strict=True)
    )
    return [[label for label in path if label != BLANK] for path in paths]


def label_frames(path: Tensor) -> list[tuple[int, int]]:
    """Returns the labels of a best path, (T,), each with the first frame in which it is emitted."""
    labels, counts = torch.unique_consecutive(path, return_counts=True)
    first = counts.cumsum(0) - counts
    pairs = zip(labels.tolist(), first.tolist(), strict=True)
    return [(label, frame) for label, frame in pairs if label != BLANK]
