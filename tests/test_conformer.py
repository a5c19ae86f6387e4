"""The encoder: one forward for all sizes against separate forwards, padding, what is computed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

from dynsize import conformer
from dynsize.conformer import Convolution, rotate
from dynsize.supernet import Supernet


def network(seed: int = 0, **changes) -> Supernet:
    """A supernet in float64 with random weights: the layers of a new one are the identity."""
    torch.manual_seed(seed)
    model = Supernet(tiny(dropout=0.0, **changes), labels=7).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    random.Random(seed).shuffle(model.ranking)
    return model


def utterances(
    model: Supernet, lengths: list[int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with noise in the padding too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), model.config.mel_bins)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.tensor(lengths)


networks = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**20),
        blocks=st.integers(1, 3),
        front_end=st.sampled_from(["conv2d", "vgg"]),
        rotary=st.booleans(),
        kernel=st.sampled_from([1, 3, 7]),
    )
)


def drawn(values: dict) -> Supernet:
    channels = {"conv2d": (3, 4), "vgg": (3, 4, 4, 3)}[values["front_end"]]
    return network(**values, front_end_channels=channels, sizes=(4 * values["blocks"],))


@given(networks, st.lists(st.integers(4, 40), min_size=1, max_size=3), st.data())
def test_one_forward_equals_separate_forwards(values, lengths, data):
    model = drawn(values)
    layers = model.config.layers
    sizes = sorted(
        data.draw(st.lists(st.integers(1, layers), min_size=1, max_size=4)), reverse=True
    )
    features, lengths = utterances(model, lengths)
    together, _ = model(features, lengths, sizes)
    for size, output in zip(sizes, together, strict=True):
        torch.testing.assert_close(
            output, model(features, lengths, [size])[0][0], rtol=1e-9, atol=1e-9
        )


@given(networks, st.lists(st.integers(4, 40), min_size=2, max_size=4))
def test_an_utterance_alone_equals_itself_in_a_batch(values, lengths):
    model = drawn(values)
    features, frames = utterances(model, lengths)
    batch, output_frames = model(features, frames, [model.config.layers])
    for row, length in enumerate(lengths):
        alone, _ = model(
            features[row : row + 1, :length], frames[row : row + 1], [model.config.layers]
        )
        inside = batch[0, row, : output_frames[row]]
        torch.testing.assert_close(alone[0, 0], inside, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**20), st.data())
def test_gradients_equal_those_of_separate_forwards(seed, data):
    model = network(seed)
    features, lengths = utterances(model, [17, 24])
    scores = torch.rand(8, dtype=torch.float64, requires_grad=True)
    stays = (torch.rand(8, 2) < 0.5).double()
    mask = model.mask(data.draw(st.integers(1, 8)))
    gates = [
        [True if m else stays[i] for i, m in enumerate(mask)],
        [s if m else False for s, m in zip(scores, mask, strict=True)],
    ]
    weights = [*model.parameters(), scores]
    cotangent = torch.randn_like(model(features, lengths, [8, 5], gates)[0])
    together = torch.autograd.grad(
        model(features, lengths, [8, 5], gates)[0], weights, cotangent, allow_unused=True
    )
    separate = [
        model(features, lengths, [size], [gate])[0]
        for size, gate in zip((8, 5), gates, strict=True)
    ]
    expected = torch.autograd.grad(torch.cat(separate), weights, cotangent, allow_unused=True)
    for ours, theirs in zip(together, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def computed_rows(model: Supernet, gates: list, utterances_: int = 2) -> list[int]:
    """Count the streams for which each of the L layers is computed in one forward."""
    rows = [0] * model.config.layers

    def count(layer: int):
        def hook(module, inputs):
            rows[layer] += len(inputs[0]) // utterances_

        return hook

    hooks = [
        model.encoder.blocks[layer // 4][kind].register_forward_pre_hook(count(layer))
        for layer in range(model.config.layers)
        for kind in [("ff1", "conv", "mhsa", "ff2")[layer % 4]]
    ]
    model(*utterances(model, [9] * utterances_), [model.config.layers] * len(gates), gates)
    for hook in hooks:
        hook.remove()
    return rows


@given(st.integers(0, 2**20), st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_each_layer_is_computed_for_the_fewest_rows(seed, sizes):
    model = network(seed)
    masks = [model.mask(size) for size in sorted(sizes, reverse=True)]
    # what enters a layer differs where the masks of the layers before it do
    fewest = [len({tuple(m[:layer]) for m in masks if m[layer]}) for layer in range(8)]
    assert computed_rows(model, masks) == fewest


def test_a_tensor_as_gate_parts_two_networks_after_the_layer():
    model, half = network(), torch.tensor(0.5, dtype=torch.float64)
    first, second = [True] * 8, [True] * 3 + [half] + [True] * 4
    assert computed_rows(model, [first, second]) == [1, 1, 1, 1, 2, 2, 2, 2]


def test_pruned_layers_are_never_called():
    model = network()
    kept = model.ranking[:3]
    assert computed_rows(model, [model.mask(3)]) == [int(layer in kept) for layer in range(8)]


@pytest.mark.parametrize("sizes", [(3, 5), (8, 3, 5)])
def test_networks_that_are_not_nested_are_refused(sizes):
    model = network()
    with pytest.raises(ValueError, match="a larger network prunes"):
        model(*utterances(model, [9]), sizes)


def test_nan_in_a_pruned_layer_reaches_nothing():
    model = network()
    features, lengths = utterances(model, [21, 30])
    before, _ = model(features, lengths, [5, 3])
    for layer in model.ranking[5:]:
        for weight in model.encoder.blocks[layer // 4][
            ("ff1", "conv", "mhsa", "ff2")[layer % 4]
        ].parameters():
            torch.nn.init.constant_(weight, float("nan"))
    after, _ = model(features, lengths, [5, 3])
    assert torch.equal(before, after)
    after.sum().backward()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("front_end", "channels"), [("conv2d", (3, 4)), ("vgg", (3, 4, 4, 3))])
def test_the_shortest_utterances_pass(front_end, channels):
    model = network(front_end=front_end, front_end_channels=channels)
    for length in range(1, 6):
        log_probs, lengths = model(*utterances(model, [length]), [8, 3])
        assert lengths.tolist() == [length // 4 if front_end == "vgg" else -(-length // 4)]
        assert log_probs[:, 0, : lengths[0]].isfinite().all()


def test_a_gate_of_zero_is_a_pruned_layer():
    model = network()
    features, lengths = utterances(model, [21])
    mask = model.mask(5)
    zeros = [True if kept else torch.zeros(1, dtype=torch.float64) for kept in mask]
    torch.testing.assert_close(
        model(features, lengths, [8], [zeros])[0],
        model(features, lengths, [8], [mask])[0],
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("kernel", [1, 5, 31])
@pytest.mark.parametrize("width", [16, 24])
def test_depthwise_convolution_is_conv1d(kernel, width):
    torch.manual_seed(0)
    layer = Convolution(tiny(kernel=kernel, width=width)).double()
    x = torch.randn(3, 11, width, dtype=torch.float64)
    weight, bias = layer.depthwise.weight, layer.depthwise.bias
    expected = F.conv1d(
        x.transpose(1, 2), weight, bias, padding=kernel // 2, groups=width
    ).transpose(1, 2)
    torch.testing.assert_close(layer.over_time(x), expected, rtol=1e-12, atol=1e-12)


# Every width, kernel, and batch × frames that training may meet, of which 14 once never returned.
SHAPES = """
import itertools, torch
from conftest import tiny
from dynsize.conformer import Convolution
torch.set_num_threads(2)
widths = (24, 32, 48, 64, 80, 96, 128, 144, 192, 256, 384, 512)
inputs = [(3, 62), (1, 97), (5, 41), (7, 23), (2, 151)]
inputs += [(3, 125), (4, 63), (9, 31), (6, 87), (11, 50)]
for width, kernel in itertools.product(widths, (15, 31)):
    layer = Convolution(tiny(width=width, kernel=kernel))
    for rows, frames in inputs:
        x = torch.randn(rows, frames, width, requires_grad=True)
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                layer.over_time(x.bfloat16() if enabled else x).sum().backward()
        print(width, kernel, rows, frames, flush=True)
