"""CTC (Graves et al. 2006): the loss with its gradient, greedy decoding, beam search.

Label 0 is the blank.
"""

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from dynsize import kernels

BLANK = 0
WORD = "▁"  # SentencePiece's mark: a label that begins with it begins a word


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Returns the negative log-likelihood of each utterance's labels, (N,), over all alignments.

    It is infinite, with a gradient of 0, where the labels and the blanks between repeated ones
    don't fit into the frames. `log_probs`: (N, T, V) of any float dtype; the loss is computed in
    float32, or in float64 if they are. `lengths`: (N,) frames, 1 to T. `labels`: (N, U), padded
    with anything. `label_lengths`: (N,), 0 to U.
    """
    if kernels.triton_runs("ctc_loss", log_probs.device, log_probs.dtype):
        return kernels.ctc_loss(log_probs, lengths, labels, label_lengths)
    return CtcLoss.apply(log_probs, lengths, labels, label_lengths)


class CtcLoss(torch.autograd.Function):
    """−log Σ over alignments; its gradient is minus each label's posterior probability in a frame.

    The states are the labels with blanks around them, s = 0 … 2U. With e(t, s) the log-probability
    of the state's label in frame t, α(t, s) = e(t, s) + log Σ exp α(t−1, s'), with s' = s, s−1 and,
    where state s is a label other than that of s−2, s−2. β is the same recursion on the utterance
    and its labels reversed, so one loop over the frames, on a batch of 2 N, gives both.
    """

    @staticmethod
    def forward(
        ctx, log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> Tensor:
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        frames = log_probs.shape[1]
        last = 2 * label_lengths  # (N,), the last state
        state = torch.arange(2 * labels.shape[1] + 1, device=labels.device)
        outside = state > last[:, None]  # (N, S)
        extended = with_blanks(labels).masked_fill(outside, BLANK)  # padding may hold anything
        by_frame = extended[:, None].expand(-1, frames, -1)  # (N, T, S)
        emitted = log_probs.to(dtype).gather(2, by_frame)
        emitted = emitted.masked_fill(outside[:, None], -torch.inf)
        backwards = flipped(flipped(emitted, lengths - 1, 1), last, 2)
        backwards = backwards.masked_fill(outside[:, None], -torch.inf)
        both = torch.cat([emitted, backwards])  # (2 N, T, S)
        alpha, beta = forward_variables(
            both, torch.cat([extended, flipped(extended, last, 1)])
        ).chunk(2)
        beta = flipped(flipped(beta, lengths - 1, 1), last, 2)
        at_end = alpha[torch.arange(len(alpha), device=alpha.device), lengths - 1]  # (N, S)
        final = (state == last[:, None]) | (state == last[:, None] - 1)
        log_likelihood = at_end.masked_fill(~final, -torch.inf).logsumexp(1)  # (N,)
        # α and β both contain e(t, s), so one of them must go
        posterior = (alpha + beta - emitted.clamp(min=-1e30) - log_likelihood[:, None, None]).exp()
        after = torch.arange(frames, device=labels.device)[:, None] >= lengths[:, None, None]
        nowhere = after | outside[:, None] | ~log_likelihood.isfinite()[:, None, None]
        ctx.save_for_backward(posterior.masked_fill(nowhere, 0), extended)
        ctx.vocabulary = log_probs.shape[2]
        ctx.dtype = log_probs.dtype
        return -log_likelihood

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        posterior, extended = ctx.saved_tensors
        occupied = posterior.new_zeros(*posterior.shape[:2], ctx.vocabulary)
        occupied.scatter_add_(2, extended[:, None].expand_as(posterior), posterior)  # (N, T, V)
        return (-grad[:, None, None] * occupied).to(ctx.dtype), None, None, None


def with_blanks(labels: Tensor) -> Tensor:
    """Returns (N, S) from (N, U) labels: a blank before, between and after them."""
    extended = labels.new_full((len(labels), 2 * labels.shape[1] + 1), BLANK)
    extended[:, 1::2] = labels
    return extended


def flipped(x: Tensor, last: Tensor, dim: int) -> Tensor:
    """Returns `x` with the entries 0 to `last`, (N,), of a dimension in reverse order.

    The entries after them are undefined.
    """
    place = torch.arange(x.shape[dim], device=x.device)
    index = (last[:, None] - place).clamp(min=0)  # (N, size of the dimension)
    shape = [1] * x.dim()
    shape[0], shape[dim] = x.shape[0], x.shape[dim]
    return x.gather(dim, index.view(shape).expand_as(x))


def forward_variables(emitted: Tensor, labels: Tensor) -> Tensor:
    """Returns α of every frame and state, (N, T, S).

    `emitted`: (N, T, S) log-probabilities. `labels`: (N, S).
    """
    skip = torch.zeros_like(labels, dtype=torch.bool)
    skip[:, 2:] = (labels[:, 2:] != BLANK) & (labels[:, 2:] != labels[:, :-2])
    skip_penalty = torch.zeros_like(emitted[:, 0]).masked_fill(~skip, -torch.inf)[:, 2:]
    alpha = torch.full_like(emitted, -torch.inf)
    alpha[:, 0, :2] = emitted[:, 0, :2]
    for t in range(1, emitted.shape[1]):
        before = alpha[:, t - 1]
        sources = before.new_full((3, *before.shape), -torch.inf)
        sources[0] = before
        sources[1, :, 1:] = before[:, :-1]
        sources[2, :, 2:] = before[:, :-2] + skip_penalty
        alpha[:, t] = sources.logsumexp(0) + emitted[:, t]
    return alpha


def greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Returns the labels of each utterance's best path. `log_probs`: (N, T, V)."""
    best = log_probs.argmax(-1).cpu()
    paths = zip(best, lengths.tolist(), strict=True)
    return [[label for label, _ in label_frames(path[:length])] for path, length in paths]


