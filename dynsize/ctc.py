"""CTC (Graves et al. 2006): the loss with its gradient, greedy decoding, beam search.

Label 0 is the blank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from dynsize import kernels
from dynsize.text import WORD

BLANK = 0


def ctc_loss(log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Return the negative log-likelihood of each utterance's labels, (N,), over all alignments.

    Without labels it is minus the sum of the blank's log-probabilities. It is infinite, with a
    gradient of 0, where the labels and the blanks between repeated ones don't fit into the frames;
    `batching.keep_usable` leaves such utterances out before a training. `log_probs`: (N, T, V) of
    any float dtype; the loss is computed in float32, or in float64 if they are. `lengths`: (N,)
    frames, 1 to T. `labels`: (N, U), padded with anything. `label_lengths`: (N,), 0 to U.
    """
    if kernels.triton_runs("ctc_loss", log_probs.device, log_probs.dtype):
        return kernels.ctc_loss(log_probs, lengths, labels, label_lengths)
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
    """

    @staticmethod
    def forward(
        ctx, log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> Tensor:
        frames = log_probs.shape[1]
        last_frame = lengths - 1  # (N,)
        last_state = 2 * label_lengths  # (N,)
        extended = with_blanks(labels)  # (N, S)
        outside = after(last_state, extended.shape[1])  # (N, S)
        extended = extended.masked_fill(outside, BLANK)  # padding may hold anything
        by_frame = extended[:, None].expand(-1, frames, -1)  # (N, T, S)
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        emitted = log_probs.to(dtype).gather(2, by_frame)  # (N, T, S)
        emitted = emitted.masked_fill(outside[:, None], -torch.inf)
        alpha, beta = forward_backward(emitted, extended, last_frame, last_state)
        utterance = torch.arange(len(alpha), device=alpha.device)
        at_end = alpha[utterance, last_frame]  # (N, S)
        state = torch.arange(extended.shape[1], device=labels.device)  # (S,)
        before_last = last_state - 1  # the last label; the last state is the blank after it
        final = (state == last_state[:, None]) | (state == before_last[:, None])
        log_likelihood = at_end.masked_fill(~final, -torch.inf).logsumexp(1)  # (N,)
        # e(t, s) is in both α and β: take it out once; −inf − −inf would be NaN
        posterior = alpha + beta - emitted.clamp(min=-1e30)  # (N, T, S), in logarithms
        posterior = (posterior - log_likelihood[:, None, None]).exp()
        padding = after(last_frame, frames)  # (N, T)
        impossible = ~log_likelihood.isfinite()  # (N,)
        nowhere = padding[:, :, None] | outside[:, None] | impossible[:, None, None]
        posterior = posterior.masked_fill(nowhere, 0)
        ctx.save_for_backward(posterior, extended)
        ctx.vocabulary = log_probs.shape[2]
        ctx.dtype = log_probs.dtype
        return -log_likelihood

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        posterior, extended = ctx.saved_tensors
        utterances, frames, _ = posterior.shape
        by_frame = extended[:, None].expand_as(posterior)  # (N, T, S)
        occupied = posterior.new_zeros(utterances, frames, ctx.vocabulary)
        occupied.scatter_add_(2, by_frame, posterior)  # (N, T, V)
        log_probs_grad = -grad[:, None, None] * occupied
        return log_probs_grad.to(ctx.dtype), None, None, None


def with_blanks(labels: Tensor) -> Tensor:
    """Return (N, S) from (N, U) labels: a blank before, between and after them."""
    utterances, count = labels.shape
    extended = labels.new_full((utterances, 2 * count + 1), BLANK)
    extended[:, 1::2] = labels
    return extended


def after(last: Tensor, size: int) -> Tensor:
    """Return (N, size): True from the place after `last`, (N,), on."""
    place = torch.arange(size, device=last.device)
    return place > last[:, None]


def flipped(x: Tensor, last: Tensor, dim: int) -> Tensor:
    """Return `x` with the entries 0 to `last`, (N,), of a dimension in reverse order.

    The entries after them are undefined.
    """
    place = torch.arange(x.shape[dim], device=x.device)
    index = (last[:, None] - place).clamp(min=0)  # (N, size of the dimension)
    shape = [1] * x.dim()
    shape[0] = x.shape[0]
    shape[dim] = x.shape[dim]
    index = index.view(shape)
    return x.gather(dim, index.expand_as(x))


def forward_backward(
    emitted: Tensor, labels: Tensor, last_frame: Tensor, last_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return α and β of every frame and state, (N, T, S) each.

    `emitted`: (N, T, S) log-probabilities, −inf outside the states of an utterance. `labels`:
    (N, S). `last_frame`, `last_state`: (N,); β is undefined past them.
    """
    reverse = flipped(emitted, last_frame, dim=1)
    reverse = flipped(reverse, last_state, dim=2)
    outside = after(last_state, labels.shape[1])  # (N, S)
    reverse = reverse.masked_fill(outside[:, None], -torch.inf)
    reverse_labels = flipped(labels, last_state, dim=1)
    both = torch.cat([emitted, reverse])  # (2N, T, S)
    both_labels = torch.cat([labels, reverse_labels])  # (2N, S)
    alpha, beta = forward_variables(both, both_labels).chunk(2)
    beta = flipped(beta, last_frame, dim=1)
    beta = flipped(beta, last_state, dim=2)
    return alpha, beta


