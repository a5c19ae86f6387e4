"""The encoder: one forward for all sizes against separate forwards, padding, what is computed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import computed_rows, network, tiny, utterances

from dynsize import conformer
from dynsize.conformer import Convolution, SelfAttention, depthwise_on_cpu, rotate
from dynsize.supernet import Supernet


def test_a_tensor_as_gate_parts_two_networks_after_the_layer():
    model, half = network(), torch.tensor(0.5, dtype=torch.float64)
    first, second = [True] * 8, [True] * 3 + [half] + [True] * 4
    assert computed_rows(model, [first, second]) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert computed_rows(model, [second, second]) == [1, 1, 1, 1, 2, 2, 2, 2]  # values are unknown


@pytest.mark.parametrize("sizes", [(3, 5), (8, 3, 5)])
def test_networks_that_are_not_nested_are_refused(sizes):
    model = network()
    with pytest.raises(ValueError, match="a larger network prunes"):
        model(*utterances(model, [9]), sizes)


@pytest.mark.parametrize(("front_end", "channels"), [("conv2d", (3, 4)), ("vgg", (3, 4, 4, 3))])
def test_the_shortest_utterances_pass(front_end, channels):
    model = network(front_end=front_end, front_end_channels=channels)
    for length in range(1, 6):
        log_probs, lengths = model(*utterances(model, [length]), [8, 3])
        assert lengths.tolist() == [length // 4 if front_end == "vgg" else -(-length // 4)]
        assert log_probs[:, 0, : lengths[0]].isfinite().all()


@pytest.mark.parametrize("kernel", [1, 5, 31])
@pytest.mark.parametrize("width", [16, 24])
def test_depthwise_convolution_is_conv1d(kernel, width):
    torch.manual_seed(0)
    layer = Convolution(tiny(kernel=kernel, width=width)).double()
    x = torch.randn(3, 11, width, dtype=torch.float64)
    weight, bias = layer.depthwise.weight, layer.depthwise.bias
    expected = F.conv1d(x.mT, weight, bias, padding=kernel // 2, groups=width).mT
    ours = depthwise_on_cpu(x, layer.depthwise)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_depthwise_convolution_is_float32_under_autocast(dtype):
    """In bfloat16, oneDNN's kernel never returns for some shapes."""
    layer = Convolution(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        found = depthwise_on_cpu(torch.randn(3, 11, 16, dtype=dtype), layer.depthwise)
    assert found.dtype == torch.float32


def test_the_stream_is_float32_under_autocast(monkeypatch):
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


def test_the_layers_of_a_new_network_are_the_identity():
    model = Supernet(tiny(), 5).double()
    x, _ = model.encoder(*utterances(model, [9, 7]), [[True] * 8, [False] * 8])
    assert torch.equal(*x)


@pytest.mark.parametrize("rotary", [False, True])
def test_self_attention_sees_the_order_of_frames_by_rotary_positions_alone(rotary):
    layer = SelfAttention(tiny(rotary=rotary))
    x, inside = torch.randn(1, 9, 16), torch.ones(1, 9, dtype=torch.bool)
    backwards = layer(x.flip(1), inside).flip(1)
    assert torch.allclose(backwards, layer(x, inside), atol=1e-6) != rotary


def test_rotary_positions_are_turns_of_complex_numbers():
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    speed = torch.tensor([1, 1e-1, 1e-2, 1e-3], dtype=torch.float64)  # 10000^(-i / 4)
    angle = torch.arange(9)[:, None] * speed
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x), expected, rtol=0, atol=1e-5)


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
            one = slice(row, row + 1)
            alone, _ = model(features[one], lengths[one], [size], seeds=seeds[one])
            torch.testing.assert_close(alone[0, 0], together[i, row], rtol=0, atol=1e-9)
    assert not torch.equal(together, model(features, lengths, [8, 5, 3])[0])