def label_frames(path: Tensor) -> list[tuple[int, int]]:
    """Returns the labels of a best path, (T,), each with the first frame in which it is emitted.

    Repeats are joined, then blanks removed.
    """
    labels, counts = torch.unique_consecutive(path, return_counts=True)
    first = counts.cumsum(0) - counts
    pairs = zip(labels.tolist(), first.tolist(), strict=True)
    return [(label, frame) for label, frame in pairs if label != BLANK]


class WordScorer(Protocol):
    """What the beam search asks of a language model. Scores are weighted natural logarithms."""

    def start(self) -> object: ...  # the state at the beginning of an utterance

    def score(self, state: object, word: str) -> tuple[object, float]: ...

    def finish(self, state: object) -> float: ...  # of the utterance's end


class Prefix:
    """The labels of an utterance up to now, as the last one and the prefix before it."""

    __slots__ = (
        "__weakref__",
        "after",
        "before",
        "ended",
        "frame",
        "label",
        "score",
        "state",
        "word",
    )

    def __init__(self, before: "Prefix | None", label: int, frame: int) -> None:
        self.before, self.label, self.frame = before, label, frame
        self.word = ""  # the unfinished word at its end
        self.score, self.state = 0.0, None  # language model: of the finished words
        self.ended, self.after = 0.0, None  # the same, with the unfinished word as if it ended here


