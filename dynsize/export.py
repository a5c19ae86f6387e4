"""ONNX files of a network, with the features inside: audio in, log-probabilities out.

`size-K.onnx` holds one size. `supernet.onnx` holds all of them and has the size as an input: each
layer is in an `If` node, so weights are stored once and pruned layers do not run. The opset is 20,
which onnxruntime 1.17 and newer run.

    audio             input, (B, samples) float32, padded, −1 to 1, at `sample_rate`
    lengths           input, (B,) int64, the samples of each utterance
    size              input, () int64, one of the trained sizes; only where there are all
    log_probs         output, (B, T', V) float32; label 0 is the blank, label i the unit i
    log_prob_lengths  output, (B,) int64, the frames of each utterance

The metadata `dynsize` is JSON: the configuration (`config`, with `sample_rate`), the SentencePiece
model in base64 (`tokenizer`), the duration of training's longest utterance (`longest_seconds`), and
what each size costs.

Without dynsize, text is made like this: resample to `sample_rate`, take the likeliest label of each
of the utterance's frames, join equal neighbours, remove the blank, and let SentencePiece decode the
labels, which are its ids. For audio longer than training's (or than 30 s) do it in windows, with a
sixth of a window on each side as context whose frames are dropped, as `networks.windowed` does,
which also puts faint noise in the place of digital silence.
"""

import copy
import dataclasses
import json
import logging
import math
import warnings
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from dynsize import files
from dynsize.checkpoint import Checkpoint
from dynsize.config import require_ctc
from dynsize.conformer import padding_mask
from dynsize.features import QUIETEST, mel_filters, spectrum_points, window_and_hop
from dynsize.networks import ONNX_FORMAT, OnnxGraph, network_of, open_onnx, seal
from dynsize.subnet import costs, cut
from dynsize.supernet import Supernet

FLOOR = 1e-6  # added to the scaled mel energies in the graph
TOLERANCE = 1e-4  # of log-probabilities, absolute; beside it their relative error in float32
PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # of the extra `onnx`
TORCH = "2.13"  # the oldest that exports layers which don't always run
BATCHES = ([4.0], [1.0, 0.4], [0.7, 0.02, 2.0, 0.3, 1.1])  # seconds of each utterance


def export(loaded: Checkpoint, size: int | None, path: Path) -> None:
    """Write an ONNX file of one size of a network, or with `size` None of all its sizes.

    The file computes in float32. It gets its name after it gave the checkpoint's log-probabilities.
    Raises ValueError where `check_possible` does, for a size that the network can't have, and where
    results differ; then there is no file.
    """
    check_possible(loaded, size, path)
    model = copy.copy(loaded.model).cpu().eval()
    if size is not None and model.size is None:
        model = cut(model, size)
    model.config = dataclasses.replace(model.config, precision="float32")
    loaded = dataclasses.replace(loaded, model=model)
    with files.whole(path) as unfinished:
        with without_logging(), torch.no_grad():  # the exporter would trace gradients, too
            write_graph(loaded, size is None, unfinished)
        check_results(unfinished, model)


def check_possible(loaded: Checkpoint, size: int | None, path: Path) -> None:
    """Raise ValueError where a network's file can't be written.

    Its output is not CTC, a package is missing, or torch is too old for all sizes.
    """
    require_ctc(loaded.model.config, f"{path}: an ONNX file")
    if package := missing():
        raise ValueError(f"{path}: exporting needs {package}: pip install -e '.[onnx]'")
    if size is None and torch.__version__ < TORCH:  # torch compares versions, not texts
        needs = f"all sizes in one file need torch {TORCH} or newer, this is {torch.__version__}"
        raise ValueError(f"{path}: {needs}; prune.py RUN/size-K.pt --export onnx writes one size")


def missing() -> str:
    """Return the name of a package that is needed and not installed, or an empty text."""
    return next((name for name in PACKAGES if not find_spec(name)), "")


