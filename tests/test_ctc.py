"""Our CTC loss against torch's, which never runs in the product, and decoding against brute force."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynsize.ctc import ctc_loss, greedy


@st.composite
def problems(draw):
    """Log-probabilities in float64, lengths, labels, label lengths: alignable ones, empty targets and one frame too."""
    n, t, v, u = (
        draw(st.integers(1, 5)),
        draw(st.integers(1, 20)),
        draw(st.integers(2, 6)),
        draw(st.integers(0, 6)),
    )
    torch.manual_seed(draw(st.integers(0, 2**20)))
    logits = 3 * torch.randn(n, t, v, dtype=torch.float64)
    lengths = torch.randint(1, t + 1, (n,))
    labels = torch.randint(1, v, (n, u))
    label_lengths = torch.zeros(n, dtype=torch.long)
    for row in range(n):
        for length in range(u + 1):
            target = labels[row, :length].tolist()
            if length + sum(a == b for a, b in itertools.pairwise(target)) <= lengths[row]:
                label_lengths[row] = length
    return logits, lengths, labels, label_lengths


@given(problems())
def test_loss_and_gradient_are_torchs(problem):
    logits, lengths, labels, label_lengths = problem
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = ctc_loss(ours.log_softmax(-1), lengths, labels, label_lengths)
    by_frame = theirs.log_softmax(-1).transpose(0, 1)
    expected = F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    weight = torch.linspace(-1, 2, len(loss), dtype=torch.float64)
    (weight * loss).sum().backward()
    (weight * expected).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@given(problems(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_computes_in_float32_at_least(problem, dtype):
    logits, lengths, labels, label_lengths = problem
    log_probs = logits.log_softmax(-1).to(dtype).requires_grad_()
    loss = ctc_loss(log_probs, lengths, labels, label_lengths)
    assert loss.dtype == torch.float32
    exact = ctc_loss(log_probs.double(), lengths, labels, label_lengths)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    assert log_probs.grad.dtype == dtype


@given(problems(), st.integers(0, 100))
def test_padding_changes_nothing(problem, garbage):
    logits, lengths, labels, label_lengths = problem
    log_probs = logits.log_softmax(-1)
    loss = ctc_loss(log_probs, lengths, labels, label_lengths)
    outside = torch.arange(log_probs.shape[1]) >= lengths[:, None]
    changed = log_probs.masked_fill(outside[..., None], float(garbage)).requires_grad_()
    padding = torch.arange(labels.shape[1]) >= label_lengths[:, None]
    again = ctc_loss(changed, lengths, labels.masked_fill(padding, garbage % 2), label_lengths)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    again.sum().backward()
    assert (changed.grad[outside] == 0).all()


def test_sums_over_all_alignments():
    torch.manual_seed(0)
    log_probs = torch.randn(1, 4, 3, dtype=torch.float64).log_softmax(-1)
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        joined = [label for label, _ in itertools.groupby(path) if label]
        if joined == [1, 1]:
            total += math.exp(sum(log_probs[0, t, label] for t, label in enumerate(path)))
    loss = ctc_loss(log_probs, torch.tensor([4]), torch.tensor([[1, 1]]), torch.tensor([2]))
    assert loss.item() == pytest.approx(-math.log(total), rel=1e-12)


def test_impossible_alignment_is_infinite_without_a_gradient():
    log_probs = torch.randn(2, 2, 3).log_softmax(-1).requires_grad_()
    labels, label_lengths = torch.tensor([[1, 1], [1, 2]]), torch.tensor([2, 2])
    loss = ctc_loss(
        log_probs, torch.tensor([2, 2]), labels, label_lengths
    )  # 1 1 needs a blank between: 3 frames
    assert loss[0] == math.inf and loss[1].isfinite()
    loss.sum().backward()
    assert (log_probs.grad[0] == 0).all() and (log_probs.grad[1] != 0).any()


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 9))
def test_greedy_joins_repeats_then_removes_blanks(seed, rows, frames):
    torch.manual_seed(seed)
    log_probs, lengths = torch.randn(rows, frames, 3), torch.randint(1, frames + 1, (rows,))
    for decoded, of_row, length in zip(
        greedy(log_probs, lengths), log_probs.tolist(), lengths.tolist(), strict=True
    ):
        path = [frame.index(max(frame)) for frame in of_row[:length]]
        assert decoded == [label for label, _ in itertools.groupby(path) if label != 0]