def forward_variables(emitted: Tensor, labels: Tensor) -> Tensor:
    """Return α of every frame and state, (N, T, S).

    `emitted`: (N, T, S) log-probabilities. `labels`: (N, S).
    """
    here = labels[:, 2:]  # (N, S − 2)
    two_before = labels[:, :-2]
    may_skip = (here != BLANK) & (here != two_before)
    skip_penalty = emitted.new_zeros(may_skip.shape)
    skip_penalty = skip_penalty.masked_fill(~may_skip, -torch.inf)
    alpha = torch.full_like(emitted, -torch.inf)
    alpha[:, 0, :2] = emitted[:, 0, :2]
    for t in range(1, emitted.shape[1]):
        before = alpha[:, t - 1]  # (N, S)
        sources = before.new_full((3, *before.shape), -torch.inf)
        sources[0] = before
        sources[1, :, 1:] = before[:, :-1]
        sources[2, :, 2:] = before[:, :-2] + skip_penalty
        entering = sources.logsumexp(0)
        alpha[:, t] = entering + emitted[:, t]
    return alpha


def greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Return the labels of each utterance's best path. `log_probs`: (N, T, V)."""
    paths = log_probs.argmax(-1).cpu()  # (N, T)
    found = []
    for path, length in zip(paths, lengths.tolist(), strict=True):
        pairs = label_frames(path[:length])
        found.append([label for label, _ in pairs])
    return found


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


class WordScorer(Protocol):
    """What the beam search asks of a language model. Scores are weighted natural logarithms."""

    def start(self) -> object:
        """Return the state at the beginning of an utterance."""

    def score(self, state: object, word: str) -> tuple[object, float]:
        """Return the state after a word, and the word's score."""

    def finish(self, state: object) -> float:
        """Return the score of the utterance's end."""


