"""The three algorithms, the baselines' choices, the sandwich rule, and the schedules."""

import dataclasses
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import layer_of, network, tiny, utterances
from hypothesis import given
from hypothesis import strategies as st

from dynsize import iterative_zero_out, ortho_softmax, simple_top_k
from dynsize.algorithms import ALGORITHMS, every_other, shuffled
from dynsize.batching import Batch
from dynsize.config import preset, with_method
from dynsize.schedule import learning_rate, size_at_span_end, size_at_span_start, step1_updates
from dynsize.steps import Update, gates_of, losses_of, planned, sandwich
from dynsize.supernet import Supernet


def first_update_of(k: int, layers: int, **changes):
    """A configuration, and the update of its step 1 in which the size is k."""
    config = tiny(blocks=8, sizes=(1, 32), updates=320, step1_share=0.5, delta=1, **changes)
    update = next(u for u in range(160) if size_at_span_end(u, config) == k)
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


@pytest.mark.parametrize("relaxation", ["straight-through", "soft"])
def test_a_layer_outside_the_subnet_gives_its_score_a_gradient_and_its_weights_none(relaxation):
    model = network(relaxation=relaxation, updates=100, delta=4, sizes=(4, 8))
    gates = simple_top_k.layer_weights(model.scores, model.ranking, 0, model.config)
    log_probs, _ = model(*utterances(model, [30, 21]), [4], [gates])
    log_probs[..., 0].sum().backward()
    inside = simple_top_k.rank(model.scores, model.ranking, 0, model.config)[:4]
    assert model.scores.grad.isfinite().all() and (model.scores.grad != 0).all()
    for layer in range(8):
        weights = layer_of(model, layer).parameters()
        moved = any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)
        assert moved == (layer in inside or relaxation == "soft")


zero_out_configs = st.builds(
    lambda smallest, **changes: tiny(method="iterative-zero-out", sizes=(smallest, 8), **changes),
    smallest=st.integers(1, 7),
    delta=st.integers(1, 5),
    updates=st.integers(20, 80),
    step1_share=st.floats(0.3, 1, exclude_max=True),
)


@given(zero_out_configs, st.integers(0, 79), st.booleans())
def test_the_sparsity_loss_is_zero_at_its_target_only(config, update, extreme):
    update %= step1_updates(config)
    ranking = [3, 1, 4, 0, 5, 2, 6, 7]
    alive, target = size_at_span_start(update, config), size_at_span_end(update, config)
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


def ortho(**changes):
    return tiny(**dict(method="ortho-softmax", updates=40) | changes)  # 24 updates of step 1


@given(st.integers(0, 2**20), st.integers(0, 23), st.floats(0.01, 1e4))
def test_rows_of_ortho_softmax_are_distributions(seed, update, scale):
    """The rows sum to 1, and the layer weights of size k sum to k."""
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(8, 8, dtype=torch.float64, generator=generator)
    config = ortho(seed=seed)
    rows = ortho_softmax.first_rows(scores, update, config)
    k = ortho_softmax.size_at(update, config)
    assert (rows >= 0).all() and rows.sum(1).tolist() == pytest.approx([1] * k)
    scores.requires_grad_()
    weights = torch.stack(ortho_softmax.layer_weights(scores, [], update, config))
    assert weights.sum().item() == pytest.approx(k)
    (weights[0] + ortho_softmax.extra_loss(scores, [], update, config)).backward()
    assert scores.grad.isfinite().all()


@given(st.permutations(range(8)), st.integers(1, 23))
def test_the_orthogonality_loss_of_distinct_one_hot_rows_is_exactly_0(order, update):
    config = ortho()
    scores = 1e4 * torch.eye(8, dtype=torch.float64)[list(order)]
    assert ortho_softmax.extra_loss(scores, [], update, config).item() == 0
    assert ortho_softmax.rank(scores, [], update, config) == list(order)
    k = ortho_softmax.size_at(update, config)
    weights = torch.stack(ortho_softmax.layer_weights(scores, [], update, config))
    assert weights.tolist() == [float(layer in order[:k]) for layer in range(8)]
    same = scores.clone()
    same[1] = same[0]  # two rows choose one layer: (1 · 1)² more
    weight = ortho_softmax.extra_loss_weight(update, config)
    assert ortho_softmax.extra_loss(same, [], update, config).item() == weight
    flat = torch.zeros(8, 8, dtype=torch.float64)
    expected = weight * (math.comb(k, 2) / 64 + k * (1 / 8 - 1) ** 2)
    assert ortho_softmax.extra_loss(flat, [], update, config).item() == pytest.approx(expected)