class BeamSearch:
    """Prefix beam search (Hannun et al. 2014), whose frames can be given in parts.

    The score of a prefix is the log-probability of its labels, summed over all alignments, plus the
    scores of its words. `beam`: how many prefixes are kept after each frame. `labels`: the V units;
    only a language model needs them.

    Each prefix has two log-probabilities, of the alignments that end with a blank and of those that
    end with its last label, because a repeated label is a new one only after a blank.
    """

    def __init__(
        self, beam: int, labels: Sequence[str] = (), words: WordScorer | None = None
    ) -> None:
        if beam < 1:
            raise ValueError(f"beam {beam}: must be 1 or more")
        self.beam, self.labels, self.words = beam, labels, words
        self.begins = np.array([label.startswith(WORD) for label in labels], dtype=float)  # (V,)
        root = Prefix(None, BLANK, 0)
        if words is not None:
            root.state = root.after = words.start()
        self.prefixes = [root]
        self.blank, self.label = np.zeros(1), np.full(1, -np.inf)  # (P,) each
        self.frame = 0
        self.known: WeakValueDictionary[tuple[Prefix, int], Prefix] = WeakValueDictionary()

    def advance(self, log_probs: Tensor) -> None:
        """Goes on by the frames of `log_probs`, (T, V)."""
        with np.errstate(invalid="ignore"):  # of −inf − −inf in logaddexp
            for frame in log_probs.double().cpu().numpy():
                self.step(frame)

    def step(self, frame: np.ndarray) -> None:
        """Goes on by one frame, (V,) log-probabilities."""
        last = np.array([prefix.label for prefix in self.prefixes])  # (P,)
        total = np.logaddexp(self.blank, self.label)
        longer = total[:, None] + frame  # (P, V): prefixes with one more label
        longer[np.arange(len(last)), last] = self.blank + frame[last]
        longer[:, BLANK] = -np.inf
        blank = total + frame[BLANK]  # (P,): the same prefixes
        label = self.label + frame[last]
        self.merge(blank, label, longer)
        ranked = np.concatenate([np.logaddexp(blank, label), longer.ravel()])
        if self.words is not None:
            ranked += self.word_scores()
        best = largest(ranked, self.beam)
        old = best[best < len(last)]
        new = best[best >= len(last)] - len(last)  # in `longer`
        parents, added = np.divmod(new, len(frame))
        pairs = zip(parents, added.tolist(), strict=True)
        grown = [self.grown(self.prefixes[parent], label) for parent, label in pairs]
        self.prefixes = [self.prefixes[i] for i in old] + grown
        self.blank = np.concatenate([blank[old], np.full(len(new), -np.inf)])
        self.label = np.concatenate([label[old], longer.ravel()[new]])
        self.frame += 1

    def merge(self, blank: np.ndarray, label: np.ndarray, longer: np.ndarray) -> None:
        """Moves to a prefix of the beam what `longer` gives to it from the prefix before it."""
        place = {prefix: i for i, prefix in enumerate(self.prefixes)}
        for i, prefix in enumerate(self.prefixes):
            parent = place.get(prefix.before)
            if parent is not None:
                entering = longer[parent, prefix.label]
                if entering > np.logaddexp(blank[i], label[i]):
                    prefix.frame = self.frame  # most alignments emit its label only now
                label[i] = np.logaddexp(label[i], entering)
                longer[parent, prefix.label] = -np.inf

    def word_scores(self) -> np.ndarray:
        """Returns the scores of the finished words of P prefixes, then of P · V longer ones."""
        score = np.array([prefix.score for prefix in self.prefixes])
        ended = np.array([prefix.ended for prefix in self.prefixes])
        longer = score[:, None] + (ended - score)[:, None] * self.begins  # (P, V)
        return np.concatenate([score, longer.ravel()])

    def grown(self, before: Prefix, label: int) -> Prefix:
        """Returns the prefix with one more label: the one that exists, or else a new one."""
        prefix = self.known.get((before, label))
        if prefix is not None:
            prefix.frame = self.frame
            return prefix
        prefix = Prefix(before, label, self.frame)
        self.known[before, label] = prefix
        if self.words is not None:
            self.add_piece(prefix, self.labels[label], self.words)
        return prefix

    @staticmethod
    def add_piece(prefix: Prefix, piece: str, words: WordScorer) -> None:
        """Gives a prefix its unfinished word and its scores, from those of the prefix before it."""
        before = prefix.before
        if piece.startswith(WORD):
            prefix.word = piece.removeprefix(WORD)
            prefix.score, prefix.state = before.ended, before.after
        else:
            prefix.word = before.word + piece
            prefix.score, prefix.state = before.score, before.state
        prefix.ended, prefix.after = prefix.score, prefix.state
        if prefix.word:
            prefix.after, gain = words.score(prefix.state, prefix.word)
            prefix.ended += gain

    def results(self) -> list[tuple[float, list[tuple[int, int]]]]:
        """Returns the score and the labels of each prefix of the beam, the best one first.

        The labels are pairs of a label and the frame in which it is emitted.
        """
        scores = np.logaddexp(self.blank, self.label)
        if self.words is not None:
            scores = scores + [p.ended + self.words.finish(p.after) for p in self.prefixes]
        order = largest(scores, self.beam)
        return [(float(scores[i]), labels_of(self.prefixes[i])) for i in order]


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` largest scores, the largest first, without −inf."""
    best = np.arange(len(scores))
    if count < len(scores):
        best = np.argpartition(-scores, count)[:count]
    best = best[np.argsort(-scores[best], kind="stable")]
    return best[scores[best] > -np.inf]


def labels_of(prefix: Prefix) -> list[tuple[int, int]]:
    """Returns the labels of a prefix, each with its frame; frames never fall."""
    pairs, frame = [], prefix.frame
    while prefix.before is not None:
        frame = min(frame, prefix.frame)
        pairs.append((prefix.label, frame))
        prefix = prefix.before
    return pairs[::-1]


def beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    beam: int,
    labels: Sequence[str] = (),
    words: WordScorer | None = None,
) -> list[list[int]]:
    """Returns the best labels of each utterance; see `BeamSearch`. `log_probs`: (N, T, V)."""
    found = []
    for of_utterance, length in zip(log_probs, lengths.tolist(), strict=True):
        search = BeamSearch(beam, labels, words)
        search.advance(of_utterance[:length])
        found.append([label for label, _ in search.results()[0][1]])
    return found
