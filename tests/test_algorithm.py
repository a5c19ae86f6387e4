"""Both algorithms, the baselines' choices, the sandwich rule, stochastic depth, and the schedules."""

import dataclasses
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

from dynsize import baselines, iterative_zero_out, sandwich, simple_top_k
from dynsize.config import LAYERS
from dynsize.kernels import layer_gates
from dynsize.schedule import learning_rate, size_before, step1_updates
from dynsize.schedule import size_after as size_at
from dynsize.supernet import Supernet


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


def first_update_of(k: int, layers: int, **changes):
    """A configuration, and the update of its step 1 in which the size is k."""
    config = tiny(blocks=8, sizes=(1, 32), updates=320, step1_share=0.5, delta=1, **changes)
    update = next(u for u in range(160) if size_at(u, config) == k)
    return config, update


@given(
    st.lists(st.sampled_from([-1e4, -1.0, 0.5, 0.6, 1e4]), min_size=32, max_size=32),
    st.integers(1, 31),
)
def test_straight_through_weights_are_the_binary_top_k(values, k):
    config, update = first_update_of(k, 32)
    scores = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    weights = torch.stack(simple_top_k.layer_weights(scores, range(32), update, config))
    # by falling score; of equal ones the lower layer
    top = sorted(range(32), key=lambda layer: (-values[layer], layer))[:k]
    assert weights.tolist() == [float(layer in top) for layer in range(32)]
    assert simple_top_k.rank(scores, range(32), update, config)[:k] == top
    (weights * torch.linspace(-1, 1, 32)).sum().backward()
    assert scores.grad.isfinite().all()


def test_straight_through_has_the_gradient_of_the_relaxed_weights():
    scores = torch.randn(32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(32, dtype=torch.float64)
    gradients = []
    for relaxation in ("straight-through", "soft"):
        config, update = first_update_of(9, 32, relaxation=relaxation)
        weights = torch.stack(simple_top_k.layer_weights(scores, range(32), update, config))
        gradients += torch.autograd.grad((cotangent * weights).sum(), scores)
    assert torch.equal(*gradients) and (gradients[0] != 0).all()
    assert simple_top_k.extra_loss(scores, range(32), update, config).item() == 0


@given(st.integers(0, 2**20), st.integers(2, 10))
def test_gradients_of_the_relaxed_weights_are_finite_differences(seed, layers):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(layers, dtype=torch.float64, generator=generator)
    k = 1 + seed % layers
    assert torch.autograd.gradcheck(
        lambda s: simple_top_k.relaxed_top_k(s, k), scores.requires_grad_()
    )


@given(scores_and_k(), st.randoms(use_true_random=False))
def test_relaxed_weights_permute_with_the_scores(drawn, random):
    scores, k = drawn
    order = random.sample(range(len(scores)), len(scores))
    permuted = simple_top_k.relaxed_top_k(scores[order], k)
    torch.testing.assert_close(
        permuted, simple_top_k.relaxed_top_k(scores, k)[order], rtol=1e-9, atol=1e-9
    )


@given(
    st.lists(st.sampled_from([-math.inf, -1.0, 0.5, 0.5, 2.0, math.inf]), min_size=8, max_size=8),
    st.booleans(),
)
def test_masks_keep_exactly_k_layers_and_are_nested(values, zero_out):
    algorithm = iterative_zero_out if zero_out else simple_top_k
    config = tiny(method="iterative-zero-out" if zero_out else "simple-top-k")
    ranking = algorithm.rank(torch.tensor(values), range(8), 0, config)
    model = Supernet(config, 4, ranking)
    masks = [model.mask(k) for k in range(1, 9)]
    for k, mask in enumerate(masks, start=1):
        assert sum(mask) == k
        for low, high in zip(mask, masks[-1] if k == 8 else masks[k], strict=True):
            assert high or not low
        lost = [values[layer] for layer in range(8) if not mask[layer]]
        assert not lost or max(lost) <= min(values[layer] for layer in range(8) if mask[layer])
        for a, b in pairwise(range(8)):
            assert values[a] != values[b] or mask[a] or not mask[b]


@pytest.mark.parametrize("relaxation", ["straight-through", "soft"])
def test_a_layer_outside_the_subnet_gives_its_score_a_gradient_and_its_weights_none(relaxation):
    torch.manual_seed(0)
    config = tiny(relaxation=relaxation, updates=100, delta=4, sizes=(4, 8), dropout=0.0)
    model = Supernet(config, 5).double()
    for weight in model.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))
    gates = simple_top_k.layer_weights(model.scores, model.ranking, 0, config)
    log_probs, _ = model(torch.randn(2, 30, 12).double(), torch.tensor([30, 21]), [4], [gates])
    log_probs[..., 0].sum().backward()
    inside = simple_top_k.rank(model.scores, model.ranking, 0, config)[:4]
    assert model.scores.grad.isfinite().all() and (model.scores.grad != 0).all()
    for layer in range(8):
        weights = model.encoder.blocks[layer // 4][LAYERS[layer % 4]].parameters()
        moved = any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)
        assert moved == (layer in inside or relaxation == "soft")


