"""Agreement with numbers that the authors' published implementation computed in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynsize.config import LAYERS, Config
from dynsize.conformer import Encoder
from dynsize.simple_top_k import relaxed_top_k

REFERENCE = Path(__file__).parent / "reference"
OUR_NAMES = {  # the authors' name of each module of a layer → ours
    "layer_norm.": "norm.", "layernorm.": "norm.", "linear_ff.": "expand.",
    "linear_out.": "project.", "pointwise_conv1.": "expand.", "depthwise_conv.": "depthwise.",
    "norm.": "depthwise_norm.", "pointwise_conv2.": "project.",
    "mhsa.in_proj_": "query_key_value.", "mhsa.out_proj.": "project.",
}  # fmt: skip


def our_name(name: str) -> str:
    if name.startswith("frontend.conv"):
        number, kind = name.removeprefix("frontend.conv").split(".")
        return f"front_end.convolutions.{int(number) - 1}.{kind}"
    if name.startswith("frontend.linear."):
        return name.replace("frontend.linear.", "front_end.project.")
    _, block, rest = name.split(".", 2)
    if rest.startswith("final_layer_norm."):
        return f"blocks.{block}.norm.{rest.split('.')[-1]}"
    _, number, rest = rest.split(".", 2)
    theirs = next(theirs for theirs in OUR_NAMES if rest.startswith(theirs))
    ours = OUR_NAMES[theirs] + rest.removeprefix(theirs)
    return f"blocks.{block}.{LAYERS[int(number)]}.{ours}"


@pytest.fixture(scope="module")
def reference() -> tuple[Encoder, dict]:
    numbers = dict(np.load(REFERENCE / "encoder.npz"))
    config = Config(
        blocks=3, width=16, attention_heads=2, kernel=7, mel_bins=20, sizes=(4, 6, 12), dropout=0.0,
        front_end="vgg", front_end_channels=(4, 6, 6, 4), rotary=False,
    )  # fmt: skip
    encoder = Encoder(config, range(12)).double().eval()
    prefix = "weights/"
    weights = {
        our_name(name.removeprefix(prefix)): torch.from_numpy(value)
        for name, value in numbers.items()
        if name.startswith(prefix) and "layer_gates" not in name
    }
    encoder.load_state_dict(weights)
    return encoder, {name: torch.from_numpy(value) for name, value in numbers.items()}


@torch.no_grad()
def test_encoder_of_every_size_in_one_forward(reference):
    encoder, numbers = reference
    best = numbers["weights/layer_gates"].sort(descending=True, stable=True).indices.tolist()
    sizes = (12, 6, 4)
    masks = [[layer in best[:size] for layer in range(12)] for size in sizes]
    outputs, frames = encoder(numbers["features"], numbers["lengths"], masks)
    assert frames[0] == numbers["frontend_lengths"][0]
    for size, output in zip(sizes, outputs, strict=True):
        torch.testing.assert_close(output[0], numbers[f"output_size{size}"][0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_encoder_with_soft_layer_weights(reference):
    encoder, numbers = reference
    output, _ = encoder(numbers["features"], numbers["lengths"], [list(numbers["soft_weights"])])
    torch.testing.assert_close(output[0, 0], numbers["output_soft"][0], rtol=0, atol=1e-9)


def test_relaxed_top_k():
    numbers = np.load(REFERENCE / "relaxed_top_k.npz")
    cases = sorted({name.split("/")[0] for name in numbers})
    assert len(cases) == 44
    for case in cases:
        names = (f"{case}/{name}" for name in ("scores", "cotangent", "weights", "scores_grad"))
        scores, cotangent, weights, gradient = (torch.from_numpy(numbers[name]) for name in names)
        relaxed = relaxed_top_k(scores.requires_grad_(), int(case.rsplit("_k", 1)[1]))
        torch.testing.assert_close(relaxed, weights, rtol=0, atol=1e-9, msg=case)
        (cotangent * relaxed).sum().backward()
        torch.testing.assert_close(scores.grad, gradient, rtol=0, atol=1e-9, msg=case)
