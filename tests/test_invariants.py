"""What pruning promises: properties of drawn cases, in the order of a proof.

A ranking orders the layers; masks follow from it; a mask decides what is computed; so a subnet that
is cut out, or runs together with others, is the same network; and files give back all of it.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import computed_rows, layer_of, network, tiny, utterances
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynsize import checkpoint, iterative_zero_out
from dynsize.algorithms import ALGORITHMS
from dynsize.config import LAYERS, Config
from dynsize.schedule import ends_span, size_at_span_start, step1_updates
from dynsize.simple_top_k import relaxed_top_k
from dynsize.steps import Update, gates_of
from dynsize.subnet import cut, largest_within, macs, parameters
from dynsize.supernet import OUTPUTS, Supernet
from dynsize.tokenizer import train_tokenizer

L = 8  # layers of the tiny configuration
SEEDS = st.integers(0, 2**20)
SIZES = st.integers(1, L)
METHODS = st.sampled_from(list(ALGORITHMS))
# Scores have this many different values at most: with few there are ties, with six also ±infinity.
LEVELS = st.integers(1, 6)
VALUES = torch.tensor([0.5, 0.0, -1.0, 1e4, torch.inf, -torch.inf])


def drawn_scores(config: Config, seed: int, levels: int) -> Tensor:
    """Return scores of the method's shape, each one of the first `levels` values."""
    generator = torch.Generator().manual_seed(seed)
    shape = ALGORITHMS[config.method].initial_scores(config).shape
    return VALUES[torch.randint(levels, shape, generator=generator)]


def learned(config: Config, seed: int, levels: int) -> list[int]:
    """Return the ranking at the end of step 1, where scores change at will."""
    algorithm, ranking = ALGORITHMS[config.method], list(range(config.layers))
    for update in range(step1_updates(config)):
        if ends_span(update, config):
            scores = drawn_scores(config, seed + update, levels)
            ranking = algorithm.rank(scores, ranking, update, config)
    return ranking


# 1. Scores → ranking


@given(METHODS, SEEDS, LEVELS)
def test_ties_go_to_the_lower_layer(method, seed, levels):
    """Of layers with equal scores the lower one is ranked first."""
    config = tiny(method=method)
    scores, algorithm = drawn_scores(config, seed, levels), ALGORITHMS[method]
    ranking = algorithm.rank(scores, list(range(L)), 0, config)
    rows = scores.expand(L, -1).tolist()  # the n-th place is decided by row n
    for place, (row, layer) in enumerate(zip(rows, ranking, strict=True)):
        rest = ranking[place + 1 :]
        assert all((row[layer], -layer) > (row[other], -other) for other in rest)


@given(SEEDS, LEVELS, st.integers(1, 5), st.integers(1, 7), st.integers(10, 80))
def test_zeroed_out_layers_stay_zeroed_out(seed, levels, delta, smallest, updates):
    """A layer that Iterative-Zero-Out zeroes out never comes back, whatever its score becomes."""
    config = tiny(method="iterative-zero-out", delta=delta, sizes=(smallest, L), updates=updates)
    ranking, gone = list(range(L)), set()
    for update in range(step1_updates(config)):
        scores = drawn_scores(config, seed + update, levels)
        weights = iterative_zero_out.layer_weights(scores, ranking, update, config)
        now = {layer for layer, weight in enumerate(weights) if weight is False}
        assert gone <= now and len(now) == L - size_at_span_start(update, config)
        expected = scores.sigmoid().tolist()
        assert all(w is False or w.item() == expected[i] for i, w in enumerate(weights))
        gone = now
        if ends_span(update, config):
            ranking = iterative_zero_out.rank(scores, ranking, update, config)
    assert gone <= set(ranking[smallest:])


