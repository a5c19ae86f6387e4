"""The transducer: its loss against the sum over all alignments, and greedy decoding."""

import itertools
import math

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynsize import transducer
from dynsize.transducer import Transducer, transducer_loss

LABELS = 5


@st.composite
def problems(draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws (N, T, U + 1, V) logits in float64, lengths, (N, U) labels, and label lengths."""
    n, t, u, v = (draw(st.integers(low, high)) for low, high in ((1, 4), (1, 6), (0, 4), (2, 4)))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    logits = 3 * torch.randn(n, t, u + 1, v, dtype=torch.float64)
    lengths = torch.randint(1, t + 1, (n,))
    return logits, lengths, torch.randint(1, v, (n, u)), torch.randint(0, u + 1, (n,))


def read(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the blank and of the next label, as the loss takes them."""
    index = labels[:, None, :, None].expand(-1, log_probs.shape[1], -1, -1)
    return log_probs[..., 0], log_probs[:, :, :-1].gather(-1, index)[..., 0]


def loss_of(logits: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    return transducer_loss(*read(logits.log_softmax(-1), labels), lengths, label_lengths)


def brute_force(log_probs: Tensor, labels: list[int]) -> Tensor:
    """Minus the logarithm of the sum over all orders of T blanks and the labels, () float64.

    The last one is a blank: it ends the utterance. `log_probs`: (T, U + 1, V).
    """
    frames = len(log_probs)
    places = frames - 1 + len(labels)
    paths = []
    for of_labels in itertools.combinations(range(places), len(labels)):
        t = u = 0
        path = log_probs.new_zeros(())
        for place in range(places + 1):
            emitted = labels[u] if place in of_labels else 0
            path = path + log_probs[t, u, emitted]
            t, u = (t, u + 1) if emitted else (t + 1, u)
        paths.append(path)
    return -torch.stack(paths).logsumexp(0)


@given(problems())
def test_loss_and_gradient_are_those_of_all_alignments(problem):
    """The loss and its gradient are those of the sum over all alignments, to 1e-9 in float64."""
    logits, lengths, labels, label_lengths = problem
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = loss_of(ours, lengths, labels, label_lengths)
    expected = []
    for row, (t, u) in enumerate(zip(lengths, label_lengths, strict=True)):
        log_probs = theirs[row, :t, : u + 1].log_softmax(-1)
        expected.append(brute_force(log_probs, labels[row, :u].tolist()))
    expected = torch.stack(expected)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    weight = torch.linspace(-1, 2, len(loss), dtype=torch.float64)
    (weight * loss).sum().backward()
    (weight * expected).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@given(problems(), st.sampled_from([torch.nan, torch.inf, 7.0]))
def test_padding_is_never_read(problem, garbage):
    """What lies outside an utterance changes neither losses nor gradients, whatever it holds."""
    logits, lengths, labels, label_lengths = problem
    scores = read(logits.log_softmax(-1), labels)
    frame, place = torch.arange(logits.shape[1])[:, None], torch.arange(logits.shape[2])
    frames_outside = frame >= lengths[:, None, None]
    most = label_lengths[:, None, None]
    outside = [frames_outside | (place > most), (frames_outside | (place >= most))[..., :-1]]
    filled = [s.masked_fill(o, garbage) for s, o in zip(scores, outside, strict=True)]
    found = []
    for both in (scores, filled):
        both = [part.clone().requires_grad_() for part in both]
        loss = transducer_loss(*both, lengths, label_lengths)
        loss.sum().backward()
        found.append([loss, *(part.grad for part in both)])
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)
    assert all(not grad[o].any() for grad, o in zip(found[1][1:], outside, strict=True))


def test_impossible_labels_have_an_infinite_loss_without_gradient():
    scores = [torch.zeros(2, 3, 3), torch.zeros(2, 3, 2)]
    scores[1][0, :, 1] = -torch.inf  # the second label of the first utterance is never emitted
    scores = [part.requires_grad_() for part in scores]
    loss = transducer_loss(*scores, torch.tensor([3, 2]), torch.tensor([2, 1]))
    assert loss[0] == math.inf and loss[1].isfinite()
    loss.sum().backward()
    assert all(not part.grad[0].any() and part.grad[1].any() for part in scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_utterances_keep_their_precision(dtype):
    """600 frames and 100 labels in float32 are the float64 ones to 1e-5, gradients to 1e-4."""
    torch.manual_seed(0)
    log_probs = (4 * torch.randn(1, 600, 101, 4)).log_softmax(-1)
    both = read(log_probs, torch.randint(1, 4, (1, 100)))
    exact = [part.to(dtype).double().requires_grad_() for part in both]
    rounded = [part.to(dtype).requires_grad_() for part in both]
    lengths = torch.tensor([600]), torch.tensor([100])
    losses = [transducer_loss(*scores, *lengths) for scores in (exact, rounded)]
    assert losses[1].dtype == torch.float32 and losses[1] > 600
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 4e-3
    for expected, found in zip(exact, rounded, strict=True):
        assert found.grad.dtype == dtype
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=0, atol=tolerance)


# The output of three sizes.


def outputs_and_batch(seed: int = 0) -> tuple[list[Transducer], tuple[Tensor, ...]]:
    """Three outputs in float64 that share the label side, and frames with their labels."""
    torch.manual_seed(seed)
    outputs: list[Transducer] = []
    for _ in range(3):
        like = outputs[-1] if outputs else None
        outputs.append(Transducer(tiny(), LABELS, like).double())
    x = torch.randn(3, 4, 9, 16, dtype=torch.float64)
    lengths, label_lengths = torch.tensor([9, 4, 1, 6]), torch.tensor([3, 0, 2, 5])
    return outputs, (x, lengths, torch.randint(1, LABELS, (4, 5)), label_lengths)


def losses_of(outputs: list[Transducer], x: Tensor, *others: Tensor) -> Tensor:
    pairs = zip(outputs, x, strict=True)
    emissions = torch.stack([output(of_size) for output, of_size in pairs])
    return Transducer.losses(outputs, emissions, *others)


def test_few_utterances_at_a_time_change_nothing(monkeypatch):
    """The loss and all gradients are the same for one utterance at a time as for all at once."""
    outputs, (x, *others) = outputs_and_batch()
    weights = list(torch.nn.ModuleList(outputs).parameters())
    found = []
    for most in (transducer.MOST_NUMBERS, 1):
        monkeypatch.setattr(transducer, "MOST_NUMBERS", most)
        frames = x.clone().requires_grad_()
        losses = losses_of(outputs, frames, *others)
        gradients = torch.autograd.grad(losses.sum(), [frames, *weights])
        found.append([losses, *gradients])
    for at_once, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(in_parts, at_once, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_decoding_takes_the_best_label_of_each_node(seed):
    """Greedy decoding equals a plain walk through the frames, for parts of any length too."""
    outputs, (x, lengths, *_) = outputs_and_batch(seed)
    output, x = outputs[0], 3 * x[0]
    expected = []
    for frames, length in zip(x, lengths.tolist(), strict=True):
        context, found = [0, 0], []
        for frame in range(length):
            for _ in range(transducer.MOST_LABELS):
                label_side = output.label_side(torch.tensor(context))
                nodes = output.encoder_side(frames[frame]) + label_side
                label = output.joiner(nodes.tanh()).argmax().item()
                if label == 0:
                    break
                found.append((label, frame))
                context = [context[1], label]
        expected.append(found)
    assert any(expected)
    emissions = output(x)
    assert output.decode(emissions, lengths) == expected
    for of_one, length, found in zip(emissions, lengths, expected, strict=True):
        assert output.decode_parts(of_one[:length].split(2)) == found


def test_the_sizes_share_the_label_side_alone():
    outputs, _ = outputs_and_batch()
    assert all(output.label_side is outputs[0].label_side for output in outputs)
    names = [name for name, _ in torch.nn.ModuleList(outputs).named_parameters()]
    assert len(names) == 3 * 4 + 3