def test_the_rows_of_ortho_softmax_separate_from_their_initial_values():
    """From nearly equal rows, the first k choose k layers, with weights near 0 and 1."""
    sizes = (8, 16, 24)
    config = preset("digits", method="ortho-softmax", sizes=sizes, updates=2000, seed=3)
    scores = torch.nn.Parameter(ortho_softmax.initial_scores(config))
    assert scores.abs().max() < 0.01 and scores.shape == (24, 24)
    assert len(scores.unique(dim=0)) == 24  # equal rows would have equal gradients
    other = dataclasses.replace(config, seed=4)
    assert not torch.equal(scores, ortho_softmax.initial_scores(other))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    useful = torch.linspace(0, 1, 24)[order]
    optimizer = torch.optim.Adam([scores], betas=(0.9, config.beta2))
    for update in range(step1_updates(config)):
        weights = torch.stack(ortho_softmax.layer_weights(scores, [], update, config))
        loss = -0.1 * (useful * (2 * weights - weights**2)).sum()  # more than 1 is worth less
        loss = loss + ortho_softmax.extra_loss(scores, [], update, config)
        optimizer.param_groups[0]["lr"] = learning_rate(update, config) * config.score_rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = ortho_softmax.first_rows(scores.detach(), update, config)[:8]
    assert len(set(rows.argmax(1).tolist())) == 8 and rows.amax(1).min() > 0.9


def test_schedules_of_ortho_softmax():
    config = ortho(step1_share=0.5, updates=400)
    taus = [ortho_softmax.temperature(update, config) for update in range(200)]
    assert taus[0] == 1 and taus[-1] == pytest.approx(0.1)
    factors = [later / tau for tau, later in pairwise(taus)]
    assert factors == pytest.approx([0.1 ** (1 / 199)] * 199)
    weights = [ortho_softmax.extra_loss_weight(update, config) for update in range(200)]
    assert weights[0] == 0 and weights[50] == 0.5 and weights[100:] == [1.0] * 100
    sizes = Counter(ortho_softmax.size_at(update, config) for update in range(200))
    assert set(sizes) == {3, 5} and min(sizes.values()) > 70


def test_presets_have_the_papers_settings_of_each_method():
    def settings(name: str, method: str, **changes) -> tuple:
        config = preset(name, method=method, **changes)
        return config.delta, config.initial_score, config.score_rate

    for name in ("demo", "digits"):
        assert settings(name, "simple-top-k") == (1, 0.5, 1.0)
        assert settings(name, "iterative-zero-out") == (4, 2.0, 10.0)
    assert settings("librispeech", "simple-top-k") == (1, 0.5, 1.0)
    assert settings("tedlium2", "simple-top-k") == (4, 0.5, 1.0)
    for name in ("librispeech", "tedlium2"):
        assert settings(name, "iterative-zero-out") == (4, 10.0, 1.0)
    assert settings("tedlium2", "simple-top-k", delta=2, initial_score=0.0) == (2, 0.0, 1.0)
    changed = with_method(preset("tedlium2", score_rate=3.0), "iterative-zero-out", updates=9)
    assert (changed.delta, changed.initial_score, changed.score_rate) == (4, 10.0, 3.0)


@pytest.mark.parametrize("method", ["simple-top-k", "iterative-zero-out"])
@given(st.integers(20, 500), st.integers(1, 4), st.integers(1, 7), st.floats(0.1, 0.9))
def test_k_falls_in_equal_spans(method, updates, delta, smallest, share):
    config = tiny(updates=updates, delta=delta, sizes=(smallest, 8), step1_share=share)
    config = dataclasses.replace(config, method=method)
    ks = [size_at_span_end(update, config) for update in range(step1_updates(config))]
    spans = math.ceil((8 - smallest) / delta)
    expected = [max(8 - delta * i, smallest) for i in range(1, 1 + spans)]
    assert [ALGORITHMS[method].size_at(update, config) for update in range(len(ks))] == ks
    updates_of = Counter(ks)
    if len(ks) >= spans:
        assert ks == sorted(ks, reverse=True) and list(updates_of) == expected
        assert max(updates_of.values()) - min(updates_of.values()) <= 1