def write_graph(loaded: Checkpoint, choose: bool, path: Path) -> None:
    """Write a network's file. With `choose` the size is an input."""
    model = loaded.model
    inputs = dict(audio=torch.randn(2, 9000), lengths=torch.tensor([9000, 7000]))
    shapes: list[dict] = [{0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO}]
    if choose:
        inputs["size"] = torch.tensor(model.sizes[0])
        shapes.append({})
    program = torch.onnx.export(
        Deployed(model).eval(),
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=["log_probs", "log_prob_lengths"],
        dynamic_shapes=shapes,
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    content = dict(
        format=ONNX_FORMAT,
        tokenizer=b64encode(loaded.tokenizer.model).decode(),
        longest_seconds=loaded.longest_seconds,
        config=dataclasses.asdict(model.config),
        costs={size: costs(model, size) for size in model.sizes},
    )
    program.model.metadata_props["dynsize"] = json.dumps(content)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in the source each one comes from
    move_convolutions(program)
    program.save(path, external_data=False)
    add_seal(path)


def add_seal(path: Path) -> None:
    """End an ONNX file with its checksum."""
    data = path.read_bytes()
    path.write_bytes(data + seal(data))


def move_convolutions(program: torch.onnx.ONNXProgram) -> None:
    """Move the weights of the convolutions of optional layers to where these are computed.

    onnxruntime reorders a convolution's weights for its fast kernel only there.
    """
    graph = program.model.graph
    for node in graph:
        if node.op_type == "If":
            layer = node.attributes["then_branch"].as_graph()
            for convolution in layer:
                if convolution.op_type == "Conv":
                    for weight in convolution.inputs[1:]:
                        graph.initializers.pop(weight.name)
                        layer.register_initializer(weight)


@contextmanager
def without_logging() -> Iterator[None]:
    """Keep from the terminal what the exporters advise: packages to install, steps to add."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check_results(path: Path, model: Supernet) -> None:
    """Raise ValueError where a file gives other log-probabilities than its network, for some size.

    Noise of several lengths, in batches of several sizes, is what they are compared on. Equal
    log-probabilities mean equal text.
    """
    graph = OnnxGraph(path)
    reference = network_of(model)
    generator = torch.Generator().manual_seed(0)
    for seconds in BATCHES:
        lengths = [round(s * model.config.sample_rate) for s in seconds]
        audio = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
        for size in model.sizes:
            found, frames = graph.run(audio, lengths, size)
            for row, length in enumerate(lengths):
                expected = reference(audio[row, :length], size).numpy()
                got = found[row, : frames[row]]
                if got.shape != expected.shape or not np.allclose(got, expected, 1e-5, TOLERANCE):
                    where = f"size {size}, {length} samples in a batch of {len(lengths)}"
                    raise ValueError(f"{path}: other results than the checkpoint's: {where}")


def quantize(path: Path, to: Path) -> None:
    """Write an int8 file from a float file that `export` wrote.

    Products of activations with weights are int8: activations are quantized as they come (dynamic
    quantization), weights with a scale for each column. The features, the convolutions, and the
    products of two activations stay float. Its results are not checked here.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.metadata_props[-1]  # the checksum
    features = [node.name for node in model.graph.node if "features." in " ".join(node.input)]
    with files.whole(to) as unfinished:
        with without_logging():
            quantize_dynamic(
                model,
                unfinished,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=features,
                extra_options=dict(MatMulConstBOnly=True, EnableSubgraph=True),
            )
        add_seal(unfinished)
        open_onnx(unfinished)


class Features(nn.Module):
    """`features.log_mel` of a batch of padded utterances, with the spectrum as matrix products.

    onnxruntime's DFT takes several times as long. A Hann window of n samples is symmetric about
    sample n/2, and only the power of the spectrum counts. So let time begin at n/2: then a cosine
    is the same at two mirrored samples and a sine has the opposite sign, so their sum is multiplied
    with the cosines and their difference with the sines. This halves the products.
    """

    def __init__(self, model: Supernet) -> None:
        super().__init__()
        config = model.config
        self.window, self.hop = window_and_hop(config)
        self.hops = math.ceil(self.window / self.hop)  # that one window reaches over
        # log(energy + c) = log(s · energy + s · c) − log s, whose last term goes with the mean.
        # With s = 1 the exporter would take a c of 1e-10 for 0.
        filters = mel_filters(config) * (FLOOR / QUIETEST)  # (N/2 + 1, F)
        self.half = self.window // 2
        # Sample 0 has the weight 0 in a Hann window, so its first half is the samples 1 to n/2.
        sample = torch.arange(1, self.half + 1, dtype=torch.float64)[:, None]
        hann = torch.sin(math.pi * sample / self.window).square()
        if self.window % 2 == 0:
            hann[-1] /= 2  # sample n/2 is its own mirror image
        points = spectrum_points(config)  # N
        frequency = 2 * math.pi / points * torch.arange(points // 2 + 1)
        angle = (sample - self.window / 2) * frequency  # (n/2, N/2 + 1)
        self.register_buffer("filters", filters)
        self.register_buffer("cosines", (hann * angle.cos()).float())
        self.register_buffer("sines", (hann * angle.sin()).float())

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, T, F) and the (B,) frames inside. `audio`: (B, samples). `lengths`: (B,)."""
        energies = self.energies(self.windows(audio, lengths))
        # In float64: the deviation of a bin can be small beside its logarithms.
        features = (energies.double() + FLOOR).log()  # (B, T, F)
        lengths = 1 + (lengths - self.window).clamp(min=0) // self.hop
        inside = padding_mask(lengths, features.shape[1])[..., None]
        features = torch.where(inside, features, 0.0)
        count = lengths[:, None, None]
        features = features - features.sum(1, keepdim=True) / count
        squares = features.square() * inside
        variance = squares.sum(1, keepdim=True) / count
        deviation = (variance + 1e-5).sqrt()
        return (features / deviation).float(), lengths

    def windows(self, audio: Tensor, lengths: Tensor) -> Tensor:
        """Return the analysis windows, (B, T, n), each with mean 0.

        An utterance shorter than a window is filled up with zeros. All other windows that reach
        into the padding are outside the utterance.
        """
        first = audio[:, : self.window]
        first = torch.where(padding_mask(lengths, first.shape[1]), first, 0.0)
        frames = audio.shape[1] // self.hop + 4  # four at least, as the VGG front-end needs
        parts = frames + self.hops - 1
        zeros = audio.new_zeros(audio.shape[0], parts * self.hop - audio.shape[1])
        audio = torch.cat([first, audio[:, self.window :], zeros], dim=1)
        audio = audio.reshape(audio.shape[0], parts, self.hop)  # len() would fix the batch's size
        windows = torch.cat([audio[:, i : i + frames] for i in range(self.hops)], dim=-1)
        windows = windows[..., : self.window]
        return windows - windows.mean(-1, keepdim=True)

    def energies(self, windows: Tensor) -> Tensor:
        """Return the energy in each mel bin, (B, T, F). `windows`: (B, T, n)."""
        first = windows[..., 1 : self.half + 1]  # (B, T, n/2)
        mirrored = windows[..., -self.half :].flip(-1)
        real = (first + mirrored) @ self.cosines  # (B, T, N/2 + 1)
        imaginary = (first - mirrored) @ self.sines
        power = real.square() + imaginary.square()
        return power @ self.filters


class Deployed(nn.Module):
    """The networks of a checkpoint as straight-line code, in float32, only for inference.

    With one size it is that network; with several, `forward` takes the size.
    """

    def __init__(self, model: Supernet) -> None:
        super().__init__()
        self.features = Features(model)
        self.encoder = model.encoder
        self.place = {layer: place for place, layer in enumerate(model.ranking)}
        output_layers = [model.output(size) for size in model.sizes]
        weights = torch.stack([layer.weight.detach().T for layer in output_layers])
        biases = torch.stack([layer.bias.detach() for layer in output_layers])
        self.register_buffer("weights", weights)  # (M, D, V)
        self.register_buffer("biases", biases)  # (M, V)
        self.register_buffer("sizes", torch.tensor(model.sizes))

    def forward(
        self, audio: Tensor, lengths: Tensor, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (B, T', V), and the (B,) frames inside each utterance.

        `audio`: (B, samples) float32. `lengths`: (B,) int64, in samples. `size`: () int64.
        """
        features, lengths = self.features(audio, lengths)
        x = self.encoder.front_end(features, lengths)  # (B, T', D)
        lengths = self.encoder.front_end.output_frames(lengths)
        inside = padding_mask(lengths, x.shape[1])
        for block, layers in enumerate(self.encoder.blocks):
            for i, kind in enumerate(self.encoder.kinds):
                place = self.place[len(self.encoder.kinds) * block + i]
                if kind not in layers:
                    continue  # pruned in every size
                if size is None:
                    x = residual(layers[kind], x, inside)
                else:
                    x = optional(layers[kind], x, inside, size > place)
            # Over (B · T', D): onnxruntime replaces a sum and a LayerNorm over (B, T', D) by one
            # kernel that takes four times as long as the two.
            x = layers["norm"](x.flatten(0, 1)).unflatten(0, inside.shape)
        number = 0
        if size is not None:
            number = ((size >= self.sizes).sum() - 1).clamp(min=0)
        logits = x @ self.weights[number] + self.biases[number]
        return logits.log_softmax(-1), lengths


def residual(layer: nn.Module, x: Tensor, inside: Tensor) -> Tensor:
    """Return x + scale · f(norm(x))."""
    return x + layer.scale * layer(layer.norm(x), inside)


def optional(layer: nn.Module, x: Tensor, inside: Tensor, kept: Tensor) -> Tensor:
    """Return `residual`, or `x` where a layer is not `kept`, () bool: then it does not run."""
    return torch.cond(
        kept,
        lambda x, inside: residual(layer, x, inside),
        lambda x, inside: x.clone(),
        (x, inside),
    )