zero_out_configs = st.builds(
    lambda delta, smallest, updates, share: tiny(
        method="iterative-zero-out", delta=delta, sizes=(smallest, 8), updates=updates, step1_share=share
    ),
    st.integers(1, 5), st.integers(1, 7), st.integers(20, 80), st.floats(0.3, 1, exclude_max=True),
)  # fmt: skip


@given(zero_out_configs, st.integers(0, 2**20))
def test_zeroed_out_layers_only_grow_and_agree_with_the_ranking(config, seed):
    generator = torch.Generator().manual_seed(seed)
    ranking, gone, order = list(range(8)), [], []
    for update in range(step1_updates(config)):
        scores = 3 * torch.randn(8, generator=generator)  # anything may become of them
        weights = iterative_zero_out.layer_weights(scores, ranking, update, config)
        now = [layer for layer, weight in enumerate(weights) if weight is False]
        iteration = (
            update * math.ceil((8 - config.sizes[0]) / config.delta) // step1_updates(config)
        )
        assert len(now) == min(config.delta * iteration, 8 - config.sizes[0])
        assert set(gone) <= set(now)
        order, gone = [layer for layer in now if layer not in gone] + order, now
        for layer, weight in enumerate(weights):
            assert weight is False or weight.item() == torch.sigmoid(scores[layer]).item()
        ranking = iterative_zero_out.rank(scores, ranking, update, config)
        assert sorted(ranking) == list(range(8))
        assert set(ranking[8 - len(gone) :]) == set(gone)
        alive = ranking[: 8 - len(gone)]
        assert alive == sorted(alive, key=lambda layer: (-scores[layer].item(), layer))
    position = {layer: place for place, layer in enumerate(ranking)}
    earlier = [
        layer for layer in order if layer in gone
    ]  # last zeroed-out first, iteration by iteration
    for layer in set(range(8)) - set(gone):
        assert all(position[layer] < position[lost] for lost in earlier)


@given(zero_out_configs, st.integers(0, 79), st.booleans())
def test_the_sparsity_loss_is_zero_at_its_target_only(config, update, extreme):
    update %= step1_updates(config)
    ranking = [3, 1, 4, 0, 5, 2, 6, 7]
    alive, target = size_before(update, config), size_at(update, config)
    share = torch.tensor(target / alive, dtype=torch.float64)
    scores = torch.full((8,), float("nan"), dtype=torch.float64)
    scores[ranking[:alive]] = share.logit()
    assert abs(iterative_zero_out.extra_loss(scores, ranking, update, config).item()) < 1e-12
    scores = torch.randn(8, dtype=torch.float64) * (1e4 if extreme else 1)
    scores.requires_grad_()
    loss = iterative_zero_out.extra_loss(scores, ranking, update, config)
    lost = 8 - sum(torch.sigmoid(scores[layer]).item() for layer in ranking[:alive])
    assert loss.item() == pytest.approx(5 * abs(lost / 8 - (8 - target) / 8))
    loss.backward()
    assert scores.grad.isfinite().all() and (scores.grad[ranking[alive:]] == 0).all()


@pytest.mark.parametrize("method", ["simple-top-k", "iterative-zero-out"])
@given(st.integers(20, 500), st.integers(1, 4), st.integers(1, 7), st.floats(0.1, 0.9))
def test_k_falls_in_equal_spans(method, updates, delta, smallest, share):
    config = tiny(updates=updates, delta=delta, sizes=(smallest, 8), step1_share=share)
    config = dataclasses.replace(config, method=method)
    ks = [size_at(update, config) for update in range(step1_updates(config))]
    expected = [
        max(8 - delta * i, smallest) for i in range(1, 1 + math.ceil((8 - smallest) / delta))
    ]
    spans = Counter(ks)
    if len(ks) >= len(expected):
        assert ks == sorted(ks, reverse=True) and list(spans) == expected
        assert max(spans.values()) - min(spans.values()) <= 1


