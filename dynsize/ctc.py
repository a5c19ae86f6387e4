"""CTC (Graves et al. 2006): the loss with its gradient, and greedy decoding.

Label 0 is the blank.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynsize import kernels
from dynsize.config import Config
from dynsize.conformer import padding_mask
from dynsize.kernels.reference import BLANK, torchs_ctc_loss


class Ctc(nn.Linear):
    """CTC's output of one size: a linear layer.

    `labels`: V with the blank. `like`: the output of another size; they share nothing.
    """

    def __init__(self, config: Config, labels: int, like: "Ctc | None" = None) -> None:
        super().__init__(config.width, labels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the labels' log-probabilities, (…, T', V). `x`: (…, T', D)."""
        return log_softmax(super().forward(x))

    @staticmethod
    def losses(
        outputs: Sequence["Ctc"],
        emissions: Tensor,
        lengths: Tensor,
        labels: Tensor,
        label_lengths: Tensor,
    ) -> Tensor:
        """Return the negative log-likelihood of each utterance's labels by M networks, (M, B).

        `outputs`: those of the M networks. `emissions`: (M, B, T', V) log-probabilities. For the
        others see `ctc_loss`. It runs once for all networks, because it loops over the frames.
        """
        networks = len(outputs)
        loss = ctc_loss(
            emissions.flatten(0, 1),  # (M·B, T', V)
            lengths.repeat(networks),
            labels.repeat(networks, 1),
            label_lengths.repeat(networks),
        )
        return loss.unflatten(0, (networks, -1))

    @staticmethod
    def decode(emissions: Tensor, lengths: Tensor) -> list[list[tuple[int, int]]]:
        """Return the labels of each utterance's best path, each with its first frame.

        `emissions`: (B, T', V). `lengths`: (B,) frames.
        """
        paths = emissions.argmax(-1).cpu()  # (B, T')
        pairs = zip(paths, lengths.tolist(), strict=True)
        return [label_frames(path[:length]) for path, length in pairs]

    @staticmethod
    def decode_parts(parts: Iterable[Tensor]) -> list[tuple[int, int]]:
        """Return the same for one utterance, given by parts (T', V) that follow each other."""
        path = [emissions.argmax(-1) for emissions in parts]
        return label_frames(torch.cat(path))

    @staticmethod
    def least_frames(labels: Sequence[int]) -> int:
        """Return the frames that these labels need, and the blanks between two equal ones."""
        repeats = sum(a == b for a, b in pairwise(labels))
        return len(labels) + repeats

    def macs(self, frames: int, labels: int) -> int:
        """Return the multiply-accumulates of decoding."""
        return frames * self.weight.numel()


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32, or in float64 if the logits are."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).log_softmax(-1)


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Return the negative log-likelihood of each utterance's labels, (N,), over all alignments.

    Without labels it is minus the sum of the blank's log-probabilities. It is infinite, with a
    gradient of 0, where the labels and the blanks between repeated ones don't fit into the frames;
    `training_data.keep_usable` leaves such utterances out before a training.

    `log_probs`: (N, T, V) of any float dtype; the loss is computed in float32, or in float64 if
    they are. `lengths`: (N,) frames, 1 to T. `labels`: (N, U), padded with anything.
    `label_lengths`: (N,), 0 to U.
    """
    if kernels.triton_runs("ctc_loss", log_probs.device, log_probs.dtype):
        differentiate = torch.is_grad_enabled() and log_probs.requires_grad
        others = (lengths, labels, label_lengths, differentiate)
        loss, _ = torch.ops.dynsize.ctc_loss(log_probs, *others)
        return loss
    if log_probs.device.type == "cuda":
        loss, _ = torchs_ctc_loss(log_probs, lengths, labels, label_lengths)
        return loss
    return CtcLoss.apply(log_probs, lengths, labels, label_lengths)


class CtcLoss(torch.autograd.Function):
    """−log Σ over alignments, with its gradient.

    The gradient for log_probs[n, t, v] is minus the posterior probability that frame t emits label
    v. It is 0 in the padding, and where no alignment exists.

    The states are the labels with blanks around them, s = 0 … 2U. With e(t, s) the log-probability
    of the state's label in frame t, α(t, s) = e(t, s) + log Σ exp α(t−1, s'). The sum is over the
    states before: s' = s, s' = s−1, and also s' = s−2 where state s is no blank and its label
    differs from that of s−2. β is the same recursion on the utterance and its labels reversed, so
    one loop over the frames, on a batch of 2 N, gives both.

    α and β are kept relative to the largest number of each frame, because float32 rounds those of
    long utterances, −10⁴, to 10⁻³. As the posterior probabilities of a frame sum to 1, they are the
    softmax over its states.
    """

    @staticmethod
    def forward(
        ctx, log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> Tensor:
        utterances, frames, vocabulary = log_probs.shape
        last_frame = lengths - 1  # (N,)
        last_state = 2 * label_lengths  # (N,)
        states = 2 * labels.shape[1] + 1  # S
        extended = labels.new_full((utterances, states), BLANK)  # (N, S)
        extended[:, 1::2] = labels
        inside = padding_mask(last_state + 1, states)  # (N, S)
        extended = extended.masked_fill(~inside, BLANK)  # padding may hold anything
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        by_frame = extended[:, None].expand(-1, frames, -1)  # (N, T, S)
        emitted = log_probs.to(dtype).gather(2, by_frame)  # (N, T, S)
        emitted = emitted.masked_fill(~inside[:, None], -torch.inf)
        alpha, beta, largest = forward_backward(emitted, extended, last_frame, last_state)

        # An alignment ends in the last label or in the blank after it.
        utterance = torch.arange(utterances, device=alpha.device)
        at_end = alpha[utterance, last_frame]  # (N, S)
        before_end = padding_mask(last_state - 1, states)
        at_end = at_end.masked_fill(before_end, -torch.inf)
        subtracted = largest.cumsum(1)[utterance, last_frame]
        log_likelihood = at_end.logsumexp(1) + subtracted  # (N,)

        # e(t, s) is in both α and β: take it out once; −inf − −inf would be NaN
        posterior = alpha + beta - emitted.clamp(min=-1e30)  # (N, T, S), in logarithms
        posterior = posterior.softmax(2)
        possible = log_likelihood.isfinite()[:, None]  # (N, 1)
        frames_inside = padding_mask(lengths, frames) & possible  # (N, T)
        somewhere = frames_inside[:, :, None] & inside[:, None]  # (N, T, S)
        posterior = posterior.masked_fill(~somewhere, 0)
        ctx.save_for_backward(posterior, extended)
        ctx.vocabulary = vocabulary
        ctx.dtype = log_probs.dtype
        return -log_likelihood

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        posterior, extended = ctx.saved_tensors
        utterances, frames, _ = posterior.shape
        by_frame = extended[:, None].expand_as(posterior)  # (N, T, S)
        occupied = posterior.new_zeros(utterances, frames, ctx.vocabulary)
        occupied.scatter_add_(2, by_frame, posterior)  # (N, T, V)
        occupied *= -grad[:, None, None]
        return occupied.to(ctx.dtype), None, None, None


def flipped(x: Tensor, last: Tensor, dim: int) -> Tensor:
    """Return `x` with the entries 0 to `last`, (N,), of a dimension in reverse order.

    The entries after them are undefined.
    """
    index = last[:, None] - torch.arange(x.shape[dim], device=x.device)
    index = index.clamp(min=0)  # (N, size of the dimension)
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    return x.gather(dim, index.view(shape).expand_as(x))


def forward_backward(
    emitted: Tensor, extended: Tensor, last_frame: Tensor, last_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return α and β of every frame and state, (N, T, S), and what was subtracted from α, (N, T).

    `emitted`: (N, T, S) log-probabilities, −inf outside the states of an utterance. `extended`:
    (N, S). `last_frame`, `last_state`: (N,); β is undefined past them.
    """
    reverse = flipped(emitted, last_frame, dim=1)
    reverse = flipped(reverse, last_state, dim=2)
    inside = padding_mask(last_state + 1, extended.shape[1])  # (N, S)
    reverse = reverse.masked_fill(~inside[:, None], -torch.inf)
    reverse_extended = flipped(extended, last_state, dim=1)
    both = torch.cat([emitted, reverse])  # (2N, T, S)
    both_extended = torch.cat([extended, reverse_extended])  # (2N, S)
    variables, largest = forward_variables(both, both_extended)
    alpha, beta = variables.chunk(2)
    beta = flipped(beta, last_frame, dim=1)
    beta = flipped(beta, last_state, dim=2)
    return alpha, beta, largest[: len(alpha)]