@given(SEEDS, LEVELS, st.integers(1, 5), st.integers(10, 80))
def test_the_smallest_weights_are_zeroed_out(seed, levels, delta, updates):
    """An iteration ends by zeroing out the layers of smallest weight that are left."""
    config = tiny(method="iterative-zero-out", delta=delta, updates=updates)
    ranking = list(range(L))
    for update in range(step1_updates(config) - 1):
        if ends_span(update, config):
            scores = drawn_scores(config, seed + update, levels)
            here, there = (size_at_span_start(u, config) for u in (update, update + 1))
            before = ranking
            ranking = iterative_zero_out.rank(scores, before, update, config)
            left, lost = ranking[:there], ranking[there:here]
            assert {*left, *lost} == set(before[:here]) and lost
            assert scores[left].min() >= scores[lost].max()
            assert ranking[here:] == before[here:]  # lost earlier: ranked lower


# 2. Ranking → masks


@given(METHODS, SEEDS, LEVELS)
def test_masks_keep_k_layers_and_are_nested(method, seed, levels):
    """The mask of size k keeps the k layers that are ranked first, as do all larger subnets."""
    config = tiny(method=method)
    ranking = learned(config, seed, levels)
    model = Supernet(config, 4, ranking)
    kept = [{layer for layer in range(L) if model.mask(k)[layer]} for k in range(L + 1)]
    assert kept == [set(ranking[:k]) for k in range(L + 1)]
    assert [len(layers) for layers in kept] == list(range(L + 1))


# 3. Relaxed weights


@st.composite
def scores_and_k(draw) -> tuple[Tensor, int]:
    values = draw(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=12))
    return torch.tensor(values, dtype=torch.float64), draw(st.integers(1, len(values)))


@given(scores_and_k())
def test_relaxed_weights_sum_to_k_and_keep_the_order(drawn):
    """Relaxed weights are not negative, sum to k, rise with the scores; gradients are finite."""
    scores, k = drawn
    scores.requires_grad_()
    relaxed = relaxed_top_k(scores, k)
    assert (relaxed >= 0).all()
    assert relaxed.sum().item() == pytest.approx(k, rel=1e-6)
    assert (relaxed[scores.argsort()].diff() >= -1e-9).all()
    (relaxed * torch.linspace(-1, 1, len(scores), dtype=torch.float64)).sum().backward()
    assert scores.grad.isfinite().all()


# 4. Masks → what is computed


@given(SEEDS, st.lists(SIZES, min_size=1, max_size=3))
def test_nan_in_a_pruned_layer_reaches_nothing(seed, sizes):
    """NaN in all weights of the pruned layers changes no output and no gradient."""
    model = network(seed)
    sizes = sorted(sizes, reverse=True)
    features, lengths = utterances(model, [21, 30])
    before, _ = model(features, lengths, sizes)
    for layer in model.ranking[sizes[0] :]:
        for weight in layer_of(model, layer).parameters():
            torch.nn.init.constant_(weight, float("nan"))
    after, _ = model(features, lengths, sizes)
    assert torch.equal(before, after)
    after[..., 0].sum().backward()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@given(SEEDS, st.lists(SIZES, min_size=1, max_size=4))
def test_each_layer_is_computed_for_the_fewest_rows(seed, sizes):
    """Networks share a layer's computation as long as all their gates before it are the same."""
    model = network(seed)
    masks = [model.mask(size) for size in sorted(sizes, reverse=True)]
    fewest = [len({tuple(m[:layer]) for m in masks if m[layer]}) for layer in range(L)]
    assert computed_rows(model, masks) == fewest


# 5. The same network, cut out or together with others