"""


def test_the_depthwise_convolution_returns_for_every_shape():
    """A child process computes 240 shapes in both precisions, and is killed if it hangs."""
    command = [sys.executable, "-c", SHAPES]
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    environment = os.environ | dict(OMP_NUM_THREADS="2", PYTHONPATH=path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            output, _ = child.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
    assert child.returncode == 0 and len(output.splitlines()) == 240, output[-100:]


def test_the_stream_is_float32_under_autocast(monkeypatch):
    """The sum of the layers' outputs never has fewer bits than float32, whatever the branches."""
    model = network(precision="bfloat16").float()
    streams, branches, op = [], [], conformer.gated_residual_layer_norm

    def recorded(x, branch, *others):
        streams.append(x.dtype)
        branches.append(branch.dtype)
        return op(x, branch, *others)

    monkeypatch.setattr(conformer, "gated_residual_layer_norm", recorded)
    features, lengths = utterances(model, [40, 33])
    model(features.float(), lengths, [8, 3])
    assert set(streams) == {torch.float32} and set(branches) == {torch.bfloat16}


def test_rotary_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 9, 8)
    products = rotate(query)[0, 0] @ rotate(key)[0, 0].T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.01


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    outputs = []
    for precision in ("float32", "bfloat16"):
        model = network(precision=precision).float()
        features, lengths = utterances(model, [40, 33])
        outputs.append(model(features.float(), lengths, [8, 3])[0])
    assert outputs[1].dtype == torch.float32
    assert not torch.equal(*outputs)
    assert (outputs[0].exp() - outputs[1].exp()).abs().max() < 0.1


def test_dropout_differs_by_layer_and_utterance_and_is_one_for_all_sizes(monkeypatch):
    model, seen, op = network(), [], conformer.gated_residual_layer_norm
    model.encoder.dropout = 0.3

    def recorded(x, branch, gates, scale, dropout, seed, *others):
        seen.extend([] if seed is None else seed.tolist())
        return op(x, branch, gates, scale, dropout, seed, *others)

    monkeypatch.setattr(conformer, "gated_residual_layer_norm", recorded)
    features, lengths = utterances(model, [40, 40])
    seeds = torch.tensor([5, 2**40])
    together, _ = model(features, lengths, [8, 5, 3], seeds=seeds)
    assert len(set(seen)) == len(seen) == 2 * 8
    for i, size in enumerate((8, 5, 3)):
        for row in range(2):
            alone, _ = model(
                features[row : row + 1], lengths[row : row + 1], [size], seeds=seeds[row : row + 1]
            )
            torch.testing.assert_close(alone[0, 0], together[i, row], rtol=0, atol=1e-9)
    assert not torch.equal(together, model(features, lengths, [8, 5, 3])[0])
