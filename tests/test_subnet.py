"""Cutting subnets out of a supernet, and what they cost."""

import pytest
import torch
from conftest import network, tiny
from torch.utils.flop_counter import FlopCounterMode

from dynsize.conformer import FRONT_ENDS
from dynsize.features import feature_frames, log_mel
from dynsize.subnet import ROUNDS, cut, largest_within, latencies, macs, parameters, widened
from dynsize.supernet import Supernet


def supernet(**changes) -> Supernet:
    return network(**changes).float()


def test_a_cut_subnet_has_nothing_of_the_pruned_layers():
    model = supernet()
    subnet = cut(model, 3)
    names = subnet.state_dict().keys()
    kinds = ("ff1", "conv", "mhsa", "ff2")
    for layer in range(8):
        prefix = f"encoder.blocks.{layer // 4}.{kinds[layer % 4]}."
        assert any(name.startswith(prefix) for name in names) == (layer in model.ranking[:3])
    kept = {n: w for n, w in model.named_parameters() if n in names}
    assert parameters(subnet) == sum(w.numel() for w in kept.values()) < parameters(model)
    assert parameters(model, 3) == parameters(subnet)
    assert parameters(model) == parameters(cut(model, 8))  # one number for one network
    outputs = {name.split(".")[1] for name in names if name.startswith("output_layers.")}
    assert outputs == {"3"} and "scores" not in names
    subnet.output_layers["3"].weight.data.zero_()
    assert model.output_layers["3"].weight.abs().sum() > 0  # a copy


@pytest.mark.parametrize("seconds", [1.0, 7.3])
@pytest.mark.parametrize("front_end", ["conv2d", "vgg"])
def test_macs_are_those_that_torch_counts(front_end, seconds):
    channels = {"conv2d": (8, 16), "vgg": (8, 16, 16, 8)}[front_end]
    changes = dict(front_end=front_end, front_end_channels=channels, mel_bins=30)
    model = supernet(width=48, kernel=7, **changes)
    frames = feature_frames(round(seconds * 8000), model.config)
    for size in model.sizes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, frames, 30), torch.tensor([frames]), [size])
        assert macs(model, size, seconds) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert set(FRONT_ENDS) == {"conv2d", "vgg"}


def test_the_latency_budget_is_of_this_machine(monkeypatch):
    monkeypatch.setattr(
        "dynsize.subnet.latencies", lambda networks, seconds: [seconds * networks[0].size]
    )
    assert largest_within(supernet(), "max_latency_ms", 13.0, 2.0) == 6


def test_an_untrained_size_has_the_output_layer_of_the_next_smaller_one():
    model = supernet()
    for size, trained in ((1, 3), (4, 3), (5, 5), (7, 5)):
        subnet = cut(model, size)
        assert torch.equal(subnet.output(size).weight, model.output_layers[str(trained)].weight)
        assert sum(len(block) - 1 for block in subnet.encoder.blocks) == size


def test_a_widened_model_computes_what_it_did_in_every_output_layer():
    model = supernet(sizes=(8,))
    config = tiny(sizes=(2, 5, 8), method="iterative-zero-out")
    supernet_of = widened(model, config).eval()
    features, lengths = torch.randn(2, 33, 12), torch.tensor([33, 20])
    before, _ = model(features, lengths, [8])
    every = [[True] * 8] * 3
    after, _ = supernet_of(features, lengths, [8, 5, 2], every)
    assert all(torch.equal(before[0], of_size) for of_size in after)
    assert (supernet_of.scores == config.initial_score).all() and supernet_of.sizes == (2, 5, 8)
    with pytest.raises(ValueError, match="was cut to 3 layers"):
        widened(cut(supernet(), 3), config)


def test_latencies_are_from_samples_to_log_probabilities(monkeypatch):
    """So that a size costs the same milliseconds here as in the recogniser."""
    seen = []
    monkeypatch.setattr(
        "dynsize.subnet.log_mel", lambda x, config: seen.append(len(x)) or log_mel(x, config)
    )
    model = supernet()
    latencies([model, cut(model, 3)], seconds=0.1)
    assert seen == [model.config.sample_rate // 10] * 2 * (ROUNDS + 1)  # one to warm up