@given(SEEDS, st.sampled_from([3, 5, 8]), st.booleans(), st.sampled_from(list(OUTPUTS)))
def test_the_cut_subnet_equals_the_masked_supernet(seed, size, shared_output_layer, output):
    """A subnet that is cut out computes what the supernet computes with its mask."""
    model = network(seed, shared_output_layer=shared_output_layer, output=output)
    model.float().double()  # a cut subnet is float32
    features, lengths = utterances(model, [33, 20])
    subnet = cut(model, size).double()
    targets = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    found = []
    for either in (model, subnet):
        emissions, frames = either(features, lengths, [size])
        texts = either.output(size).decode(emissions[0], frames)
        found.append((emissions, either.losses(emissions, frames, [size], *targets), texts))
    masked, alone = found
    for expected, ours in zip(masked[:2], alone[:2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert alone[2] == masked[2]


networks = st.fixed_dictionaries(
    dict(
        seed=SEEDS,
        output=st.sampled_from(list(OUTPUTS)),
        block=st.sampled_from([LAYERS, ("mhsa", "ff"), ("conv", "ff2", "mhsa")]),
        blocks=st.integers(1, 3),
        front_end=st.sampled_from(["conv2d", "vgg"]),
        rotary=st.booleans(),
        kernel=st.sampled_from([1, 3, 7]),
    )
)


def drawn_network(values: dict) -> Supernet:
    channels = {"conv2d": (3, 4), "vgg": (3, 4, 4, 3)}[values["front_end"]]
    layers = len(values["block"]) * values["blocks"]
    return network(**values, front_end_channels=channels, sizes=(layers,))


@given(networks, st.lists(st.integers(4, 40), min_size=1, max_size=3), st.data())
def test_one_forward_equals_separate_forwards(values, lengths, data):
    """Networks that run together compute what each computes alone."""
    model = drawn_network(values)
    every = st.lists(st.integers(1, model.config.layers), min_size=1, max_size=4)
    sizes = sorted(data.draw(every), reverse=True)
    features, lengths = utterances(model, lengths)
    together, _ = model(features, lengths, sizes)
    for size, output in zip(sizes, together, strict=True):
        alone, _ = model(features, lengths, [size])
        torch.testing.assert_close(output, alone[0], rtol=1e-9, atol=1e-9)


def gradients(outputs: Sequence[Tensor], weights: list[Tensor], cotangent: Tensor) -> list:
    options = dict(allow_unused=True, retain_graph=True)
    return torch.autograd.grad(torch.cat(outputs), weights, cotangent, **options)


@given(METHODS, SEEDS, st.integers(0, 6), SIZES)
def test_gradients_equal_those_of_separate_forwards(method, seed, update, size):
    """Networks that run together have the gradients that each has alone, in both steps."""
    model = network(seed, method=method)
    features, lengths = utterances(model, [17, 24])
    step1 = (model.scores, model.ranking, update, model.config)
    layer_weights = ALGORITHMS[method].layer_weights(*step1)
    stays = (torch.rand(L, 2) < 0.5).double()
    mask = model.mask(size)
    dropped = [kept or stay for kept, stay in zip(mask, stays, strict=True)]
    weights = list(model.parameters())
    for gates in ([[True] * L, layer_weights], [dropped, mask]):
        together, _ = model(features, lengths, [L, 5], gates)
        pairs = zip((L, 5), gates, strict=True)
        separate = [model(features, lengths, [k], [of_size])[0] for k, of_size in pairs]
        cotangent = torch.randn_like(together)
        ours = gradients([together], weights, cotangent)
        for gradient, expected in zip(ours, gradients(separate, weights, cotangent), strict=True):
            assert (gradient is None) == (expected is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@given(networks, st.lists(st.integers(4, 40), min_size=2, max_size=4))
def test_an_utterance_alone_equals_itself_in_a_batch(values, lengths):
    """An utterance has the same emissions and the same loss alone as in any batch."""
    model = drawn_network(values)
    largest = [model.config.layers]
    features, frames = utterances(model, lengths)
    batch, output_frames = model(features, frames, largest)
    labels = torch.randint(1, model.labels, (len(lengths), 3))
    label_lengths = torch.arange(len(lengths)).clamp(max=output_frames)  # CTC needs as many frames
    losses = model.losses(batch, output_frames, largest, labels, label_lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone, _ = model(features[one, :length], frames[one], largest)
        inside = batch[0, row, : output_frames[row]]
        torch.testing.assert_close(alone[0, 0], inside, rtol=1e-9, atol=1e-9)
        target = labels[one, : label_lengths[row]], label_lengths[one]
        loss = model.losses(alone, output_frames[one], largest, *target)
        torch.testing.assert_close(loss[0, 0], losses[0, row], rtol=1e-9, atol=1e-9)


@given(SEEDS)
def test_stochastic_depth_changes_the_supernet_alone(seed):
    """With stochastic depth the smaller sizes compute what they compute without it."""
    model = network(seed, stochastic_depth=0.5)
    features, lengths = utterances(model, [17, 24])
    masks = [model.mask(size) for size in (8, 5, 3)]
    seeds = torch.tensor([seed, 2**40 + seed])
    gates = gates_of(Update(11, 2, {8: 1.0, 5: 0.3, 3: 0.3}), model, seeds)
    dropped, _ = model(features, lengths, [8, 5, 3], gates)
    plain, _ = model(features, lengths, [8, 5, 3], masks)
    torch.testing.assert_close(dropped[1:], plain[1:], rtol=1e-9, atol=1e-9)
    skipped = any(isinstance(g, Tensor) and (g == 0).any() for g in gates[0])
    assert skipped != torch.equal(dropped[0], plain[0])


# 6. Budgets and files


@given(SEEDS, st.sampled_from(["max_params", "max_macs"]), st.floats(0, 1.1), st.booleans())
def test_budgets_are_kept_and_used(seed, budget, share, exactly):
    """Pruning to a budget takes the largest size that costs at most the budget."""
    model = network(seed)
    costs = {
        "max_params": [parameters(cut(model, size)) for size in range(1, L + 1)],
        "max_macs": [macs(model, size) for size in range(1, L + 1)],
    }[budget]
    limit = costs[seed % L] if exactly else round(costs[-1] * share)
    fitting = sum(cost <= limit for cost in costs)
    if fitting:
        assert largest_within(model, budget, limit, 1.0) == fitting
    else:
        with pytest.raises(ValueError, match=rf"--{budget.replace('_', '-')} .*one layer has"):
            largest_within(model, budget, limit, 1.0)


@given(METHODS, SEEDS, st.sampled_from([None, 3]), st.sampled_from(list(OUTPUTS)))
def test_a_checkpoint_gives_back_what_was_saved(method, seed, size, output):
    """A checkpoint has the same weights, scores, ranking and settings after it is read."""
    tokenizer = train_tokenizer(["LOW MID"], 12)
    model = network(seed, labels=tokenizer.labels, method=method, output=output).float()
    saved = model if size is None else cut(model, size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.pt"
        checkpoint.save(file, saved, tokenizer, dict(update=3) if size is None else None)
        read = checkpoint.load(file)
        assert [path.name for path in file.parent.iterdir()] == ["a.pt"]
    loaded = read.model
    assert read.tokenizer.encode("LOW") == tokenizer.encode("LOW")
    assert read.training == (dict(update=3) if size is None else None)
    assert loaded.size == size and loaded.config == model.config
    assert [loaded.mask(k) for k in range(L)] == [model.mask(k) for k in range(L)]
    names = dict(saved.named_parameters())
    assert names.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(weight, loaded.get_parameter(n)) for n, weight in names.items())


@given(METHODS, SEEDS)
def test_weights_alone_bring_their_masks(method, seed):
    """`state_dict` has the ranking: loading it gives the right masks, or an error."""
    model = network(seed, method=method)
    other = Supernet(model.config, 7).double()
    other.load_state_dict(model.state_dict())
    assert other.ranking == model.ranking
    without = {name: w for name, w in model.state_dict().items() if name != "_extra_state"}
    with pytest.raises(RuntimeError, match="_extra_state"):
        other.load_state_dict(without)
    with pytest.raises(ValueError, match="not a ranking of 8 layers"):
        other.load_state_dict(without | {"_extra_state": [0] * L})
    subnet = cut(model, 3)
    elsewhere = model.ranking[3:] + model.ranking[:3]
    with pytest.raises(ValueError, match="a subnet with the layers"):
        subnet.load_state_dict(subnet.state_dict() | {"_extra_state": elsewhere})
