"""Cutting, costs, and checkpoints of supernets and subnets."""

import random

import pytest
import torch
from conftest import tiny
from torch.utils.flop_counter import FlopCounterMode

from dynsize import checkpoint
from dynsize.conformer import FRONT_ENDS
from dynsize.features import feature_frames, log_mel
from dynsize.subnet import (
    ROUNDS,
    cut,
    largest_within,
    latencies,
    layer_name,
    macs,
    parameters,
    widened,
)
from dynsize.supernet import Supernet
from dynsize.tokenizer import train_tokenizer


def supernet(seed: int = 0, labels: int = 7, **changes) -> Supernet:
    torch.manual_seed(seed)
    model = Supernet(tiny(**changes), labels).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    random.Random(seed).shuffle(model.ranking)
    return model


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
    assert (
        "output_layers.3.weight" in names
        and "output_layers.8.weight" not in names
        and "scores" not in names
    )
    subnet.output_layers["3"].weight.data.zero_()
    assert model.output_layers["3"].weight.abs().sum() > 0  # a copy


def test_cutting_refuses_other_sizes_and_cut_networks():
    for size in (0, 9):
        with pytest.raises(ValueError, match=f"no size {size}; sizes are 1 to 8 layers"):
            cut(supernet(), size)
    with pytest.raises(ValueError, match="cut already, to 3 layers"):
        cut(cut(supernet(), 3), 3)


@pytest.mark.parametrize("seconds", [1.0, 7.3])
@pytest.mark.parametrize("front_end", ["conv2d", "vgg"])
def test_macs_are_those_that_torch_counts(front_end, seconds):
    channels = {"conv2d": (8, 16), "vgg": (8, 16, 16, 8)}[front_end]
    model = supernet(
        front_end=front_end, front_end_channels=channels, width=48, mel_bins=30, kernel=7
    )
    frames = feature_frames(round(seconds * 8000), model.config)
    for size in model.sizes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, frames, 30), torch.tensor([frames]), [size])
        assert macs(model, size, seconds) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert set(FRONT_ENDS) == {"conv2d", "vgg"}


def test_the_latency_budget_is_of_this_machine(monkeypatch):
    monkeypatch.setattr(
        "dynsize.subnet.latencies", lambda networks, seconds: [seconds * networks[0][1]]
    )
    assert largest_within(supernet(), "max_latency_ms", 13.0, 2.0) == 6


def test_an_untrained_size_has_the_output_layer_of_the_next_smaller_one():
    model = supernet()
    for size, trained in ((1, 3), (4, 3), (5, 5), (7, 5)):
        subnet = cut(model, size)
        assert torch.equal(
            subnet.output_layer(size).weight, model.output_layers[str(trained)].weight
        )
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


def test_latencies_are_one_positive_number_for_each_network():
    model = supernet()
    assert all(ms > 0 for ms in latencies([(model, 8), (cut(model, 3), 3)], seconds=0.1))


def test_latencies_are_from_samples_to_log_probabilities(monkeypatch):
    """So that a size costs the same milliseconds here as in the recogniser."""
    seen = []
    monkeypatch.setattr(
        "dynsize.subnet.log_mel", lambda x, config: seen.append(len(x)) or log_mel(x, config)
    )
    model = supernet()
    latencies([(model, 8), (model, 3)], seconds=0.1)
    assert seen == [model.config.sample_rate // 10] * 2 * (ROUNDS + 1)  # one to warm up


def test_layer_names():
    assert [layer_name(layer) for layer in (0, 9, 23)] == ["1.ff1", "3.conv", "6.ff2"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["LOW MID"], 12)
    checkpoint.save(tmp_path / "a.pt", supernet(labels=tokenizer.labels), tokenizer)
    before = (tmp_path / "a.pt").read_bytes()

    def full(content, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "a.pt", supernet(1, labels=tokenizer.labels), tokenizer)
    assert (tmp_path / "a.pt").read_bytes() == before


class Malicious:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_bad_checkpoints_are_named(tmp_path, capsys):
    tokenizer = train_tokenizer(["LOW MID"], 12)
    good = tmp_path / "good.pt"
    checkpoint.save(good, supernet(labels=tokenizer.labels), tokenizer)
    data = good.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save(Malicious(), tmp_path / "code.pt")
    content = torch.load(good, weights_only=True)
    torch.save(content | {"weights": {}}, tmp_path / "weights.pt")
    torch.save(content | {"config": content["config"] | {"kernel": 4}}, tmp_path / "config.pt")
    weights = {name: w for name, w in content["weights"].items() if name != "_extra_state"}
    torch.save(content | {"weights": weights}, tmp_path / "ranking.pt")
    for name in (
        "cut",
        "text",
        "empty",
        "other",
        "code",
        "weights",
        "config",
        "ranking",
        "missing",
    ):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            checkpoint.load(tmp_path / f"{name}.pt")
    assert "this code ran" not in capsys.readouterr().out