@given(st.integers(2, 12), st.data())
def test_every_other_layer_is_kept(blocks, data):
    layers = 4 * blocks
    sizes = sorted(data.draw(st.sets(st.integers(1, layers), min_size=1, max_size=3)))
    ranking = baselines.every_other(layers, sizes)
    assert sorted(ranking) == list(range(layers))
    gaps = [b - a for a, b in pairwise(sorted(ranking[: sizes[0]]))]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert sorted(baselines.every_other(layers, [layers // 2])[: layers // 2]) == list(
        range(0, layers, 2)
    )
    assert (
        sorted(baselines.shuffled(layers, 3))
        == list(range(layers))
        != baselines.shuffled(layers, 3)
    )


def test_layer_drop_skips_each_layer_for_a_share_of_the_utterances():
    seeds = torch.randint(2**62, (3000,), generator=torch.Generator().manual_seed(0))
    gates = layer_gates(seeds, 8, 0.2)
    assert gates.shape == (8, 3000) and set(gates.unique().tolist()) == {0.0, 1.0}
    assert gates.mean().item() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / gates.numel()))
    assert not torch.equal(gates[0], gates[1])


def test_sandwich_rule():
    def weights(update: int, *sizes: int, **changes) -> dict[int, float]:
        return sandwich.loss_weights(update, sizes, tiny(**changes))

    drawn = [weights(update, 2, 3, 5, 8) for update in range(4000)]
    for of_update in drawn:
        assert list(of_update) == sorted(of_update, reverse=True)
        assert len(of_update) == 3 and of_update[8] == 1.0 and of_update[2] == 0.3
    between = Counter(list(of_update)[1] for of_update in drawn)
    assert set(between) == {3, 5} and abs(between[3] - 2000) < 4 * math.sqrt(
        1000
    )  # 4 standard deviations
    assert drawn[17] == weights(17, 2, 3, 5, 8)
    assert drawn != [weights(update, 2, 3, 5, 8, seed=1) for update in range(4000)]
    assert weights(0, 4, 8) == {8: 1.0, 4: 0.3}
    assert weights(0, 8) == {8: 1.0}


def test_stochastic_depth_drops_layers_outside_the_smallest_subnet():
    seeds = torch.randint(2**62, (3000,), generator=torch.Generator().manual_seed(0))
    smallest = [layer in (1, 6) for layer in range(8)]
    masks = [[True] * 8, [layer in (1, 2, 6) for layer in range(8)], smallest]
    gates = sandwich.gates(masks, seeds, tiny(stochastic_depth=0.3))
    assert gates[1:] == masks[1:]
    assert [gate is True for gate in gates[0]] == smallest
    stays = torch.stack([gate for gate in gates[0] if gate is not True])  # (6, 3000)
    assert set(stays.unique().tolist()) == {0.0, 1.0}
    assert stays.mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / stays.numel()))
    assert not torch.equal(stays[0], stays[1])
    half = sandwich.gates(masks, seeds[1500:], tiny(stochastic_depth=0.3))[
        0
    ]  # an utterance's draw is its own
    assert torch.equal(torch.stack([gate for gate in half if gate is not True]), stays[:, 1500:])
    assert sandwich.gates(masks, seeds, tiny(stochastic_depth=0.0)) == masks


def test_learning_rate():
    config = tiny(updates=1000, peak_learning_rate=1.0, warmup=0.45, cooldown=0.45)
    rates = [learning_rate(update, config) for update in range(1000)]
    assert rates[0] == pytest.approx(0.01, abs=0.003) and rates[449] == max(rates) == pytest.approx(
        1.0
    )
    assert rates[224] == pytest.approx(0.505, abs=0.003) and rates[899] == pytest.approx(0.01)
    assert rates[:450] == sorted(rates[:450]) and rates[450:] == sorted(rates[450:], reverse=True)
    assert rates[-1] == pytest.approx(1e-8)
