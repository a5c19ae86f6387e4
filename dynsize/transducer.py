"""The transducer (Graves 2012): a joiner of frames and labels, its loss, and greedy decoding.

An alignment is a path through a lattice. At its node (t, u), frame t has been reached and u of the
U labels have been emitted. From there it emits either the blank, and goes on to (t + 1, u), or the
next label, and goes on to (t, u + 1). It begins at (0, 0), and the blank of the last frame ends it
at (T, U). The likelihood of the labels is the sum over all of these paths.

Which label comes next depends on the frame and on the last two labels (Ghodsi et al. 2020,
"RNN-transducer with stateless prediction network"). Label 0 is the blank. In the context it stands
for the beginning of an utterance.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynsize.config import Config
from dynsize.conformer import padding_mask
from dynsize.ctc import BLANK, log_softmax

CONTEXT_LABELS = 2  # labels that decide about the next one
MOST_LABELS = 5  # that greedy decoding emits in one frame
MOST_NUMBERS = 2**24  # that the joiner computes at a time, 64 MB in float32


class LabelSide(nn.Module):
    """The stateless prediction network: the embedding of the last two labels, then a linear layer.

    All sizes share it, as it sees no frame.
    """

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(labels, width)
        self.project = nn.Linear(CONTEXT_LABELS * width, width)

    def forward(self, context: Tensor) -> Tensor:
        """Return (…, D). `context`: (…, 2) the last two labels, the older one first."""
        x = self.embedding(context)  # (…, 2, D)
        return self.project(x.flatten(-2))


class Transducer(nn.Module):
    """The transducer of one size. Its joiner is `joiner(tanh(encoder side + label side))`.

    `labels`: V with the blank. `like`: the output of another size, with which this one shares the
    label side.
    """

    def __init__(self, config: Config, labels: int, like: "Transducer | None" = None) -> None:
        super().__init__()
        width = config.width
        self.encoder_side = nn.Linear(width, width)
        self.label_side = like.label_side if like else LabelSide(width, labels)
        self.joiner = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoder side, (…, T', D), in float32 at least. `x`: (…, T', D)."""
        x = self.encoder_side(x)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def losses(
        outputs: Sequence["Transducer"],
        emissions: Tensor,
        lengths: Tensor,
        labels: Tensor,
        label_lengths: Tensor,
    ) -> Tensor:
        """Return the negative log-likelihood of each utterance's labels by M networks, (M, B).

        `outputs`: those of the M networks. `emissions`: (M, B, T', D), their encoder sides.
        `lengths`: (B,), 1 to T'. `labels`: (B, U), padded with anything. `label_lengths`: (B,), 0
        to U.
        """
        inside = padding_mask(label_lengths, labels.shape[1])  # (B, U)
        labels = labels.masked_fill(~inside, BLANK)
        before = F.pad(labels, (CONTEXT_LABELS, 0), value=BLANK)  # (B, 2 + U)
        contexts = before.unfold(1, CONTEXT_LABELS, 1)  # (B, U + 1, 2)
        label_side = outputs[0].label_side(contexts)  # (B, U + 1, D), the same for all sizes
        pairs = zip(outputs, emissions, strict=True)
        nodes = [output.nodes(of_size, label_side, labels) for output, of_size in pairs]
        blank, label = zip(*nodes, strict=True)
        networks = len(outputs)
        loss = transducer_loss(
            torch.cat(blank),  # (M·B, T', U + 1)
            torch.cat(label),  # (M·B, T', U)
            lengths.repeat(networks),
            label_lengths.repeat(networks),
        )
        return loss.unflatten(0, (networks, -1))

    def nodes(
        self, encoder_side: Tensor, label_side: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities at all nodes: (B, T', U + 1) blank, (B, T', U) next label.

        The joiner's V numbers for each node are most of the memory of a transducer's training. So
        it runs for a few utterances at a time, and computes them again in the backward pass.

        `encoder_side`: (B, T', D). `label_side`: (B, U + 1, D). `labels`: (B, U).
        """
        numbers = self.joiner.in_features + self.joiner.out_features  # for each node
        of_utterance = encoder_side.shape[1] * label_side.shape[1] * numbers
        utterances = max(1, MOST_NUMBERS // of_utterance)
        if utterances >= len(labels):
            return self.join(encoder_side, label_side, labels)
        parts = zip(
            encoder_side.split(utterances),
            label_side.split(utterances),
            labels.split(utterances),
            strict=True,
        )
        options = dict(use_reentrant=False, preserve_rng_state=False)
        nodes = [checkpoint(self.join, *part, **options) for part in parts]
        blank, label = zip(*nodes, strict=True)
        return torch.cat(blank), torch.cat(label)

    def join(
        self, encoder_side: Tensor, label_side: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the same as `nodes`, of a few utterances."""
        frames = encoder_side.shape[1]
        nodes = encoder_side[:, :, None] + label_side[:, None]  # (b, T', U + 1, D)
        logits = self.joiner(torch.tanh(nodes))  # (b, T', U + 1, V)
        log_probs = log_softmax(logits)
        next_label = labels[:, None, :, None]  # (b, 1, U, 1)
        next_label = next_label.expand(-1, frames, -1, -1)
        label = log_probs[:, :, :-1].gather(-1, next_label)  # (b, T', U, 1)
        return log_probs[..., BLANK], label.squeeze(-1)

    def decode(self, emissions: Tensor, lengths: Tensor) -> list[list[tuple[int, int]]]:
        """Return the labels of each utterance, each with the frame in which it is emitted.

        In each frame the best label is emitted, until this is the blank or there are `MOST_LABELS`.
        `emissions`: (B, T', D). `lengths`: (B,) frames.
        """
        device = self.joiner.weight.device
        emissions = emissions.to(device)
        lengths = lengths.to(device)
        context = lengths.new_full((len(emissions), CONTEXT_LABELS), BLANK)  # (B, 2)
        label_side = self.label_side(context)  # (B, D)
        frames = [0]
        emitted = [torch.full_like(lengths, BLANK)]  # (B,) in each of these frames
        for frame in range(emissions.shape[1]):
            inside = frame < lengths  # (B,)
            for _ in range(MOST_LABELS):
                nodes = emissions[:, frame] + label_side  # (B, D)
                logits = self.joiner(torch.tanh(nodes))  # (B, V)
                label = logits.argmax(-1)
                label = label.masked_fill(~inside, BLANK)
                emits = label != BLANK
                if not emits.any():  # note: this waits for the device
                    break
                frames.append(frame)
                emitted.append(label)
                longer = torch.stack([context[:, -1], label], dim=1)  # (B, 2)
                context = torch.where(emits[:, None], longer, context)
                label_side = self.label_side(context)
        by_utterance = torch.stack(emitted, dim=1).tolist()
        found = []
        for of_utterance in by_utterance:
            pairs = zip(of_utterance, frames, strict=True)
            found.append([(label, frame) for label, frame in pairs if label != BLANK])
        return found

    def decode_parts(self, parts: Iterable[Tensor]) -> list[tuple[int, int]]:
        """Return the same for one utterance, given by parts (T', D) that follow each other."""
        emissions = torch.cat(list(parts))
        (found,) = self.decode(emissions[None], torch.tensor([len(emissions)]))
        return found

    @staticmethod
    def least_frames(labels: Sequence[int]) -> int:
        """Return the frames in which greedy decoding can emit these labels."""
        return math.ceil(len(labels) / MOST_LABELS)

    def macs(self, frames: int, labels: int) -> int:
        """Return the multiply-accumulates of greedy decoding."""
        encoder_side = frames * self.encoder_side.weight.numel()
        label_side = labels * self.label_side.project.weight.numel()
        joiner = (frames + labels) * self.joiner.weight.numel()
        return encoder_side + label_side + joiner


def transducer_loss(blank: Tensor, label: Tensor, lengths: Tensor, label_lengths: Tensor) -> Tensor:
    """Return the negative log-likelihood of each utterance's labels, (N,), over all alignments.

    It is infinite, with a gradient of 0, where no alignment is possible. `blank`: (N, T, U + 1) and
    `label`: (N, T, U), the log-probabilities of the blank and of the next label at each node; these
    are all that the loss reads of V labels. They are of any float dtype. The loss is computed in
    float32, or in float64 if they are. What lies outside an utterance is not read. `lengths`: (N,)
    frames, 1 to T. `label_lengths`: (N,), 0 to U.
    """
    return TransducerLoss.apply(blank, label, lengths, label_lengths)


class TransducerLoss(torch.autograd.Function):
    """−log Σ over alignments, with its gradient: minus the probability that a path takes an arc.

    It has no matrix products, so autocast changes nothing in it. It is computed over the diagonals
    n = t + u of the lattice. Each arc leads from a diagonal to the next one, so all nodes of a
    diagonal are computed at once. α(n, u) is the log-probability of the paths from the beginning to
    a node, and β(n, u) of those from it to the end.

    Each path takes one arc from each diagonal. So the probabilities of the arcs from a diagonal sum
    to 1, and are the softmax of α + arc + β. α and β are kept relative to the largest number of
    their diagonal, because float32 rounds those of long utterances, −10⁴, to 10⁻³.
    """

    @staticmethod
    def forward(
        ctx, blank: Tensor, label: Tensor, lengths: Tensor, label_lengths: Tensor
    ) -> Tensor:
        frames, columns = blank.shape[1:]
        inside = padding_mask(lengths, frames)[:, :, None]  # (N, T, 1)
        nodes = padding_mask(label_lengths + 1, columns)[:, None]  # (N, 1, U + 1)
        before_last_node = padding_mask(label_lengths, columns)[:, None]  # (N, 1, U + 1)
        ctx.dtype = blank.dtype
        dtype = torch.promote_types(blank.dtype, torch.float32)
        label = F.pad(label, (0, 1)).to(dtype)  # (N, T, U + 1)
        label = label.masked_fill(~(inside & before_last_node), -torch.inf)
        blank = blank.to(dtype)
        blank = blank.masked_fill(~(inside & nodes), -torch.inf)
        blank_arcs = by_diagonal(blank)
        label_arcs = by_diagonal(label)
        last = lengths + label_lengths  # (N,): the diagonal of the end
        alpha, largest = paths_to_nodes(blank_arcs, label_arcs)
        beta = paths_from_nodes(blank_arcs, label_arcs, last, label_lengths)
        utterance = torch.arange(len(last), device=last.device)
        log_likelihood = largest.cumsum(1)[utterance, last]  # (N,)
        before = alpha[:, :-1]  # (N, T + U, U + 1): α where each arc begins
        after_blank = beta[:, 1:]  # β where it ends
        after_label = one_label_earlier(after_blank)
        through_blank = before + blank_arcs + after_blank
        through_label = before + label_arcs + after_label
        through = torch.cat([through_blank, through_label], dim=2)
        posterior = through.softmax(2)
        before_end = padding_mask(last, posterior.shape[1])  # (N, T + U)
        somewhere = before_end & log_likelihood.isfinite()[:, None]
        posterior = posterior.masked_fill(~somewhere[:, :, None], 0)
        of_blank, of_label = posterior.chunk(2, dim=2)
        ctx.save_for_backward(by_frame(of_blank, frames), by_frame(of_label, frames))
        return -log_likelihood

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_blank, by_label = ctx.saved_tensors  # (N, T, U + 1) each
        minus = -grad[:, None, None]
        blank_grad = minus * by_blank
        label_grad = minus * by_label[:, :, :-1]
        return blank_grad.to(ctx.dtype), label_grad.to(ctx.dtype), None, None


def by_diagonal(x: Tensor) -> Tensor:
    """Return (N, T + U, U + 1), node (t, u) in row t + u, −inf elsewhere. `x`: (N, T, U + 1)."""
    frames, columns = x.shape[1:]
    row = torch.arange(frames + columns - 1, device=x.device)
    label = torch.arange(columns, device=x.device)
    frame = row[:, None] - label  # (T + U, U + 1)
    outside = (frame < 0) | (frame >= frames)
    index = frame.clamp(0, frames - 1)
    index = index.expand(len(x), -1, -1)
    moved = x.gather(1, index)
    return moved.masked_fill(outside, -torch.inf)


def by_frame(x: Tensor, frames: int) -> Tensor:
    """Return (N, T, U + 1), node (t, u) in row t again. `x`: (N, T + U, U + 1)."""
    frame = torch.arange(frames, device=x.device)
    label = torch.arange(x.shape[2], device=x.device)
    row = frame[:, None] + label  # (T, U + 1)
    row = row.expand(len(x), -1, -1)
    return x.gather(1, row)


def one_label_later(x: Tensor) -> Tensor:
    """Return `x`, (…, U + 1), with the number of u − 1 at u, and −inf at 0."""
    return F.pad(x[..., :-1], (1, 0), value=-torch.inf)


def one_label_earlier(x: Tensor) -> Tensor:
    """Return `x`, (…, U + 1), with the number of u + 1 at u, and −inf at U."""
    return F.pad(x[..., 1:], (0, 1), value=-torch.inf)


def paths_to_nodes(blank_arcs: Tensor, label_arcs: Tensor) -> tuple[Tensor, Tensor]:
    """Return α, (N, T + U + 1, U + 1), and what was subtracted on each diagonal, (N, T + U + 1).

    The sum of the latter up to the end is the log-likelihood: there is no other node on the last
    diagonal. The arcs: (N, T + U, U + 1) log-probabilities, −inf where there is no arc.
    """
    here = torch.full_like(blank_arcs[:, 0], -torch.inf)  # (N, U + 1)
    here[:, 0] = 0
    rows = [here]
    subtracted = [here[:, 0]]
    for blank, label in zip(blank_arcs.unbind(1), label_arcs.unbind(1), strict=True):
        by_blank = here + blank
        by_label = one_label_later(here + label)
        here = torch.logaddexp(by_blank, by_label)
        largest = here.amax(1)
        finite = largest.clamp(min=-1e30)  # where no path gets here too
        here = here - finite[:, None]
        rows.append(here)
        subtracted.append(largest)
    return torch.stack(rows, dim=1), torch.stack(subtracted, dim=1)


def paths_from_nodes(
    blank_arcs: Tensor, label_arcs: Tensor, last: Tensor, label_lengths: Tensor
) -> Tensor:
    """Return β, (N, T + U + 1, U + 1). `last`: (N,), the diagonal on which each utterance ends."""
    diagonals, columns = blank_arcs.shape[1:]
    diagonal = torch.arange(diagonals + 1, device=last.device)
    label = torch.arange(columns, device=last.device)
    on_last = diagonal == last[:, None]  # (N, T + U + 1)
    on_end = label == label_lengths[:, None]  # (N, U + 1)
    ends = on_last[:, :, None] & on_end[:, None]
    here = torch.full_like(blank_arcs[:, 0], -torch.inf)  # (N, U + 1)
    here = here.masked_fill(ends[:, -1], 0)
    rows = [here]
    by_diagonals = [part.unbind(1) for part in (blank_arcs, label_arcs, ends[:, :-1])]
    arcs = list(zip(*by_diagonals, strict=True))
    for blank, label, end in reversed(arcs):
        by_blank = here + blank
        by_label = one_label_earlier(here) + label
        here = torch.logaddexp(by_blank, by_label)
        largest = here.amax(1, keepdim=True)
        here = here - largest.clamp(min=-1e30)
        here = here.masked_fill(end, 0)
        rows.append(here)
    return torch.stack(rows[::-1], dim=1)