def forward_variables(emitted: Tensor, extended: Tensor) -> tuple[Tensor, Tensor]:
    """Return α of every frame and state, (N, T, S), and what was subtracted in each frame, (N, T).

    `emitted`: (N, T, S) log-probabilities. `extended`: (N, S), labels with blanks around them.
    """
    label = extended[:, 2:]  # (N, S − 2)
    two_before = extended[:, :-2]
    may_skip = (label != BLANK) & (label != two_before)
    first, *others = emitted.unbind(1)  # (N, S) each
    skip_penalty = torch.full_like(first, -torch.inf)
    skip_penalty[:, 2:].masked_fill_(may_skip, 0)
    alpha = torch.full_like(first, -torch.inf)
    alpha[:, :2] = first[:, :2]
    alphas = [alpha]
    largest = [torch.zeros_like(alpha[:, :1])]
    for of_frame in others:
        before = F.pad(alpha, (2, 0), value=-torch.inf)  # (N, 2 + S): each state has two before it
        stepped = before[:, 1:-1]
        skipped = before[:, :-2] + skip_penalty
        entering = torch.logaddexp(alpha, stepped)
        entering = torch.logaddexp(entering, skipped)
        alpha = entering + of_frame
        maximum = alpha.amax(1, keepdim=True)
        maximum = maximum.clamp(min=-1e30)  # finite where no alignment gets here
        alpha = alpha - maximum
        alphas.append(alpha)
        largest.append(maximum)
    return torch.stack(alphas, 1), torch.cat(largest, 1)


def label_frames(path: Tensor) -> list[tuple[int, int]]:
    """Return the labels of a best path, (T,), each with the first frame in which it is emitted.

    Repeats are joined, then blanks removed.
    """
    labels, counts = torch.unique_consecutive(path, return_counts=True)
    end = counts.cumsum(0)
    first = end - counts
    emitted = labels != BLANK
    labels = labels[emitted].tolist()
    frames = first[emitted].tolist()
    return list(zip(labels, frames, strict=True))