@given(st.integers(2, 12), st.data())
def test_every_other_layer_is_kept(blocks, data):
    layers = 4 * blocks
    sizes = sorted(data.draw(st.sets(st.integers(1, layers), min_size=1, max_size=3)))
    ranking = every_other(layers, sizes)
    assert sorted(ranking) == list(range(layers))
    gaps = [b - a for a, b in pairwise(sorted(ranking[: sizes[0]]))]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert sorted(every_other(layers, [layers // 2])[: layers // 2]) == list(range(0, layers, 2))
    assert sorted(shuffled(layers, 3)) == list(range(layers)) != shuffled(layers, 3)


def test_layer_drop_skips_each_layer_for_a_share_of_the_utterances():
    seeds = torch.randint(2**62, (3000,), generator=torch.Generator().manual_seed(0))
    model = Supernet(tiny(method="layerdrop", shared_output_layer=True, layer_drop=0.2), 5)
    (by_layer,) = gates_of(planned(model, 11), model, seeds)
    gates = torch.stack(by_layer)  # (8, 3000)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert gates.mean().item() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / gates.numel()))
    assert not torch.equal(gates[0], gates[1])


def test_sandwich_rule():
    def weights(update: int, *sizes: int, **changes) -> dict[int, float]:
        return sandwich(update, sizes, tiny(**changes))

    drawn = [weights(update, 2, 3, 5, 8) for update in range(4000)]
    for of_update in drawn:
        assert list(of_update) == sorted(of_update, reverse=True)
        assert len(of_update) == 3 and of_update[8] == 1.0 and of_update[2] == 0.3
    between = Counter(list(of_update)[1] for of_update in drawn)
    assert set(between) == {3, 5}
    assert abs(between[3] - 2000) < 4 * math.sqrt(1000)  # 4 standard deviations
    assert drawn[17] == weights(17, 2, 3, 5, 8)
    assert drawn != [weights(update, 2, 3, 5, 8, seed=1) for update in range(4000)]
    assert weights(0, 4, 8) == {8: 1.0, 4: 0.3}
    assert weights(0, 8) == {8: 1.0}


def test_the_loss_weights_of_step_1_are_the_papers():
    model = Supernet(tiny(), 5)
    assert planned(model, 0) == Update(0, 1, {8: 1.0, 7: 0.3})
    assert planned(model, 7).step == 2  # 0.6 of 12 updates are step 1
    model.config = tiny(method="layerdrop", shared_output_layer=True)
    assert planned(model, 0) == Update(0, 2, {8: 1.0})


def test_the_loss_of_an_update_is_the_weighted_sum_of_torchs_ctc_per_label():
    model = network(stochastic_depth=0.0)
    features, frames = utterances(model, [40, 31])
    labels, label_lengths = torch.tensor([[3, 3, 1], [2, 5, 0]]), torch.tensor([3, 2])
    batch = Batch([], features, frames, labels, label_lengths, torch.tensor([1, 2]), {})
    update = Update(11, 2, {8: 1.0, 5: 0.3, 3: 0.2})
    loss, ctc = losses_of(update, batch, 5, model, None)
    log_probs, lengths = model(features, frames, [8, 5, 3])
    by_size = [
        F.ctc_loss(of_size.transpose(0, 1), labels, lengths, label_lengths, reduction="sum") / 5
        for of_size in log_probs
    ]
    torch.testing.assert_close(ctc, torch.stack(by_size).detach())
    torch.testing.assert_close(loss, by_size[0] + 0.3 * by_size[1] + 0.2 * by_size[2])

    def divergence(large: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        pairs = zip(large, small, lengths, strict=True)
        return sum((p[:n].exp() * (p[:n] - q[:n])).sum() for p, q, n in pairs) / 5

    largest, *smaller = log_probs
    teacher = network(seed=1)
    (target,), _ = teacher(features, frames, [8])
    taught, _ = losses_of(update, batch, 5, model, teacher)
    torch.testing.assert_close(taught - loss, divergence(target, largest))
    taught.backward(retain_graph=True)
    assert all(weight.grad is None for weight in teacher.parameters())
    model.config = tiny(stochastic_depth=0.0, self_distillation=0.5)
    taught, _ = losses_of(update, batch, 5, model, None)
    added = 0.5 * sum(divergence(largest, small) for small in smaller)
    torch.testing.assert_close(taught - loss, added)
    (grad,) = torch.autograd.grad(taught - loss, [model.output(8).weight])
    assert grad.abs().max() < 1e-9  # the supernet is the teacher: nothing pulls it


def test_stochastic_depth_drops_layers_outside_the_smallest_subnet():
    seeds = torch.randint(2**62, (3000,), generator=torch.Generator().manual_seed(0))
    model = Supernet(tiny(sizes=(2, 3, 8), stochastic_depth=0.3), 5, [1, 6, 2, 0, 3, 4, 5, 7])
    update = Update(11, 2, {8: 1.0, 3: 0.3, 2: 0.3})
    masks = [model.mask(size) for size in (8, 3, 2)]
    smallest = masks[-1]
    gates = gates_of(update, model, seeds)
    assert gates[1:] == masks[1:]
    assert [gate is True for gate in gates[0]] == smallest
    stays = torch.stack([gate for gate in gates[0] if gate is not True])  # (6, 3000)
    assert set(stays.unique().tolist()) == {0.0, 1.0}
    assert stays.mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / stays.numel()))
    assert not torch.equal(stays[0], stays[1])
    half = gates_of(update, model, seeds[1500:])[0]  # an utterance's draw is its own
    assert torch.equal(torch.stack([gate for gate in half if gate is not True]), stays[:, 1500:])
    alone = Update(11, 2, {8: 1.0})
    assert gates_of(alone, model, seeds) == [[True] * 8]
    model.config = tiny(sizes=(2, 3, 8), stochastic_depth=0.0)
    assert gates_of(update, model, seeds) == masks


def test_learning_rate():
    config = tiny(updates=1000, peak_learning_rate=1.0, warmup=0.45, cooldown=0.45)
    rates = [learning_rate(update, config) for update in range(1000)]
    assert rates[0] == pytest.approx(0.01, abs=0.003)
    assert rates[449] == max(rates) == pytest.approx(1.0)
    assert rates[224] == pytest.approx(0.505, abs=0.003) and rates[899] == pytest.approx(0.01)
    assert rates[:450] == sorted(rates[:450]) and rates[450:] == sorted(rates[450:], reverse=True)
    assert rates[-1] == pytest.approx(1e-8)