@dataclass(eq=False)
class Prefix:
    """The labels of an utterance up to now: the last one, and a link to the prefix before it."""

    before: "Prefix | None"
    label: int
    frame: int
    word: str = ""  # the unfinished word at its end
    score: float = 0.0  # of its finished words, by the language model
    state: object = None  # of the language model after them
    ended_score: float = 0.0  # the same, as if the unfinished word ended here
    ended_state: object = None


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
        self.beam = beam
        self.labels = labels
        self.words = words
        begins = [label.startswith(WORD) for label in labels]
        self.begins = np.array(begins, dtype=float)  # (V,): 1 for a label that begins a word
        root = Prefix(None, BLANK, frame=0)
        if words is not None:
            root.state = words.start()
            root.ended_state = root.state
        self.prefixes = [root]
        # Log-probabilities (P,) of the alignments that end with a blank, or with the last label.
        self.after_blank = np.zeros(1)
        self.after_label = np.full(1, -np.inf)
        self.frame = 0
        self.known: WeakValueDictionary[tuple[Prefix, int], Prefix] = WeakValueDictionary()

    def advance(self, log_probs: Tensor) -> None:
        """Advance by the frames of `log_probs`, (T, V)."""
        with np.errstate(invalid="ignore"):  # of −inf − −inf in logaddexp
            for of_frame in log_probs.double().cpu().numpy():
                self.step(of_frame)

    def step(self, log_probs: np.ndarray) -> None:
        """Advance by one frame. `log_probs`: (V,)."""
        last = np.array([prefix.label for prefix in self.prefixes])  # (P,)
        total = np.logaddexp(self.after_blank, self.after_label)
        # the same prefixes
        blank = total + log_probs[BLANK]  # (P,)
        label = self.after_label + log_probs[last]  # (P,)
        # prefixes with one more label; a repeated label needs a blank before it
        longer = total[:, None] + log_probs  # (P, V)
        place = np.arange(len(last))
        longer[place, last] = self.after_blank + log_probs[last]
        longer[:, BLANK] = -np.inf
        self.merge(blank, label, longer)
        scores = np.logaddexp(blank, label)
        scores = np.concatenate([scores, longer.ravel()])  # (P + P · V,)
        if self.words is not None:
            scores += self.word_scores()
        best = largest(scores, self.beam)
        self.choose(best, blank, label, longer)
        self.frame += 1

    def merge(self, blank: np.ndarray, label: np.ndarray, longer: np.ndarray) -> None:
        """Where a longer prefix is in the beam already, add its probability there instead."""
        place = {prefix: i for i, prefix in enumerate(self.prefixes)}
        for i, prefix in enumerate(self.prefixes):
            parent = place.get(prefix.before)
            if parent is None:
                continue
            entering = longer[parent, prefix.label]
            if entering > np.logaddexp(blank[i], label[i]):
                prefix.frame = self.frame  # most alignments emit its label only now
            label[i] = np.logaddexp(label[i], entering)
            longer[parent, prefix.label] = -np.inf

    def choose(
        self, best: np.ndarray, blank: np.ndarray, label: np.ndarray, longer: np.ndarray
    ) -> None:
        """Make the next beam of the prefixes and the longer prefixes that `best` names.

        `best`: indices, 0 to P − 1 for the prefixes of the beam, then those of `longer`, (P, V).
        """
        count, vocabulary = longer.shape
        is_old = best < count
        old = best[is_old]
        new = best[~is_old] - count
        prefixes = [self.prefixes[i] for i in old]
        for i in new.tolist():
            parent, added = divmod(i, vocabulary)
            prefix = self.grown(self.prefixes[parent], added)
            prefixes.append(prefix)
        self.prefixes = prefixes
        never = np.full(len(new), -np.inf)
        grown = longer.ravel()[new]
        self.after_blank = np.concatenate([blank[old], never])
        self.after_label = np.concatenate([label[old], grown])

    def word_scores(self) -> np.ndarray:
        """Return the scores of the finished words of P prefixes, then of P · V longer ones."""
        score = np.array([prefix.score for prefix in self.prefixes])  # (P,)
        ended = np.array([prefix.ended_score for prefix in self.prefixes])
        gain = ended - score  # of a label that begins a word
        longer = score[:, None] + gain[:, None] * self.begins  # (P, V)
        return np.concatenate([score, longer.ravel()])

    def grown(self, before: Prefix, label: int) -> Prefix:
        """Return the prefix with one more label: the one that exists, or else a new one."""
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
        """Give a prefix its unfinished word and its scores, from those of the prefix before it."""
        before = prefix.before
        if piece.startswith(WORD):
            prefix.word = piece.removeprefix(WORD)
            prefix.score = before.ended_score
            prefix.state = before.ended_state
        else:
            prefix.word = before.word + piece
            prefix.score = before.score
            prefix.state = before.state
        prefix.ended_score = prefix.score
        prefix.ended_state = prefix.state
        if prefix.word:
            prefix.ended_state, gain = words.score(prefix.state, prefix.word)
            prefix.ended_score += gain

    def results(self) -> list[tuple[float, list[tuple[int, int]]]]:
        """Return the score and the labels of each prefix of the beam, the best one first.

        The labels are pairs of a label and the frame in which it is emitted.
        """
        scores = np.logaddexp(self.after_blank, self.after_label)
        if self.words is not None:
            for i, prefix in enumerate(self.prefixes):
                end = self.words.finish(prefix.ended_state)
                scores[i] += prefix.ended_score + end
        found = []
        for i in largest(scores, self.beam):
            labels = labels_of(self.prefixes[i])
            found.append((float(scores[i]), labels))
        return found


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest scores, the largest first, without −inf."""
    best = np.arange(len(scores))
    if count < len(scores):
        best = np.argpartition(-scores, count)[:count]
    order = np.argsort(-scores[best], kind="stable")
    best = best[order]
    return best[scores[best] > -np.inf]


def labels_of(prefix: Prefix) -> list[tuple[int, int]]:
    """Return the labels of a prefix, each with its frame; frames never fall."""
    pairs = []
    frame = prefix.frame
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
    """Return the best labels of each utterance; see `BeamSearch`. `log_probs`: (N, T, V)."""
    found = []
    for of_utterance, length in zip(log_probs, lengths.tolist(), strict=True):
        search = BeamSearch(beam, labels, words)
        search.advance(of_utterance[:length])
        _, best = search.results()[0]
        found.append([label for label, _ in best])
    return found
