"""Simple-Top-k, the sandwich rule, stochastic depth, and the schedules."""

import math
from collections import Counter

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

from dynsize import sandwich, simple_top_k
from dynsize.training import learning_rate


@st.composite
def scores_and_k(draw, widest=1e4):
    values = draw(st.lists(st.floats(-widest, widest), min_size=2, max_size=12))
    return torch.tensor(values, dtype=torch.float64), draw(st.integers(1, len(values)))


@given(scores_and_k())
def test_relaxed_weights_sum_to_k_and_keep_the_order(drawn):
    scores, k = drawn
    scores.requires_grad_()
    relaxed = simple_top_k.relaxed_top_k(scores, k)
    assert (relaxed >= 0).all()
    assert relaxed.sum().item() == pytest.approx(k, rel=1e-6)
    order = scores.argsort()
    assert (relaxed[order].diff() >= -1e-9).all()
    (relaxed * torch.linspace(-1, 1, len(scores), dtype=torch.float64)).sum().backward()
    assert scores.grad.isfinite().all()


@given(scores_and_k(widest=3))
def test_relaxed_weights_are_the_sum_of_the_papers_softmaxes(drawn):
    scores, k = drawn
    a, total = scores, torch.zeros_like(scores)
    for _ in range(k):
        p = a.softmax(0)
        a, total = a + torch.log1p(-p), total + p
    torch.testing.assert_close(simple_top_k.relaxed_top_k(scores, k), total, rtol=1e-6, atol=1e-6)


@given(scores_and_k())
def test_straight_through_weights_are_the_binary_top_k(drawn):
    scores, k = drawn
    weights = simple_top_k.layer_weights(scores, k, "straight-through")
    # by falling score; of equal ones the lower layer
    top = sorted(range(len(scores)), key=lambda layer: (-scores[layer].item(), layer))[:k]
    assert weights.tolist() == [float(layer in top) for layer in range(len(scores))]
    assert simple_top_k.ranking(scores)[:k] == top


def test_straight_through_has_the_gradient_of_the_relaxed_weights():
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(6, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((cotangent * simple_top_k.layer_weights(scores, 3, relaxation)).sum(), scores)[0]
        for relaxation in ("straight-through", "soft")
    ]
    assert torch.equal(*gradients) and (gradients[0] != 0).all()


@given(st.integers(20, 500), st.integers(1, 4), st.integers(1, 7), st.floats(0.1, 0.9))
def test_k_falls_in_equal_spans(updates, delta, smallest, share):
    config = tiny(updates=updates, delta=delta, sizes=(smallest, 8), step1_share=share)
    ks = [simple_top_k.size_at(update, config) for update in range(simple_top_k.step1_updates(config))]
    expected = [max(8 - delta * i, smallest) for i in range(1, 1 + math.ceil((8 - smallest) / delta))]
    spans = Counter(ks)
    if len(ks) >= len(expected):
        assert ks == sorted(ks, reverse=True) and list(spans) == expected
        assert max(spans.values()) - min(spans.values()) <= 1


def test_sandwich_rule():
    config = tiny(sizes=(2, 3, 5, 8))
    drawn = [sandwich.loss_weights(update, config) for update in range(4000)]
    for weights in drawn:
        assert list(weights) == sorted(weights, reverse=True)
        assert len(weights) == 3 and weights[8] == 1.0 and weights[2] == 0.3
    between = Counter(list(weights)[1] for weights in drawn)
    assert set(between) == {3, 5} and abs(between[3] - 2000) < 4 * math.sqrt(1000)  # 4 standard deviations
    assert drawn[17] == sandwich.loss_weights(17, config)
    assert drawn != [sandwich.loss_weights(update, tiny(sizes=(2, 3, 5, 8), seed=1)) for update in range(4000)]
    assert sandwich.loss_weights(0, tiny(sizes=(4, 8))) == {8: 1.0, 4: 0.3}
    assert sandwich.loss_weights(0, tiny(sizes=(8,))) == {8: 1.0}


def test_stochastic_depth_drops_layers_outside_the_smallest_subnet():
    torch.manual_seed(0)
    smallest, device = [layer in (1, 6) for layer in range(8)], torch.device("cpu")
    masks = [[True] * 8, [layer in (1, 2, 6) for layer in range(8)], smallest]
    gates = sandwich.gates(masks, 3000, tiny(stochastic_depth=0.3), device)
    assert gates[1:] == masks[1:]
    assert [gate is True for gate in gates[0]] == smallest
    stays = torch.stack([gate for gate in gates[0] if gate is not True])  # (6, 3000)
    assert set(stays.unique().tolist()) == {0.0, 1.0}
    assert stays.mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / stays.numel()))
    assert not torch.equal(stays[0], stays[1])
    assert sandwich.gates(masks, 5, tiny(stochastic_depth=0.0), device) == masks


def test_learning_rate():
    config = tiny(updates=1000, peak_learning_rate=1.0, warmup=0.45, cooldown=0.45)
    rates = [learning_rate(update, config) for update in range(1000)]
    assert rates[0] == pytest.approx(0.01, abs=0.003) and rates[449] == max(rates) == pytest.approx(1.0)
    assert rates[224] == pytest.approx(0.505, abs=0.003) and rates[899] == pytest.approx(0.01)
    assert rates[:450] == sorted(rates[:450]) and rates[450:] == sorted(rates[450:], reverse=True)
    assert rates[-1] == pytest.approx(1e-8)
